"""What is minimised, per token and in float32; `token_sum` or `row_mean` reduce it in a separate last call.

Log-probabilities, advantages and values in, one loss per position out. Nothing here knows a model or an episode.
Where a function takes a `mask`, positions outside it may hold anything, NaN included: neither the value nor its
gradient escapes. Without one every position must be finite: a sum that drops a NaN still has a NaN in its gradient.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from echelon.errors import DataError

LARGEST_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this before `exp`: e^20 is five hundred million, and finite in float32."""


def require(tensor: Tensor | None, name: str, how: str) -> Tensor:
    """The tensor, or an error that says which one is missing and how to get it. A missing tensor is never zero."""
    if tensor is None:
        raise DataError(f"{name} is missing from the batch, and a missing tensor is not zero. {how}")
    return tensor


def token_sum(x_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"], denom: float) -> Float[Tensor, ""]:
    """Sum over the sampled tokens, divided by `denom`: every token weighs the same, whatever row or batch it is in.

    `denom` is fixed for one optimizer step (its number of sampled tokens, all micro-batches and ranks together), so
    the sum over micro-batches is the number of the whole batch.
    """
    return _zeroed(x_BT, mask_BT).sum() / denom


def row_mean(x_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"], denom: float) -> Float[Tensor, ""]:
    """Sum over rows of each row's mean over its sampled tokens, divided by `denom`: every row weighs the same.

    `denom` is then the number of rows of the whole step. A row without sampled tokens contributes 0.
    """
    return (_zeroed(x_BT, mask_BT).sum(1) / mask_BT.sum(1).clamp(min=1)).sum() / denom


def reduce_stats(
    stats: dict[str, Float[Tensor, "B T"]], mask_BT: Bool[Tensor, "B T"], denom: float
) -> dict[str, float]:
    """Per-token statistics as numbers that add up over micro-batches, each by `token_sum`.

    Those whose name ends in "/max" are the largest value of a sampled token instead (−inf if there is none), and are
    maximised over micro-batches.
    """
    if not stats:
        return {}
    lowest = torch.tensor(-math.inf, device=mask_BT.device)
    numbers = [
        torch.where(mask_BT, x_BT, lowest).max() if name.endswith("/max") else token_sum(x_BT, mask_BT, denom)
        for name, x_BT in stats.items()
    ]
    return dict(zip(stats, torch.stack([number.float() for number in numbers]).tolist(), strict=True))


def nll(logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Negative log-likelihood: supervised fine-tuning, behaviour cloning, pretraining terms."""
    return -_at_least_float32(logprobs)


def reinforce(
    logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """−A·log π, whose gradient is the policy gradient when the tokens were sampled from this very policy."""
    logprobs, advantages = _ready(mask, logprobs, advantages)
    return -advantages.detach() * logprobs


def clipped_surrogate(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"] | None = None,
    *,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = None,
) -> tuple[Float[Tensor, "*shape"], dict[str, Float[Tensor, "*shape"]]]:
    """PPO's pessimistic objective −min(ρA, clip(ρ, 1−low, 1+high)·A), ρ = π/π_old, and what to watch, per token.

    `dual` bounds the loss of a negative advantage by dual·|A|, however large the ratio. Statistics, to be reduced by
    `reduce_stats`: `ratio`, `ratio/max`, `clipped` (1 where a clip removed the gradient), `kl` (k3 estimate of
    KL(π_old‖π), never negative).

    PPO https://arxiv.org/abs/1707.06347, dual clip https://arxiv.org/abs/1912.09729
    """
    logprobs, old_logprobs, advantages = _ready(mask, logprobs, old_logprobs, advantages)
    log_ratio = _log_ratio(logprobs, old_logprobs)
    loss, clipped = _pessimistic(log_ratio.exp(), advantages.detach(), low, high, dual)
    return loss, _ratio_stats(log_ratio, clipped)


def cispo(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"] | None = None,
    *,
    low: float = 1.0,
    high: float = 4.0,
) -> tuple[Float[Tensor, "*shape"], dict[str, Float[Tensor, "*shape"]]]:
    """−w·A·log π with the importance weight w = clip(ρ, 1−low, 1+high) held constant, and what to watch, per token.

    The bound is on the weight, not on the gradient: a token whose ratio lies outside goes on teaching, with the weight
    of the bound. `low` 1 leaves small ratios as they are. Statistics as in `clipped_surrogate`; `clipped` is 1 where
    the weight is not the ratio.

    MiniMax-M1 https://arxiv.org/abs/2506.13585
    """
    logprobs, old_logprobs, advantages = _ready(mask, logprobs, old_logprobs, advantages)
    log_ratio = _log_ratio(logprobs, old_logprobs)
    ratio = log_ratio.exp().detach()
    weight = ratio.clamp(1 - low, 1 + high)
    return -weight * advantages.detach() * logprobs, _ratio_stats(log_ratio, weight != ratio)


def gspo(
    logprobs_BT: Float[Tensor, "B T"],
    old_logprobs_BT: Float[Tensor, "B T"],
    advantages_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    sequence_BT: Int[Tensor, "B T"],
    *,
    low: float = 3e-4,
    high: float = 4e-4,
    dual: float | None = None,
) -> tuple[Float[Tensor, "B T"], dict[str, Float[Tensor, "B T"]]]:
    """`clipped_surrogate` in which every token has the ratio of its sequence, s = (π(y)/π_old(y))^(1/|y|).

    `sequence_BT` says which sequence a token belongs to; what it says outside the mask is not read. s is close to 1, so
    its bounds are narrow. The gradient of s reaches a token through its own log-probability: GSPO-token. The mean over
    a sequence has the value of −min(sA, clip(s)A) and, if the advantages in it are equal, its gradient: GSPO. The
    statistics `ratio` and `clipped` are of s, `kl` is of the tokens.

    https://arxiv.org/abs/2507.18071
    """
    logprobs, old, advantages = _ready(mask_BT, logprobs_BT, old_logprobs_BT, advantages_BT)
    token_log_ratio = _log_ratio(logprobs, old)
    of_sequence = sequence_means(token_log_ratio.detach(), mask_BT, sequence_BT)
    log_ratio = of_sequence + logprobs - logprobs.detach()
    loss, clipped = _pessimistic(log_ratio.exp(), advantages.detach(), low, high, dual)
    return loss, _ratio_stats(log_ratio, clipped) | {"kl": _k3(token_log_ratio)}


def truncated_importance(
    logprobs_BT: Float[Tensor, "B T"],
    sampled_logprobs_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    sequence_BT: Int[Tensor, "B T"] | None = None,
    *,
    clip: float = 2.0,
) -> Float[Tensor, "B T"]:
    """min(π/μ, clip) of each token: what a token that another policy μ has sampled counts to π. 0 outside the mask.

    With `sequence_BT` the ratio of a token is that of its whole sequence, the product over all of its tokens, and is
    bounded once, after the product: exact where nothing is bounded, at a variance that grows with the length. The ratio
    of the token alone forgets that π would seldom have come to where μ was, and has little variance. Both are
    constants, without a gradient, and never 0: what a bound costs is bias, towards what μ said.

    Truncated importance sampling, https://arxiv.org/abs/1802.01561 (V-trace's ρ̄); for language models whose sampler is
    not quite the policy, https://fengyao.notion.site/off-policy-rl
    """
    logprobs, sampled = _ready(mask_BT, logprobs_BT.detach(), sampled_logprobs_BT.detach())
    log_ratio = logprobs - sampled
    if sequence_BT is not None:
        log_ratio = _sequence_sums(log_ratio, mask_BT, sequence_BT)
    weights = log_ratio.clamp(-LARGEST_LOG_RATIO, math.log(clip)).exp()
    return torch.where(mask_BT, weights, 0.0)


def sequence_means(
    x_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"], sequence_BT: Int[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """The mean of each sequence over its masked tokens, given back to each of them; 0 outside the mask."""
    counts_BT = _sequence_sums(torch.ones_like(x_BT), mask_BT, sequence_BT)
    return _sequence_sums(x_BT, mask_BT, sequence_BT) / counts_BT.clamp(min=1)


def _sequence_sums(
    x_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"], sequence_BT: Int[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """The sum of each sequence over its masked tokens, given back to each of them; 0 outside the mask."""
    sequence_M = sequence_BT[mask_BT]
    sums_S = x_BT.new_zeros(int(sequence_M.max()) + 1 if len(sequence_M) else 0)
    sums_S = sums_S.index_add(0, sequence_M, x_BT[mask_BT])
    return torch.zeros_like(x_BT).index_put((mask_BT,), sums_S[sequence_M])


def _log_ratio(logprobs: Float[Tensor, "*shape"], old_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return (logprobs - old_logprobs.detach()).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def _pessimistic(
    ratio: Float[Tensor, "*shape"], advantages: Float[Tensor, "*shape"], low: float, high: float, dual: float | None
) -> tuple[Float[Tensor, "*shape"], Bool[Tensor, "*shape"]]:
    """The larger of the free and the clipped loss, a negative advantage's bounded; where a bound took the gradient."""
    free, bounded = -ratio * advantages, -ratio.clamp(1 - low, 1 + high) * advantages
    loss, clipped = torch.maximum(free, bounded), bounded > free
    if dual is not None:
        ceiling = -dual * advantages
        excessive = (advantages < 0) & (loss > ceiling)
        loss, clipped = torch.where(excessive, ceiling, loss), clipped | excessive
    return loss, clipped


def _ratio_stats(
    log_ratio: Float[Tensor, "*shape"], clipped: Bool[Tensor, "*shape"]
) -> dict[str, Float[Tensor, "*shape"]]:
    ratio = log_ratio.detach().exp()
    return {"ratio": ratio, "ratio/max": ratio, "clipped": clipped.to(ratio.dtype), "kl": _k3(log_ratio)}


def _k3(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """ρ − 1 − log ρ: a k3 estimate of KL(π_old‖π), as a number to watch."""
    return torch.expm1(log_ratio.detach()) - log_ratio.detach()


def awr(
    logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"] | None = None,
    *,
    beta: float = 1.0,
    clamp: float = 20.0,
) -> Float[Tensor, "*shape"]:
    """Advantage-weighted regression: imitate what was done, weighted by min(exp(βA), clamp).

    β is an inverse temperature: 0 is plain imitation, large values imitate only the best. Off-policy data is fine.
    https://arxiv.org/abs/1910.00177
    """
    logprobs, advantages = _ready(mask, logprobs, advantages)
    weights = (beta * advantages.detach()).clamp(max=math.log(clamp)).exp()
    return -weights * logprobs


def squared_error(
    values: Float[Tensor, "*shape"],
    targets: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """(value − target)², without the ½; the target is a constant."""
    values, targets = _ready(mask, values, targets)
    return (values - targets.detach()).square()


def clipped_value(
    values: Float[Tensor, "*shape"],
    old_values: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"] | None = None,
    *,
    clip: float = 0.2,
) -> Float[Tensor, "*shape"]:
    """PPO's value loss ½·max((V−R)², (V_clipped−R)²), V_clipped being V kept within ±clip of its old value."""
    values, old_values, returns = _ready(mask, values, old_values, returns)
    old_values, returns = old_values.detach(), returns.detach()
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (bounded - returns).square())


def huber(error: Float[Tensor, "*shape"], delta: float = 1.0) -> Float[Tensor, "*shape"]:
    """½·error² up to |error| = delta, then a straight line of slope delta: one bad target cannot dominate a step."""
    error = _at_least_float32(error)
    return F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)


def expectile(error: Float[Tensor, "*shape"], tau: float) -> Float[Tensor, "*shape"]:
    """|τ − 1(error < 0)|·error², error = target − prediction: the prediction drifts above the mean for τ > ½.

    As τ → 1 it approaches the maximum over the actions in the data, without querying others: implicit Q-learning,
    https://arxiv.org/abs/2110.06169
    """
    error = _at_least_float32(error)
    return torch.where(error < 0, 1 - tau, tau) * error.square()


def pairwise(
    chosen: Float[Tensor, "*shape"],
    rejected: Float[Tensor, "*shape"],
    margin: float | Float[Tensor, "*shape"] = 0.0,
) -> Float[Tensor, "*shape"]:
    """Bradley–Terry: −log σ(chosen − rejected − margin), the loss of a reward model per preference pair."""
    chosen, rejected = _ready(None, chosen, rejected)
    return -F.logsigmoid(chosen - rejected - margin)


def kl_k1(
    logprobs: Float[Tensor, "*shape"],
    ref_logprobs: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """log π − log π_ref of a token sampled from π: the unbiased estimate of KL(π‖π_ref), of either sign.

    For use *in rewards*. As a loss its expected gradient is zero. http://joschu.net/blog/kl-approx.html
    """
    logprobs, ref_logprobs = _ready(mask, logprobs, ref_logprobs)
    return logprobs - ref_logprobs


def kl_k2(
    logprobs: Float[Tensor, "*shape"],
    ref_logprobs: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """½·(log π − log π_ref)²: biased as an estimate, but its expected gradient on samples from π is ∇KL(π‖π_ref)."""
    return 0.5 * kl_k1(logprobs, ref_logprobs, mask).square()


def kl_k3(
    logprobs: Float[Tensor, "*shape"],
    ref_logprobs: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """e^x − x − 1 with x = log π_ref − log π: unbiased and never negative, GRPO's KL loss.

    As a loss on samples from π its expected gradient is ∇KL(π_ref‖π), not ∇KL(π‖π_ref).
    """
    x = (-kl_k1(logprobs, ref_logprobs, mask)).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return torch.expm1(x) - x


def entropy(logits: Float[Tensor, "*shape V"]) -> Float[Tensor, "*shape"]:
    """Entropy in nats of each categorical distribution; logits of −inf are choices that do not exist."""
    logprobs = F.log_softmax(_at_least_float32(logits), -1)
    return -_expectation(logprobs, logprobs)


def categorical_kl(logits: Float[Tensor, "*shape V"], ref_logits: Float[Tensor, "*shape V"]) -> Float[Tensor, "*shape"]:
    """KL(π‖π_ref) in nats over all choices, exact; infinite where π allows what π_ref does not."""
    logits, ref_logits = _ready(None, logits, ref_logits)
    logprobs = F.log_softmax(logits, -1)
    return _expectation(logprobs, logprobs - F.log_softmax(ref_logits, -1).detach())


def _expectation(logprobs: Float[Tensor, "*shape V"], x: Float[Tensor, "*shape V"]) -> Float[Tensor, "*shape"]:
    """Σ π·x, in which impossible choices count nothing even where x is infinite."""
    return (logprobs.exp() * torch.where(logprobs > -math.inf, x, 0.0)).sum(-1)


def _ready(mask: Bool[Tensor, "*shape"] | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in at least float32, of one shape, and 0 outside the mask."""
    shapes = {tuple(tensor.shape) for tensor in tensors}
    assert len(shapes) == 1, f"one entry per position in each tensor, got shapes {sorted(shapes)}"
    if mask is None:
        return tuple(_at_least_float32(tensor) for tensor in tensors)
    return tuple(_zeroed(tensor, mask) for tensor in tensors)


def _zeroed(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return torch.where(mask, _at_least_float32(x), 0.0)


def _at_least_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return x if x.dtype == torch.float64 else x.float()
