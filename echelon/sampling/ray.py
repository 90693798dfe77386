"""Engines in other processes, on this machine or on others, behind the two methods of one: carried there by Ray.

All samplers of a process share its workers, each of which holds a copy of every model; of several ranks each has its
own. Ray starts them, brings them weights and says what became of them; what they are asked and answer goes over a
connection to each (`wire`). A conversation stays with the worker that has its keys and values; a worker that dies,
hangs or cannot be reached is replaced and what it was asked is asked again. Every request draws from its own seed, so
who answers it, and how often it was asked, changes nothing. Knows nothing of how weights are trained, or of what a
worker does.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from echelon.config import RayConfig
from echelon.errors import ConfigError, EchelonError, RolloutError, need
from echelon.models import lora
from echelon.models.lm import first_line
from echelon.sampling import wire
from echelon.sampling.cache import hashes
from echelon.sampling.copied import check_copyable
from echelon.sampling.ends import cut
from echelon.sampling.ray_cluster import address_of, connect, guard, own, place_of, put
from echelon.sampling.ray_worker import Worker, learning, numbers_of, taken_apart
from echelon.types import Completion, SamplingParams

BARREN = 3
"""So many workers may be lost in a row, each in place of the one before, without an answer from any of them."""
TRIES = 8
"""So many workers one request may be given to."""
PATIENCE = 10.0
"""Seconds that the very first requests wait for all workers to have started, rather than go to those that have."""
HOMES = 1 << 16
"""Conversations of which it is remembered who has them."""
SAYS_WHY = 2.0
"""Seconds that Ray is given to say what became of a worker."""
NAMES = itertools.count()
"""By which workers know models."""

T = TypeVar("T")


class RaySampler:
    """Samples from copies of a module that Ray's workers hold. Concurrent calls of `sample` are spread over them.

    The cluster is joined, or started, and the workers with it, when one of the samplers that share them is first asked
    or loaded: those of this process with the same settings. `load` returns once the new weights are on their way,
    whatever is being answered: what was asked before is answered with the weights of then. `longest` is how many tokens
    a prompt and its answer may have together, for workers with vLLM; `cache_tokens` is that of each worker's engine.

    Raises MissingExtra without Ray, and ConfigError for what cannot be: weights of few bits, workers that ranks cannot
    share out.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        settings: RayConfig,
        *,
        longest: int = 0,
        cache_tokens: int | None = None,
        version: int = 0,
    ) -> None:
        guard(settings)
        need("ray", "ray")
        _check(module)
        own(settings)
        self.module, self.tokenizer, self.settings = module, tokenizer, settings
        engine = {"engine": settings.engine, "longest": longest, "cache_tokens": cache_tokens}
        self._model = Model(next(NAMES), engine | {"concurrency": settings.in_flight}, version=version)
        self._pool: Pool | None = None

    @property
    def version(self) -> int:
        """Of the weights that were loaded last."""
        return self._model.version

    async def sample(self, prompt: list[int], params: SamplingParams) -> Completion:
        """One completion, the one that the engine of the workers would give here.

        `params.stop_when` is asked here, of every token in turn, once the answer is there: it may remember what it
        saw, and need not be fit to travel. What was drawn after the token that ends it is dropped.

        Raises RolloutError where workers cannot be replaced, and what the engine raises.
        """
        assert prompt, "a prompt needs at least one token"
        pool = self._opened()
        said, place = await pool.thread.result(pool.ask(self._model, prompt, replace(params, stop_when=None)))
        if params.stop_when is not None:
            said = cut(said.tokens, said.logprobs, params, self.tokenizer, said.version) or said
        pool.thread.soon(self._model.settle, place, [*prompt, *said.tokens])
        return said

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send new weights to all workers, as one object that each of their machines fetches once.

        Of a module with adapters only what learns is read, from the module itself, whose weights these are. Without
        any weights, only the version changes. Raises RolloutError where there is no room for them.
        """
        weights, news = iter(weights), None
        first = next(weights, None)
        if first is not None and lora.has_adapters(self.module):
            weights = iter(())  # a generator that is dropped ends whatever it had begun
            news = self._sent(learning(self.module))
        elif first is not None:
            news = self._sent(itertools.chain([first], weights))
        if self._pool is not None:
            return self._pool.thread.run(self._pool.load(self._model, news, version))
        self._model.renew(news, version)
        if news is not None:
            self._opened()

    def _sent(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        connect(self.settings)
        found, known = numbers_of(weights), self.module.state_dict().keys()
        assert found.keys() <= known, f"weights that the module does not have: {sorted(found.keys() - known)[:3]}"
        return put(found)

    def _opened(self) -> Pool:
        """The workers, which hold the model: with the weights that are loaded or else with those of the module."""
        if self._pool is None:
            connect(self.settings)
            skeleton, numbers = taken_apart(self.module, self.tokenizer)
            model, pool = self._model, pool_of(self.settings)
            model.plan = put(skeleton)
            if lora.has_adapters(self.module):
                model.base = put(numbers)
            elif model.news is None:
                model.news = put(numbers_of(self.module.state_dict().items()))
            pool.thread.run(pool.open(model))
            weakref.finalize(self, pool.thread.soon, pool.close, model).atexit = False
            self._pool = pool
        return self._pool


@dataclass(slots=True, eq=False)
class Model:
    """What workers hold for one sampler."""

    name: int
    engine: dict[str, Any]
    """What runs it there."""
    plan: Any = None
    """The module without its numbers, in Ray's store."""
    base: Any = None
    """All numbers of a module with adapters."""
    news: Any = None
    """The numbers that were loaded last, by their names."""
    round: int = 0
    """How often something was loaded."""
    version: int = 0
    homes: OrderedDict[int, Place] = field(default_factory=OrderedDict)
    """Who has which conversation."""

    def renew(self, news: Any, version: int) -> None:
        """Other weights, or with None only their version: nobody has any conversation any more."""
        self.news = self.news if news is None else news
        self.round += 1
        self.version = version
        self.homes.clear()

    def settle(self, place: Place, tokens: list[int]) -> None:
        """Remember who has this conversation."""
        *_, last = 0, *hashes(tokens)
        if last:
            self.homes[last] = place
            self.homes.move_to_end(last)
        if len(self.homes) > HOMES:
            self.homes.popitem(last=False)


