"""The main job, made very small: every stage runs and the summary says what it must.

What becomes of the files of stages is tried with stages that end at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import yaml

from echelon import cli
from echelon.config.loading import load
from echelon.recipes import archer, evaluate, grpo, quickstart, sft
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


Words = Callable[..., int]


class Ended:
    """A stage that has ended as soon as it is started, badly if its recipe is `bad`."""

    bad = ""
    commands: ClassVar[list[list[str]]] = []

    def __init__(self, command: list[str], stdout: Any, **_: object) -> None:
        self.words = command[command.index("echelon") + 1 :]
        self.commands.append(self.words)
        Path(command[command.index("--out") + 1]).mkdir(exist_ok=True)
        stdout.write(b"first\nthis was said\n")

    def poll(self) -> int:
        return int(self.words[0] == self.bad)


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Words:
    """Run the quickstart into `quick` of this test, with stages that end at once and a table of one line."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(quickstart, "subprocess", SimpleNamespace(Popen=Ended, STDOUT=0, DEVNULL=0))
    monkeypatch.setattr(quickstart, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(quickstart, "summarise", lambda cfg, *_, **__: {"steps": cfg.steps, "seed": cfg.seed})
    monkeypatch.setattr(quickstart, "draw", lambda out, summary: None)
    monkeypatch.setattr(quickstart, "show", lambda summary, console, out: console.print("the table"))
    monkeypatch.setattr(Ended, "commands", [])
    return lambda *flags: cli.main(["quickstart", "--out", str(tmp_path / "quick"), *SMALL, *flags])


@pytest.mark.parametrize("where", ["learn_to_copy", "save_module"])
def test_one_that_was_interrupted_while_it_prepared_goes_on(
    quick: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    out, save = tmp_path / "quick", quickstart.save_module

    def interrupted(module: Any, *rest: Any, **_: Any) -> None:
        if where == "save_module":
            save(module, *rest)
            (rest[0] / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(quickstart, where, interrupted)
        assert quick() == 130
    assert (out / "random_play.jsonl").exists()
    assert not (out / "tiny").exists(), "it appears whole"
    assert quick() == 2
    assert f"{out}: there is a quickstart already. Continue it with --resume" in capsys.readouterr().err
    assert quick("--resume", "--games", "65") == 0, "nothing was made of the games of before"
    assert len((out / "random_play.jsonl").read_text().splitlines()) == 65
    assert (out / "tiny/model.safetensors").is_file()
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("place", "flags", "message"),
    [
        ("quick", [], "there are files and no quickstart, and they stay. Choose another --out."),
        ("quick", ["--resume"], "there are files and no quickstart, and they stay. Choose another --out."),
        ("quick/notes.txt", [], "cannot be written (Not a directory). Choose another --out."),
        ("quick/notes.txt/deep", [], "cannot be written (Not a directory). Choose another --out."),
        ("other", ["--resume"], "there is no quickstart to resume. Leave out --resume."),
    ],
)
def test_a_place_that_is_no_place_of_a_quickstart_is_left_alone(
    quick: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, flags: list[str], message: str
) -> None:
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick/notes.txt").write_text("mine")
    assert quick("--out", str(tmp_path / place), *flags) == 2
    assert capsys.readouterr().err == f"{tmp_path / place}: {message}\n"
    assert [path.name for path in tmp_path.rglob("*")] == ["quick", "notes.txt"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--steps", "4", "--eval-episodes", "9"],
            "archer.yaml: what is there was made with steps = 2, and now it is 4",
        ),
        (["--seed", "7", "--steps", "4"], "tiny.yaml: what is there was made with seed = 0, and now it is 7"),
        (
            ["--episodes-per-step", "64"],
            "archer.yaml: what is there was made with episodes_per_step = 32, and now it is 64",
        ),
        (["--eval-episodes", "9"], "test_warm.yaml: what is there was made with eval_episodes = 8, and now it is 9"),
        (["--games", "65"], "tiny.yaml: what is there was made with games = 64, and now it is 65"),
        (["--copying-steps", "5"], "tiny.yaml: what is there was made with copying_steps = 4, and now it is 5"),
        (["--guess", "0.25"], "tiny.yaml: what is there was made with guess = 0.5, and now it is 0.25"),
        (["--hidden", "96"], "tiny.yaml: what is there was made with hidden = 64, and now it is 96"),
        (["--layers", "1"], "tiny.yaml: what is there was made with layers = 2, and now it is 1"),
    ],
)
def test_one_that_is_resumed_keeps_the_settings_that_its_numbers_are_of(
    quick: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    out = tmp_path / "quick"
    assert quick() == 0
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert quick("--resume", *flags) == 2
    said = f"{out}/{message}. Leave it as it was, or choose another --out.\n"
    assert capsys.readouterr().err == said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


def test_settings_that_change_no_number_may_change_and_so_may_those_of_stages_to_come(
    quick: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Ended, "bad", "archer")
    assert quick() == 2
    assert "the stage 'archer' ended with status 1 and said: this was said" in capsys.readouterr().err
    monkeypatch.setattr(Ended, "bad", "")
    free = ("--threads", "2", "--save-every", "7", "--keep-last", "3", "--parallel", "1", "--quiet", "--log.name", "a")
    assert quick("--resume", *free, "--steps", "4") == 0
    assert json.loads((tmp_path / "quick/summary.json").read_text()) == {"steps": 4, "seed": 0}
    (tmp_path / "quick").rename(tmp_path / "moved")
    assert quick("--resume", "--out", str(tmp_path / "moved"), "--steps", "4") == 0, "all is done"
    assert [command[0] for command in Ended.commands[:5]] == ["sft", "archer", "grpo", "archer", "grpo"]
    assert len(Ended.commands) == 5 + 4


def test_a_stage_that_has_saved_something_is_resumed_and_keeps_its_settings(
    quick: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quick"
    assert quick() == 0
    for name in ("warm", "archer"):
        (out / name / "done").unlink()
    (out / "archer/checkpoints/step_000000").mkdir(parents=True)
    Ended.commands.clear()
    assert quick("--resume", "--episodes-per-step", "64") == 2
    assert "archer.yaml: what is there was made with episodes_per_step = 32" in capsys.readouterr().err
    assert quick("--resume") == 0
    assert [(command[0], command[-1]) for command in Ended.commands] == [
        ("sft", str(out / "warm")),
        ("archer", "--resume"),
    ]


def test_settings_of_a_stage_that_cannot_be_read_are_one_line(
    quick: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quick() == 0
    for text in ("a: [", "only words", "\x00"):
        (tmp_path / "quick/grpo.yaml").write_text(text)
        assert quick("--resume") == 2
        assert "grpo.yaml: it cannot be read, so nobody knows what its stage was made with." in capsys.readouterr().err
    (tmp_path / "quick/grpo.yaml").unlink()
    assert quick("--resume") == 0


def test_trackers_and_silence_reach_the_stages_that_train(quick: Words, tmp_path: Path) -> None:
    said = ("--log.project", "mine", "--log.name", "first", "--no-log.tokens", "--quiet")
    assert quick(*said) == 0
    for name, recipe in {"warm": sft, "archer": archer, "grpo": grpo}.items():
        log = load(recipe.Config, [tmp_path / f"quick/{name}.yaml"], ["--out", "x"]).log
        assert (log.project, log.name, log.tokens, log.quiet) == ("mine", f"first_{name}", False, True)
    settings = yaml.safe_load((tmp_path / "quick/test_warm.yaml").read_text())
    assert load(evaluate.Config, [tmp_path / "quick/test_warm.yaml"], ["--out", "x"]).episodes == 8
    assert "log" not in settings


def test_a_quiet_one_shows_what_came_of_it_and_what_went_wrong_alone(
    quick: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quick("--quiet") == 0
    assert capsys.readouterr() == ("the table\n", "")
    assert quick("--resume") == 0
    assert quick("--out", str(tmp_path / "loud")) == 0
    assert capsys.readouterr().out.count("\n") > 10
    monkeypatch.setattr(Ended, "bad", "sft")
    assert quick("--out", str(tmp_path / "bad"), "--quiet") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("the stage 'warm' ended with status 1 and said: this was said")


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
