"""Off-policy memory of one level: episodes in, transitions out, and a ring that keeps them compactly.

Knows tokens and rewards; knows no model, no loss and no padding. What a sample is turned into is the recipe's business.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from safetensors.numpy import load_file, save_file
from torch import Tensor

from echelon.errors import ConfigError, DataError
from echelon.text.chat import Example
from echelon.types import Episode, Turn


@dataclass(slots=True)
class Transition:
    """One decision of one role: what it saw, what it said, what that earned, and where the role decided next."""

    state: list[int]
    """The prompt of the turn."""
    action: list[int]
    reward: float
    """Everything earned until the next state; with n steps, already the discounted sum of the n rewards."""
    next_state: list[int] | None
    """What is bootstrapped from; None exactly when `terminated`."""
    terminated: bool
    discount_steps: int = 1
    """The value of the next state counts gamma ** discount_steps."""
    logprobs: list[float] = field(default_factory=list)
    """Of the action tokens, when they were sampled."""
    text: str = ""
    """The action decoded, for critics with a tokenizer of their own."""
    version: int = 0
    """Version of the weights that acted."""
    mc_return: float = 0.0
    """Discounted return to go, nothing bootstrapped into it: for logs, ablations and filtered cloning."""
    episode: int = -1
    """Transitions of one episode share it; given by the replay."""

    def __post_init__(self) -> None:
        assert (self.next_state is None) == self.terminated, "next_state is None exactly when terminated"

    @property
    def prompt(self) -> list[int]:
        """The state, under the name `pack` reads: consecutive transitions of an episode join into one row."""
        return self.state


def transitions(episode: Episode, role: str, *, gamma: float, n_step: int = 1) -> list[Transition]:
    """The decisions of `role`, as a Markov decision process over its own turns.

    One step lasts from a turn of the role to the next turn of the role on the same branch. All rewards in between, its
    own and those given to other roles' turns, belong to that step and are not discounted within it; rewards before the
    role's first turn belong to no decision. With `n_step` the reward is R_0 + gamma R_1 + … over n such steps, and
    fewer where the branch ends first (`discount_steps` says how many).

    At the end of a branch a terminated episode has no next state and a truncated one continues in `episode.final`. In a
    tree, every successor gives a transition of its own, in the order of the tree, and `mc_return` averages over the
    branches like `Episode.value`.

    Raises DataError for a failed episode, and for a truncated one whose final state is not known.
    """
    assert n_step >= 1, n_step
    if episode.ending == "failed":
        raise DataError(
            f"task '{episode.task}': the episode failed, so its rewards mean nothing. Drop it before replay."
        )
    children = _children(episode)
    returns = _returns_to_go(episode, role, gamma, children)
    found: list[Transition] = []
    for turn in episode.of(role):
        for reward, steps, successor, leaf in _outcomes(turn, children, gamma, n_step):
            next_state = successor.prompt if successor else _state_after(episode, leaf)
            found.append(
                Transition(
                    state=turn.prompt,
                    action=turn.action,
                    reward=reward,
                    next_state=next_state,
                    terminated=next_state is None,
                    discount_steps=steps,
                    logprobs=turn.logprobs,
                    text=turn.text,
                    version=turn.version,
                    mc_return=returns[turn.index],
                )
            )
    return found


def examples(found: Iterable[Sequence[Transition]]) -> list[Example]:
    """What was seen and said in the transitions of episodes, without what was thought of it then (log-probs)."""
    return [Example(transition.state, transition.action) for episode in found for transition in episode]


def mc_returns(found: Iterable[Sequence[Transition]]) -> Float[Tensor, "N"]:
    """Discounted return to go of every transition of episodes, in order."""
    return torch.tensor([transition.mc_return for episode in found for transition in episode])


def _children(episode: Episode) -> list[list[Turn]]:
    children: list[list[Turn]] = [[] for _ in episode.turns]
    for turn in episode.turns:
        if turn.parent is not None:
            children[turn.parent].append(turn)
    return children


def _returns_to_go(episode: Episode, role: str, gamma: float, children: list[list[Turn]]) -> list[float]:
    """Per turn; only entering another turn of `role` costs a discount."""
    returns = [0.0] * len(episode.turns)
    for turn in reversed(episode.turns):  # a child always comes after its parent
        later = [(gamma if child.role == role else 1.0) * returns[child.index] for child in children[turn.index]]
        returns[turn.index] = turn.reward + (sum(later) / len(later) if later else 0.0)
    return returns


def _outcomes(
    turn: Turn, children: list[list[Turn]], gamma: float, n_step: int
) -> Iterator[tuple[float, int, Turn | None, Turn]]:
    """Every way the next `n_step` decisions went: reward, steps taken, the successor or None, the last turn seen."""
    stack = [(turn, 0, 0.0)]
    while stack:
        node, steps, reward = stack.pop()
        if steps == n_step:
            yield reward, steps, node, node
            continue
        reward += gamma**steps * node.reward
        if not children[node.index]:
            yield reward, steps + 1, None, node
        stack += [(child, steps + (child.role == turn.role), reward) for child in reversed(children[node.index])]


def _state_after(episode: Episode, leaf: Turn) -> list[int] | None:
    """The state that follows the last turn of a branch: None only where the task itself is over."""
    if episode.ending == "terminated":
        return None
    # Truncated, not terminated: the value of the next state still counts, so it must be there.
    if episode.final is None:
        raise DataError(
            f"task '{episode.task}': the episode was truncated but carries no final state to bootstrap from. "
            "Set episode.final to the tokens of the state after the last turn."
        )
    if leaf is not episode.turns[-1]:
        raise DataError(
            f"task '{episode.task}': the truncated episode has several branches but one final state, that of its last "
            "turn. End the branches by termination, or keep one branch per episode."
        )
    return episode.final


_RECORD = np.dtype(
    [(name, np.int32) for name in ("state_start", "state_stop", "action_stop", "next_start", "next_stop")]
    + [(name, np.int32) for name in ("logprobs_start", "logprobs_stop", "discount_steps")]
    + [("version", np.int64), ("reward", np.float64), ("mc_return", np.float64)]
)
_TERMINATED = -1


@dataclass(frozen=True, slots=True)
class _Stored:
    """One episode: its rows of ids once, and its transitions as ranges into them."""

    id: int
    tokens: npt.NDArray[np.int32]
    records: npt.NDArray[np.void]
    logprobs: npt.NDArray[np.float32]
    texts: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        parts = (self.id, self.tokens, self.records, self.logprobs, self.texts, *self.texts)
        return sys.getsizeof(self) + sum(map(sys.getsizeof, parts))

    def get(self, index: int) -> Transition:
        record = dict(zip(_RECORD.names or (), self.records[index].item(), strict=True))
        terminated = record["next_start"] == _TERMINATED
        return Transition(
            state=self.tokens[record["state_start"] : record["state_stop"]].tolist(),
            action=self.tokens[record["state_stop"] : record["action_stop"]].tolist(),
            reward=record["reward"],
            next_state=None if terminated else self.tokens[record["next_start"] : record["next_stop"]].tolist(),
            terminated=terminated,
            discount_steps=record["discount_steps"],
            logprobs=self.logprobs[record["logprobs_start"] : record["logprobs_stop"]].tolist(),
            text=self.texts[index],
            version=record["version"],
            mc_return=record["mc_return"],
            episode=self.id,
        )


class _Rows:
    """Sequences of ids, each kept once: one that extends an earlier one grows its row, another starts a new row."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def put(self, ids: list[int]) -> tuple[int, int]:
        """The row that now begins with `ids`, and their number."""
        for index in reversed(range(len(self.rows))):
            row = self.rows[index]
            shared = min(len(row), len(ids))
            if row[:shared] == ids[:shared]:
                row.extend(ids[shared:])
                return index, len(ids)
        self.rows.append(list(ids))
        return len(self.rows) - 1, len(ids)


