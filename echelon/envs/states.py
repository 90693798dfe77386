"""Conversations of a data set as an environment: each is replied to once, and that ends the episode.

It knows a state and the strategy that was chosen there, not what a reply is worth, unless a judge is given who says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from echelon.envs._shared import EnvSpec, need_split
from echelon.envs.dialogue_models import Counts, ask_judge
from echelon.errors import ConfigError, DataError
from echelon.text.dialogue import DialogueState, responder_prompt
from echelon.text.endpoint import Ask
from echelon.types import Message, Step, Task


@dataclass(frozen=True, slots=True)
class Given:
    """A conversation where a reply is due, and the strategy that somebody chose there."""

    state: DialogueState
    strategy: str
    """Its label, as prompts write it."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What else the row says: rewards may read it. JSON types."""


class States:
    """One episode: the state of the task, one reply, the end. `states_env` gives it tasks, and perhaps a judge."""

    listed: Mapping[str, Sequence[Task]] = {}
    """Split → its tasks."""
    judge: tuple[Ask, ...] = ()
    """Who says how satisfying a reply is, 0 to 5; nobody, and a reply earns nothing here."""
    weight: float = 1.0
    """What each point counts."""

    def __init__(self, task: Task) -> None:
        said = task.data["state"]
        self.state = DialogueState(
            query=said["query"],
            history=tuple((who, words) for who, words in said["history"]),
            emotion=said["emotion"],
            description=said["description"],
        )
        self._counts = Counts()

    @classmethod
    def tasks(cls, split: str) -> Sequence[Task]:
        """The states trained on (`train`), or those held out (`test`)."""
        need_split("a data set of conversations", split)
        if split == "test" and not cls.listed.get(split):
            raise ConfigError(
                "no conversations are held out. Say which with data.eval_path, data.eval_split or data.eval_fraction."
            )
        return cls.listed[split]

    def start(self) -> list[Message]:
        """The conversation, without a strategy: who plays tells it."""
        return responder_prompt(self.state)

    async def step(self, action: str) -> Step:
        """Whatever is said ends the episode; a judge who does not answer fails it."""
        if not self.judge:
            return Step(terminated=True)
        yes = await ask_judge(self.judge[0], self.state, action, "", self._counts)
        told = {"unreadable": float(self._counts.unreadable), **{name: float(said) for name, said in yes.items()}}
        return Step(reward=self.weight * sum(yes.values()), terminated=True, info=told)


def states_env(
    train: Iterable[Given],
    held_out: Iterable[Given] = (),
    *,
    judge: Ask | None = None,
    weight: float = 1.0,
    name: str = "conversations",
) -> EnvSpec:
    """Given states as an environment. The data of a task are `state`, `strategy` (its label) and the row's columns.

    Raises DataError when there is nothing to train on.
    """
    listed = {
        split: tuple(_task(given, f"{split}/{number}") for number, given in enumerate(rows))
        for split, rows in (("train", train), ("test", held_out))
    }
    if not listed["train"]:
        raise DataError(f"{name}: there are no conversations. Give data.path a file with at least one decision.")
    judges = () if judge is None else (judge,)
    return EnvSpec(name, type("States", (States,), {"listed": listed, "judge": judges, "weight": weight}))


def _task(given: Given, ident: str) -> Task:
    state = {
        "query": given.state.query,
        "history": [list(said) for said in given.state.history],
        "emotion": given.state.emotion,
        "description": given.state.description,
    }
    return Task(ident, {**given.columns, "state": state, "strategy": given.strategy})
