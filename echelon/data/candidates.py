"""Off-policy memory of a level that chooses: every state with all that was offered in it, and what the choice led to.

Knows tokens and rewards; knows no model, no loss and no padding.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from echelon.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Options:
    """A state and what was offered to be said in it, as tokens."""

    state: list[int]
    candidates: list[list[int]]


@dataclass(frozen=True, slots=True)
class Choice:
    """One decision: the options, which was taken, what that earned, and the options it led to."""

    options: Options
    chosen: int
    reward: float
    after: Options | None
    """What is bootstrapped from; None exactly where the episode terminated. One cut off has it like any other."""

    @property
    def terminated(self) -> bool:
        """Whether nothing follows."""
        return self.after is None


@dataclass(frozen=True, slots=True)
class _Stored:
    """One episode. Its states are mostly prefixes of one another, so each is what it adds to the one before."""

    tokens: npt.NDArray[np.int32]
    """Of each state what it adds, then its candidates."""
    sizes: npt.NDArray[np.int32]
    """Of each state: tokens kept of the one before, tokens added, number of candidates, tokens of each of them."""
    chosen: npt.NDArray[np.int32]
    rewards: npt.NDArray[np.float64]

    def choices(self) -> list[Choice]:
        """All of its decisions, in order."""
        options = self._options()
        after = [*options[1:], *([None] if len(options) == len(self.chosen) else [])]
        taken = zip(options[: len(self.chosen)], self.chosen.tolist(), self.rewards.tolist(), after, strict=True)
        return [Choice(*parts) for parts in taken]

    def _options(self) -> list[Options]:
        found: list[Options] = []
        sizes, tokens = self.sizes.tolist(), self.tokens.tolist()
        place, read = 0, 0
        state: list[int] = []
        while place < len(sizes):
            kept, added, count = sizes[place : place + 3]
            state = state[:kept] + tokens[read : read + added]
            read, place = read + added, place + 3
            candidates: list[list[int]] = []
            for size in sizes[place : place + count]:
                candidates.append(tokens[read : read + size])
                read += size
            place += count
            found.append(Options(state, candidates))
        return found


def _store(found: Sequence[Choice]) -> _Stored:
    options = [choice.options for choice in found]
    if (last := found[-1].after) is not None:
        options.append(last)
    tokens: list[int] = []
    sizes: list[int] = []
    before: list[int] = []
    for point in options:
        kept = _shared(before, point.state)
        tokens += point.state[kept:]
        sizes += [kept, len(point.state) - kept, len(point.candidates), *map(len, point.candidates)]
        for candidate in point.candidates:
            tokens += candidate
        before = point.state
    chosen, rewards = [choice.chosen for choice in found], [choice.reward for choice in found]
    return _Stored(
        np.array(tokens, np.int32), np.array(sizes, np.int32), np.array(chosen, np.int32), np.array(rewards, np.float64)
    )


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class CandidateReplay:
    """The newest episodes, up to `capacity` decisions; whole episodes leave, oldest first.

    Sampling depends on the seed and on what is stored, on nothing else. There is no need to fill it before learning: it
    gives what it has.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ConfigError(f"capacity = {capacity}: a replay must hold at least one decision. Raise capacity.")
        self.capacity = capacity
        self._stored: deque[_Stored] = deque()
        self._size = 0

    def __len__(self) -> int:
        """The number of decisions."""
        return self._size

    def add(self, episodes: Iterable[Sequence[Choice]]) -> None:
        """Append episodes, each given as all of its decisions in order; an empty one is skipped.

        Raises DataError for an episode that is longer than the whole replay.
        """
        for found in episodes:
            if len(found) > self.capacity:
                raise DataError(
                    f"an episode has {len(found)} decisions and the replay holds {self.capacity}: it can never be "
                    "stored whole. Raise replay_capacity."
                )
            assert all(one.after == two.options for one, two in pairwise(found)), "a chain of decisions"
            if found:
                self._append(_store(found))

    def sample(self, n: int, *, seed: int) -> list[Choice]:
        """`n` decisions, uniformly and with replacement."""
        if not self._stored:
            raise DataError("the replay is empty: there is nothing to sample. Add episodes first.")
        ends = np.cumsum([len(stored.chosen) for stored in self._stored])
        picks = np.random.Generator(np.random.Philox(seed)).integers(self._size, size=n)
        owners = np.searchsorted(ends, picks, side="right").tolist()
        opened = {owner: self._stored[owner].choices() for owner in sorted(set(owners))}
        return [opened[owner][pick - int(ends[owner])] for pick, owner in zip(picks.tolist(), owners, strict=True)]

    def save(self, folder: Path) -> None:
        """Write everything stored, so that a loaded replay answers the same seeds with the same samples."""
        folder.mkdir(parents=True, exist_ok=True)
        sizes = [(len(s.tokens), len(s.sizes), len(s.chosen)) for s in self._stored]
        tensors: dict[str, npt.NDArray[Any]] = {
            "tokens": np.concatenate([np.empty(0, np.int32), *(s.tokens for s in self._stored)]),
            "sizes": np.concatenate([np.empty(0, np.int32), *(s.sizes for s in self._stored)]),
            "chosen": np.concatenate([np.empty(0, np.int32), *(s.chosen for s in self._stored)]),
            "rewards": np.concatenate([np.empty(0, np.float64), *(s.rewards for s in self._stored)]),
        }
        save_file(tensors, folder / "candidates.safetensors")
        (folder / "candidates.json").write_text(json.dumps({"episodes": sizes}), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Replace the content by what was saved; if it is more than this capacity, the oldest episodes leave."""
        tensors = load_file(folder / "candidates.safetensors")
        lengths = json.loads((folder / "candidates.json").read_text(encoding="utf-8"))["episodes"]
        self._stored.clear()
        self._size = 0
        at = (0, 0, 0)
        for episode in lengths:
            stop = tuple(start + length for start, length in zip(at, episode, strict=True))
            parts = [
                tensors[name][start:end].copy()  # a view would keep the memory of every episode alive
                for name, start, end in (
                    ("tokens", at[0], stop[0]),
                    ("sizes", at[1], stop[1]),
                    ("chosen", at[2], stop[2]),
                    ("rewards", at[2], stop[2]),
                )
            ]
            self._append(_Stored(*parts))
            at = stop

    def _append(self, stored: _Stored) -> None:
        self._stored.append(stored)
        self._size += len(stored.chosen)
        while self._size > self.capacity:
            self._size -= len(self._stored.popleft().chosen)
