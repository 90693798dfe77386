"""Whole runs on two ranks: the files of one process, checkpoints for any number of ranks, and a rank that dies."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echelon import cli
from echelon.config import TrainConfig
from echelon.data.control import Recorded, control_arrays, control_rows
from echelon.envs import load_env
from echelon.text.codec import Codec, Space
from tests.recipes.conftest import GAME, made, recorded
from tests.recipes.doors import GAME as DOORS
from tests.recipes.doors import TEMPLATES
from tests.recipes.preferences import write_pairs
from tests.recipes.steer import ENV as STEER
from tests.recipes.steer import QUESTION
from tests.recipes.strategies import lines, write_decisions
from tests.train import recipes_together

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[2]
PLAYS = ["--env", "guess_number", "--env-settings", *(f"{key}={value}" for key, value in GAME.items())]
PLAYS += ["--sampling.max-tokens", "3", "--steps", "2", "--threads", "1"]
FSDP = ["--dist.strategy", "fsdp"]
CLOCK = "seconds"
TALK = "tests.recipes.talk:Talk"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model of one layer, and games to imitate."""
    folder, env = tmp_path_factory.mktemp("start"), load_env("guess_number", GAME)
    games = recorded(env, ("optimal", "random", "random", "random"), 40, folder / "games.jsonl")
    return {"model": str(made(env, folder / "model", layers=1)), "games": str(games)}


def two_ranks(*words: str) -> subprocess.CompletedProcess[str]:
    """`echelon launch` of these words on two ranks, to its end."""
    command = [sys.executable, "-m", "echelon", "launch", "--nproc", "2", *words]
    around = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=around, capture_output=True, text=True, timeout=600)


def rows(out: Path, name: str = "metrics") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(CLOCK)} for row in found]


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]], rel: float) -> None:
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=rel, abs=1e-6)


def test_a_run_goes_from_two_ranks_to_one_process_and_back_as_if_one_process_had_done_it(
    files: dict[str, str], tmp_path: Path
) -> None:
    words = ["sft", "--model.path", files["model"], "--data.path", files["games"], "--data.eval-fraction", "0.3"]
    words += ["--rows-per-step", "8", "--eval-every", "2", "--threads", "1", "--max-steps"]
    out = str(tmp_path / "moved")
    first = two_ranks(*words, "2", "--out", out, *FSDP)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.count("sft 1/2") == 1  # one rank speaks
    assert cli.main([*words, "4", "--out", out, "--resume"]) == 0
    last = two_ranks(*words, "6", "--out", out, "--resume", *FSDP)
    assert (last.returncode, last.stderr) == (0, "")

    assert cli.main([*words, "6", "--out", str(tmp_path / "stayed")]) == 0
    same(rows(tmp_path / "moved"), rows(tmp_path / "stayed"), 1e-5)
    assert {path.name for path in (tmp_path / "moved" / "best").iterdir()} == {
        path.name for path in (tmp_path / "stayed" / "best").iterdir()
    }


@dataclass(frozen=True)
class Pairs:
    """Runs of every recipe by one process, and by two ranks."""

    one: Path
    two: Path


@pytest.fixture(scope="module")
def every(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """The directories of both, each with a run by the name of its recipe."""
    pytest.importorskip("gymnasium")
    folder = tmp_path_factory.mktemp("every")
    commands = {recipe: [recipe, "--threads", "1", *words] for recipe, words in recipes(files, folder).items()}
    pairs = Pairs(folder / "one", folder / "two")
    told = [[*words, "--out", str(pairs.two / recipe)] for recipe, words in commands.items()]
    (folder / "commands.json").write_text(json.dumps(told))
    around = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, recipes_together.__file__, str(folder / "commands.json")]
    done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stderr) == (0, "")
    for recipe, words in commands.items():
        assert cli.main([*words, "--out", str(pairs.one / recipe)]) == 0
    return pairs


