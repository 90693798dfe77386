"""A task that a model with random weights can get better at: use a letter. As an environment, and as a reward."""

from __future__ import annotations

from collections.abc import Sequence

from echelon.types import Message, Step, Task


def use_of_letter(prompts: list[list[Message]], completions: list[str], letter: list[str]) -> list[float]:
    """The reward of an answer to a prompt: how often it has the letter of its row."""
    return [float(said.count(sought)) for said, sought in zip(completions, letter, strict=True)]


class Letters:
    """Two answers in a row, each earning as much as it has of the letter."""

    def __init__(self, task: Task) -> None:
        self._letter: str = task.data["letter"]
        self._answers = 0

    @classmethod
    def tasks(cls, split: str) -> Sequence[Task]:
        """One task for each of four letters, the same in both splits."""
        return [Task(id=f"{split}/{letter}", data={"letter": letter}) for letter in "aiou"]

    def start(self) -> list[Message]:
        """Which letter."""
        return [Message(role="user", content=f"say {self._letter}")]

    def step(self, action: str) -> Step:
        """Once more, then the end."""
        self._answers += 1
        over = self._answers == 2
        again = [] if over else [Message(role="user", content="again")]
        return Step(messages=again, reward=float(action.count(self._letter)), terminated=over)
