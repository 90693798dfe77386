"""How an utterance critic learns: expectiles, scales and the token baseline, in numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from echelon.data.packing import Sampled, pack, pack_branches, pack_transitions
from echelon.data.replay import Transition
from echelon.errors import DataError
from echelon.models.heads import TokenValue, UtteranceCritic
from echelon.models.lm import tiny
from echelon.ops.scales import LINEAR, Scale
from echelon.train.critic import baseline_loss, bootstrap_, critic_loss

LM = tiny(["a b c"], vocab_size=270, hidden=16, layers=1, heads=1)[0]
STEPS = [Transition([3, 4], [10], -1.0, [3, 4, 10, 5], False), Transition([3, 4, 10, 5], [12], -1.0, None, True)]


def flat(q: float, v: float, scale: Scale = LINEAR) -> UtteranceCritic:
    """A critic that says the same whatever it reads."""
    critic = UtteranceCritic.from_lm(LM, scale=scale)
    with torch.no_grad():
        for heads, value in ((critic.q, q), (critic.v, v)):
            for head in heads:
                torch.nn.init.zeros_(head[-1].weight)  # type: ignore[index, arg-type]
                head[-1].bias.fill_(scale.start(value))  # type: ignore[index, union-attr, operator]
    return critic


def batch_of(q_target: float, v_target: float) -> Any:
    batch = pack_transitions(STEPS)
    batch.q_target, batch.v_target = torch.full((2, 2), q_target), torch.full((2, 2), v_target)
    return batch


@pytest.mark.parametrize(("expectile", "above", "below"), [(0.5, 1.0, 1.0), (0.9, 1.8, 0.2), (0.7, 1.4, 0.6)])
def test_errors_that_would_raise_v_weigh_more(expectile: float, above: float, below: float) -> None:
    """u = target - V = ±1: |τ - 1(u < 0)|·u² is .9 and .1 at τ = .9; twice that, so that ½ is the plain square."""
    for target, weight in ((-9.0, above), (-11.0, below)):
        loss, stats = critic_loss(flat(-10.0, -10.0), batch_of(-10.0, target), expectile=expectile)
        assert stats["v_loss"] == pytest.approx(2 * weight)  # both twins
        assert stats["q_loss"] == 0
        assert loss.item() == pytest.approx(2 * weight)


def test_at_one_half_loss_and_gradient_are_those_of_the_square() -> None:
    """V is pulled at with 2·(V - target), bit by bit what it was before there were expectiles."""
    critic = flat(-10.0, -10.0)
    critic_loss(critic, batch_of(-10.0, -7.0))[0].backward()
    for head in critic.v:
        assert head[-1].bias.grad.item() == -6.0  # type: ignore[index, union-attr]


def test_the_minimum_of_an_expectile_lies_where_its_errors_balance() -> None:
    """Of targets 0 and 1 the .8 expectile is .8: .2·2·(.8 - 0) = .8·2·(1 - .8)."""
    batch = batch_of(0.0, 0.0)
    batch.v_target[:, 1] = 1.0
    critic = flat(0.0, 0.8)
    critic_loss(critic, batch, expectile=0.8)[0].backward()
    for head in critic.v:
        assert head[-1].bias.grad.item() == pytest.approx(0, abs=1e-6)  # type: ignore[index, union-attr]


def test_on_the_scale_of_symlog_logarithms_are_compared_and_values_are_said() -> None:
    scale, far = Scale("symlog"), math.e**3 - 1
    critic = flat(math.e - 1, -(math.e - 1), scale)
    _, stats = critic_loss(critic, batch_of(far, far))
    assert stats["q_loss"] == pytest.approx(2 * (3 - 1) ** 2, rel=1e-5)
    assert stats["v_loss"] == pytest.approx(2 * (3 + 1) ** 2, rel=1e-5)
    assert stats["q_mean"] == pytest.approx(math.e - 1, rel=1e-5)


def test_where_v_has_no_target_nothing_is_pulled_on_any_scale() -> None:
    for scale in (LINEAR, Scale("symlog"), Scale("range", -20.0, 0.0)):
        batch, critic = batch_of(-1.0, math.nan), flat(-1.0, -5.0, scale)
        loss, stats = critic_loss(critic, batch, expectile=0.9)
        loss.backward()
        assert stats["v_loss"] == 0
        assert all(not head[-1].bias.grad for head in critic.v)  # type: ignore[index, union-attr]


@pytest.mark.parametrize("scale", [LINEAR, Scale("symlog"), Scale("range", -20.0, 0.0)])
def test_what_q_is_pulled_towards_is_a_value_on_every_scale(scale: Scale) -> None:
    batch = pack_transitions(STEPS)
    q_2N = bootstrap_(batch, flat(-8.0, -10.0, scale), gamma=0.95)
    assert batch.q_target is not None
    torch.testing.assert_close(batch.q_target, torch.tensor([[-10.5, -1.0]] * 2), rtol=1e-4, atol=0)
    torch.testing.assert_close(q_2N, torch.full((2, 2), -8.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("layout", [pack, pack_branches])
def test_the_baseline_is_pulled_towards_the_advantage_at_every_token(layout: Any) -> None:
    value = TokenValue.from_lm(LM)
    value.start_at(0.5)
    batch = layout([Sampled([3, 4], [10, 11, 12], [0.0] * 3), Sampled([3, 4], [20], [0.0])])
    batch.returns = batch.spread(torch.tensor([1.5, -0.5]))
    loss, _ = baseline_loss(value, batch)
    assert loss.item() == pytest.approx((3 * 1.0 + 1.0) / 4)
    loss.backward()
    assert value.head.bias.grad.item() == pytest.approx(2 * (3 * (0.5 - 1.5) + (0.5 + 0.5)) / 4)


def test_a_baseline_without_returns_is_an_error_not_zero() -> None:
    with pytest.raises(DataError, match="returns is missing from the batch"):
        baseline_loss(TokenValue.from_lm(LM), pack([Sampled([3], [4], [0.0])]))
