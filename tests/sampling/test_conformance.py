"""Every sampler keeps the promises of `Sampler`, whatever it samples with."""

from __future__ import annotations

import asyncio
import random
from functools import cache
from typing import Any

import pytest

from echelon.models.lm import tiny
from echelon.sampling.local import LocalSampler
from echelon.sampling.scripted import ScriptedSampler
from echelon.seeds import derive_seed
from echelon.types import Sampler, SamplingParams
from tests.sampling.conformance import check_sampler


@cache
def small() -> tuple[Any, Any]:
    return tiny(["what is in the box? a cat, a hat, a bat."] * 3, vocab_size=330, hidden=32, layers=2, heads=2)


def local(concurrency: int) -> Sampler:
    return LocalSampler(*small(), concurrency=concurrency)


def script(prompt: list[int], params: SamplingParams) -> str:
    """Words of two bytes, of one and of four, a different number of them for every request."""
    draw = random.Random(derive_seed(params.seed, *prompt))
    return " ".join(draw.choice(["cat", "hät", "naïve", "\N{GRINNING FACE}"]) for _ in range(draw.randrange(2, 9)))


def scripted(_: int) -> Sampler:
    return ScriptedSampler(script, small()[1], delay=lambda prompt, params: params.seed % 3 / 1000)


@pytest.mark.parametrize("make", [local, scripted])
@pytest.mark.parametrize("concurrency", [8, 2])
def test_samplers_keep_their_promises(make: Any, concurrency: int) -> None:
    _, tokenizer = small()
    texts = ["what is in the box?", "a", "a cat, a hat, a bat. what is in", "a cat, a hat, a bat. a cat", "the box"]
    prompts = [tokenizer.encode(text) for text in texts]
    stop_id = tokenizer.eos_token_id
    asyncio.run(check_sampler(make(concurrency), tokenizer, prompts, stop_id=stop_id))
