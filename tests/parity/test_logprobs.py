"""Log-probs of packed rows against the model's own forward pass over each sequence alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from echelon.data.packing import Batch, Sampled, pack, pack_branches
from echelon.models import lm
from echelon.models.lm import token_logprobs, token_logprobs_and_entropy
from tests.parity.architectures import ARCHITECTURES, VOCABULARY, model, plain_logprobs

architectures = pytest.mark.parametrize("name", ARCHITECTURES)
two_kinds = pytest.mark.parametrize("name", ["Llama", "Gemma 2, mixed, soft-capped"])


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def said(prompt: list[int], action: list[int]) -> Sampled:
    return Sampled(prompt, action, [0.0] * len(action))


def two_conversations() -> list[Sampled]:
    """Three turns of one conversation and two of another, longer than any window in the models."""
    first, second = ids(20, 1), ids(9, 2)
    turns = [said(first, ids(5, 3))]
    for seed in (4, 5):
        turns.append(said(turns[-1].prompt + turns[-1].action + ids(6, seed), ids(seed, seed + 9)))
    turns.append(said(second, ids(7, 6)))
    turns.append(said(second + turns[-1].action + ids(3, 7), ids(4, 8)))
    return turns


def branching() -> list[Sampled]:
    """Several answers to several states of one conversation, one answer elsewhere, and a lone branch."""
    trunk = ids(40, 1)
    states = [trunk[:12], trunk[:25], trunk, trunk[:25], trunk, trunk]
    return [said(state, ids(3 + seed, seed)) for seed, state in enumerate(states)] + [said(ids(15, 20), ids(9, 21))]


def by_turn(batch: Batch, values: Tensor, count: int) -> list[Tensor]:
    return [values[batch.turn == index] for index in range(count)]


def gradient(module: nn.Module, loss: Tensor) -> Tensor:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([part.flatten() for part in found if part is not None])


def weighted(logprobs: list[Tensor]) -> Tensor:
    """A loss in which no two tokens count the same."""
    flat = torch.cat(logprobs)
    return (flat * torch.linspace(0.5, 1.5, len(flat))).sum()


@architectures
@pytest.mark.parametrize("layout", [pack, pack_branches])
def test_packed_rows_score_like_separate_sequences(name: str, layout: Any) -> None:
    module, turns = model(name), branching() if layout is pack_branches else two_conversations()
    batch = layout(turns)
    assert len(batch.tokens) == 2
    packed = by_turn(batch, token_logprobs(module, batch), len(turns))
    alone = [plain_logprobs(module, turn.prompt, turn.action) for turn in turns]
    torch.testing.assert_close(torch.cat(packed), torch.cat(alone), atol=1e-5, rtol=0)

    ours, theirs = gradient(module, weighted(packed)), gradient(module, weighted(alone))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@architectures
def test_what_was_not_sampled_is_zero(name: str) -> None:
    batch = pack(two_conversations())
    logprobs, entropy = token_logprobs_and_entropy(model(name), batch)
    assert logprobs[~batch.mask].eq(0).all()
    assert entropy[~batch.mask].eq(0).all()
    assert entropy[batch.mask].gt(0).all()


@two_kinds
@pytest.mark.parametrize("layout", [pack, pack_branches])
def test_the_head_in_chunks_is_the_head_at_once(name: str, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, turns = model(name), branching() if layout is pack_branches else two_conversations()
    batch = layout(turns)

    def loss() -> tuple[Tensor, Tensor]:
        logprobs, entropy = token_logprobs_and_entropy(module, batch, temperature=0.7)
        return weighted([logprobs[batch.mask], entropy[batch.mask]]), torch.cat([logprobs, entropy])

    whole_loss, whole = loss()
    expected = gradient(module, whole_loss)
    monkeypatch.setattr(lm, "LOGITS_PER_CHUNK", 3 * VOCABULARY + 1)  # three positions at a time
    chunked_loss, chunked = loss()
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=0)
    found = gradient(module, chunked_loss)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@two_kinds
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_temperature_divides_the_logits(name: str, temperature: float) -> None:
    module, turns = model(name), two_conversations()
    batch = pack(turns)
    packed = by_turn(batch, token_logprobs(module, batch, temperature=temperature), len(turns))
    alone = [plain_logprobs(module, turn.prompt, turn.action, temperature) for turn in turns]
    torch.testing.assert_close(torch.cat(packed), torch.cat(alone), atol=1e-5, rtol=0)


@two_kinds
def test_entropy_is_that_of_the_distribution_sampled_from(name: str) -> None:
    module, turn = model(name), two_conversations()[0]
    batch = pack([turn])
    _, entropy = token_logprobs_and_entropy(module, batch, temperature=0.7)
    logits = module(input_ids=batch.tokens, use_cache=False).logits[0].float() / 0.7
    expected = torch.distributions.Categorical(logits=logits[len(turn.prompt) - 1 : -1]).entropy()
    torch.testing.assert_close(entropy[batch.mask], expected, atol=1e-5, rtol=0)


@architectures
@pytest.mark.parametrize("layout", [pack, pack_branches])
def test_what_lies_after_a_row_changes_nothing(name: str, layout: Any) -> None:
    """No padding id, no padding side: whatever stands behind the end of a row, its log-probs are the same."""
    module, turns = model(name), branching() if layout is pack_branches else two_conversations()
    batch = layout(turns)
    beyond = torch.arange(batch.tokens.shape[1]) >= batch.lengths[:, None]
    assert beyond.any()
    expected = token_logprobs(module, batch)
    for junk in (1, VOCABULARY - 1, torch.randint(0, VOCABULARY, batch.tokens.shape)):
        found = token_logprobs(module, replace(batch, tokens=torch.where(beyond, junk, batch.tokens)))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@architectures
@pytest.mark.parametrize("layout", [pack, pack_branches])
def test_micro_batches_score_like_the_whole(name: str, layout: Any) -> None:
    module, turns = model(name), branching() if layout is pack_branches else two_conversations()
    batch = layout(turns)
    expected = token_logprobs(module, batch)
    for micro in batch.split(1):
        found = token_logprobs(module, micro)
        torch.testing.assert_close(found, expected[micro.rows, : micro.tokens.shape[1]], atol=1e-5, rtol=0)


def test_branches_need_no_position_beyond_those_that_were_learned() -> None:
    """Side by side, sequences that fit take more columns than the model has positions."""
    import transformers

    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    turns = [said(ids(22, 1), ids(10, seed)) for seed in range(4)] + [said(ids(4, 9), ids(4, 8))]
    batch = pack_branches(turns)
    assert batch.tokens.shape[1] > 32
    packed = by_turn(batch, token_logprobs(module, batch), len(turns))
    alone = [plain_logprobs(module, turn.prompt, turn.action) for turn in turns]
    torch.testing.assert_close(torch.cat(packed), torch.cat(alone), atol=1e-5, rtol=0)
