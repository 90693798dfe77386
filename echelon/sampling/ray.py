"""Engines in other processes, on this machine or on others, behind the two methods of one: carried there by Ray.

Each worker holds a copy of the model. A conversation stays with the worker that has its keys and values; a worker that
dies, hangs or cannot be reached is replaced and what it was asked is asked again. Every request draws from its own
seed, so who answers it, and how often it was asked, changes nothing. Knows nothing of how weights are trained.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import sys
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from echelon.config import RayConfig
from echelon.errors import ConfigError, EchelonError, RolloutError, need
from echelon.models import lora
from echelon.models.lm import first_line
from echelon.sampling.cache import default_budget, hashes
from echelon.sampling.ends import Ending
from echelon.sampling.local import LocalSampler
from echelon.sampling.vllm import VllmSampler
from echelon.types import Completion, SamplingParams

BARREN = 3
"""So many workers may be lost in a row, each in place of the one before, without an answer from any of them."""
TRIES = 8
"""So many workers one request may be given to."""
PATIENCE = 10.0
"""Seconds that the very first requests wait for all workers to have started, rather than go to those that have."""
HOMES = 1 << 16
"""Conversations of which it is remembered who has them."""

Numbers = tuple[np.ndarray[Any, Any], str]
"""A tensor as it travels: its bytes as whole numbers of the same width, and its type's name."""


