"""Preference losses against numbers worked out by hand, and what they do at the reference policy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from echelon.ops import losses, preference

LOG_2 = math.log(2)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pairs(*values: tuple[float, float]) -> tuple[Tensor, Tensor]:
    chosen, rejected = zip(*values, strict=True)
    return torch.tensor(chosen, requires_grad=True), torch.tensor(rejected, requires_grad=True)


def test_bradley_terry_has_its_published_values() -> None:
    chosen, rejected = torch.tensor([1.2]), torch.tensor([0.2])
    assert losses.pairwise(chosen, rejected).item() == pytest.approx(0.313262, abs=1e-6)
    assert losses.pairwise(chosen, rejected, 0.5).item() == pytest.approx(0.474077, abs=1e-6)
    margins = torch.tensor([0.0, 0.5])
    both = losses.pairwise(chosen.expand(2), rejected.expand(2), margins)
    assert both.tolist() == pytest.approx([0.313262, 0.474077], abs=1e-6)


def test_at_the_reference_dpo_is_log_two_and_pulls_both_answers_alike() -> None:
    chosen, rejected = pairs((0.0, 0.0), (0.0, 0.0))
    loss = preference.dpo(chosen, rejected, beta=0.1)
    assert loss.tolist() == pytest.approx([LOG_2, LOG_2])
    loss.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([-0.05, -0.05])  # −β·σ(0)
    assert rejected.grad.tolist() == pytest.approx([0.05, 0.05])


def test_the_gradient_of_dpo_is_beta_times_how_wrong_the_pair_is() -> None:
    chosen, rejected = pairs((2.0, -1.0), (-4.0, 0.0))
    preference.dpo(chosen, rejected, beta=0.5).sum().backward()
    assert chosen.grad.tolist() == pytest.approx([-0.5 * sigmoid(-1.5), -0.5 * sigmoid(2.0)], rel=1e-5)
    assert rejected.grad.tolist() == pytest.approx([0.5 * sigmoid(-1.5), 0.5 * sigmoid(2.0)], rel=1e-5)


def test_label_smoothing_mixes_the_loss_with_that_of_the_pair_turned_round() -> None:
    chosen, rejected = pairs((3.0, 1.0))
    smooth = preference.dpo(chosen, rejected, beta=0.5, label_smoothing=0.1).item()
    assert smooth == pytest.approx(0.9 * -math.log(sigmoid(1.0)) + 0.1 * -math.log(sigmoid(-1.0)), rel=1e-6)
    assert smooth == pytest.approx(0.9 * 0.313262 + 0.1 * 1.313262, abs=1e-6)


def test_with_label_smoothing_the_best_difference_is_finite() -> None:
    """The gradient vanishes where σ(βΔ) = 1 − ε: at βΔ = log 9 for ε = 0.1."""
    chosen, rejected = pairs((math.log(9) / 0.5, 0.0))
    preference.dpo(chosen, rejected, beta=0.5, label_smoothing=0.1).sum().backward()
    assert chosen.grad.item() == pytest.approx(0, abs=1e-7)


def test_ipo_is_the_squared_distance_from_its_optimum() -> None:
    chosen, rejected = pairs((0.0, 0.0), (5.0, 0.0), (1.0, -1.0))
    loss = preference.ipo(chosen, rejected, beta=0.1)
    assert loss.tolist() == pytest.approx([25.0, 0.0, 9.0])  # 1/(2β) = 5
    loss.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([-10.0, 0.0, -6.0])  # 2(Δ − 5)


def test_hinge_stops_teaching_where_pairs_are_apart() -> None:
    chosen, rejected = pairs((0.0, 0.0), (1.0, -1.0), (3.0, 0.0))
    loss = preference.hinge(chosen, rejected, beta=0.5)
    assert loss.tolist() == pytest.approx([1.0, 0.0, 0.0])
    loss.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([-0.5, 0.0, 0.0])


@pytest.mark.parametrize("loss", [preference.dpo, preference.ipo, preference.hinge])
def test_only_the_difference_counts(loss) -> None:  # type: ignore[no-untyped-def]
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.5])
    torch.testing.assert_close(loss(chosen, rejected, beta=0.3), loss(chosen + 4, rejected + 4, beta=0.3))


def test_far_apart_pairs_stay_finite() -> None:
    chosen, rejected = pairs((-1e4, 1e4), (1e4, -1e4))
    loss = preference.dpo(chosen, rejected, beta=1.0)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([2e4, 0.0])
    assert torch.isfinite(chosen.grad).all()


def test_half_precision_log_ratios_are_compared_in_float32() -> None:
    chosen = torch.tensor([300.0], dtype=torch.bfloat16)
    assert preference.ipo(chosen, chosen, beta=0.5).dtype == torch.float32


def test_agreement_counts_a_tie_as_half() -> None:
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0])
    assert preference.agreement(chosen, rejected).tolist() == [1.0, 0.0, 0.5]


def test_brier_of_a_coin_is_a_quarter_and_of_certainty_zero_or_one() -> None:
    zero = torch.zeros(2)
    assert preference.brier(zero, zero).item() == pytest.approx(0.25)
    far = torch.tensor([100.0])
    assert preference.brier(far, -far).item() == pytest.approx(0)
    assert preference.brier(-far, far).item() == pytest.approx(1)
    mixed = preference.brier(torch.tensor([math.log(3), -math.log(3)]), zero).item()  # p = 0.75 and 0.25
    assert mixed == pytest.approx((0.25**2 + 0.75**2) / 2)


def test_confidence_that_holds_as_often_as_it_says_is_calibrated() -> None:
    """Four pairs at 75 %, three of them right; two at ½ that tie."""
    chosen = torch.tensor([math.log(3)] * 3 + [-math.log(3), 0.0, 0.0])
    rejected = torch.zeros(6)
    assert preference.calibration_error(chosen, rejected).item() == pytest.approx(0, abs=1e-6)


def test_calibration_error_weighs_each_bin_by_its_pairs() -> None:
    """One pair at 95 % that is right (gap .05), three at 75 % of which one is right (gap .75 − 1/3)."""
    far, near = math.log(19), math.log(3)
    chosen = torch.tensor([far, near, -near, -near])
    error = preference.calibration_error(chosen, torch.zeros(4)).item()
    assert error == pytest.approx(0.25 * 0.05 + 0.75 * (0.75 - 1 / 3), abs=1e-6)


def test_certainty_falls_into_the_last_bin() -> None:
    far = torch.tensor([1000.0, -1000.0])
    assert preference.calibration_error(far, torch.zeros(2)).item() == pytest.approx(0.5)
