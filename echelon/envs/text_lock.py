"""A row of locked doors: each shows a hint word, and one key word opens it. Which key fits which hint is the same in
every episode but told nowhere, so it has to be learned; with many doors, credit for one word has to be found.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cache

from echelon.envs._shared import Player, at_random, need_at_least, need_kind, need_split, user
from echelon.errors import ConfigError, DataError
from echelon.types import Message, Step, Task

HINTS = ("red", "blue", "green", "gold", "gray", "pink", "black", "white", "brown", "lime", "plum", "rose")
KEYS = ("sun", "moon", "star", "tree", "bird", "fish", "rain", "snow", "wind", "leaf", "rock", "lake")
TASKS = 64
"""Rows of doors in each split."""


class TextLock:
    """Say the right key word at each of `doors` doors: 1/doors for each one opened.

    A wrong word leaves its door shut and the next door follows; with `chain` it ends the episode instead. With `sparse`
    the same return is paid all at once, at the last step. Every end is `terminated`: no door is left.
    """

    def __init__(
        self, task: Task, *, doors: int = 12, keys: int = 6, sparse: bool = False, chain: bool = False, lock: int = 0
    ) -> None:
        self._hints: Sequence[str] = task.data["hints"]
        self._opens = fitting(keys, lock)
        if unknown := [hint for hint in self._hints if hint not in self._opens]:
            raise DataError(f"text_lock: with {keys} keys no door shows '{unknown[0]}'. Use the task's own settings.")
        self._sparse, self._chain = sparse, chain
        self._opened = self._turns = 0

    @classmethod
    def tasks(
        cls, split: str, *, doors: int = 12, keys: int = 6, sparse: bool = False, chain: bool = False, lock: int = 0
    ) -> list[Task]:
        """64 random rows of hints. The splits are drawn apart; the keys fit the same hints in both."""
        need_split("text_lock", split)
        need_at_least("text_lock", "doors", doors, 1, "there is nothing to open")
        shown = sorted(fitting(keys, lock))
        return [
            Task(id=f"text_lock/{split}/{row}", data={"hints": random.Random(f"{split}/{row}").choices(shown, k=doors)})
            for row in range(TASKS)
        ]

    def start(self) -> list[Message]:
        """The keys to choose from and the first hint, in one short message."""
        return user(f"Say the key of each door. Keys: {' '.join(KEYS[: len(self._opens)])}. Hint: {self._hints[0]}")

    def step(self, action: str) -> Step:
        """Try a key. The text must contain exactly one of the key words; other text opens nothing."""
        words = set(re.findall(r"[a-z]+", action.lower())) & set(self._opens.values())
        opened = words == {self._opens[self._hints[self._turns]]}
        self._turns += 1
        self._opened += opened
        ended = self._turns == len(self._hints) or (self._chain and not opened)
        feedback = "ok" if opened else "no"
        paid = (self._opened if ended else 0) if self._sparse else int(opened)
        return Step(
            messages=user(feedback if ended else f"{feedback}. Hint: {self._hints[self._turns]}"),
            reward=paid / len(self._hints),
            terminated=ended,
            info=self._summary() if ended else {},
        )

    @classmethod
    def utterances(
        cls, *, doors: int = 12, keys: int = 6, sparse: bool = False, chain: bool = False, lock: int = 0
    ) -> list[str]:
        """Everything a scripted player may say."""
        return list(KEYS[:keys])

    @classmethod
    def player(
        cls,
        kind: str,
        seed: int = 0,
        *,
        doors: int = 12,
        keys: int = 6,
        sparse: bool = False,
        chain: bool = False,
        lock: int = 0,
    ) -> Player:
        """A scripted player of one episode: `random` says any key, `optimal` knows which one fits."""
        need_kind("text_lock", kind)
        opens = fitting(keys, lock)

        def say_fitting(messages: Sequence[Message]) -> str:
            return opens[messages[-1]["content"].rpartition("Hint: ")[2]]

        return say_fitting if kind == "optimal" else at_random(seed, lambda draw: draw.choice(KEYS[:keys]))

    def _summary(self) -> dict[str, float]:
        opened = self._opened / len(self._hints)
        return {"win": float(opened == 1), "opened": opened, "turns": float(self._turns)}


@cache
def fitting(keys: int, lock: int) -> dict[str, str]:
    """Hint to the key that fits it; `lock` draws another pairing of the same words."""
    if not 2 <= keys <= len(KEYS):
        raise ConfigError(f"text_lock: keys = {keys}: there are words for 2 to {len(KEYS)} keys. Use one of those.")
    shuffled = random.Random(f"lock {lock}").sample(KEYS[:keys], k=keys)
    return dict(zip(HINTS[:keys], shuffled, strict=True))
