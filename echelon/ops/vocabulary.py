"""Log-probabilities over a large vocabulary, without a tensor of positions by vocabulary.

Hidden states and the weight of a linear head in, one number per position out. The vocabulary is taken in blocks that
fit in a cache; the gradient makes again what was not kept, and what is kept is bounded. Knows no model.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

LOGITS_PER_BLOCK = 1 << 21
"""About so many float32 logits exist at once (8 MiB, a processor's cache); on other devices, 32 times as many."""

LOGITS_KEPT = 11 << 22
"""So many logits at most (176 MiB) are kept for the gradient; others are made again, a fourth product besides three."""


def linear_scores(
    hidden_MH: Float[Tensor, "M H"],
    weight_VH: Float[Tensor, "V H"],
    bias_V: Float[Tensor, "V"] | None,
    targets_M: Int[Tensor, "M"],
    *,
    scale: float = 1.0,
    cap: float | None = None,
    temperature: float = 1.0,
    with_entropy: bool = True,
) -> tuple[Float[Tensor, "M"], Float[Tensor, "M"] | None]:
    """log π of each target and the entropy of π in nats, float32, where π = softmax(logits / temperature).

    The logits are scale·(hidden·weightᵀ + bias), and with `cap` what soft-capping makes of them: cap·tanh(logits/cap).
    Differentiable once, in hidden, weight and bias. What is not asked for is not computed: no gradient of the entropy
    unless the loss uses it, none of a frozen weight.
    """
    learns = torch.is_grad_enabled() and (hidden_MH.requires_grad or weight_VH.requires_grad)
    room = LOGITS_KEPT if learns else 0
    logits = _Logits(scale, cap, temperature)
    scores: tuple[Tensor, Tensor | None] = _LinearScores.apply(  # type: ignore[no-untyped-call]
        hidden_MH, weight_VH, bias_V, targets_M, logits, with_entropy, room
    )
    return scores


class _Logits:
    """What happens between the head's output and the softmax, forth and back, in place."""

    def __init__(self, scale: float, cap: float | None, temperature: float) -> None:
        self.scale, self.cap, self.temperature = scale, cap, temperature

    def of(self, hidden_MH: Tensor, weight_vH: Tensor, bias_v: Tensor | None, out_Mv: Tensor | None = None) -> Tensor:
        """Logits of one block, float32, in `out_Mv` if it is given."""
        if out_Mv is None or bias_v is not None or weight_vH.dtype != torch.float32:
            found_Mv = torch.nn.functional.linear(hidden_MH, weight_vH, bias_v)
            raw_Mv = found_Mv.float() if out_Mv is None else out_Mv.copy_(found_Mv)
        else:
            raw_Mv = torch.mm(hidden_MH, weight_vH.T, out=out_Mv)
        if self.cap is not None:
            return raw_Mv.mul_(self.scale / self.cap).tanh_().mul_(self.cap / self.temperature)
        return raw_Mv if self.scale == self.temperature else raw_Mv.mul_(self.scale / self.temperature)

    def back_(self, gradient_Mv: Tensor, logits_Mv: Tensor) -> Tensor:
        """The gradient with respect to the head's output, from that with respect to the logits."""
        if self.cap is not None:
            gradient_Mv.mul_(1 - (logits_Mv * (self.temperature / self.cap)).square_())
        return gradient_Mv if self.scale == self.temperature else gradient_Mv.mul_(self.scale / self.temperature)


class _LinearScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        logits: _Logits,
        with_entropy: bool,
        room: int,
    ) -> tuple[Tensor, Tensor | None]:
        count, blocks = len(targets_M), _blocks(len(targets_M), weight_VH)
        # One tensor, the first blocks behind each other: so many small ones would leave holes where they were.
        fits = sum(block.stop - block.start for block in blocks if count * block.stop <= room)
        kept = torch.empty(count * fits, device=hidden_MH.device)
        picked_M = torch.zeros(count, device=hidden_MH.device)
        # Sums over the blocks seen, of exp(logit - top) and of that times (logit - top): `top` is the largest so far.
        top_M, total_M, moment_M = picked_M + torch.finfo(torch.float32).min, picked_M.clone(), picked_M.clone()
        for block in blocks:
            bias_v = None if bias_V is None else bias_V[block]
            logits_Mv = logits.of(hidden_MH, weight_VH[block], bias_v, _place(kept, count, block))
            row, column = _within(targets_M, block)
            picked_M[row] = logits_Mv[row, column]
            higher_M = torch.maximum(top_M, logits_Mv.amax(-1))
            shift_M, shrink_M = top_M - higher_M, (top_M - higher_M).exp()
            centred_Mv = logits_Mv - higher_M[:, None]
            weights_Mv = centred_Mv.exp() if with_entropy else centred_Mv.exp_()
            if with_entropy:
                moment_M = shrink_M * (moment_M + shift_M * total_M) + (centred_Mv.mul_(weights_Mv)).sum(-1)
            total_M = shrink_M * total_M + weights_Mv.sum(-1)
            top_M = higher_M
        normaliser_M, entropy_M = top_M + total_M.log(), total_M.log() - moment_M / total_M
        ctx.save_for_backward(hidden_MH, weight_VH, bias_V, targets_M, normaliser_M, entropy_M, kept)
        ctx.logits = logits
        ctx.set_materialize_grads(False)
        return picked_M - normaliser_M, entropy_M if with_entropy else None

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_MH, weight_VH, bias_V, targets_M, normaliser_M, entropy_M, kept = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        to_hidden = torch.zeros_like(hidden_MH, dtype=torch.float32) if wants_hidden else None
        to_weight = torch.empty_like(weight_VH) if wants_weight else None
        to_bias = torch.empty_like(bias_V) if wants_bias else None
        for block in _blocks(len(targets_M), weight_VH):
            logits_Mv = _place(kept, len(targets_M), block)
            if logits_Mv is None:
                bias_v = None if bias_V is None else bias_V[block]
                logits_Mv = ctx.logits.of(hidden_MH, weight_VH[block], bias_v)
            wrong_Mv = _to_logits(logits_Mv, _within(targets_M, block), normaliser_M, entropy_M, *gradients)
            out_Mv = ctx.logits.back_(wrong_Mv, logits_Mv).to(weight_VH.dtype)
            if to_hidden is not None and out_Mv.dtype == torch.float32:
                to_hidden.addmm_(out_Mv, weight_VH[block])
            elif to_hidden is not None:
                to_hidden += out_Mv @ weight_VH[block]
            if to_weight is not None:
                torch.mm(out_Mv.T, hidden_MH, out=to_weight[block])
            if to_bias is not None:
                to_bias[block] = out_Mv.sum(0)
        return None if to_hidden is None else to_hidden.to(hidden_MH.dtype), to_weight, to_bias, None, None, None, None