def _store(id: int, found: Sequence[Transition]) -> _Stored:
    rows, logprobs = _Rows(), list[float]()
    places: list[tuple[int, int]] = []
    for transition in found:
        # The action lies right behind its state, so the next turn of the conversation extends the same row.
        places.append((rows.put(transition.state + transition.action)[0], len(transition.state)))
        places.append(rows.put(transition.next_state) if transition.next_state is not None else (_TERMINATED, 0))
    starts = np.cumsum([0] + [len(row) for row in rows.rows]).tolist()
    records = np.zeros(len(found), _RECORD)
    for index, transition in enumerate(found):
        (row, length), (next_row, next_length) = places[2 * index], places[2 * index + 1]
        state_stop = starts[row] + length
        next_start = _TERMINATED if next_row == _TERMINATED else starts[next_row]
        ranges = (starts[row], state_stop, state_stop + len(transition.action), next_start, next_start + next_length)
        before = len(logprobs)
        logprobs += transition.logprobs
        numbers = (transition.discount_steps, transition.version, transition.reward, transition.mc_return)
        records[index] = (*ranges, before, len(logprobs), *numbers)
    tokens = np.array([token for row in rows.rows for token in row], np.int32)
    return _Stored(id, tokens, records, np.array(logprobs, np.float32), tuple(t.text for t in found))


