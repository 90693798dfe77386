"""A script answers like a model would: with tokens, where a model would stop, when it pleases."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

import pytest

from echelon.errors import RolloutError
from echelon.models.lm import tiny
from echelon.sampling.scripted import ScriptedSampler
from echelon.types import Completion, SamplingParams


@cache
def tokens_of() -> Any:
    return tiny(["yes no maybe"], vocab_size=300, hidden=16, layers=1, heads=1)[1]


def test_texts_are_said_in_the_order_of_the_requests() -> None:
    sampler = ScriptedSampler(["yes", "no"], tokens_of(), delay=lambda prompt, _: 0.002 / prompt[0])

    async def ask() -> list[Completion]:
        return await asyncio.gather(*(sampler.sample([n], SamplingParams()) for n in (1, 2)))

    said = asyncio.run(ask())
    assert [completion.text for completion in said] == ["yes", "no"]
    assert said[0].tokens == [*tokens_of().encode("yes"), tokens_of().eos_token_id]
    assert said[0].logprobs == [0.0] * len(said[0].tokens)
    assert [prompt for prompt, _ in sampler.asked] == [[1], [2]]


def test_a_script_that_is_too_short_says_so() -> None:
    sampler = ScriptedSampler(["yes"], tokens_of())
    asyncio.run(sampler.sample([1], SamplingParams()))
    with pytest.raises(RolloutError, match="the script has 1 answers and was asked for one more"):
        asyncio.run(sampler.sample([1], SamplingParams()))


def test_a_function_sees_the_prompt_and_the_request() -> None:
    sampler = ScriptedSampler(lambda prompt, params: f"{prompt[-1]} {params.seed}", tokens_of())
    assert asyncio.run(sampler.sample([4, 7], SamplingParams(seed=3))).text == "7 3"


def test_delays_change_when_an_answer_arrives_and_nothing_else() -> None:
    arrived: list[str] = []
    sampler = ScriptedSampler(["slow", "fast"], tokens_of(), delay=lambda prompt, _: prompt[0] / 1000)

    async def ask(number: int) -> None:
        arrived.append((await sampler.sample([number], SamplingParams())).text)

    async def both() -> None:
        await asyncio.gather(ask(20), ask(1))

    asyncio.run(both())
    assert arrived == ["fast", "slow"]


def test_a_whole_completion_is_passed_on() -> None:
    given = Completion([5, 6], [-0.5, -1.5], "hm", "length", 3)
    assert asyncio.run(ScriptedSampler([given], tokens_of()).sample([1], SamplingParams())) is given


def test_a_text_is_cut_where_the_request_stops_it() -> None:
    sampler = ScriptedSampler(lambda *_: "yes no maybe", tokens_of())

    def said(**stops: Any) -> tuple[str, str]:
        completion = asyncio.run(sampler.sample([1], SamplingParams(**stops)))
        return completion.text, completion.stop

    assert said() == ("yes no maybe", "stop")
    assert said(stop=("no",)) == ("yes no", "stop")
    assert said(stop_when=lambda text: len(text) >= 3) == ("yes", "stop")
    assert said(max_tokens=1)[1] == "length"
    assert said(stop_ids=(tokens_of().encode("yes")[-1],))[1] == "stop"
