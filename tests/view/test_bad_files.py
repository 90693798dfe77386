"""Files that are broken, strange or meant badly, through every command that reads them: each shows what is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from echelon import cli
from tests.view.conftest import Write, episode, lines, turn

LONG = 10_000_000
ODD = [
    "<script>alert(1)</script>",
    "\x1b[2J\x07\x9b31m bell",
    "\u202eright to left\u202c שלום",
    "no space " + "x" * 5000,
    "\ud800 half a pair",
]
COMMANDS = (["report"], ["watch", "--once"], ["watch", "--terminal"], ["compare"], ["runs"])


@pytest.fixture
def odd(write: Write, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that is still being written: numbers that are none, bytes that are no text, texts that try to be more."""
    rows = [
        {"step": 0, "seconds": 1.0, "reward/mean": float("nan"), "policy/loss": 1.0, "\x1b[31mred": float("inf")},
        {"step": 1, "seconds": 2.0, "reward/mean": float("-inf"), "policy/loss": 10**400},
        {"step": 2, "seconds": 3.0, "reward/mean": 1.0, "policy/loss": "low"},
        "[]",
        "null",
    ]
    said = [episode(at, text, [turn(text, role=text[:40], seen=text, note=text)]) for at, text in enumerate(ODD)]
    folder = write(metrics=rows, episodes=said, settings={"env": ODD[1], ODD[0]: ODD[2], "steps": 9})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "seco')
    with (folder / "episodes.jsonl").open("ab") as file:
        file.write(lines([episode(9, "long", [turn("x" * LONG)])]).encode())
        file.write(b'{"step": 9, "task": "bytes", "turns": [{"role": "a", "text": "\xff\xfe"}]}\n{"step": 10, "ta')
    monkeypatch.chdir(folder.parent)
    return folder


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_shows_the_rest_and_obeys_nothing(
    words: list[str], odd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *flags = words
    assert cli.main([command, "run", *flags]) == 0
    out, err = capsys.readouterr()
    assert "run" in out
    assert err == ""
    assert not set("\x1b\x07\x9b\u202e") & set(out)
    assert max(map(len, out.splitlines())) < 20_000


@pytest.mark.parametrize("command", ["compare", "runs"])
def test_what_a_program_reads_is_json_to_the_letter(
    command: str, odd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert cli.main([command, "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=refuse)


def test_what_is_left_out_is_said(odd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "run"]) == 0
    said = capsys.readouterr().out
    for words in (
        "The last line of metrics.jsonl is only half written",
        "metrics.jsonl: 2 lines cannot be read",
        "The last line of episodes.jsonl is only half written",
        "episodes.jsonl: 1 lines are not valid UTF-8",
        "Not finite, so left out of its curve: reward/mean in 2 of 3 steps",
    ):
        assert words in said
    assert (odd / "report.html").stat().st_size < 1_000_000


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_folder_without_a_run_is_one_line_that_says_how_to_make_one(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *flags = words
    assert cli.main([command, ".", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("or make a first one: echelon quickstart.\n")
