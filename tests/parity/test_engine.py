"""Log-probs the engine sampled with against those the trainer computes: the ratio of the first update is 1."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from echelon.data.packing import Sampled, pack
from echelon.errors import DataError
from echelon.models.lm import check_masks, token_logprobs
from echelon.ops.sampling import counter_uniform, draw
from echelon.sampling.local import LocalSampler
from echelon.types import Completion, SamplingParams
from tests.parity.architectures import ARCHITECTURES, VOCABULARY, model, plain_logprobs
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
@pytest.mark.parametrize("tokens", [100_000, 700, 1])
def test_the_engine_samples_with_the_trainers_log_probs(name: str, tokens: int) -> None:
    """Over multi-turn conversations with caches kept; with little room, waiting and evictions as well."""
    engine = LocalSampler(model(name), tokenizer("plain"), cache_tokens=tokens)
    conversations = asyncio.run(play(engine))
    assert largest_difference(name, conversations) < 1e-4


@pytest.mark.parametrize("name", ["Llama", "Mistral, sliding", "Gemma 3, mixed"])
def test_what_is_resident_does_not_change_what_is_sampled(name: str) -> None:
    """The same conversations with room for all, with room for one, and each in an engine of its own."""
    roomy, narrow = (LocalSampler(model(name), tokenizer("plain"), cache_tokens=tokens) for tokens in (100_000, 1))
    first = asyncio.run(play(roomy))
    second = asyncio.run(play(narrow))
    assert [[turn.action for turn in turns] for turns in first] == [[turn.action for turn in turns] for turns in second]


arrivals = st.lists(
    st.tuples(
        st.integers(0, 3),  # which family of prompts, so that some share prefixes
        st.integers(1, 60),  # how much of it
        st.integers(1, 6),  # tokens to sample
        st.integers(0, 5),  # steps of the engine before it arrives
        st.integers(0, 2),  # turns that follow, each extending the last
        st.sampled_from(["length", "id", "string", "predicate"]),  # what may stop it
    ),
    min_size=1,
    max_size=6,
)


def stopping(kind: str, tokens: int, seed: int) -> SamplingParams:
    change: dict[str, Any] = {
        "length": {},
        "id": {"stop_ids": tuple(range(3, 60))},
        "string": {"stop": ("e", "1")},
        "predicate": {"stop_when": lambda text: len(text) > 4},
    }[kind]
    return SamplingParams(max_tokens=tokens, seed=seed, **change)


def whole_characters(tokens: list[int]) -> str:
    """The text so far, without the bytes at its end that are not yet a character."""
    texts = [tokenizer("plain").decode(tokens[:end], skip_special_tokens=True) for end in range(len(tokens) + 1)]
    return next(text for text in reversed(texts) if not text.endswith("\ufffd"))


@torch.no_grad()
def one_by_one(name: str, prompt: list[int], params: SamplingParams) -> tuple[list[int], list[float]]:
    """The definition: one row, the whole sequence through the model for every token, and a draw from what comes out."""
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < params.max_tokens:
        logits = model(name)(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[:, -1].float()
        drawn, logprob = draw(logits, counter_uniform(torch.tensor([params.seed]), torch.tensor([len(tokens)])))
        tokens.append(int(drawn))
        logprobs.append(float(logprob))
        text = whole_characters(tokens)
        if int(drawn) in params.stop_ids or any(stop in text for stop in params.stop):
            break
        if params.stop_when is not None and params.stop_when(text):
            break
    return tokens, logprobs


@architectures
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(arrivals, st.integers(1, 6), st.sampled_from([1, 600, 100_000]), st.sampled_from([4, 4096]))
def test_random_arrivals_lengths_evictions_and_stops_are_one_row_at_a_time(
    name: str, plans: list[tuple[int, int, int, int, int, str]], concurrency: int, cache_tokens: int, per_pass: int
) -> None:
    engine = LocalSampler(model(name), tokenizer("plain"), concurrency=concurrency, cache_tokens=cache_tokens)
    engine.pass_tokens = per_pass
    asked: list[tuple[list[int], SamplingParams, Completion]] = []

    async def come(number: int, family: int, length: int, tokens: int, wait: int, turns: int, stop: str) -> None:
        prompt = ids(60, family)[:length]
        for turn in range(turns + 1):
            for _ in range(wait):
                await asyncio.sleep(0)
            params = stopping(stop, tokens, seed=10 * number + turn)
            done = await engine.sample(prompt, params)
            asked.append((prompt, params, done))
            prompt = [*prompt, *done.tokens, *ids(1 + number, turn)]

    async def all_come() -> None:
        await asyncio.gather(*(come(number, *plan) for number, plan in enumerate(plans)))

    asyncio.run(all_come())
    for prompt, params, done in asked:
        tokens, logprobs = one_by_one(name, prompt, params)
        assert done.tokens == tokens
        assert done.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_a_model_that_no_mask_reaches_is_refused() -> None:
    import transformers

    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    bloom = transformers.AutoModelForCausalLM.from_config(transformers.BloomConfig(**settings))
    with pytest.raises(DataError, match="BloomForCausalLM cannot be told by masks and positions"):
        check_masks(bloom)
    mpt = transformers.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)
    with pytest.raises(DataError, match=r"MptForCausalLM cannot be told .* \(it ignores them\)"):
        check_masks(transformers.AutoModelForCausalLM.from_config(mpt))


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "no attention function to replace": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "layers of another kind": (
        "GPTNeoConfig",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "no keys and values at all": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_cannot_share_a_pass_is_sampled_one_by_one_with_one_notice(name: str) -> None:
    import transformers

    kind, change = OTHERS[name]
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, kind)(vocab_size=VOCABULARY, **ends, **change)
        module = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.warns(UserWarning, match="one after the other"):
        engine = LocalSampler(module, tokenizer("plain"))
    conversations = asyncio.run(play(engine))  # a second notice would be an error
    for turn in conversations[3] + conversations[-1]:
        with torch.no_grad():
            expected = plain_logprobs(module, turn.prompt, turn.action, temperature=0.8)
        assert turn.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


@architectures
def test_models_that_can_be_told_who_sees_whom_pass(name: str) -> None:
    check_masks(model(name))
