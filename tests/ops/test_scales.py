"""Scales of values: numbers that can be worked out by hand, and that nothing is lost on the way there and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echelon.ops.scales import LINEAR, Scale, symexp, symlog

SYMLOG, GAME = Scale("symlog"), Scale("range", -20.0, 0.0)


def test_symlog_is_the_number_near_zero_and_its_logarithm_far_away() -> None:
    x = torch.tensor([0.0, math.e - 1, 1 - math.e**2, 999.0, 1e-6], dtype=torch.float64)
    expected = torch.tensor([0.0, 1.0, -2.0, math.log(1000), 1e-6], dtype=torch.float64)
    torch.testing.assert_close(symlog(x), expected, rtol=1e-6, atol=0)


@given(st.floats(-1e6, 1e6))
def test_symexp_undoes_symlog(value: float) -> None:
    x = torch.tensor(value, dtype=torch.float64)
    assert symexp(symlog(x)).item() == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_both_have_slope_one_at_zero() -> None:
    for function in (symlog, symexp):
        x = torch.tensor([0.001, -0.001], requires_grad=True)
        function(x).sum().backward()
        torch.testing.assert_close(x.grad, torch.ones(2), rtol=2e-3, atol=0)


def test_a_range_is_never_left_and_its_middle_is_what_zero_means() -> None:
    values = GAME.values(torch.tensor([0.0, math.log(3), -1e4, 1e4]))
    torch.testing.assert_close(values, torch.tensor([-10.0, -5.0, -20.0, 0.0]))


def test_on_the_linear_scale_nothing_happens() -> None:
    x = torch.tensor([3.0, -7.0])
    assert LINEAR.values(x) is x
    assert LINEAR.compared(x) is x
    assert LINEAR.start(-7.0) == -7.0


def test_losses_compare_logarithms_on_the_scale_of_symlog_and_values_elsewhere() -> None:
    x = torch.tensor([math.e - 1, 0.0])
    torch.testing.assert_close(SYMLOG.compared(x), torch.tensor([1.0, 0.0]))
    assert GAME.compared(x) is x


@pytest.mark.parametrize("scale", [LINEAR, SYMLOG, GAME])
def test_outputs_can_start_at_a_value(scale: Scale) -> None:
    assert scale.values(torch.tensor(scale.start(-7.5))).item() == pytest.approx(-7.5, rel=1e-5)


@pytest.mark.parametrize(("value", "moved"), [(-30.0, -19.8), (0.0, -0.2), (5.0, -0.2)])
def test_values_at_the_end_of_the_range_start_inside_it(value: float, moved: float) -> None:
    assert GAME.values(torch.tensor(GAME.start(value))).item() == pytest.approx(moved, rel=1e-4)
