"""Means and intervals by hand; failed episodes are counted and never averaged."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from echelon.envs import load_env
from echelon.rollout.evaluate import (
    Estimate,
    bootstrap,
    evaluation_record,
    rollout_metrics,
    scripted_loop,
    summarise,
)
from echelon.rollout.roles import collect
from echelon.types import Episode, Turn


def episode(
    *rewards: float, ending: str = "terminated", tokens: int = 2, stop: str = "stop", **metrics: float
) -> Episode:
    turns = [
        Turn(i, "actor", [1], [3] * tokens, [0.0] * tokens, f"said {i}", i - 1 if i else None, stop, 0, reward)  # type: ignore[arg-type]
        for i, reward in enumerate(rewards)
    ]
    return Episode("t", turns=turns, ending=ending, metrics=metrics)  # type: ignore[arg-type]


def test_equal_values_leave_no_doubt() -> None:
    assert bootstrap([2.5, 2.5, 2.5]) == Estimate(2.5, 2.5, 2.5, 3)
    assert bootstrap([4.0]) == Estimate(4.0, 4.0, 4.0, 1)


def test_the_interval_of_a_large_sample_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(10, 3, 400).tolist()
    estimate = bootstrap(values)
    half = 1.96 * float(np.std(values)) / math.sqrt(400)
    assert estimate.mean == pytest.approx(np.mean(values))
    assert estimate.low == pytest.approx(estimate.mean - half, abs=0.05)
    assert estimate.high == pytest.approx(estimate.mean + half, abs=0.05)


def test_the_interval_of_two_values_by_enumeration() -> None:
    """The mean of two draws from 0 and 1 is 0, ½ or 1 with odds 1 : 2 : 1, so the interval is all of it."""
    assert bootstrap([0.0, 1.0]) == Estimate(0.5, 0.0, 1.0, 2)


def test_an_interval_is_a_function_of_the_values_and_the_seed() -> None:
    values = [0.0, 1.0, 1.0, 5.0, 2.0]
    assert bootstrap(values) == bootstrap(values)
    assert {bootstrap(values, resamples=50, seed=seed).high for seed in range(20)} != {bootstrap(values).high}


def test_an_estimate_reads_as_mean_and_interval() -> None:
    assert str(Estimate(0.5, 0.25, 0.75, 8)) == "0.50 [0.25, 0.75]"


def test_a_summary_leaves_out_what_failed() -> None:
    found = summarise(
        [
            episode(1.0, 2.0, tokens=3, win=1.0),
            episode(5.0, tokens=1, win=0.0, extra=4.0),
            episode(99.0, 99.0, ending="failed", win=1.0),
        ]
    )
    assert {name: (estimate.mean, estimate.n) for name, estimate in found.items()} == {
        "return": (4.0, 2),
        "turns": (1.5, 2),
        "length": (3.5, 2),
        "win": (0.5, 2),
        "extra": (4.0, 1),
    }


def test_nothing_can_be_said_about_failures_alone() -> None:
    with pytest.raises(AssertionError, match="every episode failed"):
        summarise([episode(1.0, ending="failed")])


def test_the_numbers_of_a_training_step_by_hand() -> None:
    episodes = [
        episode(1.0, 2.0, win=1.0),
        episode(1.0, tokens=8, ending="truncated", stop="length", win=0.0),
        episode(99.0, ending="failed", win=1.0),
    ]
    assert rollout_metrics(episodes) == {
        "reward/mean": 2.0,
        "reward/std": 1.0,
        "episode/turns": 1.5,
        "episode/failed": 1.0,
        "episode/truncated": 0.5,
        "turn/tokens": 4.0,
        "turn/cut_off": pytest.approx(1 / 3),
        "turn/distinct": pytest.approx(2 / 3),
        "episode/win": 0.5,
    }


@pytest.mark.parametrize(("kind", "won"), [("optimal", True), ("random", False)])
def test_a_scripted_player_plays_like_a_role(kind: str, won: bool) -> None:
    spec = load_env("text_lock", {"doors": 3})

    def player(*, seed: int) -> object:
        return spec.cls.player(kind, seed, doors=3)

    play = scripted_loop(spec.make, player, name=kind)  # type: ignore[arg-type]
    episodes = asyncio.run(collect(spec.tasks("test"), play, seed=0))
    assert all(e.ending == "terminated" and len(e.of(kind)) == 3 for e in episodes)
    assert all(e.reward == pytest.approx(e.metrics["opened"]) for e in episodes)
    assert all(e.reward == pytest.approx(1.0) for e in episodes) == won
    again = asyncio.run(collect(spec.tasks("test"), play, seed=0))
    assert [[t.text for t in e.turns] for e in episodes] == [[t.text for t in e.turns] for e in again]


def test_a_record_has_every_step_and_the_average_leaves_failed_episodes_out() -> None:
    chosen = episode(-1.0, 3.0)
    chosen.turns[1].seed = 7
    record = evaluation_record([chosen, episode(9.0, ending="failed"), episode(0.0)], {7: {"chosen": 2}})
    assert record["average_score"] == 1.0
    first, second, _ = record["episodes"]
    assert (first["score"], first["ending"], first["text"]) == (2.0, "terminated", "said 0said 1")
    assert first["steps"] == [
        {"role": "actor", "text": "said 0", "reward": -1.0},
        {"role": "actor", "text": "said 1", "reward": 3.0, "chosen": 2},
    ]
    assert (second["score"], second["ending"]) == (None, "failed")
    assert evaluation_record([episode(1.0, ending="failed")])["average_score"] is None