class RaySampler:
    """Samples from copies of a module that Ray's workers hold. Concurrent calls of `sample` are spread over them.

    The cluster is joined, or started, and the workers with it, when it is first asked or loaded. `load` returns once
    the new weights are on their way, whatever is being answered: what was asked before is answered with the weights of
    then. `longest` is how many tokens a prompt and its answer may have together, for workers with vLLM;
    `cache_tokens` is that of each worker's engine.

    Raises MissingExtra without Ray, and ConfigError for what cannot be: weights of few bits, several ranks.
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
        need("ray", "ray")
        _check(module)
        self.module, self.tokenizer, self.settings = module, tokenizer, settings
        self.version = version
        self._engine = {"engine": settings.engine, "longest": longest, "cache_tokens": cache_tokens}
        self._engine |= {"concurrency": settings.in_flight}
        self._round = 0
        self._plan: Any = None
        self._base: Any = None
        self._news: Any = None
        self._workers: list[_Place] = []
        self._waiting: deque[tuple[list[int], asyncio.Future[_Place]]] = deque()
        self._homes: OrderedDict[int, _Place] = OrderedDict()
        self._patient = True
        self._loop: asyncio.AbstractEventLoop | None = None

    async def sample(self, prompt: list[int], params: SamplingParams) -> Completion:
        """One completion, the one that the engine of the workers would give here.

        `params.stop_when` is asked here, of every token in turn, once the answer is there: it may remember what it
        saw, and need not be fit to travel. What was drawn after the token that ends it is dropped.

        Raises RolloutError where workers cannot be replaced, and what the engine raises.
        """
        assert prompt, "a prompt needs at least one token"
        self._loop = asyncio.get_running_loop()
        if not self._workers:
            self._start()
        why = ""
        for _ in range(TRIES):
            place = await self._place_for(prompt)
            try:
                said = await self._ask(place, prompt, params)
            except _Lost as lost:
                why = str(lost)
                self._replace(place, why)
                continue
            finally:
                place.busy -= 1
                self._hand_out()
            place.answered = True
            if params.stop_when is not None:
                said = _cut(said, params, self.tokenizer)
            self._settle(place, [*prompt, *said.tokens])
            return said
        raise RolloutError(
            f"{TRIES} workers in a row were lost over one request (the last: {why}). Look at what it asks, or at the "
            "memory of the workers' machines."
        )

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send new weights to all workers, as one object that each of their machines fetches once.

        Of a module with adapters only what learns is read, from the module itself, whose weights these are. Without
        any weights, only the version changes. Raises RolloutError where there is no room for them.
        """
        weights = iter(weights)
        first = next(weights, None)
        self.version = version
        self._round += 1
        self._homes.clear()
        if first is not None and lora.has_adapters(self.module):
            weights = iter(())  # a generator that is dropped ends whatever it had begun
            self._news_from(_learning(self.module))
        elif first is not None:
            self._news_from(itertools.chain([first], weights))
        if not self._workers and first is None:
            return
        if not self._workers:
            self._start()
            return
        for place in self._workers:
            news = self._news if first is not None else None
            place.promises.append(place.actor.load.remote(news, self._round, version).future())
            self._watch(place)

    def _news_from(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._connect()
        found, known = _numbers(weights), self.module.state_dict().keys()
        assert found.keys() <= known, f"weights that the module does not have: {sorted(found.keys() - known)[:3]}"
        self._news = _put(found)

    def _connect(self) -> None:
        """Join the cluster, or start one on this machine, unless this process has one."""
        ray = need("ray", "ray")
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = _address(self.settings)
        said = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if address:
                ray.init(address, **said)
            else:
                ray.init("local", include_dashboard=False, **said)
        except Exception as error:  # of many kinds, plain ones among them
            told = f"address = {address}: Ray is not to be reached there" if address else "workers: Ray does not start"
            raise ConfigError(
                f"sampling.ray.{told} ({first_line(error)}) Give the address of a cluster that was started with: ray "
                "start --head, or none for one on this machine."
            ) from error

    def _start(self) -> None:
        """Start all workers, on the weights that are loaded or else on those of the module."""
        ray = need("ray", "ray")
        self._connect()
        skeleton, numbers = _taken_apart(self.module, self.tokenizer)
        self._plan = ray.put(skeleton)
        if lora.has_adapters(self.module):
            self._base = _put(numbers)
        elif self._news is None:
            self._news = _put(_numbers(self.module.state_dict().items()))
        for _ in range(self.settings.workers):
            self._workers.append(self._hire())
            self._watch(self._workers[-1])

    def _hire(self, barren: int = 0) -> _Place:
        """One more worker, which begins to start."""
        ray, said = need("ray", "ray"), self.settings
        actor = (
            ray.remote(Worker)
            .options(
                num_cpus=said.cpus if _address(said) else 0,
                num_gpus=said.gpus,
                max_restarts=0,
                max_concurrency=2 * said.in_flight + 8,
                scheduling_strategy="SPREAD",
            )
            .remote(said, self._engine)
        )
        opened = actor.open.remote(self._plan, self._base, self._news, self._round, self.version)
        return _Place(actor, barren=barren, promises=[opened.future()])

    def _watch(self, place: _Place) -> None:
        """Hand requests out as soon as this worker has done what it promised."""
        for promise in place.promises:
            promise.add_done_callback(lambda _: self._wake())

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop of an earlier rollout
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._hand_out)

    async def _place_for(self, prompt: list[int]) -> _Place:
        """A worker with room, once there is one: one of its requests is now this one."""
        waiting: asyncio.Future[_Place] = asyncio.get_running_loop().create_future()
        entry = (prompt, waiting)
        self._waiting.append(entry)
        try:
            self._hand_out()
            until = time.monotonic() + self.settings.timeout
            while not waiting.done():
                await asyncio.wait([waiting], timeout=min(PATIENCE, self.settings.timeout))
                self._patient = False
                self._hand_out()
                if any(place.started and not place.lost for place in self._workers):
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
            free = [place for place in list(self._workers) if self._serves(place)]
            if self._patient and len(free) < len(self._workers):
                return
        except EchelonError as error:
            while self._waiting:
                _, waiting = self._waiting.popleft()
                if not waiting.done():
                    waiting.set_exception(error)
            return
        while self._waiting:
            prompt, waiting = self._waiting[0]
            if not waiting.done():
                place = self._choose(prompt, [place for place in free if place.busy < self.settings.in_flight])
                if place is None:
                    return
                place.busy += 1
                waiting.set_result(place)
            self._waiting.popleft()

    def _serves(self, place: _Place) -> bool:
        """Whether a worker has started; it waits for new weights itself. A failed one is replaced, or is an error."""
        for promise in [promise for promise in place.promises if promise.done()]:
            error = promise.exception()
            if error is not None:
                self._replace(place, *_reason(error))
                return False
            place.started = True
            place.promises.remove(promise)
        return place.started and not place.lost

    def _choose(self, prompt: list[int], free: Sequence[_Place]) -> _Place | None:
        """The worker that has most of this prompt, if it has room, else the one with least to do."""
        for key in reversed([*hashes(prompt)]):
            home = self._homes.get(key)
            if home is not None and any(home is place for place in free):
                return home
        return min(free, key=lambda place: place.busy, default=None)

    def _settle(self, place: _Place, tokens: list[int]) -> None:
        """Remember who has this conversation."""
        *_, last = 0, *hashes(tokens)
        if last:
            self._homes[last] = place
            self._homes.move_to_end(last)
        if len(self._homes) > HOMES:
            self._homes.popitem(last=False)

    async def _ask(self, place: _Place, prompt: list[int], params: SamplingParams) -> Completion:
        """What this worker answers. Raises _Lost where it does not, and what its engine raises."""
        ray, asked = need("ray", "ray"), self.version
        answer = place.actor.sample.remote(list(prompt), replace(params, stop_when=None), self._round)
        try:
            async with asyncio.timeout(self.settings.timeout):
                said: Completion = await asyncio.wrap_future(answer.future())
        except asyncio.CancelledError:
            ray.cancel(answer)
            raise
        except ray.exceptions.RayTaskError as error:
            raise (error.cause or RolloutError(first_line(error))) from None
        except TimeoutError:
            raise _Lost(f"no answer within {self.settings.timeout:g} s") from None
        except ray.exceptions.RayError as error:
            raise _Lost(first_line(error)) from error
        if said.version not in (asked, self.version):
            raise RolloutError(
                f"a worker answered with weights of version {said.version}, and it was asked for version {asked}. "
                "Something else loads weights into it: give the run workers of its own."
            )
        return said

    def _replace(self, place: _Place, why: str, known: EchelonError | None = None) -> None:
        """Another worker in place of one that is lost. Raises RolloutError where that never helped, or what is known to
        be wrong with every worker."""
        if place.lost:
            return
        place.lost = True
        with suppress(Exception):
            need("ray", "ray").kill(place.actor)
        print(f"a rollout worker was lost ({why.rstrip('.')}) and is replaced", file=sys.stderr, flush=True)
        barren = 0 if place.answered else place.barren + 1
        hopeless = barren >= BARREN or known is not None
        here = self._workers.index(place)
        self._workers[here] = self._hire(0 if hopeless else barren)
        self._watch(self._workers[here])
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
            f"none of {said.workers} workers was ready within {said.timeout:g} s. Each asks for {said.cpus} CPUs and "
            f"{said.gpus:g} GPUs, and free on the cluster are {there.get('CPU', 0):g} and {there.get('GPU', 0):g}. "
            "Ask for less with sampling.ray.workers, cpus and gpus, or add machines."
        )


