"""vLLM itself, beside the local engine and the trainer, on one tiny model whose weights change from test to test."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from echelon import cli
from echelon.config import LoraConfig, OptimConfig
from echelon.data.packing import Sampled, pack
from echelon.errors import ConfigError, DataError, RolloutError
from echelon.models import lora
from echelon.models.lm import tiny, token_logprobs
from echelon.ops.sampling import penalise_repetition, restrict_logits
from echelon.sampling.local import LocalSampler
from echelon.sampling.vllm import VllmSampler
from echelon.train.learner import Learner
from echelon.types import Completion, SamplingParams
from tests.recipes.doors import GAME, TEMPLATES
from tests.sampling.conformance import check_sampler

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

LONGEST = 160
Request = tuple[list[int], SamplingParams]


@dataclass
class Place:
    """The engine of this file, the model it serves, and what starting it left behind."""

    sampler: VllmSampler
    module: Any
    tokenizer: Any
    left: dict[str, Any]
    versions: Iterator[int]

    def load(self) -> None:
        """Give vLLM the weights as they are."""
        self.sampler.load(self.module.state_dict().items(), next(self.versions))

    def ask(self, requests: Sequence[Request]) -> list[Completion]:
        return ask(self.sampler, requests)


def small(seed: int = 0) -> tuple[Any, Any]:
    module, tokenizer = tiny(
        ["a cat, a hat, a bat."], vocab_size=300, hidden=64, layers=2, heads=2, max_positions=LONGEST, seed=seed
    )
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(3 if weight.ndim > 1 else 1)  # sharper, so that the most likely token is no tie
    return module, tokenizer


def state() -> dict[str, Any]:
    """What of this process starting an engine could change."""
    return {
        "threads": torch.get_num_threads(),
        "setter": torch.set_num_threads,
        "draws": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
        "variables": {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")},
        "cores": os.sched_getaffinity(0),
        "type": torch.get_default_dtype(),
    }


@pytest.fixture(scope="module")
def place() -> Place:
    module, tokenizer = small()
    before = state()
    sampler = VllmSampler(module, tokenizer, longest=1000, concurrency=32, cache_tokens=4096)
    sampler.load(module.state_dict().items(), 1)
    after = state()
    left = {name: after[name] for name in before if before[name] != after[name]}
    return Place(sampler, module, tokenizer, left, itertools.count(2))


@pytest.fixture
def fresh(place: Place) -> Place:
    """The same with the weights it began with, and nothing resident."""
    place.module.load_state_dict(small()[0].state_dict())
    place.load()
    return place


def ask(sampler: Any, requests: Sequence[Request]) -> list[Completion]:
    async def all_at_once() -> list[Completion]:
        return await asyncio.gather(*(sampler.sample(*request) for request in requests))

    return asyncio.run(all_at_once())


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(5, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def mismatch(module: Any, requests: Sequence[Request], said: Sequence[Completion], temperature: float) -> float:
    """The largest difference to what the trainer computes."""
    pieces = [Sampled(prompt, each.tokens, each.logprobs) for (prompt, _), each in zip(requests, said, strict=True)]
    batch = pack(pieces)
    assert batch.logprobs is not None
    with torch.no_grad():
        ours = token_logprobs(module, batch, temperature=temperature)
    return float((ours - batch.logprobs)[batch.mask].abs().max())


class Watched:
    """How many tokens each forward pass of vLLM's model reads."""

    def __init__(self, sampler: VllmSampler) -> None:
        self.passes: list[int] = []
        self.model = sampler.engine.vllm.model_executor.driver_worker.worker.model_runner.model

    def __enter__(self) -> list[int]:
        self._handle = self.model.register_forward_pre_hook(self._note, with_kwargs=True)
        return self.passes

    def _note(self, module: Any, args: Any, kwargs: Any) -> None:
        self.passes.append(kwargs["positions"].shape[-1])

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()


