"""Recipes that play the coming steps while one trains: exact, repeatable, resumable, and still learning."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

GRPO = ("grpo", "--tasks-per-step", 2, "--group-size", 4, "--policy.epochs", 2)
PPO = ("ppo", "--episodes-per-step", 8, "--warmup-steps", 1, "--policy.epochs", 2, "--value-epochs", 2)
ARCHER = ("archer", "--episodes-per-step", 8, "--warmup-steps", 1, "--critic-updates", 2, "--critic-episodes", 4)
CONTROL = ("control", "--method", "grpo", "--tasks-per-step", 2, "--group-size", 4)
PLANNED = (*CONTROL, "--plan-every", 2, "--plan-tokens", 3)
RECIPES = [pytest.param(GRPO, id="grpo"), pytest.param(PPO, id="ppo"), pytest.param(PLANNED, id="control")]
AHEAD = "--asynchronous.max-staleness"
OWN = ("policy/staleness", "policy/mismatch/kl", "policy/importance")
"""How the names begin that only such a run logs."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_where_nothing_is_learned_ahead_is_what_in_turn_is(train, game: list[str], recipe: tuple[object, ...]) -> None:
    """Then all weights are the same, so the same is played, judged and logged."""
    still = (*recipe, *game, "--steps", 4, "--policy.optim.lr", 0)
    one, other = train(*still, name="in turn"), train(*still, AHEAD, 2, name="ahead")
    assert other.rows("episodes") == one.rows("episodes")
    assert [row["policy/staleness"] for row in other.rows()] == [0, 1, 2, 2]
    for row, expected in zip(other.rows(), one.rows(), strict=True):
        told = {name: number for name, number in row.items() if not name.startswith(OWN)}
        assert told == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        pytest.param(GRPO, (AHEAD, 1, "--policy.kl-coef", 0.1), id="grpo"),
        pytest.param(GRPO, (AHEAD, 2, "--replacements", 2, "--asynchronous.correction", "sequence"), id="grpo-2"),
        pytest.param(PPO, (AHEAD, 1, "--shaping.kl-coef", 0.1), id="ppo"),
        pytest.param(ARCHER, (AHEAD, 1, "--actor-states", "rollout"), id="archer"),
        pytest.param(CONTROL, (AHEAD, 1, "--method", "ppo", "--value", "text", "--eval-every", 2), id="control"),
    ],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    train, game: list[str], killed_at, recipe: tuple[object, ...], flags: tuple[object, ...]
) -> None:
    """To the bit; and no thread is left when a run is interrupted."""
    words = (*recipe, *game, *flags, "--steps", 6, "--save-every", 2, "--policy.optim.lr", 1e-2)
    whole = train(*words, name="whole")
    killed_at(3)
    train(*words, name="killed", status=130)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("rollout")] == []
    killed_at(-1)
    resumed = train(*words, "--resume", name="killed")
    assert len(whole.rows()) == 6
    assert resumed.rows() == whole.rows()
    assert resumed.rows("episodes") == whole.rows("episodes")
    torch.testing.assert_close(resumed.weights(), whole.weights(), rtol=0, atol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_that_older_weights_played_are_corrected_and_others_are_not(
    train, game: list[str], recipe: tuple[object, ...]
) -> None:
    rows = train(*recipe, *game, "--steps", 4, AHEAD, 1, "--policy.optim.lr", 1e-2).rows()
    old = [row["policy/staleness"] for row in rows]
    moved = [row.get("policy/mismatch/kl", 0.0) > 1e-6 for row in rows]
    assert old == [0, 1, 1, 1]
    # PPO's first step trains no policy, so the second one is played with the weights it learns with.
    assert moved == ([False, False, True, True] if recipe is PPO else [False, True, True, True])
    for row, stale in zip(rows, moved, strict=True):
        assert ("policy/importance" in row) is stale
        assert row.get("policy/first_mismatch", 0.0) < 1e-4


def test_ahead_replacements_come_from_places_of_their_own(train, game: list[str]) -> None:
    run = train(*GRPO, *game, "--steps", 3, AHEAD, 1, "--replacements", 2)
    assert all(0 <= row["group/replaced"] <= 2 for row in run.rows())


def test_episodes_that_fail_ahead_count_against_the_budget_and_leave_no_thread(
    train, fragile: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train(*GRPO, *fragile, "--steps", 3, AHEAD, 1, "--error-budget", 0, status=2)
    assert "episodes failed, more than the error budget of 0%" in capsys.readouterr().err
    assert [thread for thread in threading.enumerate() if thread.name.startswith("rollout")] == []


def test_more_steps_than_a_run_was_begun_with(train, game: list[str]) -> None:
    """What nobody has played ahead is played with the weights the run ended with."""
    train(*GRPO, *game, "--steps", 2, AHEAD, 2)
    rows = train(*GRPO, *game, "--steps", 5, AHEAD, 2, "--resume").rows()
    assert [row["policy/staleness"] for row in rows] == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        (GRPO, (AHEAD, -1), "max_staleness = -1: it counts steps."),
        (GRPO, (AHEAD, 1, "--model.quantization", "4bit"), "max_staleness = 1: what plays is a copy of the weights"),
        (PPO, (AHEAD, 1, "--sampler", "vllm", "--lora.dropout", 0.1), "max_staleness = 1: vLLM would disturb"),
        (ARCHER, (AHEAD, 1, "--candidates", 2, "--freeze-actor"), "max_staleness = 1: the critic that picks"),
    ],
    ids=["negative", "quantized", "dropout", "candidates"],
)
def test_what_cannot_run_ahead_is_refused_in_one_line(
    train,
    game: list[str],
    capsys: pytest.CaptureFixture[str],
    recipe: tuple[object, ...],
    flags: tuple[object, ...],
    message: str,
) -> None:
    train(*recipe, *game, *flags, status=2)
    error = capsys.readouterr().err
    assert error.startswith(f"asynchronous.{message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(("states", "corrected"), [("rollout", True), ("replay", False)])
def test_archer_corrects_what_older_weights_played_and_not_what_it_draws_anew(
    train, game: list[str], states: str, corrected: bool
) -> None:
    rows = train(*ARCHER, *game, "--steps", 4, AHEAD, 1, "--actor-states", states).rows()
    assert [row["policy/staleness"] for row in rows] == [0, 1, 1, 1]
    assert ["policy/importance" in row for row in rows] == [False, False, corrected, corrected]
    assert all(row.get("policy/first_mismatch", 0.0) < 1e-4 for row in rows)


def test_levels_with_weights_of_their_own_are_old_by_themselves(train, game: list[str], start: Path) -> None:
    """Only the planner learns, so what the controller said is never old, and with the planner's own name it is told."""
    rows = train(*PLANNED, *game, "--planner.path", start, "--learns", "planner", "--steps", 3, AHEAD, 1).rows()
    assert [row["policy/staleness"] for row in rows] == [0, 1, 1]
    assert ["planner/importance" in row for row in rows] == [False, True, True]
    assert not any("policy/importance" in row for row in rows)