@dataclass(slots=True, eq=False)
class _Place:
    """A worker as seen from here."""

    actor: Any
    barren: int
    """So many before it, each in place of the one before, were lost without an answer."""
    promises: list[Future[None]] = field(default_factory=list)
    """What it was told to do and has not said to be done: to start, to take weights."""
    busy: int = 0
    started: bool = False
    answered: bool = False
    lost: bool = False


class _Lost(Exception):
    """A worker will not answer."""


class Worker:
    """An engine in a process of its own, on a copy of a module whose weights it is sent."""

    def __init__(self, settings: RayConfig, engine: dict[str, Any]) -> None:
        torch.set_num_threads(settings.cpus)
        self.device = "cuda" if settings.gpus else "cpu"
        self.share = min(settings.gpus, 1.0) if settings.gpus else 1 / settings.workers
        self.settings = engine
        self.module: Any = None
        self.engine: LocalSampler | VllmSampler | None = None
        self.round = 0
        self._asked = 0
        self._changed = asyncio.Condition()

    async def open(
        self,
        skeleton: bytes,
        base: Sequence[Numbers] | None,
        news: dict[str, Numbers] | None,
        number: int,
        version: int,
    ) -> None:
        """Build the module and an engine on it: all of its numbers (`base`), and over them those of the names."""
        self.module, tokenizer = _put_together(skeleton, base, self.device)
        if news is not None:
            _fill(self.module, news, all_of_it=base is None)
        said = dict(self.settings)
        said["cache_tokens"] = said["cache_tokens"] or int(self.share * default_budget(self.module))
        if said.pop("engine") == "vllm":
            self.engine = VllmSampler(self.module, tokenizer, version=version, **said)
            self.engine.load(lora.merged_weights(self.module), version)
        else:
            said.pop("longest")
            self.engine = LocalSampler(self.module, tokenizer, version=version, **said)
        await self._now(number)

    async def load(self, news: dict[str, Numbers] | None, number: int, version: int) -> None:
        """New weights, or only their version, once all that was asked before is answered."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._asked and self.round == number - 1)
        assert self.engine is not None
        while not self.engine.idle:  # it drops what was given up
            await asyncio.sleep(0)
        if news is not None:
            _fill(self.module, news, all_of_it=False)
        whole = isinstance(self.engine, VllmSampler) and news is not None
        self.engine.load(lora.merged_weights(self.module) if whole else iter(()), version)
        await self._now(number)

    async def sample(self, prompt: list[int], params: SamplingParams, number: int) -> Completion:
        """The engine's answer, by the weights of this `load` (they are counted) or later ones."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.round >= number)
        assert self.engine is not None
        self._asked += 1
        try:
            return await self.engine.sample(prompt, params)
        finally:
            self._asked -= 1
            if not self._asked:
                await self._now(self.round)

    async def _now(self, number: int) -> None:
        self.round = number
        async with self._changed:
            self._changed.notify_all()


