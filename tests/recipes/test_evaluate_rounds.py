"""`echelon evaluate RUN --rounds K`: runs of feedback and plain models, the files, and going on after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from echelon import cli
from echelon.config import ModelConfig
from echelon.errors import ConfigError
from echelon.recipes.evaluate import Config
from echelon.rollout import rounds
from tests.recipes.conftest import Run
from tests.recipes.doors import GAME, TEMPLATES, pupil

SHORT = ("--max-tokens", 1, "--max-prompt-tokens", 500)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model that can play both roles."""
    return str(pupil(tmp_path_factory.mktemp("pupil")))


@pytest.fixture(scope="module")
def trained(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of feedback after one step, with templates of its own."""
    return feedback_run(model, tmp_path_factory.mktemp("feedback") / "run")


def feedback_run(model: str, out: Path, *more: str) -> Path:
    words = ["feedback", "--solver.model.path", model, "--env", GAME, "--out", str(out), "--threads", "1"]
    words += ["--steps", "1", "--tasks-per-step", "3", "--attempts", "2", "--rounds", "1"]
    for level in ("solver", "coach"):
        words += [f"--{level}.sampling.max-tokens", "1", f"--{level}.sampling.max-prompt-tokens", "32"]
    for name, template in TEMPLATES.items():
        words += [f"--templates.{name.replace('_', '-')}", template]
    assert cli.main([*words, *more]) == 0
    return out


def evaluated(*words: object, status: int = 0) -> None:
    assert cli.main(["evaluate", *map(str, words), "--threads", "1"]) == status


def summary(out: Path) -> dict[str, Any]:
    found = json.loads((out / "summary.json").read_text())["estimates"]
    assert isinstance(found, dict)
    return found


def test_a_run_of_feedback_is_evaluated_with_its_own_templates_and_lengths(trained: Path, tmp_path: Path) -> None:
    evaluated(trained, "--env", GAME, "--rounds", 2, "--out", tmp_path / "e")
    rows = Run(tmp_path / "e").rows("episodes")
    assert [row["number"] for row in rows] == list(range(12))
    roles = ["solver", "coach", "solver", "coach", "solver"]
    for row in rows:
        door = row["task"][0]
        first, remark, second, *_ = row["turns"]
        assert [turn["role"] for turn in row["turns"]] == roles
        assert first["seen"] == door
        assert remark["seen"] == f"{door}{first['text']}?"
        assert second["seen"] == f"{door}{first['text']}!{remark['text']}"
        assert max(turn["tokens"] for turn in row["turns"]) == 1
    found = summary(tmp_path / "e")
    names = {"accuracy/turn1", "accuracy/turn2", "accuracy/turn3", "oracle/any_turn", "self_stopped/accuracy"}
    names |= {"flips/right_to_wrong/turn2", "progress/turn3", "calibration/turn1", "utilisation/gain/turn2"}
    assert names | {"unparsed/turn1"} <= found.keys()
    right = [[turn["score"] for turn in row["turns"] if turn["role"] == "solver"] for row in rows]
    assert found["accuracy/turn3"]["mean"] == pytest.approx(sum(scores[2] for scores in right) / 12)
    assert found["oracle/any_turn"]["mean"] == pytest.approx(sum(max(scores) for scores in right) / 12)


def test_results_of_a_run_lie_in_it_under_a_name_of_what_was_evaluated(trained: Path) -> None:
    evaluated(trained, "--env", GAME, "--rounds", 1, "--episodes", 2)
    (out,) = (trained / "evaluation").iterdir()
    assert out.name == "step_000001_doors:Doors_test_rounds_1".replace("doors:Doors", Path(GAME).stem)
    evaluated(trained, "--env", GAME, "--rounds", 1, "--episodes", 2, status=2)
    evaluated(trained, "--env", GAME, "--rounds", 1, "--episodes", 2, "--overwrite")


def test_a_run_of_feedback_needs_rounds(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(trained, "--env", GAME, status=2)
    assert "learned to solve with feedback. Give --rounds 1, or more." in capsys.readouterr().err


@pytest.mark.parametrize("coach", [False, True])
def test_any_model_can_be_its_own_coach_or_have_another(model: str, trained: Path, tmp_path: Path, coach: bool) -> None:
    words = ["--env", GAME, "--rounds", 1, "--episodes", 3, *SHORT, "--out", tmp_path / "e"]
    evaluated("--model.path", model, *words, *(["--coach", trained] if coach else []))
    assert [turn["role"] for turn in Run(tmp_path / "e").rows("episodes")[0]["turns"]] == ["solver", "coach", "solver"]


@pytest.mark.parametrize("context", ["none", "fixed", "stranger", "example"])
def test_another_context_than_that_of_training(trained: Path, tmp_path: Path, context: str) -> None:
    evaluated(
        trained, "--env", GAME, "--rounds", 1, "--episodes", 3, "--context", context, "--out", tmp_path / "e", *SHORT
    )
    roles = [turn["role"] for turn in Run(tmp_path / "e").rows("episodes")[0]["turns"]]
    assert roles == {"none": ["solver"] * 2, "fixed": ["solver"] * 2, "example": ["coach", "solver"]}.get(
        context, ["solver", "coach", "solver"]
    )


SHARING = {
    "one model": ("--weights", "shared"),
    "two adapters": ("--weights", "adapters", "--lora.rank", "2"),
    "no coach": ("--context", "none"),
}


@pytest.mark.parametrize("kind", SHARING)
def test_however_a_run_holds_its_levels(model: str, tmp_path: Path, kind: str) -> None:
    run = feedback_run(model, tmp_path / "run", *SHARING[kind])
    evaluated(run, "--env", GAME, "--rounds", 1, "--episodes", 3, "--out", tmp_path / "e")
    roles = [turn["role"] for turn in Run(tmp_path / "e").rows("episodes")[0]["turns"]]
    assert roles == (["solver"] * 2 if kind == "no coach" else ["solver", "coach", "solver"])


def test_several_attempts_give_pass_at_k(trained: Path, tmp_path: Path) -> None:
    evaluated(trained, "--env", GAME, "--rounds", 1, "--attempts", 3, "--out", tmp_path / "e")
    found = summary(tmp_path / "e")
    assert {"pass@1/turn1", "pass@2/turn1", "pass@3/turn2"} <= found.keys()
    assert found["pass@1/turn1"]["mean"] == pytest.approx(found["accuracy/turn1"]["mean"])
    assert found["pass@1/turn1"]["mean"] <= found["pass@3/turn1"]["mean"]


def test_a_killed_evaluation_goes_on_and_ends_as_an_uninterrupted_one(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [trained, "--env", GAME, "--rounds", 1, "--seed", 3]
    evaluated(*words, "--out", tmp_path / "whole")
    keep, kept = rounds.RoundFiles.append, 0

    class Killed(Exception):
        pass

    def append(files: rounds.RoundFiles, row: rounds.Row) -> None:
        nonlocal kept
        if kept == 5:
            raise Killed
        kept += 1
        keep(files, row)

    with monkeypatch.context() as patched:
        patched.setattr(rounds.RoundFiles, "append", append)
        with pytest.raises(Killed):
            evaluated(*words, "--out", tmp_path / "killed", "--traceback")
    assert len((tmp_path / "killed" / "episodes.jsonl").read_text().splitlines()) == 5
    evaluated(*words, "--seed", 4, "--out", tmp_path / "killed", status=2)
    evaluated(*words, "--out", tmp_path / "killed")
    for name in ("episodes.jsonl",):
        whole, killed = (json_rows(tmp_path / run / name) for run in ("whole", "killed"))
        assert [without_floats(row) for row in whole] == [without_floats(row) for row in killed]
    assert summary(tmp_path / "whole")["accuracy"] == summary(tmp_path / "killed")["accuracy"]


@pytest.mark.parametrize("name", ["episodes.jsonl", "settings.json"])
def test_files_that_no_evaluation_with_rounds_began_stay(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    file = tmp_path / "e" / name
    file.parent.mkdir()
    file.write_text('{"mine": 1}\n')
    words = [trained, "--env", GAME, "--rounds", 1, "--episodes", 2, "--out", tmp_path / "e"]
    evaluated(*words, status=2)
    assert f"{name} is there and no summary.json, so it is of no whole evaluation." in capsys.readouterr().err
    assert file.read_text() == '{"mine": 1}\n'
    evaluated(*words, "--overwrite")
    assert "mine" not in file.read_text()


def json_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_floats(row: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on what else was in a batch."""
    turns = [{k: v for k, v in turn.items() if k not in ("gain", "probability")} for turn in row["turns"]]
    return {**row, "turns": turns}


def test_problems_of_a_data_set_are_all_played_and_checked(model: str, tmp_path: Path) -> None:
    rows = [{"question": "A", "answer": "1"}, {"question": "B", "answer": "#### 2"}, {"question": "C", "answer": 3}]
    file = tmp_path / "doors.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model.path", model, "--data.path", file, "--reward", "number", "--rounds", 1, *SHORT]
    evaluated(*words, "--out", tmp_path / "e")
    assert [row["task"] for row in json_rows(tmp_path / "e" / "episodes.jsonl")] == ["train/0", "train/1", "train/2"]
    file.write_text(file.read_text() + '{"question": "D"}\n')
    evaluated(*words, "--out", tmp_path / "f", status=2)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"attempts": 2}, "attempts = 2: it is about rounds of feedback. Give --rounds, too."),
        ({"coach": "x"}, "it is about rounds of feedback"),
        ({"rounds": 2, "context": "example"}, "a worked example comes before the one and only attempt"),
        ({"rounds": 1, "player": "random"}, "no script solves problems"),
        ({"rounds": 1, "transitions": "x"}, "a solver and a coach play in rounds"),
        ({"rounds": -1}, "it is a count"),
    ],
)
def test_what_does_not_go_with_rounds_is_said(settings: dict[str, Any], complaint: str) -> None:

    with pytest.raises(ConfigError, match=complaint):
        Config(env=GAME, model=ModelConfig("x"), **settings)


def test_a_coach_where_nobody_speaks_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--env", GAME, "--rounds", 1, "--context", "none", "--coach", trained, "--out", tmp_path / "e"]
    evaluated(trained, *words, status=2)
    assert "nobody speaks where context = none" in capsys.readouterr().err


def test_a_dry_run_plays_nothing(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(trained, "--env", GAME, "--rounds", 2, "--dry-run", "--out", tmp_path / "e")
    assert "tokens per step: at most 60" in capsys.readouterr().out  # 12 problems, 3 attempts and 2 remarks of 1
    assert not (tmp_path / "e").exists()
