"""What is written, what a resumed run keeps of it, and what a person sees."""

from __future__ import annotations

import errno
import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from echelon import __version__
from echelon.config import DistConfig, LogConfig, ModelConfig
from echelon.errors import CheckpointError
from echelon.recipes import grpo
from echelon.text import endpoint
from echelon.train import dist
from echelon.train import log as log_module
from echelon.train.clock import phase
from echelon.train.log import Log, episode_rows, typed
from echelon.types import Episode, Turn


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(log_module, "time", clock)
    return clock


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(folder: Path, start: int, stop: int, total: int = 6) -> None:
    with Log(folder, total=total, start=start, quiet=True) as log:
        for step in range(start, stop):
            log.episodes(step, [{"task": f"task {step}", "reward": 0.5 * step}])
            log.metrics(step, {"reward/mean": 0.5 * step, "loss": -0.25})


def test_a_row_holds_the_step_the_seconds_and_the_numbers(tmp_path: Path, clock: Clock) -> None:
    with Log(tmp_path, total=2, quiet=True) as log:
        clock.now += 1.25
        log.metrics(0, {"loss": 0.5, "tokens": 128})
        assert log.seconds == 1.25
        # Flushed: readable while the run goes on.
        assert rows(tmp_path / "metrics.jsonl") == [{"step": 0, "seconds": 1.25, "loss": 0.5, "tokens": 128.0}]


def test_a_row_says_where_its_seconds_went(tmp_path: Path) -> None:
    with phase("rollout"):
        pass
    with Log(tmp_path, total=2, quiet=True) as log:  # what was before is not of a step
        with phase("learning"):
            pass
        log.metrics(0, {})
        log.metrics(1, {})
    assert [set(row) - {"step", "seconds"} for row in rows(tmp_path / "metrics.jsonl")] == [{"seconds/learning"}, set()]


def test_a_run_says_who_wrote_it_and_whether_it_has_ended(tmp_path: Path) -> None:
    settings = grpo.Config(out="x", env="maze", model=ModelConfig(path="x"))
    about = {"recipe": "grpo", "version": __version__, "steps": 9}

    def interrupted() -> None:
        with Log(tmp_path, total=9, quiet=True, settings=settings):
            assert json.loads((tmp_path / "run.json").read_text()) == about | {"ended": False}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert json.loads((tmp_path / "run.json").read_text())["ended"] is False
    with Log(tmp_path, total=9, quiet=True, settings=settings):
        pass
    assert json.loads((tmp_path / "run.json").read_text()) == about | {"ended": True}


def test_the_last_line_says_what_was_written_and_how_to_look_at_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = grpo.Config(out="x", env="maze", model=ModelConfig(path="x"))
    (tmp_path / "checkpoints" / "step_000002").mkdir(parents=True)
    with Log(tmp_path, total=2, settings=settings) as log:
        log.metrics(1, {"loss": 1.0})
    said = f"{tmp_path}: metrics.jsonl, episodes.jsonl and checkpoints/step_000002. Look at it: "
    assert capsys.readouterr().out.splitlines()[-1] == said + typed("report", str(tmp_path))
    with Log(tmp_path, total=2, settings=settings, config=LogConfig(quiet=True)) as log:
        log.metrics(1, {"loss": float("nan")})
    assert capsys.readouterr().out == ""


def test_a_command_is_written_as_it_can_be_typed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "echelon"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert typed("report", "runs/my run") == f"{program} report 'runs/my run'"
    monkeypatch.setenv("PATH", str(program.parent))
    assert typed("report", "a") == "echelon report a"
    monkeypatch.setattr(sys, "argv", ["/somewhere/echelon/__main__.py"])
    assert typed("report", "a").endswith(" -m echelon report a")


def test_what_endpoints_were_asked_since_the_last_row_is_in_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Counter({"asked": 5, "prompt_tokens": 100})
    monkeypatch.setattr(endpoint, "_used", counts)
    with Log(tmp_path, total=3, quiet=True) as log:
        for more in (2, 0, 1):
            counts.update({"asked": more, "prompt_tokens": 10 * more})
            log.metrics(0, {})
    found = [{name: row[name] for name in row if "/" in name} for row in rows(tmp_path / "metrics.jsonl")]
    asked = [{"endpoint/asked": float(n), "endpoint/prompt_tokens": 10.0 * n} for n in (2, 1)]
    assert found == [asked[0], {}, asked[1]]