def _check(module: nn.Module) -> None:
    """Raise ConfigError for what workers cannot serve."""
    if getattr(module, "is_quantized", False):
        raise ConfigError(
            "sampling.sampler = ray: workers are sent the weights of the model that learns, and model.quantization "
            "leaves none that could be. Use --sampler local."
        )
    if any(type(part).__module__.startswith("transformers_modules") for part in module.modules()):
        raise ConfigError(
            f"sampling.sampler = ray: {type(module).__name__} is code from the model's folder, which workers do not "
            "have. Use --sampler local."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"sampling.sampler = ray: one process asks the workers, and this run has {os.environ['WORLD_SIZE']} ranks. "
            "Use --sampler local, or start it without torchrun."
        )


def _address(settings: RayConfig) -> str:
    """Of the cluster to join; empty where one is started."""
    return settings.address or os.environ.get("RAY_ADDRESS", "")


def _reason(error: Any) -> tuple[str, EchelonError | None]:
    """Why a worker could not do what it was told; and what would hold for every other one, too."""
    cause = getattr(error, "cause", None)
    return first_line(error if cause is None else cause), cause if isinstance(cause, EchelonError) else None


def _cut(said: Completion, params: SamplingParams, tokenizer: Any) -> Completion:
    """A completion that ends where its request's predicate ends it."""
    ending = Ending(params, tokenizer)
    for count in range(1, len(said.tokens) + 1):
        if reason := ending.reason(said.tokens[:count]):
            return ending.completion(said.tokens[:count], said.logprobs[:count], reason, said.version)
    return said


