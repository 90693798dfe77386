"""The page about logging names everything that a run writes into metrics.jsonl."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.recipes.conftest import Run
from tests.recipes.doors import GAME, TEMPLATES, pupil
from tests.recipes.strategies import reader, write_decisions
from tests.test_docs import CODE, columns, prose

PAGE = Path(__file__).parents[2] / "docs" / "logging.md"
REWARD = "def length(prompts, completions):\n    return [float(len(text)) for text in completions]\n"


def listed(recipe: str) -> list[str]:
    """Patterns of the names that the page lists for a recipe."""
    text = prose(PAGE)
    rows = [
        row for row, _ in columns(text, "recipes") if row["recipes"] == "all" or recipe in row["recipes"].split(", ")
    ]
    names = [name for row in rows for name in CODE.findall(row["name"])]
    if recipe == "ppo":
        names += [name for row, _ in columns(text, "ours") for name in CODE.findall(row["TRL's name"])]
    patterns = [re.escape(name).replace("<name>", ".+").replace("…", ".+") for name in names]
    return [re.sub(r"^eval/\.\+$", f"eval/({'|'.join(patterns)}|accuracy/(low|high))", pattern) for pattern in patterns]


def unknown(recipe: str, run: Run) -> set[str]:
    """Names in the rows of a run that no pattern of the page fits."""
    names = {name for row in run.rows() for name in row}
    return {name for name in names if not any(re.fullmatch(pattern, name) for pattern in listed(recipe))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def write(name: str, *rows: dict[str, str]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    asked = [f"Guess {number}." for number in range(8)]
    write("pairs.jsonl", *({"prompt": prompt, "chosen": "2", "rejected": "3 4"} for prompt in asked))
    write("ask.jsonl", *({"prompt": prompt} for prompt in asked))
    (tmp_path / "rewards.py").write_text(REWARD)
    return tmp_path


@pytest.mark.parametrize("recipe", ["sft", "reward", "dpo"])
def test_stages_that_learn_from_rows(train: Callable[..., Run], untrained: Path, folder: Path, recipe: str) -> None:
    data = ("--data.path", folder / "pairs.jsonl", "--data.eval-fraction", 0.5, "--rows-per-step", 2)
    run = train(recipe, "--model.path", untrained, *data)
    assert unknown(recipe, run) == set()


def test_strategies_learned_from_rows(train: Callable[..., Run], tmp_path: Path) -> None:
    data = ("--data.path", write_decisions(tmp_path / "d.jsonl", 20), "--data.eval-fraction", 0.5)
    few = ("--strategies", "daily_dialog", "--rows-per-step", 4, "--max-steps", 2)
    run = train("strategist", "--model.path", reader(tmp_path / "model", layers=1, hidden=16), *data, *few)
    assert unknown("strategist", run) == set()


PLAYED = {
    "grpo": "--tasks-per-step 2 --group-size 4 --replacements 1 --kl-in episodes --overlong-cache 2",
    "ppo": "--episodes-per-step 4 --warmup-steps 0 --shaping.kl-coef 0.1 --value-clip 1 --policy.ptx-coef 0.1",
}


@pytest.mark.parametrize("recipe", PLAYED)
def test_stages_that_learn_by_trying(train: Callable[..., Run], untrained: Path, folder: Path, recipe: str) -> None:
    asked = ("--data.path", folder / "ask.jsonl", "--reward", f"{folder}/rewards.py:length")
    ptx = ("--ptx.path", folder / "pairs.jsonl") if recipe == "ppo" else ()
    few = ("--steps", 1, "--sampling.max-tokens", 4, "--policy.kl-coef", 0.1, *PLAYED[recipe].split())
    run = train(recipe, "--model.path", untrained, *asked, *ptx, *few)
    assert unknown(recipe, run) == set()


def test_levels_that_learn_from_feedback(train: Callable[..., Run], tmp_path: Path) -> None:
    words = [word for name, text in TEMPLATES.items() for word in (f"--templates.{name.replace('_', '-')}", text)]
    words += ["--env", GAME, "--solver.model.path", str(pupil(tmp_path / "model")), "--keep-start", "--credit.gap", "1"]
    words += ["--steps", "1", "--tasks-per-step", "2", "--attempts", "2", "--stages", "from 0: credit.first=1"]
    words += ["--solver.sampling.max-tokens", "1", "--coach.sampling.max-tokens", "1", "--coach.baseline", "value"]
    (tmp_path / "rewards.py").write_text(REWARD)
    run = train("feedback", *words, "--coach.policy.kl-coef", "0.1", "--reward", f"{tmp_path}/rewards.py:length")
    assert "reward/length" in run.rows()[0]
    assert unknown("feedback", run) == set()


def test_a_name_that_is_not_on_the_page_is_found(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "loss": 1.0, "eval/loss": 1.0, "lost": 1.0, "eval/lost": 1.0}\n'
    )
    assert unknown("sft", Run(tmp_path)) == {"lost", "eval/lost"}
