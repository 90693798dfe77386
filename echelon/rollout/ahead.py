"""Rollouts that run ahead: while a step trains, the episodes of the coming ones are played, with a copy of the weights.

Knows threads, copies, and which version of the weights sampled what. It refuses to know what is played, how it is
judged and how it teaches.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from torch import Tensor

from echelon.config import LoraConfig, ModelConfig, SamplingConfig, demand
from echelon.errors import ConfigError, RolloutError
from echelon.rollout.roles import Role
from echelon.rollout.setup import Actor, open_copy
from echelon.train import dist
from echelon.train.checkpoint import Saveable
from echelon.train.clock import phase
from echelon.train.stale import AsyncConfig, Stale
from echelon.types import Episode, Turn

T = TypeVar("T")


class Run(Protocol):
    """Runs a coroutine to its end in an event loop of its own, as `asyncio.run` does."""

    def __call__(self, work: Coroutine[Any, Any, T], /) -> T: ...


class HasEpisodes(Protocol):
    """What a step has played, and whatever else the recipe wants to know of it."""

    @property
    def episodes(self) -> Sequence[Episode]: ...
    def to_json(self) -> dict[str, Any]: ...


Found = TypeVar("Found", bound=HasEpisodes)

Player = Callable[[Mapping[str, Role], int, Run], Found]
"""(roles by name, step, how to run a coroutine) → what was played. It may run on another thread than the one that
trains: it changes nothing that training reads, and draws from no global generator."""


@dataclass(slots=True)
class Played:
    """The episodes of a step, and what judging them logged."""

    episodes: list[Episode]
    metrics: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON types."""
        return {"episodes": [asdict(episode) for episode in self.episodes], "metrics": self.metrics}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Played:
        """What `to_json` made this of."""
        return cls([read_episode(row) for row in saved["episodes"]], saved["metrics"])


class HasWeights(Protocol):
    """Weights, and which ones: a learner's, or those of a level that stays as it is."""

    @property
    def version(self) -> int: ...
    def weights(self) -> Iterable[tuple[str, Tensor]]: ...


@dataclass(frozen=True, slots=True)
class Level:
    """Who acts with which weights. The same one under two names: two roles that speak with one set of weights."""

    actor: Actor
    learner: HasWeights
    sampling: SamplingConfig
    copied: Callable[[], Role] | None = None
    """Makes such a role with weights of its own, those that its sampler was last given by `load`; None: an engine
    around a copy of the actor's module."""

    def copy(self) -> Role:
        """The role with weights of its own."""
        return open_copy(self.actor, self.sampling) if self.copied is None else self.copied()


@dataclass(slots=True)
class _Begun(Generic[Found]):
    """A rollout under way, or done and not yet trained on."""

    at: int
    """How many steps had been trained when it was handed its weights."""
    versions: dict[str, int]
    """Role → version of the weights it was handed."""
    played: Future[Found]