def _learning(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What learns, by the names of the module's state."""
    yield from ((name, weight) for name, weight in module.named_parameters() if weight.requires_grad)


def _numbers(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Numbers]:
    """Tensors by name, as they travel; one that has two names travels once."""
    found: dict[str, Numbers] = {}
    seen: dict[tuple[int, torch.Size, tuple[int, ...]], Numbers] = {}
    for name, weight in weights:
        key = (weight.data_ptr(), weight.shape, weight.stride())
        if weight.device.type == "cpu" and key in seen:  # what is seen is held, so no other tensor lies there
            found[name] = seen[key]
        else:
            found[name] = seen[key] = _as_numbers(weight)
    return found


def _as_numbers(weight: Tensor) -> Numbers:
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    there = weight.detach().cpu().contiguous().view(width).numpy()
    return there, str(weight.dtype).removeprefix("torch.")


def _as_tensor(numbers: Numbers) -> Tensor:
    """On memory that others read as well: to be copied from, never written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would like to write
        return torch.from_numpy(numbers[0]).view(getattr(torch, numbers[1]))


def _put(numbers: Any) -> Any:
    """One object for all workers. Raises RolloutError where neither memory nor disk has room for it."""
    ray = need("ray", "ray")
    try:
        return ray.put(numbers)
    except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
        raise RolloutError(
            f"Ray has no room for the weights ({first_line(error)}) Give its nodes more: ray start "
            "--object-store-memory, or room on the disk that it spills to."
        ) from error


def _taken_apart(module: nn.Module, tokenizer: Any) -> tuple[bytes, list[Numbers]]:
    """A module and its tokenizer pickled without the numbers in its parameters, and those numbers."""
    pickler: Any = need("ray.cloudpickle", "ray").Pickler
    parameters: dict[int, tuple[int, nn.Parameter]] = {}
    file = io.BytesIO()

    class Without(pickler):  # type: ignore[misc]
        """Writes a number for each parameter, and other tensors as they travel."""

        def persistent_id(self, found: Any) -> Any:
            if isinstance(found, nn.Parameter):
                place, _ = parameters.setdefault(id(found), (len(parameters), found))
                return place, tuple(found.shape), str(found.dtype).removeprefix("torch."), found.requires_grad
            return _as_numbers(found) if isinstance(found, Tensor) else None

    Without(file).dump((module, tokenizer))
    return file.getvalue(), [_as_numbers(weight) for _, weight in parameters.values()]


def _put_together(skeleton: bytes, base: Sequence[Numbers] | None, device: str) -> tuple[Any, Any]:
    """The module, on this device, and its tokenizer; without `base` its parameters hold anything."""
    import pickle

    parameters: dict[int, nn.Parameter] = {}

    class With(pickle.Unpickler):
        def persistent_load(self, found: Any) -> Any:
            if len(found) == 2:
                return _as_tensor(found).clone().to(device)
            place, shape, kind, learns = found
            if place not in parameters:
                weight = torch.empty(shape, dtype=getattr(torch, kind), device=device)
                parameters[place] = nn.Parameter(weight, requires_grad=learns)
            return parameters[place]

    module, tokenizer = With(io.BytesIO(skeleton)).load()
    with torch.no_grad():
        for place, numbers in enumerate(base or ()):
            parameters[place].copy_(_as_tensor(numbers))
    return module, tokenizer


@torch.no_grad()
def _fill(module: nn.Module, news: dict[str, Numbers], *, all_of_it: bool) -> None:
    """Put these numbers in place of the module's own, which must be among them: all, or those that learn."""
    state = module.state_dict(keep_vars=True)
    wanted = {name for name, weight in module.named_parameters() if all_of_it or weight.requires_grad}
    assert wanted <= news.keys(), f"weights that were not sent: {sorted(wanted - news.keys())[:3]}"
    for name in news.keys() & state.keys():
        state[name].copy_(_as_tensor(news[name]))
