"""Statistics see the True positions of a mask and nothing else."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echelon.ops.masked import explained_variance, masked_mean, masked_var, masked_whiten

X = torch.tensor([[1.0, math.nan, 3.0], [8.0, -math.inf, math.inf]])
MASK = torch.tensor([[True, False, True], [True, False, False]])
ALL = torch.tensor([True, True, True])


def test_mean_and_variance_by_hand():
    assert masked_mean(X, MASK) == 4.0
    assert masked_var(X, MASK) == 13.0  # (9 + 1 + 16) / 2


def test_nothing_selected_is_zero_and_one_selected_does_not_vary():
    nothing, one = torch.zeros_like(MASK), torch.tensor([[False, False, True], [False, False, False]])
    assert masked_mean(X, nothing) == 0
    assert masked_var(X, nothing) == 0
    assert masked_var(X, one) == 0
    assert masked_whiten(X, one).abs().sum() == 0


def test_whitening_by_hand():
    whitened = masked_whiten(X, MASK)
    expected = torch.tensor([[-3.0, 0.0, -1.0], [4.0, 0.0, 0.0]]) / math.sqrt(13)
    torch.testing.assert_close(whitened, expected)
    torch.testing.assert_close(masked_whiten(X, MASK, shift_mean=False), torch.where(MASK, expected + 4, 0.0))


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=20))
def test_whitened_values_have_mean_zero_and_at_most_unit_variance(numbers):
    x = torch.tensor(numbers, dtype=torch.float64)
    mask = torch.ones_like(x, dtype=torch.bool)
    whitened = masked_whiten(x, mask)
    assert abs(masked_mean(whitened, mask)) < 1e-6
    assert masked_var(whitened, mask) < 1 + 1e-9
    if masked_var(x, mask) > 1e-3:
        assert masked_var(whitened, mask) == pytest.approx(1, rel=1e-4)


def test_no_gradient_leaves_the_mask():
    x = X.clone().requires_grad_()
    (masked_mean(x, MASK) + masked_var(x, MASK)).backward()
    torch.testing.assert_close(x.grad, torch.tensor([[1 / 3 - 3, 0, 1 / 3 - 1], [1 / 3 + 4, 0, 0]]))


def test_explained_variance_by_hand():
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns, ALL) == 1
    assert explained_variance(returns + 5, returns, ALL) == 1  # a constant offset is not variation
    assert explained_variance(torch.full((3,), 7.0), returns, ALL) == 0
    assert explained_variance(-returns, returns, ALL) == -3  # residuals 2, 4, 6 have variance 4


def test_explained_variance_ignores_masked_junk():
    returns, values = torch.tensor([1.0, 2.0, 3.0, math.nan]), torch.tensor([1.0, 2.0, 3.0, math.inf])
    assert explained_variance(values, returns, torch.tensor([True, True, True, False])) == 1


def test_returns_that_do_not_vary_leave_nothing_to_explain():
    constant = torch.full((3,), 0.1)
    many = torch.full((1000,), 0.1, dtype=torch.float64)  # whose mean is not 0.1
    assert explained_variance(torch.arange(1000.0).double(), many, torch.ones_like(many, dtype=torch.bool)) == 0
    assert explained_variance(torch.tensor([1.0, 2.0, 3.0]), constant, ALL) == 0
    assert explained_variance(constant, torch.zeros(3), ALL) == 0
    assert explained_variance(constant, constant, ~ALL) == 0
