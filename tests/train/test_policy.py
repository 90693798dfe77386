"""How advantages move a policy: which gradient, how many steps, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from echelon.config import OptimConfig
from echelon.data.packing import Batch, Sampled, pack
from echelon.errors import ConfigError, DataError
from echelon.models.lm import tiny, token_logprobs
from echelon.train.learner import Learner
from echelon.train.policy import (
    PolicyConfig,
    passes,
    policy_loss,
    reference_logprobs,
    starting_policy,
    update_policy,
)


@pytest.fixture
def policy() -> nn.Module:
    return tiny(["a few words"], vocab_size=270, hidden=16, layers=1, heads=2)[0]


@pytest.fixture
def batch(policy: nn.Module) -> Batch:
    """Four turns of two tokens, sampled from the policy as it is; two were good, two bad."""
    turns = [Sampled([7, 8 + number], [20 + number, 40], [0.0, 0.0]) for number in range(4)]
    packed = pack(turns)
    with torch.no_grad():
        packed.logprobs = token_logprobs(policy, packed)
    packed.advantages = packed.spread(torch.tensor([1.0, -1.0, 2.0, -2.0]))
    return packed


def gradient(policy: nn.Module, batch: Batch, settings: PolicyConfig) -> torch.Tensor:
    policy.zero_grad()
    loss, _ = policy_loss(policy, batch, settings=settings, temperature=1.0)
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


def update(learner: Learner, batch: Batch, settings: PolicyConfig) -> dict[str, float]:
    reference = starting_policy(learner.module, settings)
    return update_policy(
        learner, batch, settings=settings, reference=reference, temperature=1.0, tokens_per_pass=100, seed=0
    )


def test_on_its_own_samples_the_surrogate_has_the_gradient_of_reinforce(policy: nn.Module, batch: Batch) -> None:
    clipped = gradient(policy, batch, PolicyConfig(loss="clipped"))
    assert clipped.norm() > 0
    torch.testing.assert_close(clipped, gradient(policy, batch, PolicyConfig(loss="reinforce")))


def test_what_was_good_becomes_likelier_and_what_was_bad_unlikelier(policy: nn.Module, batch: Batch) -> None:
    metrics = update(Learner(policy, OptimConfig(lr=1e-2)), batch, PolicyConfig(epochs=3))
    moved = batch.pool(token_logprobs(policy, batch).detach() - batch.logprobs)
    assert (moved > 0).tolist() == [True, False, True, False]
    assert metrics["policy/first_mismatch"] < 1e-6 < metrics["policy/mismatch/max"]
    assert metrics["policy/kl"] > 0


def test_a_pass_takes_one_step_per_mini_batch(policy: nn.Module, batch: Batch) -> None:
    learner = Learner(policy, OptimConfig())
    settings = PolicyConfig()
    seen: list[tuple[int, float]] = []

    def loss_fn(module: nn.Module, part: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        seen.append((len(part.tokens), part.denom))
        return policy_loss(module, part, settings=settings, temperature=1.0)

    logged = passes(learner, batch, loss_fn, epochs=3, minibatches=2, tokens_per_pass=100, seed=0)
    assert learner.version == len(logged) == 6
    assert seen == [(2, 4.0)] * 6  # two rows each; every loss is divided by its own four tokens


def test_the_entropy_bonus_raises_entropy(policy: nn.Module, batch: Batch) -> None:
    batch.advantages = torch.zeros_like(batch.logprobs)
    learner = Learner(policy, OptimConfig(lr=1e-2))
    logged = [update(learner, batch, PolicyConfig(entropy_coef=1.0))["policy/entropy"] for _ in range(5)]
    assert logged == sorted(logged)
    assert logged[-1] > logged[0]


@pytest.mark.parametrize("kl_loss", ["k2", "k3"])
def test_kl_pulls_back_to_where_it_began(policy: nn.Module, batch: Batch, kl_loss: str) -> None:
    settings = PolicyConfig(kl_coef=1.0, kl_loss=kl_loss)
    reference = starting_policy(policy, settings)
    update(Learner(policy, OptimConfig(lr=1e-2)), batch, PolicyConfig())  # away from it
    batch.advantages = torch.zeros_like(batch.logprobs)
    batch.ref_logprobs = reference_logprobs(reference, batch, temperature=1.0, tokens_per_pass=100)
    _, far = policy_loss(policy, batch, settings=settings, temperature=1.0)
    Learner(policy, OptimConfig(lr=1e-3)).update(
        [batch], lambda m, b: policy_loss(m, b, settings=settings, temperature=1)
    )
    _, near = policy_loss(policy, batch, settings=settings, temperature=1.0)
    assert 0 < near["kl_to_start"] < far["kl_to_start"]


def test_reference_logprobs_are_those_of_the_reference_however_they_are_split(policy: nn.Module, batch: Batch) -> None:
    whole = reference_logprobs(policy, batch, temperature=0.5, tokens_per_pass=100)
    torch.testing.assert_close(whole, token_logprobs(policy, batch, temperature=0.5).detach())
    torch.testing.assert_close(whole, reference_logprobs(policy, batch, temperature=0.5, tokens_per_pass=1))


def test_no_reference_is_kept_when_nothing_reads_it(policy: nn.Module) -> None:
    assert starting_policy(policy, PolicyConfig()) is None
    reference = starting_policy(policy, PolicyConfig(kl_coef=0.1))
    assert reference is not policy
    assert not any(parameter.requires_grad for parameter in reference.parameters())


@pytest.mark.parametrize(
    ("missing", "settings"),
    [("logprobs", {}), ("advantages", {}), ("ref_logprobs", {"kl_coef": 0.1})],
)
def test_a_missing_tensor_is_an_error_and_never_zero(
    policy: nn.Module, batch: Batch, missing: str, settings: dict[str, float]
) -> None:
    with pytest.raises(DataError, match=f"^{missing} is missing from the batch"):
        policy_loss(policy, replace(batch, **{missing: None}), settings=PolicyConfig(**settings), temperature=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "reinforce", "epochs": 2}, "^epochs = 2: the plain policy gradient is on-policy"),
        ({"loss": "reinforce", "minibatches": 2}, "^minibatches = 2: the plain policy gradient is on-policy"),
        ({"epochs": 0}, "^epochs = 0: "),
        ({"clip_low": 0.0}, "^clip_low = 0.0: "),
        ({"clip_high": 0.0}, "^clip_high = 0.0: no ratio could rise"),
        ({"dual_clip": 1.0}, "^dual_clip = 1.0: "),
        ({"kl_coef": -0.1}, "^kl_coef = -0.1: a negative weight rewards the opposite"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(**settings)
