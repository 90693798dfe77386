"""How a policy learns from advantages: clipped surrogate or plain policy gradient, entropy, KL to where it began.

What every recipe shares whose policy writes tokens. It refuses to know where the advantages come from.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from echelon.config import OptimConfig, demand
from echelon.data.packing import Batch
from echelon.models.lm import token_logprobs, token_logprobs_and_entropy
from echelon.ops import losses
from echelon.seeds import derive_seed
from echelon.train.learner import Learner, LossFn, average


@dataclass(frozen=True)
class PolicyConfig:
    """How a policy learns from advantages."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4))
    """Optimizer of the policy."""
    loss: Literal["clipped", "reinforce", "awr"] = "clipped"
    """The clipped surrogate of PPO, the plain policy gradient (on-policy, so one optimizer step per batch), or
    advantage-weighted regression, which imitates what was said, the better the more, and pushes nothing away."""
    awr_beta: float = 3.0
    """How much more a better utterance is imitated: e to the power of this per unit of advantage, at most 20 times."""
    clip_low: float = 0.2
    """How far the ratio of new to old probability may fall below 1."""
    clip_high: float = 0.2
    """How far the ratio may rise above 1."""
    dual_clip: float | None = None
    """Bounds the loss of a negative advantage by this many times its size; 3 is usual, null is no bound."""
    epochs: int = 1
    """Passes over the batch of a step."""
    minibatches: int = 1
    """Optimizer steps per pass, each on a random part of the rows."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, per token."""
    kl_coef: float = 0.0
    """Weight of KL to the starting policy, per token; 0 keeps no reference."""
    kl_loss: Literal["k2", "k3"] = "k2"
    """What is minimised: k2 has the gradient of KL(policy ‖ start), k3 (GRPO's) that of KL(start ‖ policy)."""

    def __post_init__(self) -> None:
        for name in ("epochs", "minibatches"):
            demand(self, name, getattr(self, name) >= 1, "it counts something there must be one of. Give 1 or more.")
        demand(self, "clip_low", 0 < self.clip_low <= 1, "a ratio falls from 1 to 0 at most. Give 0.2, or up to 1.")
        demand(self, "clip_high", self.clip_high > 0, "no ratio could rise. Give 0.2, or more to clip less.")
        dual = self.dual_clip is None or self.dual_clip > 1
        demand(self, "dual_clip", dual, "a bound of 1 or less would cut off ratios near 1. Give 3, or null for none.")
        demand(self, "awr_beta", self.awr_beta > 0, "worse utterances would be imitated more. Give a positive number.")
        for name in ("entropy_coef", "kl_coef"):
            demand(self, name, getattr(self, name) >= 0, "a negative weight rewards the opposite. Give 0 or more.")
        off_policy = self.loss == "reinforce" and self.epochs * self.minibatches > 1
        demand(
            self,
            "epochs" if self.epochs > 1 else "minibatches",
            not off_policy,
            "the plain policy gradient is on-policy, so it takes one step per batch. Use loss = clipped for more.",
        )


def starting_policy(module: nn.Module, settings: PolicyConfig) -> nn.Module | None:
    """A frozen copy of the policy as it is now, if KL to it counts."""
    return copy.deepcopy(module).requires_grad_(False) if settings.kl_coef else None


def update_policy(
    policy: Learner,
    batch: Batch,
    *,
    settings: PolicyConfig,
    reference: nn.Module | None,
    temperature: float,
    tokens_per_pass: int,
    seed: int,
) -> dict[str, float]:
    """All optimizer steps on one batch with advantages; what they logged, averaged, under "policy/".

    `first_mismatch` is the largest |log π - log π_sampled| of the first step, before any weight has moved: more than
    about 1e-4 in float32 means that sampler and trainer do not see the same distribution.
    """
    if reference is not None:
        batch.ref_logprobs = reference_logprobs(
            reference, batch, temperature=temperature, tokens_per_pass=tokens_per_pass
        )
    loss_fn = partial(policy_loss, settings=settings, temperature=temperature)
    epochs, minibatches = settings.epochs, settings.minibatches
    logged = passes(
        policy, batch, loss_fn, epochs=epochs, minibatches=minibatches, tokens_per_pass=tokens_per_pass, seed=seed
    )
    numbers = {**average(logged), "first_mismatch": logged[0]["mismatch/max"]}
    return {f"policy/{name}": value for name, value in numbers.items()}


def passes(
    learner: Learner,
    batch: Batch,
    loss_fn: LossFn,
    *,
    epochs: int,
    minibatches: int,
    tokens_per_pass: int,
    seed: int,
) -> list[dict[str, float]]:
    """One optimizer step per mini-batch, `epochs` times over all rows in a new order; what each step logged."""
    return [
        learner.update(part.split(tokens_per_pass), loss_fn)
        for epoch in range(epochs)
        for part in batch.shuffle_split(minibatches, seed=derive_seed(seed, epoch))
    ]


def policy_loss(
    module: nn.Module, batch: Batch, *, settings: PolicyConfig, temperature: float
) -> tuple[Tensor, dict[str, float]]:
    """Clipped surrogate or policy gradient, less the entropy bonus, plus KL to the start; a mean over tokens."""
    logprobs, entropy = token_logprobs_and_entropy(module, batch, temperature=temperature)
    old = losses.require(batch.logprobs, "logprobs", "The sampler must return them.")
    advantages = losses.require(batch.advantages, "advantages", "Set batch.advantages before the update.")
    low, high, dual = settings.clip_low, settings.clip_high, settings.dual_clip
    clipped, stats = losses.clipped_surrogate(logprobs, old, advantages, batch.mask, low=low, high=high, dual=dual)
    loss = clipped
    if settings.loss == "reinforce":
        loss = losses.reinforce(logprobs, advantages, batch.mask)
    elif settings.loss == "awr":
        loss = losses.awr(logprobs, advantages, batch.mask, beta=settings.awr_beta)
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * entropy
    stats |= {"entropy": entropy.detach(), "mismatch/max": (logprobs - old).abs().detach()}
    if settings.kl_coef:
        ref = losses.require(batch.ref_logprobs, "ref_logprobs", "kl_coef needs the starting policy's log-probs.")
        kl = {"k2": losses.kl_k2, "k3": losses.kl_k3}[settings.kl_loss]
        loss = loss + settings.kl_coef * kl(logprobs, ref, batch.mask)
        stats["kl_to_start"] = losses.kl_k3(logprobs, ref, batch.mask).detach()
    return losses.token_sum(loss, batch.mask, batch.denom), losses.reduce_stats(stats, batch.mask, batch.denom)


@torch.no_grad()
def reference_logprobs(
    reference: nn.Module, batch: Batch, *, temperature: float, tokens_per_pass: int
) -> Float[Tensor, "B T"]:
    """log-probs of the batch's tokens under a policy that does not learn, on the CPU."""
    out = torch.zeros(batch.tokens.shape)
    for micro in batch.split(tokens_per_pass):
        logprobs = token_logprobs(reference, micro.to(next(reference.parameters()).device), temperature=temperature)
        out[micro.rows, : logprobs.shape[1]] = logprobs.cpu()
    return out
