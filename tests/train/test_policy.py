"""How advantages move a policy: which gradient, how many steps, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import peft
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
    SamplerMismatch,
    passes,
    policy_loss,
    reference_logprobs,
    starting_policy,
    update_policy,
)

LEARN: dict[str, Any] = {"settings": PolicyConfig(), "tokens_per_pass": 100, "seed": 0}
SETTINGS: dict[str, Any] = {"settings": PolicyConfig(), "temperature": 1.0}


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
    logged = []
    for _ in range(5):
        batch.logprobs = token_logprobs(policy, batch).detach()
        logged.append(update(learner, batch, PolicyConfig(entropy_coef=1.0))["policy/entropy"])
    assert logged == sorted(logged)
    assert logged[-1] > logged[0]


def three_steps(
    policy: nn.Module, batch: Batch, settings: PolicyConfig, *, leave_out: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Weights after three updates on one batch, with some momentum and weight decay, and what the last one logged."""
    monkeypatch.setattr(PolicyConfig, "only_advantages", leave_out)
    learner = Learner(copy.deepcopy(policy), OptimConfig(lr=1e-3, weight_decay=0.1))
    batch = replace(batch)
    for _ in range(3):
        batch.logprobs = token_logprobs(learner.module, batch).detach()
        logged = update(learner, batch, settings)
    return list(learner.module.parameters()), logged


