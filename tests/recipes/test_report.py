"""Reports of real runs: what recipes write is what the page reads."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echelon import cli
from echelon.config.loading import settings_of
from echelon.view.runs import RECIPES
from tests.recipes.conftest import Run


def told(run: Path) -> dict[str, Any]:
    """What the page of a run says, as data."""
    assert cli.main(["report", str(run)]) == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_setting_that_tells_a_recipe_is_its_own(recipe: str) -> None:
    def names(of: str) -> set[str]:
        return set(settings_of(importlib.import_module(f"echelon.recipes.{of.replace('-', '_')}").Config))

    assert [of for of in RECIPES if RECIPES[recipe] in names(of)] == [recipe]


FEW = {
    "archer": "--episodes-per-step 4 --warmup-steps 0 --critic-updates 1",
    "grpo": "--tasks-per-step 2 --group-size 4",
    "ppo": "--episodes-per-step 4 --warmup-steps 0",
    "rank": "--episodes-per-step 4 --warmup-steps 0",
}


@pytest.mark.parametrize("recipe", FEW)
def test_a_run_of(recipe: str, train: Callable[..., Run], game: list[str]) -> None:
    run = train(recipe, *game, "--steps", 2, *FEW[recipe].split())
    page = told(run.out)
    about = page["runs"][0]
    assert (about["recipe"], about["steps"], about["notes"]) == (recipe, 2, [])
    assert about["outcome"] == "reward/mean"
    assert about["shown"] == about["episodes"] == len(run.rows("episodes"))
    first, seen = run.rows("episodes")[0], page["episodes"][0]
    assert [turn["x"] for turn in seen["t"]] == [turn["text"] for turn in first["turns"]]
    assert about["perStep"] == {"grpo": 8}.get(recipe, 4)
    assert about["phases"][0]["steps"] == 2
    assert ("c" in seen["t"][0]) == (recipe == "rank")
    headings = [heading for heading, *_ in page["headings"]]
    assert any(heading.startswith("Upper level") for heading in headings) == (recipe in ("archer", "rank"))


def test_a_run_of_two_levels_with_strategies(tosca: Path) -> None:
    page = told(tosca)
    assert page["runs"][0]["recipe"] == "tosca"
    chosen = page["episodes"][0]["t"][0]
    assert chosen["g"] in {strategy for _, _, strategy, _ in chosen["c"]}


def test_a_stage_that_learns_from_rows(start: Path) -> None:
    about = told(start.parents[2])["runs"][0]
    assert (about["recipe"], about["outcome"], about["episodes"]) == ("sft", "loss", 0)
    assert about["learned"]["state"] == "good"


def test_an_evaluation(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--env", "guess_number", "--env-settings", "low=1", "high=4", "max_turns=3", "--episodes", "4"]
    assert cli.main(["evaluate", "--model.path", str(start), *words, "--out", str(tmp_path / "test")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{tmp_path / 'test'}: summary.json, episodes.jsonl. Look at them: ")
    page = told(tmp_path / "test")
    assert page["runs"][0]["recipe"] == "evaluate"
    assert page["evaluations"][0]["estimates"]["return"]["n"] == 4
    assert page["episodes"][0]["t"][0]["s"]
