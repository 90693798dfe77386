"""What a reward is made into before credit is assigned: scaled, bounded, and less the distance from the start.

Pure functions and one immutable record. Nothing here knows where a reward came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from echelon.ops.losses import kl_k1


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and summed squared deviations of all numbers seen so far, in double precision."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def having_seen(self, values: Sequence[float]) -> Moments:
        """The moments of the earlier numbers and these together (Chan, Golub and LeVeque's pairwise update)."""
        new = np.asarray(values, dtype=np.float64)
        if not len(new):
            return self
        count, mean = self.count + len(new), float(new.mean())
        apart = mean - self.mean
        squares = self.squares + float(np.square(new - mean).sum()) + apart**2 * self.count * len(new) / count
        return Moments(count, self.mean + apart * len(new) / count, squares)

    @property
    def std(self) -> float:
        """Unbiased deviation; 0 for fewer than two numbers."""
        return (self.squares / (self.count - 1)) ** 0.5 if self.count > 1 else 0.0


def normalise(
    rewards_N: Float[Tensor, "N"],
    last_N: Bool[Tensor, "N"],
    moments: Moments,
    *,
    how: Literal["off", "scale", "standard"],
) -> Float[Tensor, "N"]:
    """Rewards in units of the deviation of returns (`scale`), and moved so that the mean return is 0 (`standard`).

    `moments` are those of the returns of episodes. The mean is taken off once per episode, at the turn `last_N` marks:
    taken off every turn it would reward short episodes. Returns that do not vary leave nothing to divide by, and are
    not divided.
    """
    if how == "off":
        return rewards_N
    unit = moments.std or 1.0
    moved = torch.where(last_N, moments.mean, 0.0) if how == "standard" else torch.zeros_like(rewards_N)
    return (rewards_N - moved) / unit


def kl_rewards(
    logprobs_BT: Float[Tensor, "B T"],
    ref_logprobs_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    *,
    coef: float,
) -> Float[Tensor, "B T"]:
    """What being less like the reference costs, token by token: −coef·(log π − log π_ref); 0 outside the mask.

    Its sum over what was sampled estimates −coef·KL(π‖π_ref) without bias, and either sign is right for a single token.
    https://arxiv.org/abs/1909.08593
    """
    return -coef * kl_k1(logprobs_BT, ref_logprobs_BT, mask_BT)


def dense_rewards(
    rewards_N: Float[Tensor, "N"],
    turn_BT: Int[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    *,
    how: Literal["literal", "length_neutral"],
) -> Float[Tensor, "B T"]:
    """What a turn is worth, paid at every token it sampled instead of at the last one; 0 outside the mask.

    `literal` pays all of it at each token (ToSCA as written), so that, undiscounted, what a reply of L tokens earns is
    L times its reward: of two replies that satisfy alike the longer one earns more. `length_neutral` pays one L-th of
    it at each, which adds up to the reward however long the reply is. `turn_BT` says which turn a token belongs to.
    """
    tokens_N = torch.bincount(turn_BT[mask_BT], minlength=len(rewards_N))
    each_N = rewards_N if how == "literal" else rewards_N / tokens_N
    return torch.where(mask_BT, each_N[turn_BT.clamp_min(0)], 0.0)


def surprisal_rewards(
    logprobs_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"], *, coef: float, mean: float = 0.0
) -> Float[Tensor, "B T"]:
    """What saying the unexpected earns, token by token: coef·(−log π − mean); 0 outside the mask.

    Maximising it follows the gradient of the policy's entropy: it makes the policy more diverse (ToSCA's intrinsic
    reward). With `mean` 0 no token costs anything and every further one pays, whatever it says; the mean surprisal
    of recent tokens as `mean` takes that incentive to be long away.
    """
    return torch.where(mask_BT, coef * (-logprobs_BT.float() - mean), 0.0)


def adaptive_kl(coef: float, kl: float, *, target: float, episodes: int, horizon: int) -> float:
    """The next weight of KL: up when `kl` (nats per episode) is above `target`, down when it is below.

    coef·(1 + clip(kl/target − 1, ±0.2)·episodes/horizon), section 2.2 of https://arxiv.org/abs/1909.08593
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * episodes / horizon)
