"""Options and their values, with numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from echelon.ops import bellman
from echelon.ops.options import (
    advantage,
    bounds,
    draw,
    epsilon_greedy_policy,
    greedy,
    informative,
    other_option,
    readout,
    return_range,
    softmax_policy,
    state_value,
)

Q = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, 5.0]])
ALL = torch.ones(2, 3, dtype=torch.bool)
SOME = torch.tensor([[True, False, True], [True, True, False]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([[1, 7, 2], [1, 8, 2], [1, 9, 2]], (1, 1)),  # (1) (2) (3)
        ([[1, 7, 2], [1, 7, 8, 2]], (2, 0)),  # (1) (10): the shorter one keeps its last token
        ([[7], [8]], (0, 0)),
        ([[1, 7], [1, 8]], (1, 0)),
        ([[7, 2], [8, 2]], (0, 1)),
        ([[1, 2], [1, 2, 3]], (1, 0)),  # one begins the other
        ([[1, 2], [1, 1, 2]], (1, 0)),  # what both begin and what both end with would be all of the first
        ([[4, 5, 6]], (2, 0)),  # alone it has nothing to be told from
    ],
)
def test_what_all_options_begin_and_end_with_tells_nothing_apart(options, expected) -> None:
    assert informative(options) == expected
    front, back = expected
    assert all(len(option) - front - back >= 1 for option in options)


def test_q_is_the_mean_of_what_is_said_of_an_options_tokens() -> None:
    """Logits 2, 4, 6 have the mean 4, and the reward 3 with a next value of 5 makes 3 + 0.85 · 5 = 7.25."""
    scores, thirds = torch.tensor([2.0, 4.0, 6.0, 10.0]), torch.tensor([1 / 3] * 3 + [1.0])
    option = torch.tensor([0, 0, 0, 1])
    assert readout(scores, option, thirds, options=2).tolist() == pytest.approx([4.0, 10.0])
    assert readout(scores, option, torch.ones(4), options=2).tolist() == [12.0, 10.0]
    for terminated, expected in ((False, 7.25), (True, 3.0)):
        over = torch.tensor([terminated])
        wanted = bellman.td_target(torch.tensor([3.0]), torch.tensor([5.0]), gamma=0.85, terminated=over)
        assert wanted.item() == pytest.approx(expected)


def test_what_q_can_say_and_what_returns_can_be() -> None:
    assert bounds("logit") == (-math.inf, math.inf)
    assert bounds("logprob", shift=4.0) == (-math.inf, 4.0)
    assert bounds("prob", scale=40.0, shift=-5.0) == (-5.0, 35.0)
    assert return_range((0.0, 5.0), gamma=0.85) == pytest.approx((0.0, 100 / 3))
    assert return_range((-1.0, 1.0), gamma=0.0) == (-1.0, 1.0)
    assert return_range((1.0, 2.0), gamma=0.5) == (1.0, 4.0)  # an episode may end after one turn
    assert return_range((-1.0, 0.0), gamma=1.0) == (-math.inf, 0.0)


def test_the_best_is_looked_for_among_what_is_legal() -> None:
    assert greedy(Q, ALL).tolist() == [1, 2]
    assert greedy(Q, SOME).tolist() == [2, 0]
    assert state_value(Q, SOME).tolist() == [2.0, 0.0]
    with pytest.raises(AssertionError, match="must have a legal option"):
        greedy(Q, torch.zeros(2, 3, dtype=torch.bool))


def test_softmax_is_over_what_is_legal() -> None:
    probs = softmax_policy(Q, SOME, temperature=0.5)
    first = 1 / (1 + math.exp(2))  # Q of 1 and 2, twice as far apart at temperature 0.5
    torch.testing.assert_close(probs[0], torch.tensor([first, 0.0, 1 - first]))
    assert probs[1, 2] == 0
    assert probs.sum(1).tolist() == pytest.approx([1, 1])


def test_epsilon_is_shared_by_what_is_legal() -> None:
    probs = epsilon_greedy_policy(Q, SOME, epsilon=0.2)
    assert probs[0].tolist() == pytest.approx([0.1, 0.0, 0.9])
    assert epsilon_greedy_policy(Q, ALL, epsilon=0.3)[1].tolist() == pytest.approx([0.1, 0.1, 0.8])


def test_a_draw_takes_every_option_as_often_as_it_is_likely_and_never_an_impossible_one() -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    assert [draw(probs, pick) for pick in (0.0, 0.24, 0.26, 0.99, 0.9999999999)] == [1, 1, 3, 3, 3]
    third = torch.full((3,), 1 / 3)  # float32: the sum is not exactly 1
    assert [draw(third, pick) for pick in (0.0, 0.5, 0.9999999999)] == [0, 1, 2]


def test_the_advantage_is_over_what_the_policy_does_on_average() -> None:
    """Q = [1, 3, 2] with probabilities [.5, .25, .25] is worth 1.75: choosing 3 is 1.25 better."""
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]])
    legal = torch.tensor([[True, True, True], [True, True, False]])
    found = advantage(Q, legal, torch.tensor([1, 0]), probs)
    assert found.tolist() == pytest.approx([1.25, 0.5])
    assert state_value(Q, legal, probs).tolist() == pytest.approx([1.75, -0.5])
    mean = (probs * torch.stack([advantage(Q, legal, torch.full((2,), u), probs) for u in range(3)], 1)).sum(1)
    assert mean.tolist() == pytest.approx([0, 0])


def test_illegal_values_of_minus_infinity_do_not_spoil_an_expectation() -> None:
    q = torch.tensor([[1.0, -math.inf]])
    legal = torch.tensor([[True, False]])
    assert state_value(q, legal, softmax_policy(q, legal, temperature=1.0)).item() == 1.0


def test_another_option_is_any_legal_one_but_the_chosen() -> None:
    legal = [True, True, False, True]
    assert [other_option(1, legal, pick) for pick in (0.0, 0.49, 0.5, 0.999)] == [0, 0, 3, 3]
    with pytest.raises(AssertionError, match="no other option"):
        other_option(0, [True, False], 0.5)