class Rollouts(Generic[Found]):
    """What each step plays: played when it is asked for, or `max_staleness` steps ahead, on threads.

    Ahead, the rollout of step t begins when step t - max_staleness does, with a copy of the weights of that moment,
    and step t takes it when it is done. So which weights play a step is a matter of its number and never of how fast
    anything was. Those of the first steps are the weights the run began with. There are as many threads, and as many
    copies of the weights, as rollouts can be under way: `max_staleness`.

    In a `with` block: at its end, however it comes, what is under way is called off and no thread is left. Episodes of
    rollouts under way belong to a checkpoint, which waits until they are there, so that a resumed run needs no old
    weights (`parts`). Past its last step nothing is played ahead; the first steps of a run that is continued beyond
    its end are played with the weights that it ended with.

    Raises ConfigError where several ranks train: those play in step with each other.
    """

    def __init__(
        self,
        settings: AsyncConfig,
        levels: Mapping[str, Level],
        play: Player[Found],
        *,
        steps: int,
        read: Callable[[Mapping[str, Any]], Found],
    ) -> None:
        if settings.max_staleness and (ranks := dist.ranks()) is not None and ranks.size > 1:
            raise ConfigError(
                f"asynchronous.max_staleness = {settings.max_staleness}: {ranks.size} ranks play and train in step "
                "with each other. Leave it out, or use one process."
            )
        self.settings, self.levels = settings, levels
        self._play, self._steps, self._read = play, steps, read
        self._live = {name: level.actor.role for name, level in levels.items()}
        self._stale = {name: Stale(settings, name) for name in levels}
        self._first: dict[int, str] = {}
        """Of each set of weights, the name of the role that they are handed to."""
        for name, level in levels.items():
            self._first.setdefault(id(level), name)
        self._threads = [_Thread(self._copies()) for _ in range(settings.max_staleness)]
        self._begun: dict[int, _Begun[Found]] = {}
        self._taken: tuple[int, _Begun[Found]] | None = None

    def publish(self) -> None:
        """Let those who act on live weights have them as they are now. Ahead, nobody does: `take` hands copies over."""
        if not self._threads:
            for name in self._first.values():
                _hand_over(self.levels[name], self._live[name])

    def take(self, step: int) -> Found:
        """What this step has played; the rollout `max_staleness` steps later then begins with the weights of now.

        What a rollout raised is raised here. Raises RolloutError for a turn that other weights sampled than the role
        had been handed.
        """
        if not self._threads:
            return self._play(self._live, step, asyncio.run)
        ahead = len(self._threads)
        for coming in range(step, min(step + ahead, self._steps)):
            if coming not in self._begun:  # the first ones of this process
                self._begin(coming, at=step)
        begun = self._begun.pop(step)
        assert step - begun.at <= ahead, f"step {step} was played with the weights of step {begun.at}"
        with phase("rollout"):
            found = begun.played.result()
        for turn in (turn for episode in found.episodes if episode.ending != "failed" for turn in episode.turns):
            _check_version(turn, begun.versions, step)
        self._taken = step, begun
        if step + ahead < self._steps:
            self._begin(step + ahead, at=step)
        return found

    def stale(self, name: str) -> Stale | None:
        """What corrects the batch that this role's learner gets from the step last taken; None where the weights that
        learn are those that sampled it."""
        if self._taken is None or self._taken[1].versions[name] == self.levels[name].learner.version:
            return None
        return self._stale[name]

    def metrics(self) -> dict[str, float]:
        """How many steps old the weights were that played what was last taken; nothing where all play in turn."""
        if self._taken is None:
            return {}
        step, begun = self._taken
        return {"policy/staleness": float(step - begun.at)}

    def parts(self) -> dict[str, Saveable]:
        """What a checkpoint has to hold of it: nothing where all play in turn."""
        return {"rollouts": self} if self._threads else {}

    def save(self, folder: Path) -> None:
        """The episodes of all rollouts under way, once they are there."""
        rows = {
            step: {"at": begun.at, "versions": begun.versions, "played": begun.played.result().to_json()}
            for step, begun in self._begun.items()
        }
        (folder / "rollouts.json").write_text(json.dumps(rows, default=float), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """The rollouts that were saved, as if they had just ended."""
        for step, saved in json.loads((folder / "rollouts.json").read_bytes()).items():
            done: Future[Found] = Future()
            done.set_result(self._read(saved["played"]))
            self._begun[int(step)] = _Begun(saved["at"], saved["versions"], done)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for thread in self._threads:
            thread.call_off()
        for thread in self._threads:
            thread.join()

    def _begin(self, step: int, *, at: int) -> None:
        """Hand the weights of now over, with which `at` steps have been trained, and play with them."""
        thread = self._threads[step % len(self._threads)]
        for name in self._first.values():
            _hand_over(self.levels[name], thread.roles[name])
        versions = {name: level.learner.version for name, level in self.levels.items()}
        self._begun[step] = _Begun(at, versions, thread.begin(self._play, step))

    def _copies(self) -> dict[str, Role]:
        """By its name, each role with weights of its own, and of those that share them one."""
        made = {shared: self.levels[name].copy() for shared, name in self._first.items()}
        return {name: made[id(level)] for name, level in self.levels.items()}


class _Thread:
    """Plays one step at a time, with roles of its own, until it is called off."""

    def __init__(self, roles: Mapping[str, Role]) -> None:
        self.roles = roles
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout")
        self._lock = threading.Lock()
        self._called_off = False
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    def begin(self, play: Player[Found], step: int) -> Future[Found]:
        return self._pool.submit(play, self.roles, step, self._run)

    def call_off(self) -> None:
        """Cancel what is under way at the next moment in which it waits, and begin nothing more."""
        with self._lock:
            self._called_off = True
            if self._running is not None:
                loop, task = self._running
                loop.call_soon_threadsafe(task.cancel)

    def join(self) -> None:
        """Return when the thread has ended."""
        self._pool.shutdown(cancel_futures=True)

    def _run(self, work: Coroutine[Any, Any, T], /) -> T:
        return asyncio.run(self._watched(work))

    async def _watched(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        with self._lock:
            if self._called_off:
                work.close()
                raise asyncio.CancelledError
            self._running = asyncio.get_running_loop(), task
        try:
            return await work
        finally:
            with self._lock:
                self._running = None


def _hand_over(level: Level, role: Role) -> None:
    role.sampler.load(level.learner.weights(), level.learner.version)


def check_ahead(
    config: object,
    settings: AsyncConfig,
    model: ModelConfig,
    lora: LoraConfig,
    sampling: SamplingConfig,
    *,
    now: str = "",
) -> None:
    """Raise ConfigError where steps cannot be played ahead: for `__post_init__` of a recipe with `asynchronous`.

    `now` is the setting, if any, that has the weights of now sampled from besides.
    """
    in_turn, name = not settings.max_staleness, "asynchronous.max_staleness"
    because = "what plays is a copy of the weights, and weights of few bits are not copied. Leave quantization out."
    demand(config, name, in_turn or model.quantization == "none", because)
    because = "vLLM would disturb what lora.dropout draws meanwhile. Set it to 0, or use --sampler local."
    demand(config, name, in_turn or sampling.sampler != "vllm" or not lora.dropout, because)
    because = f"a server holds one set of weights, and {now} asks the weights of now besides. Leave one of the two out."
    demand(config, name, in_turn or sampling.sampler != "server" or not now, because)


def read_episode(row: Mapping[str, Any]) -> Episode:
    """An episode of which `dataclasses.asdict` has been written as JSON."""
    turns = [Turn(**{**turn, "starts": tuple(turn["starts"]), "heard": tuple(turn["heard"])}) for turn in row["turns"]]
    return Episode(**{**row, "turns": turns, "unanswered": tuple(row["unanswered"])})


def _check_version(turn: Turn, versions: Mapping[str, int], step: int) -> None:
    if turn.version != versions.get(turn.role, turn.version):
        raise RolloutError(
            f"a turn of '{turn.role}' in step {step} was sampled with weights of version {turn.version}, and it had "
            f"been handed version {versions[turn.role]}. Its sampler must copy what `load` gives it and name that "
            "version in what it answers; use --sampler local."
        )