class Pool:
    """Workers that all hold the same models, and who of them is asked what.

    All of it happens in one event loop, that of `thread`, whichever threads and loops the askers are in.
    """

    def __init__(self, settings: RayConfig) -> None:
        self.settings = settings
        self.thread = LoopThread()
        self.workers: list[Place] = []
        self._models: dict[int, Model] = {}
        self._waiting: deque[tuple[Model, list[int], asyncio.Future[Place]]] = deque()
        self._patient = True
        self._loop: asyncio.AbstractEventLoop | None = None

    async def open(self, model: Model) -> None:
        """Have all workers hold a model. The first one has them start."""
        self._loop = asyncio.get_running_loop()
        self._models[model.name] = model
        if not self.workers:
            self.workers += [self._hire() for _ in range(own(self.settings))]
            return
        for place in self.workers:
            self._hand_over(place, model)

    async def load(self, model: Model, news: Any, version: int) -> None:
        """Send new weights to all workers, or with None only their version."""
        model.renew(news, version)
        for place in self.workers:
            before = place.asked.get(model.name, 0)
            self._promised(place, place.actor.load.remote(model.name, news, model.round, version, before))

    def close(self, model: Model) -> None:
        """Have no worker hold this model any more."""
        self._models.pop(model.name, None)
        with suppress(Exception):  # whoever is asked may be gone, and Ray too
            for place in self.workers if need("ray", "ray").is_initialized() else ():
                place.actor.close.remote(model.name)

    async def ask(self, model: Model, prompt: list[int], params: SamplingParams) -> tuple[Completion, Place]:
        """What one of the workers answers, and which. Raises RolloutError where workers cannot be replaced, and what
        the engine raises."""
        why = ""
        for _ in range(TRIES):
            place = await self._place_for(model, prompt)
            try:
                said = await self._ask(place, model, prompt, params)
            except wire.LineLost as lost:
                why = str(lost)
                if not place.lost:
                    place.lost = True
                    why = await asyncio.shield(asyncio.create_task(self._bury(place, why)))
                continue
            finally:
                place.busy -= 1
                self._hand_out()
            place.answered = True
            return said, place
        raise RolloutError(
            f"{TRIES} workers in a row were lost over one request (the last: {why}). Look at what it asks, or at the "
            "memory of the workers' machines."
        )

    def _hire(self, barren: int = 0) -> Place:
        """One more worker, which begins to start."""
        place = Place(self._actor(), barren)
        for model in self._models.values():
            self._hand_over(place, model)
        return place

    def _actor(self) -> Any:
        said = self.settings
        return (
            need("ray", "ray")
            .remote(Worker)
            .options(
                num_cpus=said.cpus if address_of(said) else 0,
                num_gpus=said.gpus,
                max_restarts=0,
                scheduling_strategy=place_of(said),
            )
            .remote(said)
        )

    def _hand_over(self, place: Place, model: Model) -> None:
        """Have a worker hold a model."""
        sent = model.engine, model.plan, model.base, model.news, model.round, model.version
        self._promised(place, place.actor.open.remote(model.name, *sent))

    def _promised(self, place: Place, answer: Any) -> None:
        """Hand requests out as soon as this worker has done what it was told."""
        promise = answer.future()
        place.promises.append(promise)
        promise.add_done_callback(lambda _: self._wake())

    def _wake(self) -> None:
        with suppress(RuntimeError):  # nobody holds the pool any more, and its loop has ended
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._hand_out)

    async def _place_for(self, model: Model, prompt: list[int]) -> Place:
        """A worker with room, once there is one: one of its requests is now this one."""
        waiting: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        self._waiting.append((model, prompt, waiting))
        try:
            self._hand_out()
            until = time.monotonic() + self.settings.timeout
            while not waiting.done():
                await asyncio.wait([waiting], timeout=min(PATIENCE, self.settings.timeout))
                self._patient = False
                self._hand_out()
                if any(place.started and not place.lost for place in self.workers):
                    until = time.monotonic() + self.settings.timeout
                elif time.monotonic() > until and not waiting.done():
                    raise self._nobody()
            return waiting.result()
        except BaseException:
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                waiting.result().busy -= 1  # given a place at the moment in which it was given up
            waiting.cancel()
            raise

    def _hand_out(self) -> None:
        """Give those who wait a worker, first come, first served. What is wrong with all workers goes to all."""
        if not self._waiting:
            return
        try:
            free = [place for place in list(self.workers) if self._serves(place)]
            if self._patient and len(free) < len(self.workers):
                return
            self._patient = False
        except EchelonError as error:
            while self._waiting:
                *_, waiting = self._waiting.popleft()
                if not waiting.done():
                    waiting.set_exception(error)
            return
        while self._waiting:
            model, prompt, waiting = self._waiting[0]
            if not waiting.done():
                place = self._choose(model, prompt, [place for place in free if place.busy < self.settings.in_flight])
                if place is None:
                    return
                place.busy += 1
                waiting.set_result(place)
            self._waiting.popleft()

    def _serves(self, place: Place) -> bool:
        """Whether a worker has started; it waits for new weights itself. A failed one is replaced, or is an error."""
        for promise in [promise for promise in place.promises if promise.done()]:
            error = promise.exception()
            if error is not None:
                self._replace(place, *_reason(error))
                return False
            place.started = True
            place.promises.remove(promise)
        return place.started and not place.lost

    def _choose(self, model: Model, prompt: list[int], free: Sequence[Place]) -> Place | None:
        """The worker that has most of this prompt, if it has room, else the one with least to do."""
        for key in reversed([*hashes(prompt)]):
            home = model.homes.get(key)
            if home is not None and any(home is place for place in free):
                return home
        return min(free, key=lambda place: place.busy, default=None)

    async def _ask(self, place: Place, model: Model, prompt: list[int], params: SamplingParams) -> Completion:
        """What this worker answers. Raises LineLost where it does not, and what its engine raises."""
        try:
            async with asyncio.timeout(self.settings.timeout):
                line = await self._line(place)
                asked = model.version
                place.asked[model.name] = place.asked.get(model.name, 0) + 1
                said: Completion = await line.ask(model.name, prompt, params, model.round)
        except TimeoutError:
            raise wire.LineLost(f"no answer within {self.settings.timeout:g} s") from None
        if said.version not in (asked, model.version):
            raise RolloutError(
                f"a worker answered with weights of version {said.version}, and it was asked for version {asked}. "
                "Something else loads weights into it: give the run workers of its own."
            )
        return said

    async def _line(self, place: Place) -> wire.Line:
        """To this worker, opened by whoever is the first to ask it. Raises LineLost where it cannot be reached."""
        if place.line is None:
            place.line = asyncio.create_task(self._connected(place.actor))
        return await asyncio.shield(place.line)

    async def _connected(self, actor: Any) -> wire.Line:
        try:
            line = await wire.connected(*await asyncio.wrap_future(actor.listen.remote().future()))
        except need("ray", "ray").exceptions.RayError as error:
            raise wire.LineLost(first_line(error)) from error
        self.thread.ends.append(line.close)
        return line

    async def _bury(self, place: Place, why: str) -> str:
        """Replace a worker that does not answer, and say what Ray says of it."""
        why = await self._words(place.actor, why)
        self._replace(place, why)
        return why

    async def _words(self, actor: Any, why: str) -> str:
        """What became of a worker in Ray's words, or those given where it has none."""
        try:
            async with asyncio.timeout(SAYS_WHY):
                await asyncio.wrap_future(actor.__ray_ready__.remote().future())
        except need("ray", "ray").exceptions.RayError as error:
            return first_line(error)
        except TimeoutError:
            pass
        return why

    def _replace(self, place: Place, why: str, known: EchelonError | None = None) -> None:
        """Another worker in place of one that is lost. Raises RolloutError where that never helped, or what is known to
        be wrong with every worker."""
        if place not in self.workers:
            return
        place.lost = True
        if place.line is not None:
            place.line.add_done_callback(_hang_up)
        with suppress(Exception):
            need("ray", "ray").kill(place.actor)
        print(f"a rollout worker was lost ({why.rstrip('.')}) and is replaced", file=sys.stderr, flush=True)
        barren = 0 if place.answered else place.barren + 1
        hopeless = barren >= BARREN or known is not None
        here = self.workers.index(place)
        self.workers[here] = self._hire(0 if hopeless else barren)
        if known is not None:
            raise known
        if hopeless:
            raise RolloutError(
                f"{BARREN} workers in a row were lost before they had answered anything (the last: {why.rstrip('.')}). "
                "Look at the memory of the machines, and at Ray's own words: ray logs, or /tmp/ray/session_latest/logs."
            )

    def _nobody(self) -> RolloutError:
        """What to say where no worker has started in all that time."""
        said, there = self.settings, need("ray", "ray").available_resources()
        return RolloutError(
            f"none of {own(said)} workers was ready within {said.timeout:g} s. Each asks for {said.cpus} CPUs and "
            f"{said.gpus:g} GPUs, and free on the cluster are {there.get('CPU', 0):g} and {there.get('GPU', 0):g}. "
            "Ask for less with sampling.ray.workers, cpus and gpus, or add machines."
        )


