"""Log-probs of packed rows against the model's own forward pass over each sequence alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from echelon.data.packing import Batch, Sampled, pack, pack_branches
from echelon.errors import DataError
from echelon.models import lm
from echelon.models.heads import Places, Spans, TokenValue, UtteranceCritic, token_values
from echelon.models.lm import (
    attention_inputs,
    backbone,
    output_head,
    token_logprobs,
    token_logprobs_and_entropy,
)
from echelon.ops import vocabulary
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
@pytest.mark.parametrize("head", ["linear", "any"])
def test_the_head_in_parts_is_the_head_at_once(
    name: str, layout: Any, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linear head takes the vocabulary in blocks, any other head the positions in chunks."""
    module, turns = model(name), branching() if layout is pack_branches else two_conversations()
    batch = layout(turns)

    def loss() -> tuple[Tensor, Tensor]:
        logprobs, entropy = token_logprobs_and_entropy(module, batch, temperature=0.7)
        return weighted([logprobs[batch.mask], entropy[batch.mask]]), torch.cat([logprobs, entropy])

    logits = module(input_ids=batch.tokens, use_cache=False, **attention_inputs(module, batch)).logits.float() / 0.7
    row, column = batch.mask.nonzero(as_tuple=True)
    logits_MV = logits[row, batch.before[row, column]].log_softmax(-1)
    plain = [logits_MV.gather(-1, batch.tokens[batch.mask][:, None])[:, 0], -(logits_MV.exp() * logits_MV).sum(-1)]
    expected = gradient(module, weighted(plain))
    monkeypatch.setattr(vocabulary, "LOGITS_PER_BLOCK", 5 * int(batch.mask.sum()))
    monkeypatch.setattr(vocabulary, "LOGITS_KEPT", 0)
    monkeypatch.setattr(lm, "LOGITS_PER_CHUNK", 3 * VOCABULARY + 1)  # three positions at a time
    hook = output_head(module).register_forward_hook(lambda *_: None) if head == "any" else None
    try:
        part_loss, parts = loss()
        found = gradient(module, part_loss)
    finally:
        if hook is not None:
            hook.remove()
    whole = torch.cat([place_of(batch, values) for values in plain])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def place_of(batch: Batch, values_M: Tensor) -> Tensor:
    return torch.zeros(batch.tokens.shape).masked_scatter(batch.mask, values_M)


def test_an_adapter_on_the_head_is_heard() -> None:
    module = copy.deepcopy(model("Qwen2"))
    adapted = peft.get_peft_model(module, peft.LoraConfig(r=2, target_modules=["lm_head", "v_proj"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    batch = pack([two_conversations()[0]])
    turn = two_conversations()[0]
    ours, theirs = token_logprobs(adapted, batch)[batch.mask], plain_logprobs(adapted, turn.prompt, turn.action)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-6)
    found, expected = gradient(adapted, weighted([ours])), gradient(adapted, weighted([theirs]))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (ours - token_logprobs(model("Qwen2"), batch)[batch.mask]).abs().max() > 0.1


@architectures
def test_rows_laid_end_to_end_score_like_padded_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that restart keep rows apart: same log-probs, values and gradients, and no padding is computed."""
    module, turns = model(name), two_conversations()
    batch = pack(turns)
    assert batch.lengths.tolist() != [batch.tokens.shape[1]] * 2, "or there would be no padding"
    seen: list[tuple[int, ...]] = []
    value = TokenValue.from_lm(module)
    with torch.no_grad():
        value.head.weight.normal_(generator=torch.Generator().manual_seed(0))

    def score() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hook = backbone(module).register_forward_hook(lambda body, args, out: seen.append(out[0].shape[:2]))
        logprobs, (values, after) = token_logprobs(module, batch), token_values(value, batch)
        hook.remove()
        grown = gradient(value, (values * batch.mask).square().sum() + after.sum())
        return (
            logprobs,
            values[batch.mask],
            after,
            torch.cat([gradient(module, weighted([logprobs[batch.mask]])), grown]),
        )

    padded = score()
    monkeypatch.setattr(lm, "lays_end_to_end", lambda module: True)
    flat = score()
    assert seen == [tuple(batch.tokens.shape), (1, int(batch.lengths.sum()))]
    for one, other in zip(flat[:3], padded[:3], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert (flat[3] - padded[3]).abs().max() <= 1e-5 * padded[3].abs().max()


def test_an_utterance_critic_reads_rows_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pack(two_conversations())
    critic = UtteranceCritic.from_lm(model("Llama"))
    at = Spans(batch.row_N, batch.state_N, batch.first_N, batch.last_N), Places(batch.row_N, batch.state_N)
    padded = critic(batch.tokens, *at)
    monkeypatch.setattr(lm, "lays_end_to_end", lambda module: True)
    for one, other in zip(critic(batch.tokens, *at, batch.lengths), padded, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_branches_are_never_laid_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pack_branches(branching())
    expected = token_logprobs(model("Llama"), batch)
    monkeypatch.setattr(lm, "lays_end_to_end", lambda module: True)
    assert token_logprobs(model("Llama"), batch).equal(expected)


@pytest.mark.parametrize(("attention", "expected"), [("sdpa", False), ("eager", False), ("flash_attention_2", True)])
def test_rows_are_laid_end_to_end_where_attention_takes_them(attention: str, expected: bool) -> None:
    module = copy.deepcopy(model("Llama"))
    module.config._attn_implementation_internal = attention  # set for real, it asks for a GPU
    assert lm.lays_end_to_end(module) is expected


def test_a_model_whose_attention_does_not_learn_where_rows_begin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm, "lays_end_to_end", lambda module: True)
    for name in ARCHITECTURES:
        lm.check_end_to_end(model(name))
    deaf = copy.deepcopy(model("Llama"))
    forward = deaf.model.forward
    monkeypatch.setattr(deaf.model, "forward", lambda position_ids=None, **inputs: forward(**inputs))
    with pytest.raises(DataError, match="rows laid end to end would read each other"):
        lm.check_end_to_end(deaf)


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
