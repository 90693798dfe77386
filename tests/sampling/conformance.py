"""What every sampler promises, as one function: give it a sampler and a prompt, and it asserts.

The expectations come from a free run of the same request, so it needs no model and no knowledge of what is said.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from echelon.types import Completion, Sampler, SamplingParams


async def check_sampler(
    sampler: Sampler, tokenizer: Any, prompts: Sequence[list[int]], *, stop_id: int, length: int = 24
) -> None:
    """Raises AssertionError for the first promise that is broken. `stop_id` is what ends a message."""
    free = [SamplingParams(max_tokens=length, stop_ids=(stop_id,), seed=seed) for seed in range(len(prompts))]
    requests = list(zip(prompts, free, strict=True))
    said = [await sampler.sample(prompt, params) for prompt, params in requests]
    for (_, params), completion in zip(requests, said, strict=True):
        check_completion(completion, params, tokenizer)
    await check_company(sampler, requests, said)
    for (prompt, params), completion in zip(requests, said, strict=True):
        await check_stops(sampler, prompt, params, completion, tokenizer)
    await check_cancelling(sampler, requests, said)
    version = said[0].version + 5
    sampler.load(iter(()), version)
    assert (await sampler.sample(*requests[0])).version == version, "completions carry the version that was loaded"


def check_completion(completion: Completion, params: SamplingParams, tokenizer: Any) -> None:
    """One completion on its own: lengths, log-probs, and a text that is its tokens without the stop token."""
    tokens, ended = completion.tokens, completion.tokens[-1] in params.stop_ids
    assert 1 <= len(tokens) <= params.max_tokens
    assert len(completion.logprobs) == len(tokens)
    assert all(-1e9 < logprob <= 0 for logprob in completion.logprobs)
    assert completion.text == tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
    assert not any(token in params.stop_ids for token in tokens[:-1]), "nothing follows a stop id"
    if not ended and not params.stop and params.stop_when is None:
        assert (completion.stop, len(tokens)) == ("length", params.max_tokens)
    if ended:
        assert completion.stop == "stop"


async def check_company(
    sampler: Sampler, requests: Sequence[tuple[list[int], SamplingParams]], said: Sequence[Completion]
) -> None:
    """The same request gets the same answer, all at once and in any order, however often it is asked."""
    order = list(range(len(requests))) * 2
    random.Random(0).shuffle(order)
    again = await asyncio.gather(*(sampler.sample(*requests[index]) for index in order))
    for index, completion in zip(order, again, strict=True):
        assert completion.tokens == said[index].tokens
        differences = zip(completion.logprobs, said[index].logprobs, strict=True)
        assert max(abs(one - other) for one, other in differences) < 1e-4


async def check_stops(
    sampler: Sampler, prompt: list[int], params: SamplingParams, said: Completion, tokenizer: Any
) -> None:
    """A stop id, a stop string, a predicate and a limit each cut the free run where they first apply."""
    tokens = said.tokens
    middle = len(tokens) // 2
    cut = await sampler.sample(prompt, replace(params, stop_ids=(*params.stop_ids, tokens[middle])))
    assert cut.tokens == tokens[: tokens.index(tokens[middle]) + 1]
    check_completion(cut, replace(params, stop_ids=(*params.stop_ids, tokens[middle])), tokenizer)

    cut = await sampler.sample(prompt, replace(params, max_tokens=middle + 1))
    assert cut.tokens == tokens[: middle + 1]
    check_completion(cut, replace(params, max_tokens=middle + 1), tokenizer)

    texts = [tokenizer.decode(tokens[: count + 1], skip_special_tokens=True) for count in range(len(tokens))]
    whole = [count for count, text in enumerate(texts) if text and not text.endswith("\ufffd")]
    if len(whole) < 2:
        return
    target = texts[whole[len(whole) // 2]]
    first = next(count for count in whole if target in texts[count])
    ending = target[-3:]
    shorter = next(count for count in whole if ending in texts[count])
    for change, place in (({"stop": (ending,)}, shorter), ({"stop_when": lambda text: target in text}, first)):
        cut = await sampler.sample(prompt, replace(params, **change))
        assert cut.tokens == tokens[: place + 1]
        assert cut.stop == "stop"


async def check_cancelling(
    sampler: Sampler, requests: Sequence[tuple[list[int], SamplingParams]], said: Sequence[Completion]
) -> None:
    """Giving up on some requests disturbs none of the others."""
    asked = [asyncio.ensure_future(sampler.sample(*request)) for request in requests]
    for round in range(3):
        await asyncio.sleep(0)
        asked[round % len(asked)].cancel()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    for answer, expected in zip(answers, said, strict=True):
        assert isinstance(answer, asyncio.CancelledError) or (
            isinstance(answer, Completion) and answer.tokens == expected.tokens
        )
    assert any(isinstance(answer, Completion) for answer in answers)