def _to_logits(
    logits_Mv: Tensor,
    target: tuple[Tensor, Tensor],
    normaliser_M: Tensor,
    entropy_M: Tensor,
    of_logprob_M: Tensor | None,
    of_entropy_M: Tensor | None,
) -> Tensor:
    """∂ log π[target] / ∂ logits = [target] - π and ∂ entropy / ∂ logits = -π·(log π + entropy), weighed and summed."""
    logprobs_Mv = logits_Mv - normaliser_M[:, None]
    if of_entropy_M is None:
        assert of_logprob_M is not None, "autograd asks for what the loss uses"
        found_Mv = logprobs_Mv.exp_().mul_(-of_logprob_M[:, None])
    else:
        factor_Mv = (logprobs_Mv + entropy_M[:, None]).mul_(-of_entropy_M[:, None])
        if of_logprob_M is not None:
            factor_Mv.sub_(of_logprob_M[:, None])
        found_Mv = logprobs_Mv.exp_().mul_(factor_Mv)
    if of_logprob_M is not None:
        row, column = target
        found_Mv[row, column] += of_logprob_M[row]
    return found_Mv


def _blocks(count: int, weight_VH: Tensor) -> list[slice]:
    """The vocabulary in parts of equal size, so that so many positions by one of them are about one block."""
    size = LOGITS_PER_BLOCK * (1 if weight_VH.device.type == "cpu" else 32)
    entries, whole = max(1, size // max(1, count)), len(weight_VH)
    return [slice(start, min(start + entries, whole)) for start in range(0, whole, entries)]


def _place(kept: Tensor, count: int, block: slice) -> Tensor | None:
    """Where the logits of a block are kept, if they are."""
    start, stop = count * block.start, count * block.stop
    return kept[start:stop].view(count, -1) if 0 < stop <= len(kept) else None


def _within(targets_M: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """The positions whose target lies in the block, and where in it."""
    row = ((targets_M >= block.start) & (targets_M < block.stop)).nonzero()[:, 0]
    return row, targets_M[row] - block.start
