"""Losses of pairs of answers, one of which was preferred, and how well probabilities of being preferred hold.

One number per pair in, one number per pair out, float32, minimised. Knows no model: what was said, and how probable it
was, is decided above. `losses.pairwise` is the reward model's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def dpo(
    chosen_P: Float[Tensor, "P"], rejected_P: Float[Tensor, "P"], *, beta: float, label_smoothing: float = 0.0
) -> Float[Tensor, "P"]:
    """−(1−ε)·log σ(βΔ) − ε·log σ(−βΔ), Δ = chosen − rejected: direct preference optimisation of log-ratios.

    A log-ratio is log π(answer) − log π_ref(answer), summed over the answer's tokens; β times it is the answer's
    implicit reward. ε = `label_smoothing` is the probability that a label is wrong (conservative DPO).
    https://arxiv.org/abs/2305.18290, smoothing https://ericmitchell.ai/cdpo.pdf
    """
    logits_P = beta * _difference(chosen_P, rejected_P)
    return -(1 - label_smoothing) * F.logsigmoid(logits_P) - label_smoothing * F.logsigmoid(-logits_P)


def ipo(chosen_P: Float[Tensor, "P"], rejected_P: Float[Tensor, "P"], *, beta: float) -> Float[Tensor, "P"]:
    """(Δ − 1/(2β))², Δ = chosen − rejected: identity preference optimisation, whose optimum is a finite Δ.

    Equation 17 of https://arxiv.org/abs/2310.12036, where β is called τ. The log-ratios are averages over each
    answer's tokens, as in the authors' experiments (huggingface.co/blog/pref-tuning): a sum would ask of long answers
    the same Δ as of short ones.
    """
    return (_difference(chosen_P, rejected_P) - 1 / (2 * beta)).square()


def hinge(chosen_P: Float[Tensor, "P"], rejected_P: Float[Tensor, "P"], *, beta: float) -> Float[Tensor, "P"]:
    """max(0, 1 − βΔ), Δ = chosen − rejected: pairs that are apart by 1/β teach nothing more.

    SLiC, https://arxiv.org/abs/2305.10425, on log-ratios as in RSO, https://arxiv.org/abs/2309.06657.
    """
    return torch.relu(1 - beta * _difference(chosen_P, rejected_P))


def agreement(chosen_P: Float[Tensor, "P"], rejected_P: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """1 where the chosen answer scores higher, 0 where the rejected one does, ½ where they tie."""
    return (1 + torch.sign(_difference(chosen_P, rejected_P))) / 2


def brier(chosen_P: Float[Tensor, "P"], rejected_P: Float[Tensor, "P"]) -> Float[Tensor, ""]:
    """Mean squared error of σ(chosen − rejected) as the probability that the chosen answer is preferred.

    0 is perfect, 0.25 is what always saying ½ gets.
    """
    return torch.sigmoid(-_difference(chosen_P, rejected_P)).square().mean()


def calibration_error(
    chosen_P: Float[Tensor, "P"], rejected_P: Float[Tensor, "P"], *, bins: int = 10
) -> Float[Tensor, ""]:
    """How far stated confidence is from being right, on average: expected calibration error, from 0 to 1.

    The confidence in whichever answer scores higher, σ(|chosen − rejected|), lies between ½ and 1. That range is cut
    into `bins` of equal width; in each the mean confidence is compared with how often the chosen answer was the higher
    one. A tie counts as half right. https://arxiv.org/abs/1706.04599
    """
    confidence_P = torch.sigmoid(_difference(chosen_P, rejected_P).abs())
    right_P = agreement(chosen_P, rejected_P)
    place_P = ((confidence_P - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gap = confidence_P.new_zeros(bins).index_add(0, place_P, confidence_P - right_P)
    return gap.abs().sum() / len(confidence_P)


def _difference(chosen_P: Float[Tensor, "P"], rejected_P: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    assert chosen_P.shape == rejected_P.shape, "one chosen and one rejected answer per pair"
    return chosen_P.float() - rejected_P.float()
