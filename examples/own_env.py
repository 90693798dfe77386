"""An environment of your own is one class. Train on it with `--env examples/own_env.py:CountDown`."""

import random
from collections.abc import Sequence

from echelon.envs.players import Player
from echelon.types import Message, Step, Task


class CountDown:
    """Count down to zero, one number a turn: 1/start for each right one, and a wrong one ends the episode."""

    def __init__(self, task: Task, *, top: int = 9) -> None:
        self.start_at = self.last = int(task.data["start"])

    @classmethod
    def tasks(cls, split: str, *, top: int = 9) -> list[Task]:
        return [Task(id=f"count_down/{start}", data={"start": start}) for start in range(2, top + 1)]

    def start(self) -> list[Message]:
        return [Message(role="user", content=f"Count down from {self.start_at}")]

    def step(self, action: str) -> Step:
        self.last -= 1
        right = action.strip(" .\n") == str(self.last)
        reply = [Message(role="user", content="Go on." if right else "Wrong.")]
        return Step(reply, reward=right / self.start_at, terminated=not right or self.last == 0)

    @classmethod
    def utterances(cls, *, top: int = 9) -> list[str]:  # optional: for the tokenizer of a tiny model
        return [str(number) for number in range(top + 1)]

    @classmethod
    def player(cls, kind: str, seed: int = 0, *, top: int = 9) -> Player:  # optional: shows how, for a warm start
        def say(messages: Sequence[Message]) -> str:
            turn = len(messages) // 2
            right = int(messages[0]["content"].split()[-1]) - turn - 1
            return str(right if kind == "optimal" else random.Random(f"{seed}/{turn}").randint(0, top))

        return say
