"""The lower level: how what replies earned makes the one who wrote them better. PPO, one reply at a time.

Every term of the reward and of the loss has a coefficient of its own and a number of its own in the log. Knows turns
and rewards; where they come from, and who chose the strategy a reply follows, is decided above.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from echelon.config import OptimConfig, demand
from echelon.data.packing import Batch, pack
from echelon.errors import DataError
from echelon.models.heads import TokenValue
from echelon.ops import losses, shaped
from echelon.ops.masked import explained_variance, masked_mean, masked_var, masked_whiten
from echelon.train.checkpoint import Saveable
from echelon.train.ema import Average
from echelon.train.learner import Learner, Weights
from echelon.train.policy import PolicyConfig, reference_logprobs, starting_policy, update_policy
from echelon.train.shaping import Shaper, ShapingConfig, cut_off
from echelon.train.stale import Stale
from echelon.train.value import before_turns, gae_of_chains, state_values, update_value, values_of
from echelon.types import Turn

MEMORY = 0.9
"""The part of the running mean of surprisal that stays at every update."""


@dataclass(frozen=True)
class ResponderConfig:
    """How the one who writes replies learns from what they earned."""

    horizon: Literal["turn", "episode"] = "turn"
    """Where a reply's credit ends: with the reply (ToSCA), or with the dialogue, so that it also answers for what later
    replies earn."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's λ, per token."""
    whiten: bool = True
    """Give advantages mean 0 and deviation 1 over the sampled tokens of a step."""
    dense: Literal["off", "literal", "length_neutral"] = "off"
    """Where satisfaction is paid: at a reply's last token; all of it at every token, which pays for length (ToSCA as
    written); or at every token its part of it."""
    surprisal_coef: float = 0.0
    """Weight of the reward for saying the unexpected, -log π per token; it raises entropy. ToSCA's is 0.01."""
    surprisal: Literal["centred", "raw"] = "centred"
    """Surprisal less its running mean, or as it is, which pays for length (ToSCA as written)."""
    self_likelihood_coef: float = 0.0
    """Weight of the loss -log π of the responder's own replies, mean over tokens; it lowers entropy (the "PPL loss" of
    ToSCA's first code)."""
    shaping: ShapingConfig = field(default_factory=lambda: ShapingConfig(kl_coef=0.01))
    """What satisfaction is made into before credit is assigned, and the KL that is taken off it."""
    value_optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    """Optimizer of the value model."""
    value_epochs: int = 1
    """Passes of the value model over the batch of a step."""
    value_minibatches: int = 4
    """Optimizer steps of the value model per pass."""
    value_clip: float | None = 0.2
    """How far a value may move from its old one within a step, in the unit of the reward; null does not bound it."""
    warmup_steps: int = 0
    """First updates in which only the value model learns."""
    policy: PolicyConfig = field(
        default_factory=lambda: PolicyConfig(optim=OptimConfig(lr=1e-6), dual_clip=3.0, minibatches=4)
    )
    """How the responder learns from advantages."""
    ema_decay: float = 0.0
    """Keep an average of the responder's weights, of which this part stays at every step; 0 keeps none."""

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            demand(self, name, 0 <= getattr(self, name) <= 1, "a discount lies between 0 and 1.")
        opposite = {
            "surprisal_coef": "self_likelihood_coef lowers entropy",
            "self_likelihood_coef": "surprisal_coef raises it",
        }
        for name, other in opposite.items():
            fits = 0 <= getattr(self, name) < math.inf
            demand(self, name, fits, f"a negative weight does the opposite, and {other}. Give 0 or more.")
        for name in ("value_epochs", "value_minibatches"):
            demand(self, name, getattr(self, name) >= 1, "it counts something there must be one of. Give 1 or more.")
        clip = self.value_clip is None or self.value_clip > 0
        demand(self, "value_clip", clip, "no value could move. Give a few units of reward, or null for no bound.")
        demand(self, "warmup_steps", self.warmup_steps >= 0, "it counts steps. Give 0 to train the responder at once.")
        demand(self, "ema_decay", 0 <= self.ema_decay < 1, "an average moves. Give 0.99, or 0 to keep none.")


