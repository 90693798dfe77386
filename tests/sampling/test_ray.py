"""Engines that Ray carries to other processes: what they answer is what the local engine answers, whatever dies.

Most tests have workers that do as the test says; the last ones have two real ones, on a cluster of this machine.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from echelon.config import LoraConfig, RayConfig, SamplingConfig
from echelon.errors import ConfigError, RolloutError
from echelon.models import lora
from echelon.models.lm import tiny
from echelon.rollout.setup import open_sampler
from echelon.sampling import ray as pool
from echelon.sampling import ray_worker as remote
from echelon.sampling import wire
from echelon.sampling.local import LocalSampler
from echelon.sampling.ray import RaySampler
from echelon.types import Completion, SamplingParams
from tests.sampling.conformance import check_sampler

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]

Request = tuple[list[int], SamplingParams]
ENGINE = {"engine": "local", "longest": 0, "cache_tokens": 999, "concurrency": 8}


def small() -> tuple[Any, Any]:
    return tiny(["what is in the box? a cat, a hat, a bat."] * 3, vocab_size=330, hidden=32, layers=2, heads=2)


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(5, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(sampler: Any, requests: Sequence[Request]) -> list[Completion]:
    async def all_at_once() -> list[Completion]:
        return await asyncio.gather(*(sampler.sample(*request) for request in requests))

    return asyncio.run(all_at_once())


def same(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    assert [(each.tokens, each.text, each.stop) for each in found] == [
        (each.tokens, each.text, each.stop) for each in expected
    ]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@dataclass
class Told:
    """What a worker that does as it is told was asked, and what it will say."""

    name: int
    promises: dict[str, list[Future[Any]]] = field(default_factory=dict)
    asked: list[list[int]] = field(default_factory=list)
    told: list[tuple[Any, ...]] = field(default_factory=list)
    """What it was told besides: the verb, and what came with it."""

    def __getattr__(self, verb: str) -> Any:
        return _Verb(self, verb)


@dataclass
class _Verb:
    worker: Told
    verb: str

    def remote(self, *args: Any) -> Any:
        promise: Future[Any] = Future()
        self.worker.promises.setdefault(self.verb, []).append(promise)
        if self.verb == "sample":
            self.worker.asked.append(args[1])
        self.worker.told.append((self.verb, *args))
        return _Reference(promise)


@dataclass
class _Reference:
    promise: Future[Any]

    def future(self) -> Future[Any]:
        return self.promise


@dataclass
class _Line:
    worker: Told

    async def ask(self, *question: Any) -> Completion:
        import ray

        try:
            found: Completion = await asyncio.wrap_future(self.worker.sample.remote(*question).future())
        except ray.exceptions.RayError as error:
            raise wire.LineLost(str(error)) from error
        return found

    def close(self) -> None:
        pass


class Staged(pool.Pool):
    """Its workers are those of a test; each holds models at once unless `script` says otherwise. It is asked in the
    loop of the test."""

    def __init__(self, script: Callable[[Told], None] | None = None, **settings: Any) -> None:
        super().__init__(RayConfig(**{"timeout": 5.0} | settings))
        self.hired: list[Told] = []
        self.script = script or up
        self.model = pool.Model(0, {})

    def _actor(self) -> Any:
        self.hired.append(Told(len(self.hired)))
        return self.hired[-1]

    async def _connected(self, actor: Any) -> Any:
        return _Line(actor)

    async def _words(self, actor: Any, why: str) -> str:
        return why

    def _hand_over(self, place: pool.Place, model: pool.Model) -> None:
        super()._hand_over(place, model)
        self.script(place.actor)

    async def sample(self, prompt: list[int], params: SamplingParams, model: pool.Model | None = None) -> Completion:
        model = model or self.model
        if model.name not in self._models:
            await self.open(model)
        said, place = await self.ask(model, prompt, params)
        model.settle(place, [*prompt, *said.tokens])
        return said


def up(worker: Told) -> None:
    for promise in worker.promises["open"]:
        if not promise.done():
            promise.set_result(None)


def said(*tokens: int, version: int = 0) -> Completion:
    return Completion([*tokens], [0.0] * len(tokens), "", "length", version)


def dead() -> Exception:
    import ray

    return ray.exceptions.RayError("The worker is gone.")


@pytest.fixture(autouse=True)
def _no_cluster_for_staged_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    real_kill = ray.kill
    monkeypatch.setattr(ray, "kill", lambda actor: None if isinstance(actor, Told) else real_kill(actor))


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def asking(sampler: Any, *prompts: list[int]) -> list[asyncio.Task[Completion]]:
    return [asyncio.create_task(sampler.sample(prompt, SamplingParams())) for prompt in prompts]


def test_requests_are_spread_and_no_worker_gets_more_than_it_may_have() -> None:
    async def play() -> None:
        sampler = Staged(in_flight=2)
        tasks = asking(sampler, *([place] for place in range(1, 7)))
        await turns()
        one, other = sampler.hired
        assert (one.asked, other.asked) == ([[1], [3]], [[2], [4]])  # two wait here
        other.promises["sample"][0].set_result(said(9))
        await turns()
        assert other.asked == [[2], [4], [5]]
        for worker in (one, other, one, other):
            for promise in worker.promises["sample"]:
                if not promise.done():
                    promise.set_result(said(9))
            await turns()
        assert [(await task).tokens for task in tasks] == [[9]] * 6
        assert [place.busy for place in sampler.workers] == [0, 0]

    asyncio.run(play())


def test_a_conversation_stays_where_its_keys_are_until_that_worker_is_full_or_gone() -> None:
    first, action = ids(20, 1), ids(12, 2)

    async def play() -> None:
        sampler = Staged(in_flight=2)
        busy, turn = asking(sampler, ids(3, 5), first)
        await turns()
        sampler.hired[1].promises["sample"][0].set_result(said(*action))
        await turn
        for new in (3, 4):  # the first worker has as much to do from the second question on
            asking(sampler, [*first, *action, *ids(5, new)])
            await turns()
        assert [len(prompt) for prompt in sampler.hired[1].asked] == [20, 37, 37]
        asking(sampler, [*first, *action, *ids(5, 6)])
        await turns()
        assert len(sampler.hired[0].asked) == 2  # no room at home
        sampler._replace(sampler.workers[1], "gone")
        assert sampler._choose(sampler.model, [*first, *action], [sampler.workers[0]]) is sampler.workers[0]
        busy.cancel()

    asyncio.run(play())


def test_what_a_lost_worker_was_asked_is_asked_again_and_counted_once() -> None:
    async def play() -> None:
        sampler = Staged()
        (task,) = asking(sampler, [1, 2])
        await turns()
        sampler.hired[0].promises["sample"][0].set_exception(dead())
        await turns()
        assert [worker.asked for worker in sampler.hired] == [[[1, 2]], [], [[1, 2]]]
        sampler.hired[2].promises["sample"][0].set_result(said(7))
        assert (await task).tokens == [7]
        assert [place.actor.name for place in sampler.workers] == [2, 1]

    asyncio.run(play())


def test_a_worker_that_hangs_is_replaced_and_what_it_says_later_is_not_heard() -> None:
    async def play() -> None:
        sampler = Staged(workers=1, timeout=1)
        (task,) = asking(sampler, [1, 2])
        while len(sampler.hired) < 2:
            await asyncio.sleep(0.01)
        await turns()
        sampler.hired[1].promises["sample"][0].set_result(said(7))
        assert (await task).tokens == [7]
        assert sampler.hired[0].promises["sample"][0].cancelled()

    asyncio.run(play())


def test_workers_that_never_answer_end_in_one_line_not_in_an_endless_loop() -> None:
    def never(worker: Told) -> None:
        worker.promises["open"][0].set_exception(dead())

    with pytest.raises(RolloutError, match=r"3 workers in a row were lost before they had answered .*worker is gone"):
        ask(Staged(never, workers=1), [([1], SamplingParams())])


def test_a_request_that_ends_every_worker_is_given_up() -> None:
    async def play() -> None:
        sampler = Staged(workers=1)
        (task,) = asking(sampler, [1])
        for number in range(pool.TRIES):
            await turns()
            sampler.workers[0].answered = True  # it had answered others before
            sampler.hired[number].promises["sample"][0].set_exception(dead())
        await task

    with pytest.raises(RolloutError, match=r"^8 workers in a row were lost over one request"):
        asyncio.run(play())


def test_what_is_wrong_with_every_worker_is_said_to_everybody_at_once() -> None:
    import ray

    def broken(worker: Told) -> None:
        wrong = ray.exceptions.RayTaskError("open", "", ConfigError("vllm is not for this device"), "", 1, "here")
        worker.promises["open"][0].set_exception(wrong)

    async def play() -> list[Any]:
        sampler = Staged(broken)
        return await asyncio.gather(*asking(sampler, [1], [2]), return_exceptions=True)

    assert [str(error) for error in asyncio.run(play())] == ["vllm is not for this device"] * 2


def test_nobody_waits_for_workers_that_find_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    with pytest.raises(
        RolloutError, match=r"none of 2 workers was ready within 0\.05 s.* free on the cluster are 1 and 0"
    ):
        ask(Staged(lambda worker: None, timeout=0.05), [([1], SamplingParams())])


def test_the_first_requests_wait_for_all_workers_but_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_the_first(worker: Told) -> None:
        if worker.name == 0:
            up(worker)

    async def play() -> None:
        sampler = Staged(only_the_first)
        (task,) = asking(sampler, [1])
        await turns()
        assert sampler.hired[0].asked == []
        await asyncio.sleep(0.1)
        sampler.hired[0].promises["sample"][0].set_result(said(3))
        assert (await task).tokens == [3]

    monkeypatch.setattr(pool, "PATIENCE", 0.05)
    asyncio.run(play())


def test_an_answer_from_other_weights_is_refused() -> None:
    async def play() -> None:
        sampler = Staged()
        (task,) = asking(sampler, [1])
        await turns()
        sampler.hired[0].promises["sample"][0].set_result(said(3, version=4))
        await task

    with pytest.raises(RolloutError, match="weights of version 4, and it was asked for version 0"):
        asyncio.run(play())


def test_weights_may_be_loaded_while_questions_are_open() -> None:
    """What was asked before may be answered with the weights of then."""

    async def play() -> None:
        sampler = Staged(workers=1)
        (before,) = asking(sampler, [1])
        await turns()
        await sampler.load(sampler.model, None, 5)
        (after,) = asking(sampler, [2])
        await turns()
        old, new = sampler.hired[0].promises["sample"]
        old.set_result(said(3, version=0))
        new.set_result(said(4, version=5))
        assert ((await before).version, (await after).version) == (0, 5)

    asyncio.run(play())


def test_samplers_share_workers_which_know_their_models_by_name() -> None:
    async def play() -> None:
        sampler, other = Staged(), pool.Model(7, {"engine": "local"}, version=3)
        (one,) = asking(sampler, [1])
        await turns()
        two = asyncio.create_task(sampler.sample([1], SamplingParams(), other))
        await turns()
        first, second = sampler.hired
        assert [worker.told[0][:2] for worker in (first, second)] == [("open", 0)] * 2
        assert first.told[1][:3] == ("sample", 0, [1])
        assert second.told[1] == ("open", 7, {"engine": "local"}, None, None, None, 0, 3)
        assert second.told[2][:3] == ("sample", 7, [1])
        first.promises["sample"][0].set_result(said(2))
        second.promises["sample"][0].set_result(said(2, version=3))
        assert [(await task).version for task in (one, two)] == [0, 3]
        sampler.close(other)
        sampler._replace(sampler.workers[0], "gone")
        assert [each[:2] for each in sampler.hired[2].told] == [("open", 0)]  # nobody asks for the other any more

    asyncio.run(play())


def test_a_worker_lost_while_weights_are_on_their_way_is_replaced_by_one_that_begins_with_them() -> None:
    async def play() -> None:
        sampler = Staged()
        (before,) = asking(sampler, [1])
        await turns()
        sampler.hired[0].promises["sample"][0].set_result(said(2))
        await before
        await sampler.load(sampler.model, "new", 5)
        sampler.hired[0].promises["load"][0].set_exception(dead())
        (after,) = asking(sampler, [1])
        await turns()
        assert sampler.hired[2].told[0] == ("open", 0, {}, None, None, "new", 1, 5)
        assert [place.actor.name for place in sampler.workers] == [2, 1]
        (there,) = [worker for worker in sampler.hired if ("sample", 0, [1], SamplingParams(), 1) in worker.told]
        there.promises["sample"][0].set_result(said(3, version=5))
        assert (await after).version == 5

    asyncio.run(play())


def test_without_a_machine_for_a_replacement_the_others_go_on() -> None:
    def no_third(worker: Told) -> None:
        if worker.name < 2:
            up(worker)

    async def play() -> None:
        sampler = Staged(no_third)
        first = asking(sampler, [1], [2])
        await turns()
        for worker in sampler.hired:
            worker.promises["sample"][0].set_result(said(3))
        await asyncio.gather(*first)
        sampler._replace(sampler.workers[0], "gone")
        tasks = asking(sampler, [4], [5])
        await turns()
        assert sampler.hired[1].asked == [[2], [4], [5]]
        for promise in sampler.hired[1].promises["sample"][1:]:
            promise.set_result(said(3))
        await asyncio.gather(*tasks)

    asyncio.run(play())


def test_weights_for_which_there_is_no_room_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def full(_: Any) -> None:
        raise ray.exceptions.ObjectStoreFullError("The object store is full.")

    module, tokenizer = small()
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "put", full)
    with pytest.raises(RolloutError, match=r"^Ray has no room for the weights \(The object store is full.*\) Give"):
        RaySampler(module, tokenizer, RayConfig()).load(module.state_dict().items(), 1)


def test_who_gives_up_waiting_gives_up_the_work_in_the_loop_of_workers() -> None:
    began, ended = threading.Event(), threading.Event()

    async def work() -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def play(thread: pool.LoopThread) -> None:
        task = asyncio.create_task(thread.result(work()))
        assert await asyncio.to_thread(began.wait, 60)
        task.cancel()
        assert await asyncio.to_thread(ended.wait, 60)

    asyncio.run(play(pool.LoopThread()))


def test_the_loop_of_workers_ends_when_nobody_holds_it() -> None:
    before = threading.enumerate()
    thread = pool.LoopThread()
    assert thread.run(asyncio.sleep(0, "said")) == "said"
    (running,) = [other for other in threading.enumerate() if other not in before]
    loop = thread.loop
    del thread
    running.join(60)
    assert loop.is_closed()


def test_giving_up_makes_room_for_others() -> None:
    async def play() -> None:
        sampler = Staged(workers=1, in_flight=1)
        one, other, third = asking(sampler, [1], [2], [3])
        await turns()
        other.cancel()
        one.cancel()
        await turns()
        assert sampler.hired[0].asked == [[1], [3]]
        sampler.hired[0].promises["sample"][1].set_result(said(3))
        assert (await third).tokens == [3]

    asyncio.run(play())


def test_a_worker_takes_weights_when_it_has_answered_and_asks_before_wait_for_them() -> None:
    """`Worker` in this process: what was asked by the old weights is answered by them, in whatever order it comes."""
    module, tokenizer = small()
    other, _ = small()
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(2)
    skeleton, numbers = remote.taken_apart(module, tokenizer)
    changed = remote.numbers_of(other.state_dict().items())
    request = (ids(5, 1), SamplingParams(max_tokens=60, seed=3))

    async def play() -> list[Completion]:
        worker = remote.Held("cpu", 1.0)
        await worker.open(ENGINE, skeleton, numbers, None, 0, 1)
        early = asyncio.create_task(worker.sample(*request, 1))
        await turns()
        first = asyncio.create_task(worker.sample(*request, 0))
        await turns()
        await asyncio.create_task(worker.load(changed, 1, 2, 2))
        return [await first, await early]

    found = asyncio.run(play())
    same(found[:1], ask(LocalSampler(module, tokenizer), [request]))
    same(found[1:], ask(LocalSampler(other, tokenizer), [request]))
    assert [each.version for each in found] == [1, 2]
    assert found[0].tokens != found[1].tokens


def test_new_weights_wait_for_what_was_asked_before_and_is_still_on_its_way() -> None:
    """Weights and requests come over different roads."""
    module, tokenizer = small()
    skeleton, numbers = remote.taken_apart(module, tokenizer)

    async def play() -> list[int]:
        worker = remote.Held("cpu", 1.0)
        await worker.open(ENGINE, skeleton, numbers, None, 0, 1)
        loading = asyncio.create_task(worker.load(None, 1, 2, 1))
        await turns()
        before = await worker.sample(ids(5, 1), SamplingParams(max_tokens=2), 0)
        await loading
        return [before.version, (await worker.sample(ids(5, 1), SamplingParams(max_tokens=2), 1)).version]

    assert asyncio.run(play()) == [1, 2]


def test_what_comes_for_a_model_that_is_closed_does_not_bring_it_back() -> None:
    """Ray may begin a later call before one whose weights it still fetches."""
    skeleton, numbers = remote.taken_apart(*small())

    async def play() -> set[int]:
        threads = torch.get_num_threads()
        worker = remote.Worker(RayConfig())
        torch.set_num_threads(threads)
        for name in (1, 2):
            await worker.open(name, ENGINE, skeleton, numbers, None, 0, 1)
        await worker.close(3)
        await worker.close(2)
        await worker.open(3, ENGINE, skeleton, numbers, None, 0, 1)
        await asyncio.wait_for(worker.load(2, None, 1, 2, 0), 30)
        with pytest.raises(RolloutError, match="a model that is closed"):
            await asyncio.wait_for(worker.sample(2, ids(5, 1), SamplingParams(max_tokens=2), 1), 30)
        return set(worker.held)

    assert asyncio.run(play()) == {1}


def test_new_weights_wait_until_what_was_given_up_is_dropped() -> None:
    module, tokenizer = small()
    skeleton, numbers = remote.taken_apart(module, tokenizer)

    async def play() -> int:
        worker = remote.Held("cpu", 1.0)
        await worker.open(ENGINE, skeleton, numbers, None, 0, 1)
        given_up = asyncio.create_task(worker.sample(ids(5, 1), SamplingParams(max_tokens=200), 0))
        await turns()
        given_up.cancel()
        await worker.load(None, 1, 2, 1)
        return (await worker.sample(ids(5, 1), SamplingParams(max_tokens=2), 1)).version

    assert asyncio.run(play()) == 2


@pytest.mark.parametrize("view", [False, True])
def test_a_copy_computes_what_the_module_computes_and_follows_what_learns(view: bool) -> None:
    module, tokenizer = small()
    adapted = lora.attach(module, LoraConfig(rank=2), name="low")
    learns = lora.AdapterView(adapted, "low") if view else adapted
    skeleton, numbers = remote.taken_apart(learns, tokenizer)
    assert len(skeleton) < sum(weight.nbytes for weight in module.parameters())  # no numbers in it
    copied, _ = remote.put_together(skeleton, numbers, "cpu")
    tokens = torch.tensor([ids(9, 1)])
    assert torch.equal(copied(tokens).logits, learns(tokens).logits)
    with torch.no_grad():
        for _, weight in remote.learning(learns):
            weight.normal_()
    sent = remote.numbers_of(remote.learning(learns))
    assert all("lora_" in name for name in sent)
    remote.fill(copied, sent, all_of_it=False)
    assert torch.equal(copied(tokens).logits, learns(tokens).logits)


def test_weights_of_16_bits_and_tied_ones_travel_as_they_are() -> None:
    module, _ = small()
    weights = module.to(torch.bfloat16).state_dict()
    found = remote.numbers_of(weights.items())
    assert found["lm_head.weight"][0] is found["model.embed_tokens.weight"][0]  # one matrix
    for name, weight in weights.items():
        back = remote._as_tensor(found[name])
        assert back.dtype == torch.bfloat16
        assert torch.equal(back, weight)


def test_what_workers_cannot_serve_is_refused() -> None:
    module, tokenizer = small()
    module.is_quantized = True
    with pytest.raises(ConfigError, match=r"model\.quantization leaves none"):
        open_sampler(module, tokenizer, SamplingConfig(sampler="ray"))


def test_a_cluster_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def nobody(*_: Any, **__: Any) -> None:
        raise ConnectionError("Failed to connect.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", nobody)
    with pytest.raises(ConfigError, match=r"^sampling\.ray\.address = far:1: Ray is not to be reached there"):
        ask(RaySampler(*small(), RayConfig(address="far:1")), [([1], SamplingParams())])


real_workers = pytest.mark.slow
"""Ray's own processes and two workers, all of which import what they need, are half a minute of a core."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def real(cluster: None) -> RaySampler:
    """Two workers, which the tests share and reload."""
    return RaySampler(*small(), RayConfig(timeout=300))


