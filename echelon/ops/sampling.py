"""From logits to a token: the distribution that is sampled from, and a draw from it that depends on nothing else.

Randomness is a function of (seed, position), not a state: what else is in the batch changes nothing.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32, Float64, Int, Int64
from torch import Tensor

from echelon.errors import ConfigError

_BLOCK = 128
"""Tokens whose probabilities are added up together when one is drawn."""
_GOLDEN, _OTHER, _FIRST, _SECOND = (
    bits - (1 << 64) for bits in (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
"""Odd numbers of 64 bits, as the int64 of the same bits: what seeds and positions are told apart by, and the factors of
SplitMix64's finaliser."""


def restrict_logits(
    logits_NV: Float[Tensor, "N V"],
    *,
    temperature: float | Float[Tensor, "N"] = 1.0,
    top_k: int | Int[Tensor, "N"] = 0,
    top_p: float | Float[Tensor, "N"] = 1.0,
) -> Float32[Tensor, "N V"]:
    """Logits of the distribution that is sampled from, −inf for tokens that cannot be drawn; not normalised.

    Divided by the temperature, then cut to the `top_k` most likely tokens (0 or less: all), then to the smallest set of
    those that holds at least `top_p` of the remaining mass. The most likely token always stays, and ties go to the
    lower id. Each setting is one number, or one per row. Raises ConfigError for a temperature that is not positive:
    greedy decoding is an argmax, not a distribution.
    """
    rows, vocabulary = logits_NV.shape
    device = logits_NV.device
    temperature_N = torch.as_tensor(temperature, dtype=torch.float32, device=device).expand(rows)
    top_k_N = torch.as_tensor(top_k, dtype=torch.long, device=device).expand(rows)
    top_p_N = torch.as_tensor(top_p, dtype=torch.float64, device=device).expand(rows)
    if not bool((temperature_N > 0).all()):
        raise ConfigError("temperature must be above 0 to make a distribution. For 0, take the argmax of the logits.")

    logits_NV = logits_NV.float() / temperature_N[:, None]
    top_k_N = torch.where((top_k_N <= 0) | (top_k_N > vocabulary), vocabulary, top_k_N)
    if bool((top_k_N < vocabulary).any()):
        logits_NV = _keep_best(logits_NV, top_k_N)
    if bool((top_p_N < 1).any()):
        logits_NV = _keep_best(logits_NV, _nucleus_sizes(logits_NV, top_p_N))
    return logits_NV


def penalise_repetition(
    logits_NV: Float[Tensor, "N V"], penalty: Float[Tensor, "N"], seen: Sequence[Sequence[int]]
) -> Float[Tensor, "N V"]:
    """Logits in which the tokens that a row has `seen` are less likely: divided by the penalty where above 0, and
    multiplied with it where below (CTRL, arXiv 1909.05858). A penalty of 1 changes nothing, nor does how often one was
    seen.
    """
    penalised_NV = logits_NV.clone()
    for row_V, by, tokens in zip(penalised_NV, penalty.tolist(), seen, strict=True):
        if by != 1:
            ids = torch.tensor(sorted(set(tokens)), device=row_V.device)
            row_V[ids] = torch.where(row_V[ids] > 0, row_V[ids] / by, row_V[ids] * by)
    return penalised_NV


def counter_uniform(seeds_N: Int64[Tensor, "N"], positions_N: Int64[Tensor, "N"]) -> Float64[Tensor, "N"]:
    """One uniform number in the open interval (0, 1) per (seed, position), always the same one.

    The finaliser of SplitMix64 applied to the seed, to the position and to both, so neighbouring seeds and neighbouring
    positions give unrelated numbers. Not for cryptography. https://doi.org/10.1145/2660193.2660195
    """
    key_N = _scramble(seeds_N + _GOLDEN)
    second_N = _scramble(seeds_N ^ _OTHER)
    bits_N = _scramble(_scramble(key_N + positions_N * _GOLDEN) ^ second_N)
    high_N = (bits_N >> 12) & (1 << 52) - 1  # 52 bits: with 53, the largest would round to 1
    return (high_N.double() + 0.5) * 2.0**-52


