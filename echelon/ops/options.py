"""Choosing one of K options by their values: how a value is read from token scores, and what follows from a table of Q.

Tensors and numbers only. Which tokens an option is written with, and who scored them, is decided above.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def informative(options: Sequence[Sequence[int]]) -> tuple[int, int]:
    """How many tokens all options begin with, and how many they all end with: these tell nothing apart.

    At least one token of every option is between them. (1), (2) and (3), of three tokens each, give (1, 1).
    """
    shortest = min(map(len, options))
    assert shortest > 0, "an option without tokens cannot be chosen"
    alike = [len(set(tokens)) == 1 for tokens in zip(*(option[:shortest] for option in options), strict=True)]
    front = min([*alike, False].index(False), shortest - 1)
    ends = zip(*(option[len(option) - shortest :][::-1] for option in options), strict=True)
    back = [*(len(set(tokens)) == 1 for tokens in ends), False].index(False)
    return front, min(back, shortest - front - 1)


@dataclass(frozen=True, slots=True)
class Layout:
    """Which tokens of an option are read, and whether the options of a state may share a row."""

    front: int = 0
    """Tokens at the beginning of every option that are not read."""
    back: int = 0
    """Tokens at the end of every option that are not read."""
    total: bool = False
    """Scores are added up instead of averaged."""
    branches: bool = True
    """Options may branch off one row."""


def readout(
    scores_M: Float[Tensor, "M"], option_M: Int[Tensor, "M"], weight_M: Float[Tensor, "M"], *, options: int
) -> Float[Tensor, "N"]:
    """Q of each option: the weighted sum of the scores of its tokens. Weights of 1/n make it their mean."""
    return scores_M.new_zeros(options).index_add(0, option_M, scores_M * weight_M)


def bounds(score: str, *, scale: float = 1.0, shift: float = 0.0) -> tuple[float, float]:
    """What Q = scale · score + shift lies between, `score` being logit, logprob or prob, averaged over tokens."""
    low, high = {"logit": (-math.inf, math.inf), "logprob": (-math.inf, 0.0), "prob": (0.0, 1.0)}[score]
    return scale * low + shift, scale * high + shift


def return_range(rewards: tuple[float, float], *, gamma: float) -> tuple[float, float]:
    """The discounted returns there can be with rewards between these two, in episodes of any length."""
    low, high = rewards
    ahead = math.inf if gamma == 1 else 1 / (1 - gamma)
    return min(low, low * ahead if low else 0.0), max(high, high * ahead if high else 0.0)


def going_on(reward: float, follows: float, *, gamma: float) -> float:
    """The return of decisions that earn `reward` on average, of which the part `follows` is followed by another one.

    Taken as at least a twentieth: with γ = 1, and where nothing ever ends, there would be no such number.
    """
    return reward / max(1 - gamma * follows, 0.05)


def greedy(q_NK: Float[Tensor, "N K"], legal_NK: Bool[Tensor, "N K"]) -> Int[Tensor, "N"]:
    """The legal option with the largest Q, the first of equals."""
    return _only(q_NK, legal_NK).argmax(1)


def softmax_policy(
    q_NK: Float[Tensor, "N K"], legal_NK: Bool[Tensor, "N K"], *, temperature: float
) -> Float[Tensor, "N K"]:
    """π(u) ∝ exp(Q(u) / temperature) over the legal options; exactly 0 elsewhere."""
    assert temperature > 0, "greedy is not a temperature"
    return torch.softmax(_only(q_NK, legal_NK) / temperature, dim=1)


def epsilon_greedy_policy(
    q_NK: Float[Tensor, "N K"], legal_NK: Bool[Tensor, "N K"], *, epsilon: float
) -> Float[Tensor, "N K"]:
    """The best legal option with probability 1 − ε, and ε shared equally by all legal ones, the best included."""
    assert bool(legal_NK.any(1).all()), "a state that goes on must have a legal option"
    anything_NK = legal_NK.to(q_NK.dtype) / legal_NK.sum(1, keepdim=True)
    best_NK = torch.zeros_like(q_NK).scatter(1, greedy(q_NK, legal_NK)[:, None], 1.0)
    return (1 - epsilon) * best_NK + epsilon * anything_NK


def draw(probs_K: Float[Tensor, "K"], pick: float) -> int:
    """The option at this place of the unit interval, of which each takes as much as it is likely.

    `pick` is uniform in [0, 1). An impossible option is never drawn.
    """
    ends_K = probs_K.double().cumsum(0)
    place = int(torch.searchsorted(ends_K, pick * float(ends_K[-1]), right=True))
    possible = probs_K.nonzero()[:, 0]
    return min(place, int(possible[-1]))


def state_value(
    q_NK: Float[Tensor, "N K"], legal_NK: Bool[Tensor, "N K"], probs_NK: Float[Tensor, "N K"] | None = None
) -> Float[Tensor, "N"]:
    """V(s): the largest Q of a legal option, or with a policy what it expects, Σ_u π(u)·Q(u)."""
    if probs_NK is None:
        return _only(q_NK, legal_NK).amax(1)
    return (probs_NK * torch.where(legal_NK, q_NK, 0.0)).sum(1)


def advantage(
    q_NK: Float[Tensor, "N K"],
    legal_NK: Bool[Tensor, "N K"],
    chosen_N: Int[Tensor, "N"],
    probs_NK: Float[Tensor, "N K"],
) -> Float[Tensor, "N"]:
    """A_H = Q(s, u) − Σ_u π(u)·Q(s, u): how much better the choice was than what the policy does on average."""
    taken_N = q_NK.gather(1, chosen_N[:, None])[:, 0]
    return taken_N - state_value(q_NK, legal_NK, probs_NK)


def other_option(chosen: int, legal_K: Sequence[bool], pick: float) -> int:
    """A legal option that was not chosen, each as likely as the others; `pick` is uniform in [0, 1).

    Together with the chosen one, rewarded +1 and −1, it makes imitation a matter of values (straQ*, arXiv 2505.06987).
    """
    others = [place for place, legal in enumerate(legal_K) if legal and place != chosen]
    assert others, "there is no other option"
    return others[min(int(pick * len(others)), len(others) - 1)]


def _only(q_NK: Float[Tensor, "N K"], legal_NK: Bool[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """Q with −∞ where an option is not legal."""
    assert bool(legal_NK.any(1).all()), "a state that goes on must have a legal option"
    return torch.where(legal_NK, q_NK, -math.inf)
