"""Choosing among candidates: how often at random, which one, and what each is worth to whoever proposed it.

Tensors and numbers only; who draws candidates and who values them is decided above.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from echelon.ops.credit import token_gae


def exploration_rate(step: int, steps: int, *, epsilon: float, floor: float) -> float:
    """The probability of a random choice at this step of a run: ε·max(1 − step/steps, floor)."""
    return epsilon * max(1 - step / steps, floor)


def epsilon_greedy(values_K: Float[Tensor, "K"], *, epsilon: float, explore: float, pick: float) -> int:
    """Which candidate is taken: any of them with probability ε, else the best one, the first where several are.

    `explore` and `pick` are uniform draws from [0, 1): whether to take any, and which.
    """
    if explore < epsilon:
        return min(int(pick * len(values_K)), len(values_K) - 1)
    return int(values_K.argmax())


def candidate_scores(
    q_NK: Float[Tensor, "N K"],
    chosen_N: Int[Tensor, "N"],
    rewards_N: Float[Tensor, "N"],
    terminated_N: Bool[Tensor, "N"],
) -> Float[Tensor, "N K"]:
    """What each candidate of N states is worth: Q, but what was really earned where the one taken ended the episode.

    An episode that was cut off did not end: Q stays.
    """
    rows = torch.arange(len(q_NK), device=q_NK.device)
    scores_NK = q_NK.clone()
    scores_NK[rows, chosen_N] = torch.where(terminated_N, rewards_N, q_NK[rows, chosen_N])
    return scores_NK


def spread(scores_NK: Float[Tensor, "N K"]) -> Float[Tensor, "N"]:
    """The standard deviation over each state's candidates: 0 where it does not matter which is taken."""
    return scores_NK.double().std(1, correction=0).to(scores_NK.dtype)


def value_bias(value: float, *, bounded: bool) -> float:
    """The bias of a last layer whose output shall start at `value`; behind a sigmoid, kept off its flat ends."""
    if not bounded:
        return value
    inside = min(max(value, 0.05), 0.95)
    return math.log(inside / (1 - inside))


def utterance_gae(
    scores_N: Float[Tensor, "N"],
    values_BT: Float[Tensor, "B T"],
    row_N: Int[Tensor, "N"],
    first_N: Int[Tensor, "N"],
    last_N: Int[Tensor, "N"],
    *,
    lam: float,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """GAE over the tokens of each utterance alone, which ends with its score: (advantages, returns), 0 elsewhere.

    Utterances lie anywhere in the rows, in one piece each; nothing is discounted. `values_BT` says what was expected
    before each token.
    """
    lengths_N = last_N - first_N + 1
    place_NL = torch.arange(int(lengths_N.max()), device=row_N.device).expand(len(row_N), -1)
    inside_NL = place_NL < lengths_N[:, None]
    column_NL = torch.minimum(first_N[:, None] + place_NL, last_N[:, None])
    rewards_NL = torch.where(place_NL == lengths_N[:, None] - 1, scores_N[:, None], 0.0)
    nothing_N = torch.zeros_like(scores_N)
    found = token_gae(
        rewards_NL, values_BT[row_N[:, None], column_NL], inside_NL, gamma=1.0, lam=lam, bootstrap_B=nothing_N
    )
    where = row_N[:, None].expand_as(column_NL)[inside_NL], column_NL[inside_NL]
    advantages_BT, returns_BT = (torch.zeros_like(values_BT).index_put(where, x_NL[inside_NL]) for x_NL in found)
    return advantages_BT, returns_BT
