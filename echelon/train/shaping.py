"""From what episodes earned to the reward of every token: normalised, bounded, penalised, less KL to the start.

Holds what has to survive from step to step (running statistics, the weight of KL) and saves it. The formulas are in
`echelon.ops.shaped`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from echelon.config import demand
from echelon.data.packing import Batch
from echelon.ops import losses
from echelon.ops.masked import masked_whiten
from echelon.ops.shaped import Moments, adaptive_kl, kl_rewards, normalise
from echelon.types import Episode, Turn


@dataclass(frozen=True)
class ShapingConfig:
    """What rewards are made into before credit is assigned; by default nothing."""

    normalize: Literal["off", "scale", "standard"] = "off"
    """Divide rewards by the running deviation of returns (scale); also take off their running mean (standard)."""
    clip: float | None = None
    """Largest size of a turn's reward, after normalising; null does not bound it."""
    missing_end_penalty: float = 0.0
    """Taken off a turn that was cut off at sampling.max_tokens, after the bound."""
    kl_coef: float = 0.0
    """Weight of KL to the starting policy, taken off the reward of every token; 0 takes nothing off."""
    kl_target: float | None = None
    """KL of an episode, in nats, that the weight is adapted to keep; null leaves the weight as it is."""
    kl_horizon: int = 10_000
    """Episodes in which an adapted weight changes by at most a fifth."""
    whiten: bool = False
    """Scale the rewards of a step's tokens to deviation 1, KL included; their mean stays."""

    def __post_init__(self) -> None:
        clip = self.clip is None or 0 < self.clip < math.inf
        demand(self, "clip", clip, "every reward would be the same. Give 10, or null for no bound.")
        for name, so in (
            ("missing_end_penalty", "rewards being cut off"),
            ("kl_coef", "rewards being far from the start"),
        ):
            demand(self, name, 0 <= getattr(self, name) < math.inf, f"a negative one {so}. Give 0 or more.")
        target = self.kl_target is None or 0 < self.kl_target < math.inf
        demand(self, "kl_target", target, "KL is positive. Give a few nats, or null for a fixed weight.")
        adapts = self.kl_target is None or self.kl_coef > 0
        demand(self, "kl_target", adapts, "a weight of 0 stays 0. Give kl_coef what it starts from, such as 0.05.")
        demand(self, "kl_horizon", self.kl_horizon >= 1, "it counts episodes. Give 10000.")

    @property
    def remembers(self) -> bool:
        """Whether one step's rewards depend on what was seen in earlier ones."""
        return self.normalize != "off" or self.kl_target is not None


class Shaper:
    """Makes the rewards of a step's tokens, and remembers the statistics and the weight of KL that it needs."""

    def __init__(self, settings: ShapingConfig) -> None:
        self.settings = settings
        self.kl_coef = settings.kl_coef
        self.moments = Moments()

    def rewards(self, batch: Batch, played: Sequence[Episode]) -> tuple[Float[Tensor, "B T"], dict[str, float]]:
        """The reward of every token of the batch of these episodes, and what it consists of, per episode.

        Raises DataError when KL counts and the batch has no reference log-probs.
        """
        turns = [turn for episode in played for turn in episode.turns]
        earned_N, returns = torch.tensor([turn.reward for turn in turns]), [episode.reward for episode in played]
        score_N = self.scores(earned_N, last_N=_last(played), returns=returns, cut_off_N=cut_off(turns))
        rewards_BT, kl = self.less_kl(batch.at_end(score_N), batch, episodes=len(played))
        metrics = {"shaped/score": float(score_N.sum()) / len(played)} | kl
        metrics["shaped/return"] = metrics["shaped/score"] + metrics.get("shaped/kl_reward", 0.0)
        return self.whitened(rewards_BT, batch), metrics

    def scores(
        self,
        rewards_N: Float[Tensor, "N"],
        *,
        last_N: Bool[Tensor, "N"],
        returns: Sequence[float],
        cut_off_N: Bool[Tensor, "N"],
    ) -> Float[Tensor, "N"]:
        """What each turn is worth, KL aside: normalised by all `returns` seen so far, bounded, less what a missing end
        costs. `last_N` marks the turns that end what the returns are of.
        """
        if self.settings.normalize != "off":
            self.moments = self.moments.having_seen(returns)
            rewards_N = normalise(rewards_N, last_N, self.moments, how=self.settings.normalize)
        if self.settings.clip is not None:
            rewards_N = rewards_N.clamp(-self.settings.clip, self.settings.clip)
        if self.settings.missing_end_penalty:
            rewards_N = rewards_N - self.settings.missing_end_penalty * cut_off_N.float()
        return rewards_N

    def less_kl(
        self, rewards_BT: Float[Tensor, "B T"], batch: Batch, *, episodes: int
    ) -> tuple[Float[Tensor, "B T"], dict[str, float]]:
        """Rewards of tokens less the weight of KL times each token's, and what that KL is, per episode.

        Raises DataError when KL counts and the batch has no reference log-probs.
        """
        if not self.kl_coef and batch.ref_logprobs is None:
            return rewards_BT, {}
        old = losses.require(batch.logprobs, "logprobs", "The sampler must return them.")
        ref = losses.require(batch.ref_logprobs, "ref_logprobs", "kl_coef needs the starting policy's log-probs.")
        kl = float(losses.kl_k1(old, ref, batch.mask).sum()) / episodes
        if self.kl_coef:
            rewards_BT = rewards_BT + kl_rewards(old, ref, batch.mask, coef=self.kl_coef)
        return rewards_BT, {
            "shaped/kl": kl,
            "shaped/kl_coef": self.kl_coef,
            "shaped/kl_reward": -self.kl_coef * kl,
        }

    def whitened(self, rewards_BT: Float[Tensor, "B T"], batch: Batch) -> Float[Tensor, "B T"]:
        """Rewards of tokens, at deviation 1 if settings ask for it; their mean stays."""
        return masked_whiten(rewards_BT, batch.mask, shift_mean=False) if self.settings.whiten else rewards_BT

    def adapt(self, shaped: dict[str, float], *, episodes: int) -> None:
        """Move the weight of KL towards what keeps the KL of these episodes, as `rewards` measured it, at its target.

        For steps in which the policy learns: while it does not, its KL says nothing about the weight.
        """
        if self.settings.kl_target is not None:
            kl, target, horizon = shaped["shaped/kl"], self.settings.kl_target, self.settings.kl_horizon
            self.kl_coef = adaptive_kl(self.kl_coef, kl, target=target, episodes=episodes, horizon=horizon)

    def save(self, folder: Path) -> None:
        """The weight of KL and the running statistics."""
        state = {"kl_coef": self.kl_coef, **asdict(self.moments)}
        (folder / "shaping.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """Exactly what was saved: JSON keeps every bit of a double."""
        state = json.loads((folder / "shaping.json").read_text())
        self.kl_coef, self.moments = state.pop("kl_coef"), Moments(**state)


def cut_off(turns: Sequence[Turn]) -> Bool[Tensor, "N"]:
    """Which turns ended because they had reached their greatest length."""
    return torch.tensor([turn.stop == "length" for turn in turns])


def _last(played: Sequence[Episode]) -> Bool[Tensor, "N"]:
    """Which turns end their episode."""
    return torch.tensor([turn is episode.turns[-1] for episode in played for turn in episode.turns])
