"""Log-probs the engine sampled with against those the trainer computes: the ratio of the first update is 1."""

from __future__ import annotations

import asyncio

import pytest
import torch

from echelon.data.packing import Sampled, pack
from echelon.errors import DataError
from echelon.models.lm import check_masks, token_logprobs
from echelon.sampling.local import LocalSampler
from echelon.types import SamplingParams
from tests.parity.architectures import ARCHITECTURES, VOCABULARY, model
from tests.text.templates import tokenizer

architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


async def converse(engine: LocalSampler, prompt: list[int], *, seed: int, turns: int, tokens: int) -> list[Sampled]:
    """A conversation whose turns extend each other, with observations of different lengths in between."""
    found: list[Sampled] = []
    for turn in range(turns):
        params = SamplingParams(max_tokens=tokens + (seed + turn) % 3, seed=100 * seed + turn, temperature=0.8)
        done = await engine.sample(prompt, params)
        found.append(Sampled(prompt, done.tokens, done.logprobs))
        prompt = [*prompt, *done.tokens, *ids(2 + (seed * 7 + turn) % 5, seed + turn)]
    return found


async def play(engine: LocalSampler) -> list[list[Sampled]]:
    """Conversations of many kinds at once: alone, siblings of one prompt, prompts that begin alike, returning ones."""
    shared = ids(40, 1)
    prompts = [ids(3 + 4 * n, 50 + n) for n in range(4)]
    prompts += [shared] * 4
    prompts += [shared[:20], shared[:30], shared[:39], [*shared, *ids(5, 2)], [*shared[:25], *ids(9, 3)], shared[:1]]
    both = [
        await asyncio.gather(*(converse(engine, p, seed=s, turns=3, tokens=4) for s, p in enumerate(prompts)))
        for _ in range(2)  # the second time, what was resident is found again or was dropped
    ]
    return [*both[0], *both[1]]


def largest_difference(name: str, conversations: list[list[Sampled]]) -> float:
    worst = 0.0
    with torch.no_grad():
        for turns in conversations:
            batch = pack(turns)
            assert len(batch.tokens) == 1, "turns of one conversation share one row"
            assert batch.logprobs is not None
            found = token_logprobs(model(name), batch, temperature=0.8)
            worst = max(worst, float((found - batch.logprobs).abs().max()))
    return worst


@architectures
@pytest.mark.parametrize("slots", [64, 3, 1])
def test_the_engine_samples_with_the_trainers_log_probs(name: str, slots: int) -> None:
    """Over multi-turn conversations with caches kept; with fewer slots than requests, waiting and evictions as well."""
    engine = LocalSampler(model(name), tokenizer("plain"), slots=slots)
    conversations = asyncio.run(play(engine))
    assert largest_difference(name, conversations) < 1e-4


@pytest.mark.parametrize("name", ["Llama", "Mistral, sliding", "Gemma 3, mixed"])
def test_what_is_resident_does_not_change_what_is_sampled(name: str) -> None:
    """The same conversations with room for all, with room for one, and each in an engine of its own."""
    roomy, narrow = (LocalSampler(model(name), tokenizer("plain"), slots=slots) for slots in (64, 1))
    first = asyncio.run(play(roomy))
    second = asyncio.run(play(narrow))
    assert [[turn.action for turn in turns] for turns in first] == [[turn.action for turn in turns] for turns in second]


def test_a_model_that_no_mask_reaches_is_refused() -> None:
    import transformers

    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    bloom = transformers.AutoModelForCausalLM.from_config(transformers.BloomConfig(**settings))
    with pytest.raises(DataError, match="BloomForCausalLM cannot be told by masks and positions"):
        check_masks(bloom)
    mpt = transformers.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)
    with pytest.raises(DataError, match=r"MptForCausalLM cannot be told .* \(it ignores them\)"):
        check_masks(transformers.AutoModelForCausalLM.from_config(mpt))


def test_a_model_with_other_kinds_of_layers_is_refused() -> None:
    import transformers

    neo = transformers.GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    module = transformers.AutoModelForCausalLM.from_config(neo)
    with pytest.raises(DataError, match="GPTNeoForCausalLM has layers of kind local"):
        LocalSampler(module, tokenizer("plain"))


@architectures
def test_models_that_can_be_told_who_sees_whom_pass(name: str) -> None:
    check_masks(model(name))
