"""Games that a model with random weights earns something in: a conversation for two levels, and one of any length."""

from __future__ import annotations

from echelon.text.dialogue import DialogueState, Inventory
from echelon.text.endpoint import Unanswered
from echelon.types import Message, Step, Task


class Talk:
    """Two or three exchanges; a reply earns between 0 and 5, by its length. A third of the tasks is cut off."""

    def __init__(self, task: Task, *, judged: bool = True) -> None:
        self.number, self.judged = int(task.id), judged
        self.replies: list[str] = []

    @classmethod
    def tasks(cls, split: str, **settings: bool) -> list[Task]:
        return [Task(str(number)) for number in range(6)]

    @classmethod
    def inventory(cls, **settings: bool) -> Inventory:
        return Inventory(("Question", "Advice", "Silence"))

    @property
    def state(self) -> DialogueState:
        history = [("User", f"I am {self.number}."), *(("Assistant", reply) for reply in self.replies)]
        return DialogueState(f"And {len(self.replies)}?", tuple(history), description="numbers")

    def start(self) -> list[Message]:
        return [Message(role="user", content=f"I am {self.number}.")]

    def step(self, action: str) -> Step:
        self.replies.append(action)
        if not self.judged and len(action) % 5 == 1:
            raise Unanswered("the judge said nothing that can be read")
        over = len(self.replies) == 2 + self.number % 2
        cut = over and self.number % 3 == 0
        info = {"win": float(over and not cut), "fluency": float(len(action) % 2)}
        return Step(
            [Message(role="user", content="And?")],
            float(len(action) % 6),
            terminated=over and not cut,
            truncated=cut,
            info=info,
        )


class Vary:
    """What is said earns between 0 and 5, by its length: a model with random weights learns something from it."""

    def __init__(self, task: Task, *, turns: int) -> None:
        self.task, self.left = task, turns

    @classmethod
    def tasks(cls, split: str, *, turns: int) -> list[Task]:
        return [Task(str(number)) for number in range(6)]

    def start(self) -> list[Message]:
        return [Message(role="user", content=f"I am {self.task.id}.")]

    def step(self, action: str) -> Step:
        self.left -= 1
        return Step([Message(role="user", content="And?")], float(len(action) % 6), terminated=not self.left)