@contextmanager
def broken(sampler: VllmSampler) -> Iterator[None]:
    """Within, every forward pass fails."""

    def fail(*_: Any) -> None:
        raise RuntimeError("the model is broken")

    handle = Watched(sampler).model.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def check_feedback_trains(tmp_path: Path, sampler: str, **settings: object) -> None:
    """Two steps of both levels, each with an adapter of its own, drawing from this sampler."""
    module, tokenizer = small()
    module.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["feedback", "--solver.model.path", tmp_path / "model", "--env", GAME, "--out", tmp_path / "run"]
    words += ["--weights", "adapters", "--lora.rank", 4, "--tasks-per-step", 2, "--attempts", 2, "--steps", 2]
    words += ["--threads", 1, *(word for name in TEMPLATES for word in (f"--templates.{name}", TEMPLATES[name]))]
    said = {"sampler": sampler, "adapters": "apart", "max-tokens": 3, "max-prompt-tokens": 90} | settings
    for level in ("solver", "coach"):
        words += [word for name in said for word in (f"--{level}.sampling.{name}", said[name])]
    assert cli.main([str(word) for word in words]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(row[f"{level}/first_mismatch"] <= 1e-4 for row in rows for level in ("solver", "coach")), rows


def test_starting_leaves_the_process_as_it_was(place: Place) -> None:
    assert place.left == {}


def test_drawing_leaves_the_random_numbers_of_the_process_alone(fresh: Place) -> None:
    before = state()["draws"]
    fresh.ask([(ids(5, 1), SamplingParams(max_tokens=5))])
    assert state()["draws"] == before


def test_it_keeps_the_promises_of_a_sampler(fresh: Place) -> None:
    texts = ["what is in the box?", "a", "a cat, a hat, a bat. what is in", "a cat, a hat, a bat. a cat", "the box"]
    prompts = [fresh.tokenizer.encode(text) for text in texts]
    asyncio.run(check_sampler(fresh.sampler, fresh.tokenizer, prompts, stop_id=fresh.tokenizer.eos_token_id))


def test_the_most_likely_tokens_and_their_log_probs_are_the_local_engines(fresh: Place) -> None:
    requests = [(ids(5 + 9 * n, n), SamplingParams(max_tokens=16, temperature=0)) for n in range(6)]
    ours = ask(LocalSampler(fresh.module, fresh.tokenizer), requests)
    theirs = fresh.ask(requests)
    assert [each.tokens for each in theirs] == [each.tokens for each in ours]
    for one, other in zip(ours, theirs, strict=True):
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)
        assert (other.text, other.stop) == (one.text, one.stop)


def test_stop_strings_predicates_and_ids_end_where_the_local_engine_ends(fresh: Place) -> None:
    free = SamplingParams(max_tokens=20, temperature=0)
    prompts = [ids(9, seed) for seed in range(16)]
    prompt, whole, late = next(
        (prompt, said, letter)
        for prompt, said in zip(prompts, fresh.ask([(prompt, free) for prompt in prompts]), strict=True)
        for letter in said.text[2:-1]
        if letter.isascii() and letter not in said.text[:2]
    )
    kinds = [
        replace(free, stop=("never", late)),
        replace(free, stop_when=lambda text: late in text),
        replace(free, stop_ids=(whole.tokens[6],)),
        replace(free, stop=(late,), stop_ids=(whole.tokens[0],)),
    ]
    requests = [(prompt, kind) for kind in kinds]
    ours = ask(LocalSampler(fresh.module, fresh.tokenizer), requests)
    theirs = fresh.ask(requests)
    assert [(each.tokens, each.text, each.stop) for each in theirs] == [(o.tokens, o.text, o.stop) for o in ours]
    assert all(each.stop == "stop" and len(each.tokens) < 20 for each in theirs)


CUT: list[dict[str, Any]] = [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6, "temperature": 1.5}]


@pytest.mark.parametrize("change", [*CUT, {"top_p": 0.6, "repetition_penalty": 1.5}])
def test_log_probs_are_those_of_the_distribution_that_is_drawn_from(fresh: Place, change: dict[str, Any]) -> None:
    prompt, params = ids(6, 4), SamplingParams(max_tokens=12, seed=11, **change)
    greedy = (ids(7, 5), SamplingParams(max_tokens=12, temperature=0))
    said, _ = fresh.ask([(prompt, params), greedy])
    with torch.no_grad():
        logits = fresh.module(input_ids=torch.tensor([prompt + said.tokens])).logits[0, len(prompt) - 1 : -1]
    seen = [prompt + said.tokens[:count] for count in range(len(said.tokens))]
    logits = penalise_repetition(logits, torch.full((len(seen),), params.repetition_penalty), seen)
    shaped = restrict_logits(logits, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p)
    expected = torch.log_softmax(shaped, -1).gather(-1, torch.tensor(said.tokens)[:, None])[:, 0]
    assert said.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_log_probs_are_the_trainers_after_each_of_twenty_updates(fresh: Place) -> None:
    learner = Learner(fresh.module, OptimConfig(lr=3e-3))
    requests = [(ids(6 + n, n), SamplingParams(max_tokens=10, temperature=0.7, seed=n)) for n in range(4)]
    told = []
    for update in range(20):
        said = fresh.ask(requests)
        assert mismatch(fresh.module, requests, said, 0.7) <= 1e-4, f"after {update} updates"
        told.append([each.tokens for each in said])
        batch = pack([Sampled(p, each.tokens, each.logprobs) for (p, _), each in zip(requests, said, strict=True)])
        learner.update([batch], lambda module, part: (-token_logprobs(module, part).sum() / 40, {}))
        fresh.sampler.load(learner.weights(), next(fresh.versions))
    assert told[0] != told[-1], "the updates changed what is said"


