"""Rewards before credit: numbers that can be checked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echelon.ops.credit import discounted_returns
from echelon.ops.shaped import Moments, adaptive_kl, dense_rewards, kl_rewards, normalise, surprisal_rewards


def test_the_weight_of_kl_moves_by_at_most_a_fifth_per_horizon() -> None:
    assert adaptive_kl(0.1, 12.0, target=6.0, episodes=256, horizon=10_000) == pytest.approx(0.100512)
    assert adaptive_kl(0.1, 0.0, target=6.0, episodes=256, horizon=10_000) == pytest.approx(0.1 * (1 - 0.2 * 0.0256))
    assert adaptive_kl(0.1, 6.6, target=6.0, episodes=10_000, horizon=10_000) == pytest.approx(0.11)
    assert adaptive_kl(0.1, 6.0, target=6.0, episodes=256, horizon=10_000) == 0.1


def test_what_kl_costs_adds_up_to_the_log_ratio_of_what_was_sampled() -> None:
    mask = torch.tensor([[False, True, True, False], [True, False, False, False]])
    logprobs = torch.tensor([[math.nan, -1.0, -2.0, math.inf], [-0.5, 9.0, 9.0, 9.0]])
    reference = torch.tensor([[7.0, -1.5, -1.0, math.nan], [-0.5, 0.0, 0.0, 0.0]])
    found = kl_rewards(logprobs, reference, mask, coef=0.2)
    torch.testing.assert_close(found, torch.tensor([[0, -0.1, 0.2, 0], [0, 0, 0, 0]]))


def test_moments_are_those_of_all_numbers_seen_so_far() -> None:
    moments = Moments().having_seen([1.0, 2.0]).having_seen([]).having_seen([6.0])
    assert (moments.count, moments.mean) == (3, pytest.approx(3.0))
    assert moments.std == pytest.approx(7**0.5)  # (4 + 1 + 9) / 2
    assert (Moments().std, Moments().having_seen([5.0]).std) == (0.0, 0.0)


@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=5), min_size=1, max_size=6))
def test_moments_do_not_depend_on_how_the_numbers_came(parts: list[list[float]]) -> None:
    moments, whole = Moments(), [number for part in parts for number in part]
    for part in parts:
        moments = moments.having_seen(part)
    assert moments.count == len(whole)
    assert moments.mean == pytest.approx(np.mean(whole) if whole else 0.0, abs=1e-9)
    assert moments.std == pytest.approx(np.std(whole, ddof=1) if len(whole) > 1 else 0.0, rel=1e-6, abs=1e-6)


def test_returns_are_normalised_and_the_mean_is_taken_off_once_per_episode() -> None:
    rewards, last = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([False, True, True])  # returns 3 and 6
    moments = Moments().having_seen([3.0, 6.0, 9.0])  # mean 6, deviation 3
    assert normalise(rewards, last, moments, how="off").tolist() == [1.0, 2.0, 6.0]
    assert normalise(rewards, last, moments, how="scale").tolist() == pytest.approx([1 / 3, 2 / 3, 2.0])
    standard = normalise(rewards, last, moments, how="standard")
    assert standard.tolist() == pytest.approx([1 / 3, -4 / 3, 0.0])
    assert standard[:2].sum().item() == pytest.approx((3 - 6) / 3)


def test_returns_that_do_not_vary_are_not_divided() -> None:
    rewards, last, moments = torch.tensor([2.0, 2.0]), torch.tensor([True, True]), Moments().having_seen([2.0, 2.0])
    assert normalise(rewards, last, moments, how="scale").tolist() == [2.0, 2.0]
    assert normalise(rewards, last, moments, how="standard").tolist() == [0.0, 0.0]


REPLIES = torch.tensor([[-1, 0, 0, 0, 0, -1], [-1, -1, 1, 1, -1, -1]])
"""A reply of four tokens and one of two."""


def test_dense_satisfaction_that_is_length_neutral_adds_up_to_the_reward() -> None:
    found = dense_rewards(torch.tensor([4.0, 3.0]), REPLIES, REPLIES >= 0, how="length_neutral")
    torch.testing.assert_close(found, torch.tensor([[0, 1.0, 1, 1, 1, 0], [0, 0, 1.5, 1.5, 0, 0]]))
    eight = torch.zeros(1, 8, dtype=torch.long)
    assert dense_rewards(torch.tensor([4.0]), eight, eight >= 0, how="length_neutral").tolist() == [[0.5] * 8]


def test_dense_satisfaction_as_written_is_worth_its_length() -> None:
    found = dense_rewards(torch.tensor([4.0, 4.0]), REPLIES, REPLIES >= 0, how="literal")
    assert found.sum(1).tolist() == [16.0, 8.0]  # the same satisfaction, twice the return
    to_go = discounted_returns(found[:1, 1:5], gamma=1.0)
    assert to_go.tolist() == [[16.0, 12.0, 8.0, 4.0]]  # proportional to the remaining length


def test_surprisal_pays_for_what_is_unlikely_and_centred_it_adds_up_to_nothing() -> None:
    mask = torch.tensor([[False, True, True], [True, False, False]])
    logprobs = torch.tensor([[math.nan, -1.0, -4.0], [-1.0, math.inf, 7.0]])
    raw = surprisal_rewards(logprobs, mask, coef=0.01)
    torch.testing.assert_close(raw, torch.tensor([[0, 0.01, 0.04], [0.01, 0, 0]]))
    centred = surprisal_rewards(logprobs, mask, coef=0.01, mean=2.0)
    torch.testing.assert_close(centred, torch.tensor([[0, -0.01, 0.02], [-0.01, 0, 0]]))
    assert centred.sum().item() == pytest.approx(0.0, abs=1e-8)