def recipes(files: dict[str, str], folder: Path) -> dict[str, list[str]]:
    """What every recipe that trains is told, besides threads and where to: a step or two of next to nothing."""
    model = ["--model.path", files["model"]]
    pairs = ["--data.path", str(write_pairs(folder / "pairs.jsonl", "polite", 24)), "--data.eval-fraction", "0.25"]
    pairs += ["--rows-per-step", "8", "--max-steps", "2", "--optim.lr", "1e-3"]
    decisions = ["--data.path", str(write_decisions(folder / "decisions.jsonl", 8)), "--strategies", "daily_dialog"]
    told = [{"query": f"Day {day}?", "strategy": name, "reward": 1, "done": True} for day in "12" for name in "AB"]
    weather = ["--data.path", str(lines(folder / "weather.jsonl", told)), "--strategies", "A", "B"]
    (folder / "length.py").write_text(
        "def reward(completions, **_):\n    return [float(len(t)) for t in completions]\n"
    )
    few = {
        "archer": [
            "--episodes-per-step",
            "6",
            "--warmup-steps",
            "0",
            "--critic-updates",
            "2",
            "--critic-body",
            "actor",
        ],
        "ppo": ["--episodes-per-step", "6", "--warmup-steps", "1", "--policy.epochs", "1"],
        "rank": ["--episodes-per-step", "4", "--candidates", "3", "--warmup-steps", "1", "--ranker-updates", "2"],
    }
    talk = ["--sampling.max-tokens", "4", "--steps", "2", "--episodes-per-step", "4", "--low.policy.minibatches", "1"]
    talk += ["--low.value-minibatches", "1"]
    dialogues = ["--env", TALK, "--max-turns", "2", "--high-updates", "2", "--high-batch", "4"]
    templates = [word for name, text in TEMPLATES.items() for word in (f"--templates.{name.replace('_', '-')}", text)]
    doors = ["--env", DOORS, "--attempts", "2", "--tasks-per-step", "3", *templates, "--steps", "2"]
    doors += ["--solver.sampling.max-tokens", "2", "--coach.sampling.max-tokens", "2"]
    steer = ["--env", STEER, "--steps", "2", "--tasks-per-step", "2", "--group-size", "2", "--sampling.max-tokens", "3"]
    poles = [
        "--env",
        "CartPole-v1",
        "--horizon",
        "20",
        "--steps",
        "2",
        "--envs",
        "3",
        "--rollout",
        "12",
        "--hidden",
        "8",
    ]
    judged = ["--data", str(driven(folder / "driven")), "--width", "8", "--rows-per-step", "16", "--max-steps", "2"]
    kl = ["--policy.kl-coef", "0.1"]
    return {
        "reward": [*model, *pairs, *FSDP],
        "dpo": [*model, *pairs, *FSDP],
        "ppo": [*model, *PLAYS, *few["ppo"], *kl],
        "grpo": [*model, *PLAYS, "--tasks-per-step", "2", "--group-size", "4", *kl],
        "archer": [*model, *PLAYS, *few["archer"], *kl, *FSDP],
        "rank": [*model, *PLAYS, *few["rank"], *FSDP],
        "strategist": [*model, *decisions, "--rows-per-step", "8", "--max-steps", "2", *FSDP],
        "responder": [*model, *weather, "--reward", f"{folder / 'length.py'}:reward", *talk],
        "tosca": ["--responder.path", files["model"], *dialogues, *talk, *FSDP],
        "feedback": ["--solver.model.path", files["model"], *doors],
        "control": [*model, *steer, "--plan-every", "3", "--plan-question", QUESTION, "--plan-tokens", "3", *FSDP],
        "control-mlp": ["--method", "ppo", *poles, "--hidden", "8", "--rows-per-step", "16", "--eval-episodes", "2"],
        "control-reward": [*judged, "--eval-every", "2", "--dropout", "0"],
    }


def driven(folder: Path) -> Path:
    """What control-data would have written of four episodes of eight steps, one of them held out."""
    draw, episodes = np.random.default_rng(0), []
    for _ in range(4):
        seen, done = draw.uniform(-1, 1, (9, 1)).astype(np.float32), draw.uniform(-1, 1, (8, 1)).astype(np.float32)
        episodes.append(Recorded(seen, done, -((done[:, 0] - seen[:-1, 0]).astype(np.float64) ** 2), True))
    codec = Codec(Space("box", (-1.0,), (1.0,)), Space("box", (-1.0,), (1.0,)), decimals=1, instruction="")
    folder.mkdir()
    np.savez(folder / "arrays.npz", **control_arrays(episodes, {episodes[0].name}))
    (folder / "codec.json").write_text(json.dumps(codec.to_json()))
    lines(folder / "train.jsonl", [row for episode in episodes[1:] for row in control_rows(episode, codec)])
    return folder


