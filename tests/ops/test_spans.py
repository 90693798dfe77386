"""Decisions that last several steps: their discounted reward, and their advantage."""

from __future__ import annotations

import pytest
import torch

from echelon.ops.credit import span_rewards, turn_gae


def test_a_span_earns_its_rewards_discounted_to_its_beginning() -> None:
    rewards_N, span_N = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([0, 0, 0, 1, 1])
    rewards_S, steps_S = span_rewards(rewards_N, span_N, torch.ones(5, dtype=torch.long), gamma=0.5)
    assert rewards_S.tolist() == [1 + 1 + 1, 8 + 8]
    assert steps_S.tolist() == [3, 2]


def test_what_takes_no_time_is_not_discounted() -> None:
    steps_N = torch.tensor([0, 1, 1, 0, 1])
    found = span_rewards(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([0, 0, 0, 1, 1]), steps_N, gamma=0.5)
    assert found[0].tolist() == [1 + 2 + 2, 8 + 16]
    assert found[1].tolist() == [2, 1]


def test_a_value_counts_gamma_to_the_power_of_the_steps_before_it() -> None:
    """γ = ½: the first decision takes two steps and is followed by V = 8, the second takes one and then 4."""
    advantages_S, returns_S = turn_gae(
        torch.tensor([1.0, 2.0]),
        torch.tensor([3.0, 8.0]),
        torch.tensor([0, 0]),
        torch.tensor([99.0, 4.0]),
        gamma=0.5,
        lam=1.0,
        steps_N=torch.tensor([2, 1]),
    )
    assert advantages_S.tolist() == [1 + 0.25 * (2 + 0.5 * 4) - 3, 2 + 0.5 * 4 - 8]
    assert returns_S.tolist() == [2.0, 4.0]


def test_no_trust_in_what_was_earned_later_leaves_one_decision() -> None:
    found, _ = turn_gae(
        torch.tensor([1.0, 2.0]),
        torch.tensor([3.0, 8.0]),
        torch.tensor([0, 0]),
        torch.zeros(2),
        gamma=0.5,
        lam=0.0,
        steps_N=torch.tensor([2, 1]),
    )
    assert found.tolist() == [1 + 0.25 * 8 - 3, 2 - 8]


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_turns_that_last_one_step_are_turns(lam: float) -> None:
    draw = torch.Generator().manual_seed(1)
    rewards, values, bootstrap = torch.randn(3, 9, generator=draw)
    given = (rewards, values, torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2]), bootstrap)
    found = turn_gae(*given, gamma=0.9, lam=lam, steps_N=torch.ones(9, dtype=torch.long))
    torch.testing.assert_close(found, turn_gae(*given, gamma=0.9, lam=lam))


def test_an_answer_that_time_does_not_count_passes_on_the_whole_value() -> None:
    given = (torch.zeros(2), torch.tensor([1.0, 8.0]), torch.tensor([0, 0]), torch.tensor([0.0, 6.0]))
    found, _ = turn_gae(*given, gamma=0.0, lam=1.0, steps_N=torch.tensor([0, 1]))
    assert found.tolist() == [8 - 1 - 8, -8.0], "γ⁰ = 1, also where γ = 0"
