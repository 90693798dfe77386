"""The local engine against a plain loop that samples one row at a time and caches nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from echelon.data.packing import Sampled, pack
from echelon.models.lm import tiny, token_logprobs
from echelon.ops.sampling import counter_uniform, draw, penalise_repetition, restrict_logits
from echelon.sampling.local import LocalSampler
from echelon.types import Completion, SamplingParams

Request = tuple[list[int], SamplingParams]


@cache
def small() -> tuple[Any, Any]:
    module, tokenizer = tiny(["a cat, a hat, a bat."], vocab_size=300, hidden=32, layers=2, heads=2)
    return sharpened(module), tokenizer


def sharpened(module: Any) -> Any:
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)
    return module


def fresh() -> tuple[Any, Any]:
    """A model of its own, to be trained or broken."""
    module, tokenizer = tiny(["a cat, a hat, a bat."], vocab_size=300, hidden=32, layers=2, heads=2)
    return sharpened(module), tokenizer


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(5, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def plain_loop(module: Any, prompt: list[int], params: SamplingParams) -> tuple[list[int], list[float]]:
    """The definition: the whole sequence through the model for every token, and a draw from what comes out."""
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < params.max_tokens:
        logits = module(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[:, -1].float()
        logits = penalise_repetition(logits, torch.tensor([params.repetition_penalty]), [prompt + tokens])
        shaped = restrict_logits(logits, temperature=params.temperature or 1.0, top_k=params.top_k, top_p=params.top_p)
        uniform = counter_uniform(torch.tensor([params.seed]), torch.tensor([len(tokens)]))
        token = int(logits.argmax()) if params.temperature == 0 else int(draw(shaped, uniform)[0])
        tokens.append(token)
        logprobs.append(float(torch.log_softmax(shaped, -1)[0, token]))
        if token in params.stop_ids:
            break
    return tokens, logprobs


def ask(engine: LocalSampler, requests: Sequence[Request]) -> list[Completion]:
    async def all_at_once() -> list[Completion]:
        return await asyncio.gather(*(engine.sample(*request) for request in requests))

    return asyncio.run(all_at_once())


def assert_plain(module: Any, requests: Sequence[Request], said: Sequence[Completion]) -> None:
    for (prompt, params), completion in zip(requests, said, strict=True):
        tokens, logprobs = plain_loop(module, prompt, params)
        assert completion.tokens == tokens
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_temperature_zero_is_the_argmax_and_counts_the_untempered_distribution() -> None:
    module, tokenizer = small()
    prompt = ids(7, 1)
    (said,) = ask(LocalSampler(module, tokenizer), [(prompt, SamplingParams(max_tokens=9, temperature=0, seed=4))])
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([prompt + said.tokens])).logits[0, len(prompt) - 1 : -1]
    assert said.tokens == logits.argmax(-1).tolist()
    assert said.logprobs == pytest.approx(torch.log_softmax(logits, -1).amax(-1).tolist(), abs=1e-4)


CUT = [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.7, "temperature": 1.5}]


@pytest.mark.parametrize("change", [*CUT, {"top_p": 0.6, "repetition_penalty": 1.5}])
def test_log_probs_are_those_of_the_restricted_distribution(change: dict[str, Any]) -> None:
    module, tokenizer = small()
    params = SamplingParams(max_tokens=12, **change)
    requests = [(ids(6, seed), replace(params, seed=seed)) for seed in range(6)]
    said = ask(LocalSampler(module, tokenizer), requests)
    assert_plain(module, requests, said)
    (unrestricted,) = ask(LocalSampler(module, tokenizer), [(requests[0][0], SamplingParams(max_tokens=12))])
    assert sum(said[0].logprobs) > sum(unrestricted.logprobs)


def test_settings_of_one_request_do_not_leak_into_the_others() -> None:
    module, tokenizer = small()
    kinds = [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.3}, {"temperature": 2.0}, {"stop_ids": tuple(range(99))}]
    kinds += [{"repetition_penalty": 3.0}, {"repetition_penalty": 1.5, "temperature": 0}]
    requests = [(ids(9, 1), SamplingParams(max_tokens=8, seed=5, **kind)) for kind in kinds]
    assert_plain(module, requests, ask(LocalSampler(module, tokenizer), requests))


@pytest.mark.parametrize("others", [1, 7, 60])
def test_what_else_is_in_the_batch_changes_nothing(others: int) -> None:
    module, tokenizer = small()
    wanted = [(ids(11, n), SamplingParams(max_tokens=10, seed=n)) for n in range(3)]
    company = [(ids(1 + n % 29, 90 + n), SamplingParams(max_tokens=1 + n % 13, seed=n)) for n in range(others)]
    requests = [*wanted, *company]
    random.Random(others).shuffle(requests)
    said = ask(LocalSampler(module, tokenizer, concurrency=16), requests)
    for request in wanted:
        (alone,) = ask(LocalSampler(module, tokenizer), [request])
        together = said[requests.index(request)]
        assert together.tokens == alone.tokens
        assert together.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


class Watched:
    """How many tokens each forward pass of a model reads."""

    def __init__(self, module: Any) -> None:
        self.passes: list[int] = []
        self._handle = module.get_decoder().register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: Any, kwargs: Any) -> None:
        self.passes.append(kwargs["input_ids"].numel())

    def __enter__(self) -> list[int]:
        return self.passes

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()


def test_a_next_turn_reads_only_what_is_new() -> None:
    module, tokenizer = small()
    engine = LocalSampler(module, tokenizer)
    (said,) = ask(engine, [(ids(50, 1), SamplingParams(max_tokens=4))])
    with Watched(module) as passes:
        ask(engine, [([*ids(50, 1), *said.tokens, *ids(6, 2)], SamplingParams(max_tokens=3))])
    assert passes == [7, 1, 1], "the last token of the first answer was never read"


def test_siblings_read_their_prompt_once() -> None:
    module, tokenizer = small()
    engine = LocalSampler(module, tokenizer)
    requests = [(ids(50, 1), SamplingParams(max_tokens=3, seed=seed)) for seed in range(8)]
    with Watched(module) as passes:
        said = ask(engine, requests)
    assert_plain(module, requests, said)
    assert passes == [50, 1 + 7, 8, 7], "one reads the prompt, seven copy all but its last token"


def test_a_long_prompt_is_read_in_parts_while_others_answer() -> None:
    module, tokenizer = small()
    engine = LocalSampler(module, tokenizer)
    engine.pass_tokens = 16
    requests = [(ids(5, 1), SamplingParams(max_tokens=6)), (ids(60, 2), SamplingParams(max_tokens=2))]
    with Watched(module) as passes:
        said = ask(engine, requests)
    assert_plain(module, requests, said)
    assert passes == [5 + 9, 1 + 14, 1 + 14, 1 + 14, 1 + 9, 1 + 1]


def test_two_runs_with_one_seed_are_identical_to_the_last_bit() -> None:
    module, tokenizer = small()
    requests = [(ids(3 + n, n), SamplingParams(max_tokens=9, seed=n, stop_ids=(9, 40))) for n in range(30)]
    first, second = (ask(LocalSampler(module, tokenizer, concurrency=7), requests) for _ in range(2))
    assert first == second


def test_a_prompt_may_be_exactly_what_is_resident() -> None:
    """The last token of an answer is never fed, so this prompt has no token that is not yet known."""
    module, tokenizer = small()
    for length in (3, 30):
        engine = LocalSampler(module, tokenizer)
        prompt = ids(length, 1)
        (said,) = ask(engine, [(prompt, SamplingParams(max_tokens=5))])
        for end in (4, 5, 0):
            request = ([*prompt, *said.tokens[:end]], SamplingParams(max_tokens=5, seed=end))
            assert_plain(module, [request], ask(engine, [request]))


def test_seeds_name_streams() -> None:
    module, tokenizer = small()
    requests = [(ids(5, 1), SamplingParams(max_tokens=8, seed=seed)) for seed in [*range(40), 0, 1]]
    said = [tuple(completion.tokens) for completion in ask(LocalSampler(module, tokenizer), requests)]
    assert said[40:] == said[:2]
    assert len(set(said)) == 40


def test_training_between_turns_makes_the_engine_forget_the_conversation() -> None:
    """Nobody told the engine: it sees that the live weights have changed, and prefills again."""
    module, tokenizer = fresh()
    engine = LocalSampler(module, tokenizer)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    prompt = ids(30, 1)
    turns: list[Sampled] = []
    for turn in range(3):
        (done,) = ask(engine, [(prompt, SamplingParams(max_tokens=6, seed=turn))])
        turns.append(Sampled(prompt, done.tokens, done.logprobs))
        batch = pack(turns[-1:])
        assert batch.logprobs is not None
        with torch.no_grad():
            torch.testing.assert_close(token_logprobs(module, batch), batch.logprobs, atol=1e-4, rtol=0)
        token_logprobs(module, batch).sum().backward()
        optimizer.step()
        prompt = [*prompt, *done.tokens, *ids(4, turn)]
    stale = pack(turns)
    assert stale.logprobs is not None
    with torch.no_grad():
        assert (token_logprobs(module, stale) - stale.logprobs).abs().max() > 0.1, "the steps were too small to show"


def test_completions_carry_the_version_of_their_weights() -> None:
    module, tokenizer = fresh()
    engine = LocalSampler(module, tokenizer, version=3)
    request = (ids(5, 1), SamplingParams(max_tokens=2))
    assert ask(engine, [request])[0].version == 3
    engine.load(module.state_dict().items(), 4)
    assert ask(engine, [request])[0].version == 4


class Forced(LocalSampler):
    """Says what it is told instead of what the model would."""

    tokens: list[int]

    def _draw(self, requests: list[Any], logits: Tensor) -> tuple[list[int], list[float]]:
        return [self.tokens[len(request.tokens)] for request in requests], [0.0] * len(requests)


def forced(text: str, **params: Any) -> Completion:
    module, tokenizer = small()
    engine = Forced(module, tokenizer)
    engine.tokens = [*tokenizer.encode(text), tokenizer.eos_token_id]
    stop_ids = (tokenizer.eos_token_id,)
    return ask(engine, [(ids(3, 1), SamplingParams(max_tokens=99, stop_ids=stop_ids, **params))])[0]


@pytest.mark.parametrize("text", ["naïve héhé", "我是猫 cat", "\N{GRINNING FACE}\N{CAT} ok", "e\u0301 ."])
def test_text_is_whole_even_where_characters_are_cut_into_tokens(text: str) -> None:
    seen: list[str] = []

    def watch(so_far: str) -> bool:
        seen.append(so_far)
        return False

    said = forced(text, stop_when=watch)
    assert said.text == text
    assert seen[-1] == text
    assert all(text.startswith(so_far) for so_far in seen), "no half characters, no characters twice"
    for stop in (text[:1], text[1:3], text[-1:]):
        cut = forced(text, stop=(stop,))
        assert cut.text == text[: text.index(stop) + len(stop)]
        assert cut.stop == "stop"


def test_a_character_that_is_never_finished_does_not_hide_the_rest() -> None:
    module, tokenizer = small()
    engine = Forced(module, tokenizer)
    half = tokenizer.encode("ï")[:1]
    engine.tokens = [*tokenizer.encode("na"), *half, *tokenizer.encode("ve!"), *tokenizer.encode("more")]
    (said,) = ask(engine, [(ids(3, 1), SamplingParams(max_tokens=99, stop=("!",)))])
    assert said.text == "na\ufffdve!"


def test_the_predicate_sees_the_text_and_ends_it() -> None:
    assert forced("a cat, a hat", stop_when=lambda text: text.count("a") == 3).text == "a cat, a"


def test_a_predicate_that_raises_fails_its_own_request_alone() -> None:
    module, tokenizer = small()
    sampler = LocalSampler(module, tokenizer)

    def broken(text: str) -> bool:
        raise ZeroDivisionError("a predicate of the caller's")

    params = [SamplingParams(max_tokens=6, seed=seed) for seed in range(3)]
    params[1] = replace(params[1], stop_when=broken)

    async def all_three() -> list[Completion | BaseException]:
        asked = [sampler.sample(ids(5, seed), param) for seed, param in enumerate(params)]
        return await asyncio.gather(*asked, return_exceptions=True)

    first, second, third = asyncio.run(all_three())
    assert isinstance(second, ZeroDivisionError)
    for number, said in ((0, first), (2, third)):
        assert isinstance(said, Completion)
        assert said.tokens == plain_loop(module, ids(5, number), params[number])[0]


class Broken:
    """Makes a model's forward pass fail in its n-th call from now, once."""

    def __init__(self, module: Any, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = call
        body = module.get_decoder()
        forward = body.forward

        def fail(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise FloatingPointError("the accelerator is gone")
            return forward(*args, **kwargs)

        monkeypatch.setattr(body, "forward", fail)


async def answers(engine: LocalSampler, requests: Sequence[Request]) -> list[Completion | BaseException]:
    asked = (engine.sample(*request) for request in requests)
    return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), timeout=10)


