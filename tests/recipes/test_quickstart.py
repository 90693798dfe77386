"""The main job, made very small: every stage runs and the summary says what it must."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from echelon import cli
from tests.desk import few_updates

SMALL = ["--games", "64", "--copying-steps", "4", "--steps", "2", "--episodes-per-step", "32", "--eval-episodes", "8"]


def test_every_stage_runs_and_a_second_command_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    few_updates(monkeypatch)
    out = tmp_path / "quick"
    assert cli.main(["quickstart", "--out", str(out), *SMALL]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["methods"]) == ["warm", "grpo", "archer", "archer_pick"]
    for name, method in summary["methods"].items():
        assert method["episodes"] == (0 if name == "warm" else 64)
        assert method["return"]["low"] <= method["return"]["mean"] <= method["return"]["high"]
        assert method["seeds"] == [0]
    assert (out / "curve.png").stat().st_size > 1000
    assert cli.main(["quickstart", "--out", str(out), *SMALL]) == 2
    assert "there is a quickstart already" in capsys.readouterr().err
    assert cli.main(["quickstart", "--out", str(out), *SMALL, "--resume"]) == 0


def test_a_dry_run_lists_the_commands_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["quickstart", "--out", str(tmp_path / "quick"), *SMALL, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[1] for line in printed.splitlines()] == ["sft", "archer", "grpo", *["evaluate"] * 4]
    assert not (tmp_path / "quick").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden", "40"], "hidden = 40: heads are 32 wide. Give a multiple of 32."),
        (["--steps", "1"], "steps = 1: GRPO plays 64 episodes a step and must get as many in all. Raise it."),
        (["--resume"], "there is no quickstart to resume"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["quickstart", "--out", str(tmp_path / "quick"), *SMALL, *flags]) == 2
    assert message in capsys.readouterr().err