def test_an_adapter_is_folded_into_the_weights_it_is_given_and_into_no_others(fresh: Place) -> None:
    adapted = lora.attach(small(seed=1)[0], LoraConfig(rank=4, modules_to_save=("norm",)))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn_like(weight) if "lora" in name else 0.1)
    before = {name: weight.clone() for name, weight in adapted.named_parameters()}
    requests = [(ids(8, n), SamplingParams(max_tokens=10, seed=n)) for n in range(4)]
    fresh.sampler.load(Learner(adapted, OptimConfig()).weights(), next(fresh.versions))
    said = fresh.ask(requests)
    assert mismatch(adapted, requests, said, 1.0) <= 1e-4
    with lora.off(adapted):
        assert mismatch(adapted, requests, said, 1.0) > 0.1
    assert all(weight.equal(before[name]) for name, weight in adapted.named_parameters())


def test_a_seed_names_what_is_drawn(fresh: Place) -> None:
    requests = [(ids(12, 1), SamplingParams(max_tokens=10, seed=2**62 + seed)) for seed in range(6)]
    first = fresh.ask(requests)
    (alone,) = fresh.ask(requests[3:4])
    assert alone.tokens == first[3].tokens
    assert len({tuple(each.tokens) for each in first}) == 6


def test_siblings_and_next_turns_read_a_common_beginning_once(fresh: Place) -> None:
    prompt = ids(70, 1)
    with Watched(fresh.sampler) as passes:
        said = fresh.ask([(prompt, SamplingParams(max_tokens=1, seed=seed)) for seed in range(8)])
    assert sum(passes) == 70 + 7 * (70 - 64), "two blocks of 32 are shared, the rest is read by each"
    longer = [*prompt, *said[0].tokens, *ids(30, 2)]
    with Watched(fresh.sampler) as passes:
        fresh.ask([(longer, SamplingParams(max_tokens=1))])
    assert passes == [len(longer) - 64]


def test_a_reload_changes_what_is_said_and_its_version_and_forgets_what_was_read(fresh: Place) -> None:
    request = (ids(70, 1), SamplingParams(max_tokens=12, temperature=0))
    (before,) = fresh.ask([request])
    fresh.module.load_state_dict(small(seed=5)[0].state_dict())
    fresh.load()
    with Watched(fresh.sampler) as passes:
        (after,) = fresh.ask([request])
    assert passes[0] == 70
    assert after.tokens != before.tokens
    assert after.version == before.version + 1
    assert mismatch(fresh.module, [request], [after], 1.0) <= 1e-4


def test_weights_do_not_change_under_a_completion(fresh: Place) -> None:
    async def load_in_between() -> Completion:
        asked = asyncio.ensure_future(fresh.sampler.sample(ids(5, 1), SamplingParams(max_tokens=30)))
        while not fresh.sampler.engine.running:
            await asyncio.sleep(0)
        with pytest.raises(AssertionError, match="weights change between rollouts"):
            fresh.load()
        return await asked

    version = fresh.sampler.version
    assert asyncio.run(load_in_between()).version == version


def test_a_completion_of_other_weights_than_it_began_with_is_an_error(fresh: Place) -> None:
    async def changed() -> None:
        asked = asyncio.ensure_future(fresh.sampler.sample(ids(5, 1), SamplingParams(max_tokens=30)))
        while not fresh.sampler.engine.running:
            await asyncio.sleep(0)
        fresh.sampler.engine.vllm.set_weight_version("another")
        with pytest.raises(RolloutError, match="vLLM now holds version another"):
            await asked

    asyncio.run(changed())


def test_a_failure_of_the_model_reaches_everybody_and_the_engine_recovers(fresh: Place) -> None:
    requests = [(ids(40, n), SamplingParams(max_tokens=6, seed=n)) for n in range(3)]
    expected = fresh.ask(requests)

    async def all_fail() -> None:
        for each in await asyncio.gather(*(fresh.sampler.sample(*one) for one in requests), return_exceptions=True):
            assert isinstance(each, RuntimeError)
            assert "the model is broken" in str(each)

    with broken(fresh.sampler):
        asyncio.run(all_fail())
    assert [each.tokens for each in fresh.ask(requests)] == [each.tokens for each in expected]


