"""What the terms of the responder's reward and loss do to a policy, decided by listing everything it can say.

Two policies small enough to list: one says a single word of three; one says the same word again or stops, four words at
most. Expectations over what is said, and over all batches of it, are exact sums in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from echelon.ops import losses
from echelon.ops.credit import discounted_returns
from echelon.ops.shaped import dense_rewards, surprisal_rewards

WORDS = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
"""Logits of three words: probabilities 0.665, 0.245 and 0.090."""

Loss = Callable[[Tensor], Tensor]
"""What is minimised, per word, of the log-probs of the words that were said."""


def surprisal_reward(logprobs_N: Tensor, *, mean: float = 0.0) -> Tensor:
    """Policy gradient whose only reward is surprisal."""
    everything = torch.ones(1, len(logprobs_N), dtype=torch.bool)
    earned = surprisal_rewards(logprobs_N.detach()[None], everything, coef=1.0, mean=mean)[0]
    return losses.reinforce(logprobs_N, earned.to(logprobs_N.dtype))


def expected(loss: Loss) -> Tensor:
    """The exact expected gradient of minus the loss on a word sampled from the policy itself: where it is moved."""
    logits = WORDS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    (gradient,) = torch.autograd.grad((logprobs.detach().exp() * loss(logprobs)).sum(), logits)
    return -gradient


def entropy_after(loss: Loss, *, steps: int, said: int = 3, rate: float = 0.2) -> float:
    """Mean entropy, over all batches of `said` words, after gradient steps on the batch."""
    mean = 0.0
    for batch in itertools.product(range(3), repeat=said):
        logits, words = WORDS.clone().requires_grad_(), torch.tensor(batch)
        for _ in range(steps):
            (gradient,) = torch.autograd.grad(loss(logits.log_softmax(0)[words]).mean(), logits)
            logits = (logits - rate * gradient).detach().requires_grad_()
        mean += float(WORDS.softmax(0)[words].prod() * losses.entropy(logits.detach()))
    return mean


def test_surprisal_follows_the_gradient_of_entropy_centred_or_not() -> None:
    logits = WORDS.clone().requires_grad_()
    (of_entropy,) = torch.autograd.grad(losses.entropy(logits), logits)
    torch.testing.assert_close(expected(surprisal_reward).double(), of_entropy, atol=1e-6, rtol=1e-6)
    centred = expected(lambda logprobs: surprisal_reward(logprobs, mean=0.8))
    torch.testing.assert_close(centred.double(), of_entropy, atol=1e-6, rtol=1e-6)


def test_the_two_perplexity_terms_have_opposite_signs() -> None:
    entropy = float(losses.entropy(WORDS))
    assert entropy == pytest.approx(0.8324, abs=1e-4)
    assert entropy_after(surprisal_reward, steps=1) == pytest.approx(0.8551, abs=1e-4)
    assert entropy_after(surprisal_reward, steps=8) == pytest.approx(0.8910, abs=1e-4)
    assert entropy_after(losses.nll, steps=1) == pytest.approx(0.8318, abs=1e-4)
    assert entropy_after(losses.nll, steps=8) == pytest.approx(0.8042, abs=1e-4)


def test_self_likelihood_moves_nothing_on_average_and_sharpens_by_what_was_said_by_chance() -> None:
    assert expected(losses.nll).abs().max() < 1e-12  # ∇ of Σ π over a constant
    drifts = [float(losses.entropy(WORDS)) - entropy_after(losses.nll, steps=4, said=said) for said in (1, 2, 4)]
    assert drifts[0] > drifts[1] > drifts[2] > 0  # the fewer were said, the more of it is chance


def pull_to_be_long(reward_of: Callable[[Tensor], Tensor]) -> float:
    """d (expected return) / d (logit of going on), exactly, of a policy that goes on with probability one half.

    A reply has 1 to 4 words: after each but the fourth the policy goes on or stops. `reward_of` gives the rewards of a
    reply's words from their log-probs. How much longer it gets per unit of the logit is 0.6875: the mean length is
    1 + p + p² + p³, so d/dp is 2.75 at one half, and dp/dlogit is 1/4.
    """
    logit = torch.zeros((), dtype=torch.float64, requires_grad=True)
    go, stop = torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)
    total = torch.zeros((), dtype=torch.float64)
    for length in (1, 2, 3, 4):
        choices = [go] * (length - 1) + ([stop] if length < 4 else [])  # the fourth word is the last
        logprobs = torch.stack([*choices, *([go] if length == 4 else [])])
        to_go = discounted_returns(reward_of(logprobs.detach()), gamma=1.0)
        chance = torch.stack(choices).sum().detach().exp()
        weighed = logprobs[: len(choices)] * to_go[: len(choices)]
        total = total + chance * weighed.sum()
    (pull,) = torch.autograd.grad(total, logit)
    return float(pull)


def satisfied(how: str) -> Callable[[Tensor], Tensor]:
    """Rewards of a reply that satisfies by 4 whatever its length."""

    def reward_of(logprobs: Tensor) -> Tensor:
        turn = torch.zeros(1, len(logprobs), dtype=torch.long)
        if how == "off":
            return torch.nn.functional.pad(torch.tensor([4.0]), (len(logprobs) - 1, 0)).double()
        return dense_rewards(torch.tensor([4.0]), turn, turn >= 0, how=how)[0].double()

    return reward_of


def surprising(mean: float) -> Callable[[Tensor], Tensor]:
    def reward_of(logprobs: Tensor) -> Tensor:
        mask = torch.ones(1, len(logprobs), dtype=torch.bool)
        return surprisal_rewards(logprobs[None], mask, coef=1.0, mean=mean)[0].double()

    return reward_of


def test_satisfaction_as_written_pays_for_length_and_length_neutral_hardly() -> None:
    """Paid in parts it pays a little: what earlier words are paid depends on the length, and no later word answers for
    that. At the last word nothing is paid for length."""
    assert pull_to_be_long(satisfied("off")) == pytest.approx(0.0, abs=1e-6)
    assert pull_to_be_long(satisfied("length_neutral")) == pytest.approx(7 / 48, abs=1e-6)
    assert pull_to_be_long(satisfied("literal")) == pytest.approx(4 * 0.6875)


def test_raw_surprisal_pays_for_length_and_centred_surprisal_does_not() -> None:
    bit = math.log(2)  # both choices are as surprising
    assert pull_to_be_long(surprising(0.0)) == pytest.approx(0.6875 * bit, abs=1e-6)
    assert pull_to_be_long(surprising(bit)) == pytest.approx(0.0, abs=1e-6)
