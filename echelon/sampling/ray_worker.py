"""What a worker of Ray runs: engines on copies of models whose weights it is sent, and how a model travels there.

Knows nothing of other workers, of who asks, and of how weights are trained.
"""

from __future__ import annotations

import asyncio
import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from echelon.config import RayConfig
from echelon.errors import RolloutError, need
from echelon.models import lora
from echelon.sampling import wire
from echelon.sampling.cache import default_budget
from echelon.sampling.local import LocalSampler
from echelon.sampling.vllm import VllmSampler
from echelon.types import Completion, SamplingParams

Numbers = tuple[np.ndarray[Any, Any], str]
"""A tensor as it travels: its bytes as whole numbers of the same width, and its type's name."""


class Worker:
    """A process with the models of all who ask it, by their names."""

    def __init__(self, settings: RayConfig) -> None:
        torch.set_num_threads(settings.cpus)
        self.device = "cuda" if settings.gpus else "cpu"
        self.share = min(settings.gpus, 1.0) if settings.gpus else 1 / settings.workers
        self.held: dict[int, Held] = {}
        self.closed: set[int] = set()

    async def open(self, name: int, *sent: Any) -> None:
        """Hold one more model (`Held.open`)."""
        if name not in self.closed:
            await self._named(name).open(*sent)

    async def load(self, name: int, *sent: Any) -> None:
        """New weights for a model (`Held.load`)."""
        if name not in self.closed:
            await self._named(name).load(*sent)

    async def listen(self) -> wire.Address:
        """Where this process is asked to `sample`, from now on."""
        _, address = await wire.listening(self.sample, need("ray.util", "ray").get_node_ip_address())
        return address

    async def sample(self, name: int, prompt: list[int], params: SamplingParams, number: int) -> Completion:
        """What a model answers (`Held.sample`)."""
        if name in self.closed:
            raise RolloutError("it was asked of a model that is closed")
        return await self._named(name).sample(prompt, params, number)

    async def close(self, name: int) -> None:
        """Hold a model no longer. Ray may begin this before what was sent earlier, whose weights it still fetches."""
        self.closed.add(name)
        self.held.pop(name, None)

    def _named(self, name: int) -> Held:
        """A model, of which what is asked of it may be known before the model itself is there."""
        if name not in self.held:
            self.held[name] = Held(self.device, self.share)
        return self.held[name]


class Held:
    """A copy of a module whose weights it is sent, and an engine on it."""

    def __init__(self, device: str, share: float) -> None:
        self.device, self.share = device, share
        self.module: Any = None
        self.engine: LocalSampler | VllmSampler | None = None
        self.round = -1
        self._came = 0
        self._asked = 0
        self._changed = asyncio.Condition()

    async def open(
        self,
        engine: dict[str, Any],
        skeleton: bytes,
        base: Sequence[Numbers] | None,
        news: dict[str, Numbers] | None,
        number: int,
        version: int,
    ) -> None:
        """Build the module and the engine that is described: all of the module's numbers (`base`), and over them those
        of the names."""
        self.module, tokenizer = put_together(skeleton, base, self.device)
        if news is not None:
            fill(self.module, news, all_of_it=base is None)
        said = dict(engine)
        said["cache_tokens"] = said["cache_tokens"] or int(self.share * default_budget(self.module))
        if said.pop("engine") == "vllm":
            self.engine = VllmSampler(self.module, tokenizer, version=version, **said)
            self.engine.load(lora.merged_weights(self.module), version)
        else:
            said.pop("longest")
            self.engine = LocalSampler(self.module, tokenizer, version=version, **said)
        await self._now(number)

    async def load(self, news: dict[str, Numbers] | None, number: int, version: int, before: int) -> None:
        """New weights, or only their version, once all that was asked before (so many requests) is answered."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._asked and self._came >= before and self.round == number - 1)
        assert self.engine is not None
        while not self.engine.idle:  # it drops what was given up
            await asyncio.sleep(0)
        if news is not None:
            fill(self.module, news, all_of_it=False)
        whole = isinstance(self.engine, VllmSampler) and news is not None
        self.engine.load(lora.merged_weights(self.module) if whole else iter(()), version)
        await self._now(number)

    async def sample(self, prompt: list[int], params: SamplingParams, number: int) -> Completion:
        """The engine's answer, by the weights of this `load` (they are counted) or later ones."""
        self._came += 1
        if self.round < number:
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


def learning(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What learns, by the names of the module's state."""
    yield from ((name, weight) for name, weight in module.named_parameters() if weight.requires_grad)


def numbers_of(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Numbers]:
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


def taken_apart(module: nn.Module, tokenizer: Any) -> tuple[bytes, list[Numbers]]:
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


def put_together(skeleton: bytes, base: Sequence[Numbers] | None, device: str) -> tuple[Any, Any]:
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
def fill(module: nn.Module, news: dict[str, Numbers], *, all_of_it: bool) -> None:
    """Put these numbers in place of the module's own, which must be among them: all, or those that learn."""
    state = module.state_dict(keep_vars=True)
    wanted = {name for name, weight in module.named_parameters() if all_of_it or weight.requires_grad}
    assert wanted <= news.keys(), f"weights that were not sent: {sorted(wanted - news.keys())[:3]}"
    for name in news.keys() & state.keys():
        state[name].copy_(_as_tensor(news[name]))
