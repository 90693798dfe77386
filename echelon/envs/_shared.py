"""What every environment and every scripted player needs: specs, messages, splits, and plain-or-async calls."""

from __future__ import annotations

import asyncio
import inspect
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from echelon.errors import ConfigError, did_you_mean
from echelon.types import Env, Message, Task

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EnvSpec:
    """An environment class with its settings: what recipes take tasks and episodes from."""

    name: str
    """As it was asked for."""
    cls: type[Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of both `cls.tasks` and `cls`."""

    def tasks(self, split: str) -> list[Task]:
        """The tasks of a split, `train` or `test`, always in the same order."""
        return list(self.cls.tasks(split, **self.settings))

    def make(self, task: Task) -> Env:
        """A fresh environment for one episode of `task`."""
        env: Env = self.cls(task, **self.settings)
        return env


Player = Callable[[Sequence[Message]], str]
"""Plays one episode: the dialogue so far, ending with the environment's words, to the next utterance."""

SPLITS = ("train", "test")


def user(content: str) -> list[Message]:
    """What an environment says, as the list of one message that `start` and `step` return."""
    return [Message(role="user", content=content)]


def need_split(game: str, split: str) -> None:
    """Raise a ConfigError unless `split` is `train` or `test`."""
    if split not in SPLITS:
        raise ConfigError(f"{game} has no split '{split}'. Use 'train' or 'test'.{did_you_mean(split, SPLITS)}")


def need_at_least(game: str, setting: str, value: int, least: int, why: str) -> None:
    """Raise a ConfigError when a whole-number setting is below the least that makes sense."""
    if value < least:
        raise ConfigError(f"{game}: {setting} = {value}: {why}. Use {least} or more.")


def need_kind(game: str, kind: str) -> None:
    """Raise a ConfigError unless `kind` is one of the scripted players, `random` or `optimal`."""
    if kind not in ("random", "optimal"):
        raise ConfigError(f"{game} has no '{kind}' player. Use 'random' or 'optimal'.")


def exchanges(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """What was said and what was answered, turn by turn; the opening messages belong to no turn."""
    pairs: list[tuple[str, str]] = []
    said: str | None = None
    for message in messages:
        if message["role"] == "assistant":
            said = message["content"]
        elif said is not None:
            pairs.append((said, message["content"]))
            said = None
    return pairs


def at_random(seed: int, draw: Callable[[random.Random], str]) -> Player:
    """A player that never listens: what it says is drawn anew at every turn, from the seed and the turn's number."""

    def say(messages: Sequence[Message]) -> str:
        turn = sum(message["role"] == "assistant" for message in messages)
        return draw(random.Random(f"{seed}/{turn}"))

    return say


class Search(ABC):
    """Looks for one of `count` equally likely answers: says what gets the highest expected return from what is left.

    Sets of answers are the bits of an integer, bit i for the i-th; a game says what an exchange leaves of them, and
    searches one set, asking `move` about those that may follow.
    """

    def __init__(self, count: int) -> None:
        self.everything = (1 << count) - 1
        self._moves: dict[int, tuple[float, str]] = {}

    @abstractmethod
    def fits(self, said: str, answered: str) -> int:
        """The answers that an exchange allows; all of them (or −1) where it says nothing."""

    @abstractmethod
    def search(self, left: int) -> tuple[float, str]:
        """Expected return, and the utterance that gets it, when these answers remain."""

    def say(self, messages: Sequence[Message]) -> str:
        """The next utterance, given the dialogue so far."""
        left = self.everything
        for said, answered in exchanges(messages):
            left &= self.fits(said, answered)
        return self.move(left or self.everything)[1]

    def move(self, left: int) -> tuple[float, str]:
        """`search`, each set once."""
        if left not in self._moves:
            self._moves[left] = self.search(left)
        return self._moves[left]


async def settle(value: Awaitable[T] | T) -> T:
    """The value of a call that may have been plain or async."""
    return await value if inspect.isawaitable(value) else value


def run_sync(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end from plain code, also inside a notebook that already runs an event loop."""
    if not _in_event_loop():
        return asyncio.run(work)
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, work).result()


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