def test_a_killed_and_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path: Path) -> None:
    run(tmp_path / "whole", 0, 6)
    run(tmp_path / "killed", 0, 5)
    for name in ("metrics.jsonl", "episodes.jsonl"):
        with (tmp_path / "killed" / name).open("a") as file:
            file.write('{"step": 5, "seco')
    run(tmp_path / "killed", 3, 6)  # the newest checkpoint says: 3 steps are done
    whole, killed = (tmp_path / name / "episodes.jsonl" for name in ("whole", "killed"))
    assert killed.read_bytes() == whole.read_bytes()
    without_seconds = [
        [
            {key: value for key, value in row.items() if key != "seconds"}
            for row in rows(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "killed")
    ]
    assert without_seconds[0] == without_seconds[1]
    assert [row["step"] for row in without_seconds[1]] == [0, 1, 2, 3, 4, 5]
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["episodes.jsonl", "metrics.jsonl"]


def test_seconds_continue_from_the_last_row_kept(tmp_path: Path, clock: Clock) -> None:
    with Log(tmp_path, total=3, quiet=True) as log:
        for step in range(3):
            clock.now += 10
            log.metrics(step, {})
    clock.now += 5000
    with Log(tmp_path, total=3, start=2, quiet=True) as log:
        clock.now += 1
        log.metrics(2, {})
    assert [row["seconds"] for row in rows(tmp_path / "metrics.jsonl")] == [10, 20, 21]


def test_a_number_that_is_not_finite_becomes_null_and_is_noted_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Log(tmp_path, total=9) as log:
        log.metrics(0, {"loss": float("nan"), "kl": 0.5})
        log.metrics(1, {"loss": float("inf"), "kl": 0.5})
        log.episodes(1, [{"turns": [{"value": float("-inf")}]}])
    assert [row["loss"] for row in rows(tmp_path / "metrics.jsonl")] == [None, None]
    assert rows(tmp_path / "episodes.jsonl") == [{"step": 1, "turns": [{"value": None}]}]
    printed = capsys.readouterr().out
    assert printed.count("loss is nan: written as null") == 1
    assert printed.count("written as null") == 2


def test_any_text_is_written(tmp_path: Path) -> None:
    said = "¿qué?\n\u2028\ud800 é[/b]"
    with Log(tmp_path, total=1, quiet=True) as log:
        log.episodes(0, [{"text": said}])
    assert json.loads((tmp_path / "episodes.jsonl").read_bytes())["text"] == said


def test_piped_output_is_the_first_line_the_last_and_one_in_ten_seconds(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Log(tmp_path, total=26, name="grpo") as log:
        log.note("model: 1.2 M parameters [tiny]")
        for step in range(26):
            clock.now += 1
            log.metrics(step, {"tokens": 7, "loss": 0.125, "reward/mean": step / 4})
    printed = capsys.readouterr().out
    assert printed.splitlines() == [
        "model: 1.2 M parameters [tiny]",
        "grpo 1/26  1 step/s  0:00:01 elapsed  0:00:25 left  reward/mean 0  loss 0.125  tokens 7",
        "grpo 11/26  1 step/s  0:00:11 elapsed  0:00:15 left  reward/mean 2.5  loss 0.125  tokens 7",
        "grpo 21/26  1 step/s  0:00:21 elapsed  0:00:05 left  reward/mean 5  loss 0.125  tokens 7",
        "grpo 26/26  1 step/s  0:00:26 elapsed  0:00:00 left  reward/mean 6.25  loss 0.125  tokens 7",
    ]


def test_the_headline_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log(tmp_path, total=1, headline=("q/mean", "absent")) as log:
        log.metrics(0, {"loss": 1.0, "q/mean": 2.0})
    assert capsys.readouterr().out.endswith("left  q/mean 2\n")


def test_a_terminal_gets_a_bar_with_notes_above_it(tmp_path: Path) -> None:
    screen = Console(force_terminal=True, file=io.StringIO(), width=140)
    with Log(tmp_path, total=4, start=1, name="grpo", console=screen) as log:
        log.note("a note [with brackets]")
        log.metrics(2, {"reward/mean": 0.75})
    assert isinstance(screen.file, io.StringIO)
    shown = screen.file.getvalue()
    assert "a note [with brackets]" in shown
    assert "3/4" in shown
    assert "reward/mean 0.75" in shown
    assert "\x1b[" in shown


def test_quiet_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log(tmp_path, total=1, quiet=True) as log:
        log.note("nobody reads this")
        log.metrics(0, {"loss": float("nan")})
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


class FullDisk(io.StringIO):
    name = "runs/a/metrics.jsonl"

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_rank_that_is_not_the_first_writes_and_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dist, "_ranks", dist.Ranks(1, 2, 2, DistConfig()))
    with Log(tmp_path / "run", total=1) as log:
        log.metrics(0, {"loss": 1.0})
        log.note("a note")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_append_to", lambda path: FullDisk())
    with (
        Log(tmp_path, total=1, quiet=True) as log,
        pytest.raises(CheckpointError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"),
    ):
        log.metrics(0, {"loss": 1.0})


def dialogue() -> Episode:
    turns = [
        Turn(0, "actor", [1, 2], [3], [-1.0], "three", reward=0.5),
        Turn(1, "coach", [9], [8], [-1.0], "eight", parent=0),
        Turn(2, "actor", [1, 2, 3, 4], [5], [-1.0], "five", parent=1, reward=1.0),
        Turn(3, "actor", [7, 7], [5], [-1.0], "anew", parent=2),
    ]
    return Episode("task", seed=3, turns=turns, ending="terminated", metrics={"won": 1.0})


def test_a_transcript_says_who_said_what_and_what_it_earned() -> None:
    episode = dialogue()
    actor = episode.of("actor")
    (row,) = episode_rows([episode], per_turn={"advantage": zip(actor, [0.25, -0.25, 0.0], strict=True)})
    turns = row.pop("turns")
    assert row == {
        "task": "task",
        "seed": 3,
        "ending": "terminated",
        "reward": 1.5,
        "error": None,
        "metrics": {"won": 1.0},
    }
    assert turns[:2] == [
        {"index": 0, "role": "actor", "parent": None, "text": "three", "reward": 0.5, "advantage": 0.25},
        {"index": 1, "role": "coach", "parent": 0, "text": "eight", "reward": 0.0},
    ]


def test_a_transcript_says_each_token_unless_it_is_told_not_to(tmp_path: Path) -> None:
    episode = dialogue()
    first = episode.turns[0]
    rows = [*episode_rows([episode], decode={"actor": str}, per_token={"advantages": [(first, [0.123456])]})]
    said = {"tokens": [str([first.action[0]])], "ids": first.action, "logprobs": first.logprobs, "advantages": [0.1235]}
    assert {name: rows[0]["turns"][0][name] for name in said} == said
    assert not said.keys() & rows[0]["turns"][1].keys(), "nobody can read the tokens of the coach"
    for tokens in (True, False):
        with Log(tmp_path / str(tokens), total=1, quiet=True, config=LogConfig(tokens=tokens)) as log:
            log.episodes(0, rows)
        (row,) = map(json.loads, (tmp_path / str(tokens) / "episodes.jsonl").read_text().splitlines())
        assert (said.keys() & row["turns"][0].keys() == said.keys()) is tokens
        assert row["turns"][0]["text"] == "three"


def test_a_transcript_shows_what_was_new_to_the_role_or_all_of_a_prompt_that_starts_anew() -> None:
    (row,) = episode_rows([dialogue()], decode={"actor": str})
    assert [turn.get("seen") for turn in row["turns"]] == ["[1, 2]", None, "[4]", "[7, 7]"]


def test_a_transcript_for_trackers_has_no_html_of_its_own() -> None:
    turn = {"role": "actor", "seen": "a\n<b>", "text": "<script>", "reward": 1.0, "ids": [1]}
    row = {"task": "t", "ending": "terminated", "reward": 0.5, "turns": [turn]}
    assert log_module.transcript(row) == (
        "**t**: terminated, 0.5\n\n> a\n> &lt;b&gt;\n\n**actor** (reward 1): &lt;script&gt;"
    )
    turn["text"] = "a" * 30_000
    assert len(log_module.transcript(row)) == log_module.LONGEST_TRANSCRIPT + 2