def draw(
    logits_NV: Float32[Tensor, "N V"], uniforms_N: Float[Tensor, "N"]
) -> tuple[Int64[Tensor, "N"], Float32[Tensor, "N"]]:
    """The token at which each row's cumulative probability passes its uniform number, and its log-probability.

    Never a token of probability 0. Probabilities are added in double precision, first of blocks of tokens and then
    within the block that was hit, so that the vocabulary is read twice and not sorted.
    """
    rows, vocabulary = logits_NV.shape
    top_N1 = logits_NV.amax(-1, keepdim=True)
    weights_NV = (logits_NV - top_N1).exp_()
    if vocabulary % _BLOCK:
        weights_NV = torch.nn.functional.pad(weights_NV, (0, -vocabulary % _BLOCK))
    weights_NKB = weights_NV.view(rows, -1, _BLOCK)
    mass_NK = weights_NKB.sum(-1, dtype=torch.float64)
    ends_NK = mass_NK.cumsum(-1)
    total_N = ends_NK[:, -1]
    assert bool((total_N > 0).all()), "logits that are NaN, or -inf in a whole row, are not a distribution"
    reach_N1 = _below(uniforms_N.double() * total_N, total_N)[:, None]
    block_N = (ends_NK <= reach_N1).sum(-1)
    before_N = (ends_NK - mass_NK).gather(1, block_N[:, None])[:, 0]
    within_NB = weights_NKB[torch.arange(rows, device=logits_NV.device), block_N].double().cumsum(-1)
    rest_N = _below((reach_N1[:, 0] - before_N).clamp_min(0.0), within_NB[:, -1])
    chosen_N = block_N * _BLOCK + (within_NB <= rest_N[:, None]).sum(-1)
    logprobs_N = (logits_NV.gather(1, chosen_N[:, None]) - top_N1)[:, 0] - total_N.log().float()
    return chosen_N, logprobs_N


def _below(x_N: Float64[Tensor, "N"], limit_N: Float64[Tensor, "N"]) -> Float64[Tensor, "N"]:
    """At most the number before the limit: what is passed only at the end is still passed."""
    return torch.minimum(x_N, torch.nextafter(limit_N, torch.zeros_like(limit_N)))


def _nucleus_sizes(logits_NV: Float32[Tensor, "N V"], top_p_N: Float64[Tensor, "N"]) -> Int64[Tensor, "N"]:
    """How many of the most likely tokens it takes to hold `top_p` of the mass, at least one; all of them for 1."""
    possible = int((logits_NV > -math.inf).sum(-1).max())
    probs = torch.softmax(logits_NV.topk(possible).values.double(), -1)
    before = probs.cumsum(-1) - probs
    sizes_N = (before < top_p_N[:, None]).sum(-1).clamp(min=1)
    return torch.where(top_p_N < 1, sizes_N, logits_NV.shape[1])


def _keep_best(logits_NV: Float32[Tensor, "N V"], count_N: Int64[Tensor, "N"]) -> Float32[Tensor, "N V"]:
    """−inf for all but the `count_N` largest of each row; of equal ones the first stay."""
    vocabulary = logits_NV.shape[1]
    limited_N = count_N < vocabulary
    widest = int(torch.where(limited_N, count_N, 1).max())
    best = logits_NV.topk(widest).values
    threshold_N = best.gather(1, torch.where(limited_N, count_N - 1, 0)[:, None])
    above_NV, tied_NV = logits_NV > threshold_N, logits_NV == threshold_N
    room_N1 = count_N[:, None] - above_NV.sum(-1, keepdim=True)
    keep_NV = above_NV | (tied_NV & (tied_NV.cumsum(-1) <= room_N1)) | ~limited_N[:, None]
    return torch.where(keep_NV, logits_NV, -math.inf)


def _scramble(x: Int64[Tensor, "N"]) -> Int64[Tensor, "N"]:
    """SplitMix64's finaliser: a bijection of 64-bit integers in which every input bit flips half of the output bits.

    Shifts bring in zeros; torch's own shift of a signed integer copies the sign.
    """
    x = (x ^ ((x >> 30) & (1 << 34) - 1)) * _FIRST
    x = (x ^ ((x >> 27) & (1 << 37) - 1)) * _SECOND
    return x ^ ((x >> 31) & (1 << 33) - 1)