@dataclass(slots=True)
class Judged:
    """Replies with everything that learning from them needs, and what there is to tell about them."""

    batch: Batch
    columns: dict[str, Float[Tensor, "N"]]
    """Per reply: `value` before it, mean `advantage` of its tokens (not whitened), and its `return`."""
    metrics: dict[str, float]
    replies: int
    """What the KL in `metrics` is per: replies, or dialogues (`horizon: episode`)."""


class Lower:
    """The responder, its value model, and what both are compared with; `update` is one step of PPO.

    `steps` is how many updates there will be, which decaying schedules need. `ptx(version)` is what is imitated in the
    optimizer step that makes that version into the next. Of a module with several adapters, `adapter` names the
    responder's. KL is to the responder as it is now, unless a `reference` is given.
    """

    def __init__(
        self,
        settings: ResponderConfig,
        module: nn.Module,
        value: TokenValue,
        *,
        tokenizer: Any,
        temperature: float = 1.0,
        tokens_per_pass: int = 4096,
        steps: int = 0,
        ptx: Callable[[int], Batch] | None = None,
        adapter: str = "",
        reference: nn.Module | None = None,
    ) -> None:
        self.settings, self.temperature, self.tokens_per_pass = settings, temperature, tokens_per_pass
        self.ptx = ptx
        each = settings.policy.epochs * settings.policy.minibatches
        updates = max(0, steps - settings.warmup_steps) * each
        fits = steps * settings.value_epochs * settings.value_minibatches
        self.policy = Learner(
            module, settings.policy.optim, total_steps=updates, name="responder", tokenizer=tokenizer, adapter=adapter
        )
        self.online = value
        self.value = Learner(value, settings.value_optim, total_steps=fits, name="value")
        counts = settings.policy.kl_coef or settings.shaping.kl_coef
        start = starting_policy(module, replace(settings.policy, kl_coef=counts)) if reference is None else reference
        self.reference = start
        self.shaper = Shaper(settings.shaping)
        self.mean = Average(self.policy, settings.ema_decay) if settings.ema_decay else None
        self.updates = 0
        self.surprisal: float | None = None

    def update(
        self,
        turns: Sequence[Turn],
        rewards_N: Float[Tensor, "N"],
        *,
        seed: int,
        shared_N: Float[Tensor, "N"] | None = None,
        episode_N: Sequence[int] | None = None,
        final: Sequence[Sequence[int] | None] | None = None,
    ) -> dict[str, float]:
        """Learn from these replies; what there is to log, under "low/". Arguments as in `judge`."""
        judged = self.judge(turns, rewards_N, shared_N=shared_N, episode_N=episode_N, final=final)
        return judged.metrics | self.learn(judged, seed=seed)

    def judge(
        self,
        turns: Sequence[Turn],
        rewards_N: Float[Tensor, "N"],
        *,
        shared_N: Float[Tensor, "N"] | None = None,
        episode_N: Sequence[int] | None = None,
        final: Sequence[Sequence[int] | None] | None = None,
    ) -> Judged:
        """The replies with values, returns and advantages. Nothing has learned yet.

        `rewards_N` is the satisfaction each reply earned; `shared_N`, which comes from another level, is added at its
        last token whatever `dense` says. Replies of one dialogue stand next to each other. With `horizon: episode`
        `episode_N` says to which dialogue (from 0) each belongs, and `final` of each dialogue the tokens in which it
        was cut off, None if it terminated. Raises DataError for rewards that are missing or not finite.
        """
        _check(turns, rewards_N, shared_N)
        batch = pack(turns)
        if self.reference is not None:
            batch.ref_logprobs = reference_logprobs(
                self.reference, batch, temperature=self.temperature, tokens_per_pass=self.tokens_per_pass
            )
        chain_N, after = self._chains(len(turns), episode_N, final)
        rewards_BT, metrics = self._rewards(batch, turns, rewards_N, shared_N, chain_N)
        if self.updates == 0 and not self.online.head.weight.any():  # it knows nothing yet
            self.online.start_at(self._mean_return(batch, chain_N, rewards_BT))
        values_BT = values_of(self.value, batch, self.tokens_per_pass)
        after_C = state_values(self.value, after, self.tokens_per_pass)
        gae = partial(gae_of_chains, batch, chain_N, rewards_BT, gamma=self.settings.gamma, after_C=after_C)
        advantages_BT, returns_BT = gae(values_BT, lam=self.settings.lam)
        earned_BT = gae(torch.zeros_like(values_BT), lam=1.0)[1]
        batch.values, batch.returns = values_BT, returns_BT
        batch.advantages = masked_whiten(advantages_BT, batch.mask) if self.settings.whiten else advantages_BT
        tokens_N = batch.pool(torch.ones_like(values_BT))
        columns = {
            "value": before_turns(batch, values_BT),
            "advantage": batch.pool(advantages_BT) / tokens_N,
            "return": batch.pool(rewards_BT),
        }
        metrics["low/value/explained_variance"] = float(explained_variance(values_BT, earned_BT, batch.mask))
        metrics["low/policy/advantage_std"] = float(masked_var(advantages_BT, batch.mask).sqrt())
        return Judged(batch, columns, metrics, len(after))

    def learn(self, judged: Judged, *, seed: int, stale: Stale | None = None) -> dict[str, float]:
        """One step of both models from replies that have been judged; only the value model while warming up. `stale`
        corrects replies that older weights have written."""
        settings, tokens = self.settings, self.tokens_per_pass
        learned = update_value(
            self.value,
            judged.batch,
            read_BT=judged.batch.mask,
            epochs=settings.value_epochs,
            minibatches=settings.value_minibatches,
            clip=settings.value_clip,
            tokens_per_pass=tokens,
            seed=seed,
        )
        if self.updates >= settings.warmup_steps:
            learned |= update_policy(
                self.policy,
                judged.batch,
                settings=settings.policy,
                reference=None,  # `judge` has asked it
                temperature=self.temperature,
                tokens_per_pass=tokens,
                seed=seed,
                ptx=self.ptx,
                self_likelihood=settings.self_likelihood_coef,
                stale=stale,
            )
            self.shaper.adapt({"shaped/kl": judged.metrics.get("low/kl", 0.0)}, episodes=judged.replies)
            if self.mean is not None:
                self.mean.update()
        self.updates += 1
        return {f"low/{name}": number for name, number in learned.items()}

    def parts(self) -> dict[str, Saveable]:
        """What a checkpoint holds of this level. An adapter knows its own start, so it needs no copy of it."""
        parts: dict[str, Saveable] = {"responder": self.policy, "value": self.value, "shaping": self}
        if self.reference is not None and self.reference is not self.policy.module:
            parts["reference"] = Weights(self.reference)
        if self.mean is not None:
            parts["ema"] = self.mean
        return parts

    def save(self, folder: Path) -> None:
        """What is neither weights nor optimizers: counters, running statistics, the weight of KL."""
        folder.mkdir(parents=True, exist_ok=True)
        self.shaper.save(folder)
        (folder / "lower.json").write_text(json.dumps({"updates": self.updates, "surprisal": self.surprisal}))

    def load(self, folder: Path) -> None:
        """Exactly what was saved."""
        self.shaper.load(folder)
        state = json.loads((folder / "lower.json").read_text())
        self.updates, self.surprisal = state["updates"], state["surprisal"]

    def _chains(
        self, replies: int, episode_N: Sequence[int] | None, final: Sequence[Sequence[int] | None] | None
    ) -> tuple[Int[Tensor, "N"], list[Sequence[int] | None]]:
        """Which chain of credit each reply belongs to, and what follows each chain."""
        if self.settings.horizon == "turn":
            return torch.arange(replies), [None] * replies
        if episode_N is None or final is None:
            raise DataError(
                "horizon = episode: nothing says to which dialogue each reply belongs and how that ended. Give "
                "episode_N and final."
            )
        assert list(episode_N) == sorted(episode_N), "the replies of one dialogue stand next to each other"
        assert len(final) == max(episode_N) + 1, "every dialogue has a reply and an end"
        return torch.tensor(episode_N), list(final)

    def _rewards(
        self,
        batch: Batch,
        turns: Sequence[Turn],
        rewards_N: Float[Tensor, "N"],
        shared_N: Float[Tensor, "N"] | None,
        chain_N: Int[Tensor, "N"],
    ) -> tuple[Float[Tensor, "B T"], dict[str, float]]:
        """The reward of every token, and what each of its terms comes to, per chain."""
        last_N = torch.cat([chain_N[1:] != chain_N[:-1], torch.ones(1, dtype=torch.bool)])
        returns = rewards_N.new_zeros(int(chain_N[-1]) + 1).index_add(0, chain_N, rewards_N).tolist()
        score_N = self.shaper.scores(rewards_N, last_N=last_N, returns=returns, cut_off_N=cut_off(turns))
        terms = {"satisfaction": self._paid(score_N, batch)}
        if shared_N is not None:
            terms["shared"] = batch.at_end(shared_N.float())
        if self.settings.surprisal_coef:
            terms["surprisal"] = self._surprising(batch)
        before_kl = torch.stack(list(terms.values())).sum(0)
        rewards_BT, kl = self.shaper.less_kl(before_kl, batch, episodes=len(returns))
        metrics = {
            "low/satisfaction": float(rewards_N.mean()),
            "low/surprisal": float(masked_mean(surprise(batch), batch.mask)),
            "low/length": float(batch.mask.sum()) / len(turns),
            "low/return": float(rewards_BT[batch.mask].sum()) / len(returns),
        }
        metrics |= {f"low/term/{name}": float(x_BT[batch.mask].sum()) / len(returns) for name, x_BT in terms.items()}
        names = {"shaped/kl": "low/kl", "shaped/kl_coef": "low/kl_coef", "shaped/kl_reward": "low/term/kl"}
        return self.shaper.whitened(rewards_BT, batch), metrics | {names[name]: x for name, x in kl.items()}

    def _paid(self, score_N: Float[Tensor, "N"], batch: Batch) -> Float[Tensor, "B T"]:
        """Satisfaction where it is paid."""
        if self.settings.dense == "off":
            return batch.at_end(score_N)
        return shaped.dense_rewards(score_N, batch.turn, batch.mask, how=self.settings.dense)

    def _surprising(self, batch: Batch) -> Float[Tensor, "B T"]:
        """What surprisal earns; its running mean has seen this batch."""
        found = float(masked_mean(surprise(batch), batch.mask))
        self.surprisal = found if self.surprisal is None else MEMORY * self.surprisal + (1 - MEMORY) * found
        mean = self.surprisal if self.settings.surprisal == "centred" else 0.0
        return shaped.surprisal_rewards(-surprise(batch), batch.mask, coef=self.settings.surprisal_coef, mean=mean)

    def _mean_return(self, batch: Batch, chain_N: Int[Tensor, "N"], rewards_BT: Float[Tensor, "B T"]) -> float:
        """Mean over tokens of what was earned from there on: where the value model starts."""
        nothing_BT, nothing_C = torch.zeros_like(rewards_BT), torch.zeros(int(chain_N[-1]) + 1)
        gamma = self.settings.gamma
        earned_BT = gae_of_chains(batch, chain_N, rewards_BT, nothing_BT, gamma=gamma, lam=1.0, after_C=nothing_C)[1]
        return float(masked_mean(earned_BT, batch.mask))


def surprise(batch: Batch) -> Float[Tensor, "B T"]:
    """-log π of the sampled tokens, under the distribution they were sampled from."""
    return -losses.require(batch.logprobs, "logprobs", "The sampler must return them.")


def _check(turns: Sequence[Turn], rewards_N: Tensor, shared_N: Tensor | None) -> None:
    assert turns, "there is nothing to learn from no replies"
    for name, given in (("rewards", rewards_N), ("shared rewards", shared_N)):
        if given is None and name == "shared rewards":
            continue
        given = losses.require(given, name, "Give one number per reply.")
        if given.shape != (len(turns),):
            raise DataError(f"{name}: {tuple(given.shape)} for {len(turns)} replies. Give one number per reply.")
        if not given.isfinite().all():
            first = int((~given.isfinite()).nonzero()[0, 0])
            raise DataError(
                f"{name}: that of reply {first} is {float(given[first])}. A reward that is missing is not zero: leave "
                "out the dialogue it belongs to."
            )
