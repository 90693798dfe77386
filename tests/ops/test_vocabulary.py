"""Log-probs and entropy in blocks of the vocabulary, against the way that makes all logits at once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from echelon.ops import vocabulary
from echelon.ops.vocabulary import linear_scores

M, H, V = 7, 5, 23
EVERYTHING: dict[str, float] = {"scale": 0.5, "cap": 3.0, "temperature": 0.7}
settings = pytest.mark.parametrize("settings", [{}, {"scale": 2.0}, {"temperature": 0.7}, {"cap": 3.0}, EVERYTHING])
blocks = pytest.mark.parametrize("block", [1, 3 * M, 1 << 20], ids=["entry by entry", "three at a time", "at once"])
kept = pytest.mark.parametrize("kept", [0, M * V // 2, 1 << 20], ids=["made again", "half of them kept", "kept"])


def plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    scale: float = 1.0,
    cap: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(hidden, weight, bias).float() * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    logprobs = torch.log_softmax(logits / temperature, -1)
    return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((M, H), (V, H), (V,)))
    targets = torch.randint(0, V, (M,), generator=draw)
    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
    return hidden, weight, bias, targets


def gradients(scores: tuple[Tensor, Tensor | None], of: list[Tensor], *, entropy: float = 0.0) -> list[Tensor]:
    """Of a loss in which no two positions count the same."""
    loss = (scores[0] * torch.linspace(-1.0, 2.0, len(scores[0]))).sum()
    if entropy:
        assert scores[1] is not None
        loss = loss + entropy * (scores[1] * torch.linspace(2.0, -0.5, len(scores[1]))).sum()
    return list(torch.autograd.grad(loss, of))


def test_a_small_vocabulary_by_hand() -> None:
    """Logits 0 and log 3: probabilities ¼ and ¾."""
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [math.log(3.0)]])
    logprobs, entropy = linear_scores(hidden, weight, None, torch.tensor([0, 1]))
    torch.testing.assert_close(logprobs, torch.tensor([0.25, 0.75]).log())
    assert entropy is not None
    torch.testing.assert_close(entropy, torch.full((2,), 0.25 * math.log(4) + 0.75 * math.log(4 / 3)))


@settings
@blocks
@kept
def test_blocks_change_neither_numbers_nor_gradients(
    settings: dict[str, float], block: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "LOGITS_PER_BLOCK", block)
    monkeypatch.setattr(vocabulary, "LOGITS_KEPT", kept)
    hidden, weight, bias, targets = inputs()
    for entropy in (0.0, 0.3):
        ours, theirs = (score(hidden, weight, bias, targets, **settings) for score in (linear_scores, plain))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)
        found, expected = (gradients(scores, [hidden, weight, bias], entropy=entropy) for scores in (ours, theirs))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@blocks
def test_the_entropy_alone_has_its_gradient(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "LOGITS_PER_BLOCK", block)
    hidden, weight, bias, targets = inputs()
    found, expected = (
        torch.autograd.grad(score(hidden, weight, bias, targets, cap=2.0)[1].sum(), [hidden, weight, bias])
        for score in (linear_scores, plain)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("trained", [0, 1, 2], ids=["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(trained: int) -> None:
    *parameters, targets = inputs()
    for number, parameter in enumerate(parameters):
        parameter.requires_grad_(number == trained)
    expected = gradients(plain(*parameters, targets), [parameters[trained]])
    scores = linear_scores(*parameters, targets)
    (scores[0] * torch.linspace(-1.0, 2.0, M)).sum().backward()
    torch.testing.assert_close(parameters[trained].grad, expected[0], atol=1e-5, rtol=1e-4)
    assert all(parameter.grad is None for number, parameter in enumerate(parameters) if number != trained)


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_large_logits_stay_finite(size: float) -> None:
    logprobs, entropy = linear_scores(torch.ones(2, 1), torch.tensor([[size], [-size]]), None, torch.tensor([0, 1]))
    assert logprobs.tolist() == pytest.approx([0.0, -2 * size])
    assert entropy is not None
    assert entropy.tolist() == [0.0, 0.0]


def test_a_logit_that_is_not_a_number_shows() -> None:
    hidden, weight, bias, targets = inputs()
    with torch.no_grad():
        weight[3] = math.nan
    assert linear_scores(hidden, weight, bias, targets)[0].isnan().all()


def test_lower_precision_in_float32_out() -> None:
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    ours, theirs = (score(hidden, weight, bias, targets) for score in (linear_scores, plain))
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=0)  # the head's output is rounded alike
    for one, other in zip(*(gradients(scores, [hidden, weight, bias]) for scores in (ours, theirs)), strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.02)


def test_entropy_is_left_out_when_it_is_not_wanted() -> None:
    hidden, weight, bias, targets = inputs()
    logprobs, entropy = linear_scores(hidden, weight, bias, targets, with_entropy=False)
    assert entropy is None
    assert logprobs.equal(linear_scores(hidden, weight, bias, targets)[0])


def test_no_position_is_no_number() -> None:
    hidden, weight, bias, _ = inputs()
    logprobs, _ = linear_scores(hidden[:0], weight, bias, torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == (0,)
    assert not torch.autograd.grad(logprobs.sum(), [weight])[0].any()


def test_no_tensor_of_positions_by_vocabulary_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest allocation in a pass forth and back is a block, or as large as the weight's own gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for made in out if isinstance(out, tuple) else (out,):
                if isinstance(made, Tensor):
                    self.size = max(self.size, made.numel())
            return out

    monkeypatch.setattr(vocabulary, "LOGITS_PER_BLOCK", 4 * M)
    monkeypatch.setattr(vocabulary, "LOGITS_KEPT", 0)
    hidden, weight, _, targets = inputs()
    with Largest() as ours:
        linear_scores(hidden, weight, None, targets)[0].sum().backward()
    with Largest() as theirs:
        plain(hidden, weight, None, targets)[0].sum().backward()
    assert (ours.size, theirs.size) == (V * H, M * V)