def beside(sampler: RaySampler) -> LocalSampler:
    return LocalSampler(sampler.module, sampler.tokenizer)


def requests(count: int, length: int = 16) -> list[Request]:
    return [(ids(3 + n % 20, n), SamplingParams(max_tokens=length, seed=n, stop_ids=(9, 40))) for n in range(count)]


@real_workers
def test_they_answer_what_the_local_engine_answers(real: RaySampler) -> None:
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}, {"stop": ("a",)}]
    asked = [(prompt, replace(params, **kinds[n % 5])) for n, (prompt, params) in enumerate(requests(30))]
    same(ask(real, asked), ask(beside(real), asked))


@real_workers
def test_they_keep_the_promises_of_a_sampler(real: RaySampler) -> None:
    texts = ["what is in the box?", "a", "a cat, a hat, a bat. what is in", "a cat, a hat, a bat. a cat", "the box"]
    prompts = [real.tokenizer.encode(text) for text in texts]
    asyncio.run(check_sampler(real, real.tokenizer, prompts, stop_id=real.tokenizer.eos_token_id))


@real_workers
def test_a_predicate_is_asked_here_of_every_token_and_may_remember(real: RaySampler) -> None:
    asked = requests(4, 12)
    heard: tuple[list[str], list[str]] = ([], [])

    def remembering(seen: list[str]) -> Callable[[str], bool]:
        return lambda text: seen.append(text) is None and len(text) >= 9

    for seen, sampler in zip(heard, (real, beside(real)), strict=True):
        watched = [(prompt, replace(params, stop_when=remembering(seen))) for prompt, params in asked]
        found = [ask(sampler, [request])[0] for request in watched]
        if sampler is real:
            expected = found
    same(found, expected)
    assert heard[0] == heard[1]