@dataclass(slots=True, eq=False)
class Place:
    """A worker as seen from here."""

    actor: Any
    barren: int
    """So many before it, each in place of the one before, were lost without an answer."""
    promises: list[Future[None]] = field(default_factory=list)
    """What it was told to do and has not said to be done: to start, to take weights."""
    line: asyncio.Task[wire.Line] | None = None
    """Over which it is asked."""
    asked: dict[int, int] = field(default_factory=dict)
    """How many requests it was sent, by the name of their model."""
    busy: int = 0
    started: bool = False
    answered: bool = False
    lost: bool = False


class LoopThread:
    """An event loop on a thread of its own, until nobody holds this any more."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.ends: list[Callable[[], None]] = []
        """What is done there last."""
        threading.Thread(target=_serve, args=(self.loop, self.ends), name="ray", daemon=True).start()
        weakref.finalize(self, self.loop.call_soon_threadsafe, self.loop.stop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What it comes to there; this thread waits for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def result(self, work: Coroutine[Any, Any, T]) -> T:
        """What it comes to there; this loop goes on meanwhile, and whoever gives this up gives up the work."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    def soon(self, work: Callable[..., object], *given: Any) -> None:
        """Have it done there at some time."""
        self.loop.call_soon_threadsafe(work, *given)


