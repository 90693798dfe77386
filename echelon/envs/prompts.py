"""Prompts of a data set as an environment: each is answered once, and that ends the episode.

It knows what is asked and not what an answer is worth: by itself every answer earns 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from echelon.envs._shared import EnvSpec, need_split
from echelon.errors import ConfigError, DataError
from echelon.types import Message, Step, Task


class Row(Protocol):
    """A prompt as it is read from a data set: the messages to answer, and the other columns of its row."""

    @property
    def messages(self) -> list[Message]: ...
    @property
    def columns(self) -> dict[str, Any]: ...


class Prompts:
    """One episode: the messages of the task, one answer, the end. `prompts_env` gives it tasks.

    Messages that end with the assistant's are the beginning of the answer.
    """

    listed: Mapping[str, Sequence[Task]] = {}
    """Split → its tasks."""

    def __init__(self, task: Task) -> None:
        self._messages: list[Message] = task.data["messages"]

    @classmethod
    def tasks(cls, split: str) -> Sequence[Task]:
        """The prompts trained on (`train`), or those held out (`test`)."""
        need_split("a data set of prompts", split)
        if split == "test" and not cls.listed.get(split):
            raise ConfigError(
                "no prompts are held out. Say which with data.eval_path, data.eval_split or data.eval_fraction."
            )
        return cls.listed[split]

    def start(self) -> list[Message]:
        """The prompt."""
        return self._messages

    def step(self, action: str) -> Step:
        """Whatever is said ends the episode."""
        return Step(terminated=True)


def prompts_env(train: Sequence[Row], held_out: Sequence[Row] = (), *, name: str = "prompts") -> EnvSpec:
    """Rows of prompts as an environment. The data of a task are its messages and the other columns of its row.

    Raises DataError when there is nothing to train on, and for a row that nobody can answer.
    """
    if not train:
        raise DataError(f"{name}: there are no prompts. Give data.path a file with at least one row.")
    listed = {
        split: tuple(_task(row, f"{split}/{number}", name) for number, row in enumerate(rows))
        for split, rows in (("train", train), ("test", held_out))
    }
    return EnvSpec(name, type("Prompts", (Prompts,), {"listed": listed}))


def _task(row: Row, ident: str, name: str) -> Task:
    opened = bool(row.messages) and row.messages[-1]["role"] == "assistant"
    if not row.messages or (opened and "completion" not in row.columns):
        raise DataError(
            f"{name}: prompt {ident} leaves nothing to answer: it must have messages, the last not the assistant's, or "
            "a completion that goes on with it."
        )
    return Task(ident, {**{key: _plain(value) for key, value in row.columns.items()}, "messages": row.messages})


def _plain(value: Any) -> Any:
    """A column's value as JSON types; what JSON does not know (dates, bytes) as its text."""
    return json.loads(json.dumps(value, default=str))
