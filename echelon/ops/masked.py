"""Statistics over the True positions of a mask. What stands at the other positions, NaN included, changes nothing."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def masked_mean(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean over the True positions; 0 when there are none."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def masked_var(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Unbiased variance over the True positions; 0 when there are fewer than two."""
    squares = torch.where(mask, x - masked_mean(x, mask), 0.0).square()
    return squares.sum() / (mask.sum() - 1).clamp(min=1)


def masked_whiten(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], shift_mean: bool = True, *, eps: float = 1e-8
) -> Float[Tensor, "*shape"]:
    """Scaled to unit variance over the True positions, with mean 0, or the mean it had if `shift_mean` is false.

    The other positions come out as 0. One position, or positions that do not vary, come out as their deviation from
    the mean, which is 0: there is nothing to scale.
    """
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_var(x, mask) + eps)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def explained_variance(
    values: Float[Tensor, "*shape"], returns: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """How much of the variation of the returns a critic predicts: 1 − Var(returns − values) / Var(returns).

    1 is a perfect critic, 0 one that might as well be a constant, below 0 one that is worse than a constant. Returns
    that do not vary leave nothing to explain: the answer is then 0, never NaN.
    """
    values, returns = values.double(), returns.double()
    variance = masked_var(returns, mask)
    rounding = 1e-12 * masked_mean(returns.square(), mask)
    unexplained = masked_var(returns - values, mask) / torch.where(variance > rounding, variance, 1.0)
    return torch.where(variance > rounding, 1.0 - unexplained, 0.0).float()