@real_workers
def test_new_weights_reach_all_workers_and_nothing_of_the_old_ones_stays(real: RaySampler) -> None:
    asked = requests(12)
    before = ask(real, asked)
    with torch.no_grad():
        for weight in real.module.parameters():
            weight.mul_(1.5)
    real.load(real.module.state_dict().items(), 77)
    after = ask(real, asked)
    same(after, ask(beside(real), asked))
    assert {each.version for each in after} == {77}
    assert [each.tokens for each in after] != [each.tokens for each in before]


@real_workers
def test_one_worker_is_killed_and_one_hangs_and_the_answers_are_the_same(
    real: RaySampler, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    asked = requests(40, 40)
    expected = ask(beside(real), asked)
    pids = ray.get([place.actor.__ray_call__.remote(lambda worker: os.getpid()) for place in real._pool.workers])

    async def play() -> list[Completion]:
        tasks = [asyncio.create_task(real.sample(*request)) for request in asked]
        while not any(task.done() for task in tasks):
            await asyncio.sleep(0.01)
        os.kill(pids[0], signal.SIGKILL)
        os.kill(pids[1], signal.SIGSTOP)
        return await asyncio.gather(*tasks)

    workers = real._pool
    assert workers is not None
    patient, workers.settings = workers.settings, replace(workers.settings, timeout=20)
    try:
        same(asyncio.run(play()), expected)
    finally:
        workers.settings = patient
    assert capsys.readouterr().err.count("a rollout worker was lost") == 2
