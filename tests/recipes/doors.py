"""Three doors, three keys: a game of one turn that a tiny solver and a tiny coach can play, and models that begin it.

The solver says any key; told one, it says that. Which key fits is known to nobody: whoever learns it learns it from
the verdict on what the solver says.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from echelon.config import OptimConfig
from echelon.data.packing import pack
from echelon.models.lm import tiny
from echelon.recipes.sft import loss_fn
from echelon.rollout.setup import task_batch
from echelon.text.chat import Example, Renderer
from echelon.train.learner import Learner
from echelon.types import Message, Step, Task

DOORS = ("A", "B", "C")
KEYS = ("1", "2", "3")
GAME = "tests.recipes.doors:Doors"
TEMPLATES = {
    "solve": "{question}",
    "feedback": "{question}{attempt}?",
    "refine": "{question}{attempt}!{feedback}",
    "retry": "{question}{attempt}.",
    "example": "{question}?",
    "solve_with_example": "{question}!{example}",
}


class Doors:
    """Say the key of a door: A is opened by 1, B by 2, C by 3."""

    def __init__(self, task: Task) -> None:
        self.door = str(task.data["door"])

    @classmethod
    def tasks(cls, split: str) -> list[Task]:
        return [Task(f"{door}{number}", {"door": door}) for number in range(4) for door in DOORS]

    def start(self) -> list[Message]:
        return [Message(role="user", content=self.door)]

    def step(self, action: str) -> Step:
        right = action.strip() == KEYS[DOORS.index(self.door)]
        return Step(reward=float(right), terminated=True, info={"parsed": float(action.strip() in KEYS)})


class Fragile(Doors):
    """It raises where somebody says 2 to door C."""

    def step(self, action: str) -> Step:
        if self.door == "C" and action.strip() == "2":
            raise ZeroDivisionError("two")
        return super().step(action)


def pupil(folder: Path) -> Path:
    """A model that plays both roles: keys at random where it solves and where it advises, and the key it is told. It
    says one token and has never learned to end."""
    said = []
    for door, tried, told in product(DOORS, KEYS, KEYS):
        shown = {"question": door, "attempt": tried, "feedback": told, "example": told}
        said += [(TEMPLATES[name].format(**shown), told) for name in [*TEMPLATES, "refine", "refine"]]
    module, tokenizer = tiny([text for pair in said for text in pair], vocab_size=300, hidden=32, layers=1, heads=2)
    renderer = Renderer(tokenizer)
    rows = [
        Example(renderer.render([Message(role="user", content=prompt)]), renderer.action_ids(answer)[:1])
        for prompt, answer in said
    ]
    learner = Learner(module, OptimConfig(lr=1e-2, schedule="linear", warmup_steps=20), total_steps=200)
    for step in range(200):
        learner.update([pack(task_batch(rows, step, 32, seed=0))], loss_fn)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
