"""Decisions that last: what one is worth that stays in force for several steps, in a semi-Markov decision process.

Sutton, Precup and Singh, "Between MDPs and semi-MDPs", Artificial Intelligence 112 (1999). Tensors only; it refuses to
know what a decision is, or who carries it out. Decisions of one step each are the ordinary case.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def span_rewards(
    rewards_N: Float[Tensor, "N"], span_N: Int[Tensor, "N"], steps_N: Int[Tensor, "N"], *, gamma: float
) -> tuple[Float[Tensor, "S"], Int[Tensor, "S"]]:
    """What each span of steps earned, discounted to its beginning, Σ_i γ^i r_i, and how many steps it took.

    The parts of a span stand next to each other under the same number in `span_N`, which counts from 0. `steps_N` says
    how many steps each part took: 1, or 0 for one that time did not count.
    """
    spans = int(span_N[-1]) + 1 if len(span_N) else 0
    lasted_S = steps_N.new_zeros(spans).index_add(0, span_N, steps_N)
    before_N = steps_N.cumsum(0) - steps_N  # steps of all that came earlier
    begun_S = lasted_S.cumsum(0) - lasted_S
    earned_N = rewards_N * torch.as_tensor(gamma, dtype=rewards_N.dtype) ** (before_N - begun_S[span_N])
    return rewards_N.new_zeros(spans).index_add(0, span_N, earned_N), lasted_S


def span_gae(
    rewards_S: Float[Tensor, "S"],
    values_S: Float[Tensor, "S"],
    steps_S: Int[Tensor, "S"],
    episode_S: Int[Tensor, "S"],
    bootstrap_S: Float[Tensor, "S"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "S"], Float[Tensor, "S"]]:
    """Generalised advantage estimation over decisions of `steps_S` steps each: (advantages, returns).

    δ_k = R_k + γ^n_k V_{k+1} − V_k and A_k = δ_k + γ^n_k λ A_{k+1}: time is discounted by the step, trust in what was
    earned (λ) by the decision. Decisions are laid out as turns are in `credit.turn_gae`, which this is where each takes
    one step; `bootstrap_S` is read at the last of each episode.
    """
    last_S = torch.ones_like(episode_S, dtype=torch.bool)
    last_S[:-1] = episode_S[1:] != episode_S[:-1]
    discount_S = torch.as_tensor(gamma, dtype=torch.float64) ** steps_S
    next_S = torch.where(last_S, bootstrap_S, values_S.roll(-1)).double()
    deltas = (rewards_S.double() + discount_S * next_S - values_S.double()).tolist()
    decays = torch.where(last_S, 0.0, discount_S * lam).tolist()
    advantages: list[float] = []
    for delta, decay in zip(reversed(deltas), reversed(decays), strict=True):
        advantages.append(delta + decay * (advantages[-1] if advantages else 0.0))
    advantages_S = torch.tensor(advantages[::-1], dtype=values_S.dtype)
    return advantages_S, advantages_S + values_S