class Replay:
    """The newest episodes of one role, up to `capacity` transitions; whole episodes leave, oldest first.

    The states of an episode are mostly prefixes of one another, so each row of ids is kept once (int32) and transitions
    are ranges into it. Log-probs are kept in float32, the precision they are computed in. Sampling depends on the seed
    and on what is stored, on nothing else.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ConfigError(f"capacity = {capacity}: a replay must hold at least one transition. Raise capacity.")
        self.capacity = capacity
        self._stored: deque[_Stored] = deque()
        self._next_id = 0
        self._size = 0
        self._ends: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """The number of transitions."""
        return self._size

    @property
    def nbytes(self) -> int:
        """The memory held, in bytes: arrays, texts, and the objects around them."""
        return sum(stored.nbytes for stored in self._stored)

    def add(self, episodes: Iterable[Sequence[Transition]]) -> None:
        """Append episodes, each given as all of its transitions in order; an empty one is skipped.

        Raises DataError for an episode that is longer than the whole replay.
        """
        for found in episodes:
            if len(found) > self.capacity:
                raise DataError(
                    f"an episode has {len(found)} transitions and the replay holds {self.capacity}: it can never be "
                    "stored whole. Raise the replay's capacity."
                )
            if found:
                self._append(_store(self._next_id, found))

    def sample(self, n: int, *, seed: int) -> list[Transition]:
        """`n` transitions, uniformly and with replacement."""
        generator = self._generator(seed)
        if self._ends is None:
            self._ends = np.cumsum([len(stored.records) for stored in self._stored])
        picks = generator.integers(self._size, size=n)
        owners = np.searchsorted(self._ends, picks, side="right").tolist()
        return [
            self._stored[owner].get(pick - int(self._ends[owner]))  # counted from the end of the episode
            for pick, owner in zip(picks.tolist(), owners, strict=True)
        ]

    def sample_episodes(self, n: int, *, seed: int, top: float = 1.0) -> list[list[Transition]]:
        """`n` whole episodes, uniformly over those present and with replacement.

        With `top` below 1 only over that fraction of them, one at least, whose return from their first state on is
        highest; of equal ones, over the newer.
        """
        generator = self._generator(seed)
        if top < 1:
            returns = np.array([stored.records["mc_return"][0] for stored in self._stored])
            best = np.argsort(returns, kind="stable")[-max(1, int(top * len(returns))) :]
            return [_all(self._stored[best[pick]]) for pick in generator.integers(len(best), size=n).tolist()]
        picks = generator.integers(len(self._stored), size=n)
        return [_all(self._stored[pick]) for pick in picks.tolist()]

    def episodes(self) -> Iterator[list[Transition]]:
        """Every episode present, oldest first."""
        return map(_all, self._stored)

    def save(self, folder: Path) -> None:
        """Write everything stored, so that a loaded replay answers the same seeds with the same samples."""
        folder.mkdir(parents=True, exist_ok=True)
        stored = self._stored
        tensors: dict[str, npt.NDArray[Any]] = {
            "tokens": np.concatenate([np.empty(0, np.int32), *(s.tokens for s in stored)]),
            "logprobs": np.concatenate([np.empty(0, np.float32), *(s.logprobs for s in stored)]),
            "sizes": np.array([(len(s.tokens), len(s.records), len(s.logprobs)) for s in stored], np.int64).reshape(
                -1, 3
            ),
        }
        records = np.concatenate([np.empty(0, _RECORD), *(s.records for s in stored)])
        tensors |= {f"records.{name}": np.ascontiguousarray(records[name]) for name in _RECORD.names or ()}
        save_file(tensors, folder / "replay.safetensors")
        header = {"next_id": self._next_id, "ids": [s.id for s in stored], "texts": [s.texts for s in stored]}
        (folder / "replay.json").write_text(json.dumps(header), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Replace the content by what was saved; if it is more than this capacity, the oldest episodes leave."""
        tensors = load_file(folder / "replay.safetensors")
        header = json.loads((folder / "replay.json").read_text(encoding="utf-8"))
        records = np.zeros(len(tensors["records.reward"]), _RECORD)
        for name in _RECORD.names or ():
            records[name] = tensors[f"records.{name}"]
        cuts = np.cumsum(tensors["sizes"], axis=0)[:-1].T
        parts = (
            zip(
                header["ids"],
                np.split(tensors["tokens"], cuts[0]),
                np.split(records, cuts[1]),
                np.split(tensors["logprobs"], cuts[2]),
                header["texts"],
                strict=True,
            )
            if header["ids"]
            else ()
        )
        self._stored.clear()
        self._size = 0
        for id, tokens, own, logprobs, texts in parts:
            # Copies, because a view would keep the memory of every episode alive until the last one leaves.
            self._append(_Stored(id, tokens.copy(), own.copy(), logprobs.copy(), tuple(texts)))
        self._next_id = header["next_id"]
        self._ends = None

    def _append(self, stored: _Stored) -> None:
        self._stored.append(stored)
        self._next_id = stored.id + 1
        self._size += len(stored.records)
        while self._size > self.capacity:
            self._size -= len(self._stored.popleft().records)
        self._ends = None

    def _generator(self, seed: int) -> np.random.Generator:
        if not self._stored:
            raise DataError("the replay is empty: there is nothing to sample. Add episodes first.")
        return np.random.Generator(np.random.Philox(seed))


def _all(stored: _Stored) -> list[Transition]:
    return [stored.get(index) for index in range(len(stored.records))]
