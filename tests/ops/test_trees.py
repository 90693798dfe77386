"""Values of trees, by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echelon.ops.trees import attempt_before, child_mean, tree_values

PARENTS = torch.tensor([-1, 0, 0, 1, 1, 2, -1, 6])
"""Two trees: 0 has children 1 and 2, 1 has 3 and 4, 2 has 5; and 6 has 7."""


def test_children_are_averaged_and_leaves_are_said_to_have_none() -> None:
    mean_N, has_N = child_mean(torch.arange(8.0), PARENTS)
    assert mean_N.tolist() == [1.5, 3.5, 5, 0, 0, 0, 7, 0]
    assert has_N.tolist() == [True, True, True, False, False, False, True, False]


def test_values_of_a_tree_by_hand() -> None:
    own_N = torch.tensor([1.0, 0, 0, 2, 4, 6, 1, 1])
    assert tree_values(own_N, PARENTS).tolist() == [1 + (3 + 6) / 2, 3, 6, 2, 4, 6, 2, 1]
    assert tree_values(own_N, PARENTS, gamma=0.5).tolist() == [1 + 0.5 * (1.5 + 3) / 2, 1.5, 3, 2, 4, 6, 1.5, 1]


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=12), st.floats(0, 1))
def test_in_a_chain_the_value_is_the_discounted_return(rewards: list[float], gamma: float) -> None:
    chain = torch.arange(len(rewards)) - 1
    values = tree_values(torch.tensor(rewards, dtype=torch.float64), chain, gamma=gamma).tolist()
    for start, value in enumerate(values):
        assert value == pytest.approx(sum(gamma**t * r for t, r in enumerate(rewards[start:])), abs=1e-6)


def test_the_attempt_before_is_the_nearest_one_above() -> None:
    solver_N = torch.tensor([True, False, False, True, True, True, False, True])
    assert attempt_before(PARENTS, solver_N).tolist() == [-1, 0, 0, 0, 0, 0, -1, -1]


def test_a_parent_that_comes_later_is_refused() -> None:
    with pytest.raises(AssertionError, match="earlier"):
        tree_values(torch.zeros(2), torch.tensor([1, -1]))
