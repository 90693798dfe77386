"""How advantages move a policy: which gradient, how many steps, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from echelon.config import LoraConfig, OptimConfig
from echelon.data.packing import Batch, Sampled, pack
from echelon.errors import ConfigError, DataError
from echelon.models import lora
from echelon.models.lm import tiny, token_logprobs
from echelon.text.chat import Example
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


@pytest.mark.parametrize("loss", ["clipped", "gspo", "cispo"])
def test_on_its_own_samples_every_ratio_is_one_and_has_the_gradient_of_reinforce(
    policy: nn.Module, batch: Batch, loss: str
) -> None:
    found = gradient(policy, batch, PolicyConfig(loss=loss))
    assert found.norm() > 0
    torch.testing.assert_close(found, gradient(policy, batch, PolicyConfig(loss="reinforce")))


@pytest.fixture
def conversations(policy: nn.Module) -> Batch:
    """Two episodes of two turns and one of one, in three rows; the policy has moved since it said all that."""
    said = [([7], [20, 21, 40]), ([7, 20, 21, 40, 8], [22, 40]), ([9], [23, 40]), ([9, 23, 40, 8, 8], [24])]
    turns = [Sampled(prompt, action, [0.0] * len(action)) for prompt, action in [*said, ([6, 6], [25, 26, 27, 40])]]
    packed = pack(turns)
    assert len(packed.rows) == 3
    with torch.no_grad():
        now = token_logprobs(policy, packed)
    moved = 0.3 * torch.randn(now.shape, generator=torch.Generator().manual_seed(0))
    packed.logprobs = torch.where(packed.mask, now - moved, 0.0)
    packed.advantages = packed.spread(torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5]))
    return packed


def test_the_ratio_of_gspo_belongs_to_one_turn(policy: nn.Module, conversations: Batch) -> None:
    """Longhand: the loss of each turn from its own tokens, in whatever row they lie, weighed by their number."""
    settings = PolicyConfig(loss="gspo", clip_low=0.05, clip_high=0.05)
    batch, expected, clipped = conversations, torch.zeros(()), 0
    now = token_logprobs(policy, batch)
    for turn, advantage in enumerate([1.0, -1.0, 2.0, -2.0, 0.5]):
        own = batch.turn == turn
        s = (now[own] - batch.logprobs[own]).mean().exp()
        expected = expected - own.sum() * torch.minimum(s * advantage, s.clamp(0.95, 1.05) * advantage) / 12
        clipped += int(own.sum()) * bool((s.clamp(0.95, 1.05) - s) * advantage < 0)
    expected.backward()
    by_hand = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    loss, stats = policy_loss(policy, batch, settings=settings, temperature=1.0)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert 0 < clipped < 12
    assert stats["clipped"] == pytest.approx(clipped / 12)
    torch.testing.assert_close(gradient(policy, batch, settings), by_hand, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("loss", ["clipped", "gspo", "cispo", "reinforce", "awr"])
def test_micro_batches_do_not_change_the_gradient(policy: nn.Module, conversations: Batch, loss: str) -> None:
    settings = PolicyConfig(loss=loss, clip_low=0.1, clip_high=0.1, entropy_coef=0.01)
    conversations.weights = conversations.spread(torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0]))
    whole = gradient(policy, conversations, settings)
    policy.zero_grad()
    for part in conversations.split(1):
        policy_loss(policy, part, settings=settings, temperature=1.0)[0].backward()
    parts = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"entropy_coef": 1.0}, {"kl_coef": 1.0}, {"loss": "awr"}])
def test_weights_weigh_what_is_no_multiple_of_an_advantage(
    policy: nn.Module, batch: Batch, settings: dict[str, Any]
) -> None:
    """A weight of 2 on one row and none on the others: twice what that row alone would be."""
    batch.ref_logprobs = torch.where(batch.mask, batch.logprobs - 0.5, 0.0)
    batch.advantages = torch.zeros_like(batch.logprobs)
    batch.weights = batch.spread(torch.tensor([0.0, 2.0, 0.0, 0.0]))
    found, _ = policy_loss(policy, batch, settings=PolicyConfig(**settings), temperature=1.0)
    alone = replace(batch.only(torch.tensor([False, True, False, False])), weights=None)
    expected, _ = policy_loss(policy, alone, settings=PolicyConfig(**settings), temperature=1.0)
    assert found.item() == pytest.approx(2 * expected.item())
    assert abs(expected.item()) > 0.01


def test_reference_log_probs_that_are_there_are_not_computed_again(policy: nn.Module, batch: Batch) -> None:
    batch.ref_logprobs = torch.where(batch.mask, batch.logprobs - 0.5, 0.0)
    settings = PolicyConfig(kl_coef=0.1)
    logged = update(Learner(policy, OptimConfig()), batch, settings)
    assert logged["policy/kl_to_start"] == pytest.approx(torch.tensor(-0.5).exp().item() - 0.5, rel=1e-3)


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


OFF_POLICY: dict[str, Any] = {"epochs": 2, "minibatches": 2}


@pytest.mark.parametrize(
    "settings",
    [{}, OFF_POLICY, {"loss": "reinforce"}, OFF_POLICY | {"loss": "gspo"}, OFF_POLICY | {"loss": "cispo"}],
)
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


def with_adapter(policy: nn.Module, *, dropout: float = 0.0) -> nn.Module:
    """The policy with a new low-rank adapter, which changes nothing yet."""
    return lora.attach(policy, LoraConfig(rank=2, target=("v_proj", "down_proj"), dropout=dropout))


@torch.no_grad()
def disturb(adapted: nn.Module, seed: int = 0) -> None:
    """As if the adapter had learned something."""
    for name, weight in adapted.named_parameters():
        if "lora_B" in name and weight.requires_grad:
            weight.normal_(generator=torch.Generator().manual_seed(seed + len(name)))


@pytest.mark.parametrize("learned_before", [False, True])
def test_of_a_model_with_an_adapter_the_reference_is_the_adapter_as_it_began(
    policy: nn.Module, batch: Batch, learned_before: bool
) -> None:
    adapted = with_adapter(copy.deepcopy(policy))
    if learned_before:
        disturb(adapted)
    expected = token_logprobs(adapted, batch).detach()
    assert expected.allclose(token_logprobs(policy, batch)) is not learned_before
    reference = starting_policy(adapted, PolicyConfig(kl_coef=0.1))
    assert reference is adapted, "no copy"
    disturb(adapted, seed=1)
    found = reference_logprobs(reference, batch, temperature=1.0, tokens_per_pass=100)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (token_logprobs(adapted, batch) - expected).abs().max() > 1e-2, "it is on again"


def test_an_adapter_learns_against_the_model_below_it(policy: nn.Module, batch: Batch) -> None:
    base = {name: weight.clone() for name, weight in policy.state_dict().items()}
    adapted = with_adapter(policy)
    settings = PolicyConfig(kl_coef=1.0, epochs=20)
    reference = starting_policy(adapted, settings)
    disturb(adapted)
    learner = Learner(adapted, OptimConfig(lr=1e-2))
    batch.advantages = torch.zeros_like(batch.tokens, dtype=torch.float32)
    logged = []
    for _ in range(2):
        batch.logprobs = token_logprobs(adapted, batch).detach()
        learn = LEARN | {"settings": settings, "temperature": 1.0}
        logged.append(update_policy(learner, replace(batch), reference=reference, **learn)["policy/kl_to_start"])
    assert logged[0] > 2 * logged[1] > 0
    kept = {name: weight for name, weight in adapted.state_dict().items() if "lora" not in name}
    assert len(kept) == len(base)
    assert all(one.equal(other) for one, other in zip(kept.values(), base.values(), strict=True))


def test_with_dropout_the_policy_is_compared_with_the_sampler_without_it(policy: nn.Module, batch: Batch) -> None:
    """Dropped inputs of the adapter move log-probs by far more than a mismatch may be; that is no mismatch."""
    adapted = with_adapter(policy, dropout=0.5)
    disturb(adapted)
    learner = Learner(adapted, OptimConfig(lr=1e-3))
    with torch.no_grad():
        sampled = token_logprobs(adapted.eval(), batch)
    adapted.train()
    before = [parameter.clone() for parameter in adapted.parameters()]
    batch.logprobs = sampled + 0.02 * batch.mask
    with pytest.raises(SamplerMismatch, match=r"differ by up to 0\.02"):
        update(learner, batch, PolicyConfig())
    assert all(one.equal(other) for one, other in zip(before, adapted.parameters(), strict=True))
    batch.logprobs = sampled
    logged = update(learner, batch, PolicyConfig())
    assert logged["policy/first_mismatch"] < 1e-5
    assert logged["policy/mismatch/max"] > 0.01, "while learning, dropout is on"


@pytest.fixture
def texts() -> Batch:
    """What is imitated besides: one text of two tokens, one of four."""
    return pack([Example([7], [30, 31]), Example([8, 9], [32, 33, 34, 35])])


def test_what_is_imitated_joins_every_optimizer_step(policy: nn.Module, batch: Batch, texts: Batch) -> None:
    asked: list[int] = []

    def ptx(version: int) -> Batch:
        asked.append(version)
        return texts

    settings = PolicyConfig(epochs=2, minibatches=2, ptx_coef=0.5)
    learner = Learner(policy, OptimConfig(lr=1e-2))
    with torch.no_grad():
        before = token_logprobs(policy, texts)[texts.mask].mean()
    learn = LEARN | {"settings": settings}
    logged = update_policy(learner, batch, reference=None, temperature=1.0, ptx=ptx, **learn)
    assert asked == [0, 1, 2, 3]
    assert learner.version == 4
    assert 0 < logged["policy/ptx_loss"] < -before
    assert token_logprobs(policy, texts)[texts.mask].mean() > before


@pytest.mark.parametrize("tokens_per_pass", [1, 100])
def test_the_gradient_of_a_step_is_that_of_both_losses(
    policy: nn.Module, batch: Batch, texts: Batch, tokens_per_pass: int
) -> None:
    """The mean over the texts' own tokens, at temperature 1, times its weight; however many of them there are."""
    batch.logprobs = token_logprobs(policy, batch, temperature=0.7).detach()
    policy.zero_grad()
    loss, _ = policy_loss(policy, batch, settings=PolicyConfig(), temperature=0.7)
    (loss - 0.5 * token_logprobs(policy, texts)[texts.mask].mean()).backward()
    expected = torch.stack([parameter.grad.norm() for parameter in policy.parameters()]).norm()
    learner, learn = Learner(policy, OptimConfig()), LEARN | {"tokens_per_pass": tokens_per_pass}
    learn["settings"] = PolicyConfig(ptx_coef=0.5)
    logged = update_policy(learner, batch, reference=None, temperature=0.7, ptx=lambda version: texts, **learn)
    assert logged["policy/grad_norm"] == pytest.approx(expected.item(), rel=1e-4)


def test_without_a_weight_nothing_is_imitated_and_without_texts_a_weight_is_refused(
    policy: nn.Module, batch: Batch
) -> None:
    def never(version: int) -> Batch:
        raise AssertionError

    update_policy(Learner(policy, OptimConfig()), batch, reference=None, temperature=1.0, ptx=never, **LEARN)
    with pytest.raises(ConfigError, match=r"^policy\.ptx_coef = 0\.5: nothing is there to imitate"):
        update(Learner(policy, OptimConfig()), batch, PolicyConfig(ptx_coef=0.5))


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
        ({"dual_clip": 3.0, "loss": "cispo"}, "^dual_clip = 3.0: its loss has no minimum"),
        ({"ptx_coef": -1.0}, "^ptx_coef = -1.0: a negative weight rewards the opposite"),
        ({"max_mismatch": 0.0}, "^max_mismatch = 0.0: rounding alone differs"),
        ({"kl_coef": -0.1}, "^kl_coef = -0.1: a negative weight rewards the opposite"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(**settings)