@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_failure_of_the_model_reaches_everybody_and_the_engine_recovers(
    call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four of six may run at once: the first call reads their prompts, the others answer."""
    module, tokenizer = fresh()
    engine = LocalSampler(module, tokenizer, concurrency=4)
    requests = [(ids(20 + n, n), SamplingParams(max_tokens=5, seed=n)) for n in range(6)]

    async def twice() -> tuple[list[Completion | BaseException], list[Completion | BaseException]]:
        Broken(module, call, monkeypatch)
        return await answers(engine, requests), await answers(engine, requests)

    failed, fine = asyncio.run(twice())
    assert [str(answer) for answer in failed] == ["the accelerator is gone"] * 6
    completions = [answer for answer in fine if isinstance(answer, Completion)]
    assert_plain(module, requests, completions)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_failure_to_find_room_reaches_everybody_and_the_engine_recovers(
    call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two have a beginning in common, so one waits while the other's is read."""
    module, tokenizer = fresh()
    engine = LocalSampler(module, tokenizer)
    alike = [([*ids(40, 0), last], SamplingParams(max_tokens=5)) for last in (9, 7)]
    requests = [*alike, *((ids(20 + n, n), SamplingParams(max_tokens=5, seed=n)) for n in range(1, 4))]
    cache, calls = engine._cache, 0
    opened = cache.open

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise MemoryError("the memory is full")
        return opened(*args, **kwargs)

    async def twice() -> tuple[list[Completion | BaseException], list[Completion | BaseException]]:
        monkeypatch.setattr(cache, "open", fail)
        return await answers(engine, requests), await answers(engine, requests)

    failed, fine = asyncio.run(asyncio.wait_for(twice(), timeout=60))
    assert [str(answer) for answer in failed] == ["the memory is full"] * 5
    assert_plain(module, requests, [answer for answer in fine if isinstance(answer, Completion)])


def test_a_request_that_is_given_up_disturbs_no_other() -> None:
    module, tokenizer = small()
    engine = LocalSampler(module, tokenizer, concurrency=3)
    requests = [(ids(20 + n, n), SamplingParams(max_tokens=12, seed=n)) for n in range(7)]

    async def give_up_on_some() -> list[Completion | BaseException]:
        asked = [asyncio.ensure_future(engine.sample(*request)) for request in requests]
        await asyncio.sleep(0)
        asked[5].cancel()  # still waiting for a slot
        for _ in range(4):
            await asyncio.sleep(0)
        asked[1].cancel()  # in the middle of its answer
        return await asyncio.gather(*asked, return_exceptions=True)

    said = asyncio.run(give_up_on_some())
    assert [isinstance(answer, asyncio.CancelledError) for answer in said] == [n in (1, 5) for n in range(7)]
    rest = [n for n in range(7) if n not in (1, 5)]
    assert_plain(module, [requests[n] for n in rest], [said[n] for n in rest])  # type: ignore[misc]
    assert_plain(module, requests, ask(engine, requests))


def test_a_request_that_is_given_up_makes_room() -> None:
    module, tokenizer = small()
    engine = LocalSampler(module, tokenizer, concurrency=1)
    request = (ids(9, 1), SamplingParams(max_tokens=3))

    async def give_up() -> list[Completion | BaseException]:
        endless = asyncio.ensure_future(engine.sample(ids(5, 2), SamplingParams(max_tokens=10**9)))
        for _ in range(5):
            await asyncio.sleep(0)
        endless.cancel()
        return await answers(engine, [request])

    assert_plain(module, [request], asyncio.run(give_up()))  # type: ignore[arg-type]


def test_an_aborted_rollout_leaves_an_engine_that_works() -> None:
    """Also in another event loop, with requests of the first one unfinished."""
    module, tokenizer = small()
    engine = LocalSampler(module, tokenizer)
    requests = [(ids(20 + n, n), SamplingParams(max_tokens=12, seed=n)) for n in range(4)]

    async def abort() -> None:
        running = [asyncio.ensure_future(engine.sample(*request)) for request in requests]
        for _ in range(5):
            await asyncio.sleep(0)
        assert not any(task.done() for task in running)
        raise KeyError("something else went wrong")

    with pytest.raises(KeyError):
        asyncio.run(abort())
    assert_plain(module, requests, ask(engine, requests))


def learned_positions(count: int) -> Any:
    import transformers

    settings = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": count}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    return sharpened(transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(**settings, **dropout)))


def test_prefilling_short_and_long_rows_together_needs_no_position_that_was_never_learned() -> None:
    """A row far along in its conversation is padded to the length of a fresh one, but not beyond the last position."""
    module, tokenizer = learned_positions(64), small()[1]
    engine = LocalSampler(module, tokenizer)
    prompt = ids(40, 1)
    (first,) = ask(engine, [(prompt, SamplingParams(max_tokens=4, seed=1))])
    longer = [*prompt, *first.tokens, *ids(6, 2)]
    requests = [(longer, SamplingParams(max_tokens=4, seed=2)), (ids(40, 3), SamplingParams(max_tokens=4, seed=3))]
    said = asyncio.run(answers(engine, requests))
    assert_plain(module, requests, said)  # type: ignore[arg-type]