@pytest.mark.parametrize("settings", [{}, {"epochs": 2, "minibatches": 2}, {"loss": "reinforce"}])
@pytest.mark.parametrize("advantages", [[1.0, 0.0, 0.0, -2.0], [0.0, 0.0, 0.5, 0.0], [0.0] * 4])
def test_rows_without_advantage_are_left_out_and_the_weights_become_the_same(
    policy: nn.Module,
    batch: Batch,
    settings: dict[str, Any],
    advantages: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when there is no other row: the optimizer then steps with a gradient of zero."""
    chosen = PolicyConfig(**settings)
    assert chosen.only_advantages
    batch.advantages = batch.spread(torch.tensor([0.5, -1.0, 1.0, -0.5]))
    update(Learner(policy, OptimConfig(lr=1e-3)), batch, PolicyConfig())
    batch.advantages = batch.spread(torch.tensor(advantages))
    (expected, whole), (found, part) = (
        three_steps(policy, batch, chosen, leave_out=leave_out, monkeypatch=monkeypatch) for leave_out in (False, True)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert whole["policy/rows_left_out"] == 0
    assert part["policy/rows_left_out"] == min(advantages.count(0.0), 3)
    assert part["policy/loss"] == pytest.approx(whole["policy/loss"], abs=1e-6)
    assert part["policy/grad_norm"] == pytest.approx(whole["policy/grad_norm"], rel=1e-4)


def test_what_is_logged_are_means_over_the_rows_that_were_computed(policy: nn.Module, batch: Batch) -> None:
    """A ratio of 1 is logged as 1, not as the fraction of rows that were left."""
    batch.advantages = batch.spread(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    logged = update(Learner(policy, OptimConfig(lr=1e-3)), batch, PolicyConfig())
    assert logged["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    _, alone = policy_loss(policy, batch.only(torch.tensor([True, False, False, False])), **SETTINGS)
    assert logged["policy/entropy"] == pytest.approx(alone["entropy"], rel=1e-2)


def test_rows_without_advantage_are_not_computed(policy: nn.Module, batch: Batch) -> None:
    batch.advantages = batch.spread(torch.tensor([1.0, 0.0, 0.0, -1.0]))
    seen: list[int] = []
    policy.get_decoder().register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
    update(Learner(policy, OptimConfig()), batch, PolicyConfig())
    assert sum(seen) == 2


@pytest.mark.parametrize("settings", [{"loss": "awr"}, {"entropy_coef": 0.1}, {"kl_coef": 0.1}])
def test_rows_without_advantage_stay_where_they_teach(
    policy: nn.Module, batch: Batch, settings: dict[str, Any]
) -> None:
    batch.advantages = torch.zeros_like(batch.logprobs)
    before = [parameter.clone() for parameter in policy.parameters()]
    elsewhere = tiny(["a few words"], vocab_size=270, hidden=16, layers=1, heads=2, seed=1)[0]
    learn = LEARN | {"settings": PolicyConfig(**settings)}
    logged = update_policy(Learner(policy, OptimConfig(lr=1e-2)), batch, reference=elsewhere, temperature=1.0, **learn)
    assert logged["policy/rows_left_out"] == 0
    assert logged["policy/grad_norm"] > 0
    assert not any(one.equal(other) for one, other in zip(before, policy.parameters(), strict=True))


def test_log_probs_that_are_not_the_policys_are_an_error_before_any_weight_moves(
    policy: nn.Module, batch: Batch
) -> None:
    learner = Learner(policy, OptimConfig(lr=1e-2))
    before = [parameter.clone() for parameter in policy.parameters()]
    assert batch.logprobs is not None
    batch.logprobs[2, 3] += 0.02
    for tokens_per_pass in (1, 100):  # whichever pass it is seen in
        with pytest.raises(SamplerMismatch, match=r"differ by up to 0\.02, more than policy\.max_mismatch = 0\.01, so"):
            update_policy(
                learner, batch, reference=None, temperature=1.0, **LEARN | {"tokens_per_pass": tokens_per_pass}
            )
    assert all(one.equal(other) for one, other in zip(before, policy.parameters(), strict=True))
    assert (learner.version, learner.optimizer.state_dict()["state"]) == (0, {})
    logged = update(learner, batch, PolicyConfig(max_mismatch=0.03))
    assert logged["policy/first_mismatch"] == pytest.approx(0.02, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.9, 1.1])
def test_another_temperature_than_the_samplers_is_a_mismatch(
    policy: nn.Module, batch: Batch, temperature: float
) -> None:
    with torch.no_grad():
        policy.get_output_embeddings().weight.mul_(30)  # as initialised it is nearly uniform at any temperature
        batch.logprobs = token_logprobs(policy, batch)
    with pytest.raises(SamplerMismatch):
        update_policy(Learner(policy, OptimConfig()), batch, reference=None, temperature=temperature, **LEARN)


def test_later_steps_of_a_batch_may_move_away(policy: nn.Module, batch: Batch) -> None:
    logged = update(Learner(policy, OptimConfig(lr=0.1)), batch, PolicyConfig(epochs=3))
    assert logged["policy/mismatch/max"] > 0.01 > logged["policy/first_mismatch"]


def test_in_lower_precision_a_mismatch_is_only_logged(policy: nn.Module, batch: Batch) -> None:
    assert batch.logprobs is not None
    batch.logprobs[2, 3] += 0.5
    logged = update(Learner(policy.to(torch.bfloat16), OptimConfig(lr=1e-2)), batch, PolicyConfig())
    assert logged["policy/first_mismatch"] == pytest.approx(0.5, abs=0.05)


def with_adapter(policy: nn.Module) -> nn.Module:
    """The policy with a low-rank adapter that has learned something."""
    adapted = peft.get_peft_model(policy, peft.LoraConfig(r=2, target_modules=["v_proj", "down_proj"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(len(name)))
    return adapted


def test_of_a_model_with_an_adapter_the_reference_is_the_model_without_it(policy: nn.Module, batch: Batch) -> None:
    expected = token_logprobs(policy, batch).detach()
    adapted = with_adapter(copy.deepcopy(policy))
    settings = PolicyConfig(kl_coef=0.1)
    reference = starting_policy(adapted, settings)
    assert reference is adapted, "no copy"
    found = reference_logprobs(reference, batch, temperature=1.0, tokens_per_pass=100)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (token_logprobs(adapted, batch) - expected).abs().max() > 1e-2, "its adapter is on again"


def test_an_adapter_learns_against_the_model_below_it(policy: nn.Module, batch: Batch) -> None:
    base = {name: weight.clone() for name, weight in policy.state_dict().items()}
    adapted = with_adapter(policy)
    learner = Learner(adapted, OptimConfig(lr=1e-2))
    batch.logprobs = token_logprobs(adapted, batch).detach()
    batch.advantages = torch.zeros_like(batch.logprobs)
    settings = PolicyConfig(kl_coef=1.0, epochs=20)
    logged = [update(learner, batch, settings)["policy/kl_to_start"]]
    batch.logprobs = token_logprobs(adapted, batch).detach()
    logged.append(update(learner, batch, settings)["policy/kl_to_start"])
    assert logged[0] > 2 * logged[1] > 0
    kept = {name: weight for name, weight in adapted.state_dict().items() if "lora" not in name}
    assert len(kept) == len(base)
    assert all(one.equal(other) for one, other in zip(kept.values(), base.values(), strict=True))


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
        ({"max_mismatch": 0.0}, "^max_mismatch = 0.0: rounding alone differs"),
        ({"kl_coef": -0.1}, "^kl_coef = -0.1: a negative weight rewards the opposite"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(**settings)