def test_a_predicate_that_fails_fails_its_own_request_alone(fresh: Place) -> None:
    def fails(_: str) -> bool:
        raise ZeroDivisionError

    async def both() -> list[Any]:
        params = SamplingParams(max_tokens=6)
        asked = [fresh.sampler.sample(ids(5, 1), replace(params, stop_when=fails)), fresh.sampler.sample([7], params)]
        return await asyncio.gather(*asked, return_exceptions=True)

    failed, said = asyncio.run(both())
    assert isinstance(failed, ZeroDivisionError)
    assert len(said.tokens) == 6


@pytest.mark.parametrize(
    ("prompt", "change", "kind", "message"),
    [
        (150, {"max_tokens": 11}, RolloutError, f"up to 11 do not fit the {LONGEST} tokens"),
        (5, {"temperature": 0.001}, ConfigError, "temperature = 0.001: vLLM draws at 0.01 or more"),
        (5, {"top_p": 0.0}, ConfigError, r"vLLM cannot draw so: top_p must be in \(0, 1\], got 0\.0\. Change"),
        (5, {"temperature": 2.5}, ConfigError, "vLLM cannot draw so: temperature"),
    ],
)
def test_what_vllm_cannot_do_is_refused_in_one_line(
    fresh: Place, prompt: int, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as refused:
        fresh.ask([(ids(prompt, 1), SamplingParams(**change))])
    assert "\n" not in str(refused.value)
    assert "local" in str(refused.value)


def test_what_cannot_be_served_is_refused_before_anything_starts(fresh: Place) -> None:
    with pytest.raises(ConfigError, match=r"sampling\.sleep = True: on cpu there is no accelerator"):
        VllmSampler(fresh.module, fresh.tokenizer, longest=64, sleep=True)


def test_a_model_that_vllm_does_not_read_as_it_is_is_refused(fresh: Place) -> None:
    other, _ = small(seed=3)
    sampler = VllmSampler(other, fresh.tokenizer, longest=64, cache_tokens=512)
    handle = other.lm_head.register_forward_hook(lambda _, args, logits: logits * 2)
    with pytest.raises(DataError, match="vLLM computes other log-probabilities than the model itself"):
        ask(sampler, [([1, 2], SamplingParams())])
    handle.remove()
    assert len(ask(sampler, [([1, 2], SamplingParams(max_tokens=3))])[0].tokens) == 3
    heads, tokenizer = tiny(["a"], vocab_size=300, hidden=32, layers=1, heads=2)
    with pytest.raises(DataError, match=r"LlamaForCausalLM: vLLM cannot run it .* Use --sampler local"):
        ask(VllmSampler(heads, tokenizer, longest=64, cache_tokens=512), [([1, 2], SamplingParams())])


def test_it_sleeps_when_its_event_loop_ends_and_wakes_when_asked(fresh: Place) -> None:
    """A CPU has nothing to give back, so this is the order of calls, on vLLM's own flag."""
    request = (ids(6, 1), SamplingParams(max_tokens=4))
    fresh.sampler.engine.sleep = True
    try:
        (first,) = fresh.ask([request])
        assert fresh.sampler.engine.vllm.is_sleeping()
        (again,) = fresh.ask([request])
        fresh.load()
        assert not fresh.sampler.engine.vllm.is_sleeping()
    finally:
        fresh.sampler.engine.sleep = False
    assert again.tokens == first.tokens


@pytest.mark.parametrize("ahead", [0, 1])
def test_grpo_learns_on_what_vllm_says(tmp_path: Path, ahead: int) -> None:
    module, tokenizer = tiny(["guess a number: 1 2 3 4"], vocab_size=300, hidden=64, layers=1, heads=2)
    module.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = f"--model.path {tmp_path}/model --out {tmp_path}/run --env guess_number --env-settings low=1 high=4"
    flags += " max_turns=2 --steps 2 --tasks-per-step 2 --group-size 2 --sampling.max-tokens 4 --threads 1"
    flags += f" --asynchronous.max-staleness {ahead}"
    assert cli.main(["grpo", *flags.split(), "--sampler", "vllm", "--sampling.cache-tokens", "2048"]) == 0
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 2
    assert all(row["policy/first_mismatch"] <= 1e-4 for row in rows), rows