RECIPES = ["reward", "dpo", "ppo", "grpo", "archer", "rank", "strategist", "responder", "tosca", "feedback", "control"]
RECIPES += ["control-mlp", "control-reward"]


def test_every_recipe_that_trains_runs_on_two_ranks() -> None:
    modules = {name: importlib.import_module(f"echelon.recipes.{name.replace('-', '_')}") for name in cli.recipes()}
    learn = {name for name, module in modules.items() if issubclass(module.Config, TrainConfig)}
    assert learn == {*RECIPES, "sft"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_ranks_log_and_say_what_one_process_does(every: Pairs, recipe: str) -> None:
    found, expected = rows(every.two / recipe), rows(every.one / recipe)
    assert len(expected) == 2
    if recipe == "dpo":  # before the first step both answers are as likely as they were, and rounding decides
        assert abs(found[0].pop("accuracy") - expected[0].pop("accuracy")) < 1
    same(found, expected, 1e-4)
    if (every.one / recipe / "episodes.jsonl").exists():
        said, wanted = (
            [[turn["text"] for turn in row["turns"]] for row in rows(runs / recipe, "episodes")]
            for runs in (every.two, every.one)
        )
        assert said == wanted


@pytest.mark.learning
def test_two_ranks_learn_what_is_rewarded(files: dict[str, str], tmp_path: Path) -> None:
    """To say something with a vowel: from one answer in four to all of them, in ten steps."""
    (tmp_path / "vowels.py").write_text(
        "def reward(completions, **_):\n    return [float(any(v in said for v in 'aeiou')) for said in completions]\n"
    )
    words = ["grpo", "--model.path", files["model"], *PLAYS, "--sampling.max-tokens", "2", "--max-turns", "1"]
    words += ["--reward", f"{tmp_path / 'vowels.py'}:reward", "--tasks-per-step", "4", "--group-size", "8"]
    words += ["--steps", "10", "--policy.optim.lr", "2e-2", "--save-every", "0", "--out", str(tmp_path / "run")]
    done = two_ranks(*words, *FSDP)
    assert (done.returncode, done.stderr) == (0, "")
    rewards = [1 + row["reward/mean"] for row in rows(tmp_path / "run")]  # the game takes 1 for the turn
    assert sum(rewards[:3]) / 3 < 0.5
    assert sum(rewards[-3:]) / 3 > 0.9


def test_a_rank_that_is_killed_ends_the_job_with_one_line_and_the_run_goes_on(
    files: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "deadly.py").write_text(
        "import os, signal\n\n\n"
        "def reward(completions, **_):\n"
        "    calls.append(1)\n"
        "    if os.environ.get('RANK') == '1' and len(calls) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [float(len(text)) for text in completions]\n\n\n"
        "calls = []\n"
    )
    words = ["grpo", "--model.path", files["model"], *PLAYS, "--tasks-per-step", "2", "--group-size", "2"]
    words += ["--reward", f"{tmp_path / 'deadly.py'}:reward", "--save-every", "1", "--out", str(tmp_path / "run")]
    done = two_ranks(*words)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "rank 1 was ended by SIGKILL, so the others were stopped. Start the same command again with --resume; it goes "
        "on from the newest whole checkpoint."
    ]
    assert [row["step"] for row in rows(tmp_path / "run")] == [0]
    assert cli.main([*words, "--resume"]) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1]


def test_what_is_wrong_for_all_ranks_is_said_once(files: dict[str, str], tmp_path: Path) -> None:
    words = ["--data.path", files["games"], "--out", str(tmp_path / "run"), "--threads", "1"]
    done = two_ranks("sft", "--model.path", str(tmp_path / "nowhere"), *words)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "nowhere" in done.stderr


def test_work_for_one_process_is_refused_on_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["quickstart", "--out", str(tmp_path)]) == 2
    line = "quickstart is work for one process. Run it without torchrun and without echelon launch.\n"
    assert capsys.readouterr().err == line
