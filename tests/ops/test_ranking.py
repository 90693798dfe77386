"""Choosing among candidates, with numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from echelon.ops.bellman import double_q_target
from echelon.ops.credit import gae
from echelon.ops.ranking import (
    candidate_scores,
    epsilon_greedy,
    exploration_rate,
    spread,
    utterance_gae,
    value_bias,
)


@pytest.mark.parametrize(
    ("step", "steps", "epsilon", "floor", "expected"),
    [(0, 100, 1.0, 0.05, 1.0), (50, 100, 1.0, 0.05, 0.5), (99, 100, 1.0, 0.05, 0.05), (5, 10, 0.4, 0.1, 0.2)],
)
def test_exploration_falls_with_the_steps_to_a_floor(step, steps, epsilon, floor, expected) -> None:
    assert exploration_rate(step, steps, epsilon=epsilon, floor=floor) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("explore", "pick", "expected"),
    [(0.3, 0.0, 1), (0.29, 0.0, 0), (0.0, 0.34, 1), (0.0, 0.67, 2), (0.0, 0.999999999, 2), (0.999, 0.5, 1)],
)
def test_the_best_is_taken_unless_any_is(explore: float, pick: float, expected: int) -> None:
    assert epsilon_greedy(torch.tensor([1.0, 3.0, 2.0]), epsilon=0.3, explore=explore, pick=pick) == expected


def test_the_first_of_equals_is_taken_and_without_exploring_never_another() -> None:
    assert epsilon_greedy(torch.tensor([1.0, 2.0, 2.0]), epsilon=0.0, explore=0.0, pick=0.9) == 1
    assert epsilon_greedy(torch.tensor([1.0, 2.0, 2.0]), epsilon=1.0, explore=0.999, pick=0.0) == 0


def test_what_really_was_earned_stands_for_the_one_that_ended_the_episode() -> None:
    q_NK = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    terminated = torch.tensor([False, True, False])
    found = candidate_scores(q_NK, torch.tensor([0, 1, 1]), torch.tensor([9.0, 8.0, 7.0]), terminated)
    assert found.tolist() == [[1.0, 2.0], [3.0, 8.0], [5.0, 6.0]]
    assert q_NK[1, 1] == 4.0


def test_spread_is_the_deviation_over_candidates() -> None:
    assert spread(torch.tensor([[1.0, 3.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0]])).tolist() == pytest.approx(
        [math.sqrt(0.5), 0.0]
    )


def test_a_bias_gives_the_value_also_through_a_sigmoid() -> None:
    assert value_bias(-3.0, bounded=False) == -3.0
    assert torch.tensor(value_bias(0.25, bounded=True)).sigmoid().item() == pytest.approx(0.25)
    assert torch.tensor(value_bias(0.0, bounded=True)).sigmoid().item() == pytest.approx(0.05)
    assert torch.tensor(value_bias(1.0, bounded=True)).sigmoid().item() == pytest.approx(0.95)


def test_the_online_network_picks_the_next_candidate_and_the_target_values_it() -> None:
    online, target = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[5.0, 0.0, 9.0]])
    found = double_q_target(torch.tensor([1.0]), online, target, gamma=1.0, terminated=torch.tensor([False]))
    assert found.tolist() == [1.0]


def test_each_utterance_is_a_chain_of_its_own_that_ends_with_its_score() -> None:
    """Two candidates branch off one row and a third lies in another; γ is 1, V and λ are the table's."""
    values_BT = torch.tensor([[9.0, 9.0, 0.5, 0.4, 0.3, 0.2, 0.1], [9.0, 0.7, 9.0, 9.0, 9.0, 9.0, 9.0]])
    places = torch.tensor([0, 0, 1]), torch.tensor([2, 5, 1]), torch.tensor([4, 6, 1])
    advantages, returns = utterance_gae(torch.tensor([1.0, 0.5, 2.0]), values_BT, *places, lam=0.8)
    # 1 - 0.3 = 0.7; (0.3 - 0.4) + 0.8 · 0.7 = 0.46; (0.4 - 0.5) + 0.8 · 0.46 = 0.268
    assert advantages[0].tolist() == pytest.approx([0, 0, 0.268, 0.46, 0.7, -0.1 + 0.8 * 0.4, 0.4])
    assert advantages[1].tolist() == pytest.approx([0, 1.3, 0, 0, 0, 0, 0])
    assert returns[0].tolist() == pytest.approx([0, 0, 0.768, 0.86, 1.0, 0.42, 0.5])
    alone, _ = gae(torch.tensor([0.0, 0.0, 1.0]), values_BT[0, 2:5], gamma=1.0, lam=0.8)
    assert advantages[0, 2:5].tolist() == pytest.approx(alone.tolist())