def _serve(loop: asyncio.AbstractEventLoop, ends: list[Callable[[], None]]) -> None:
    loop.run_forever()
    for end in ends:
        end()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


POOLS: weakref.WeakValueDictionary[tuple[RayConfig, str], Pool] = weakref.WeakValueDictionary()
"""Those that somebody holds, by their settings and by this process's connection to a cluster."""


def pool_of(settings: RayConfig) -> Pool:
    """The workers of all who ask with these settings."""
    key = settings, need("ray", "ray").get_runtime_context().get_node_id()
    found = POOLS.get(key)
    if found is None:
        found = POOLS[key] = Pool(settings)
    return found


def _check(module: nn.Module) -> None:
    """Raise ConfigError for what workers cannot serve."""
    check_copyable(module, "ray")
    if any(type(part).__module__.startswith("transformers_modules") for part in module.modules()):
        raise ConfigError(
            f"sampling.sampler = ray: {type(module).__name__} is code from the model's folder, which workers do not "
            "have. Use --sampler local."
        )


def _hang_up(opened: asyncio.Task[wire.Line]) -> None:
    """Close a line once it is open; that there is none has been said."""
    if not opened.cancelled() and opened.exception() is None:
        opened.result().close()


def _reason(error: Any) -> tuple[str, EchelonError | None]:
    """Why a worker could not do what it was told; and what would hold for every other one, too."""
    cause = getattr(error, "cause", None)
    return first_line(error if cause is None else cause), cause if isinstance(cause, EchelonError) else None
