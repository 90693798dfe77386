"""Three doors, three keys: a game of one turn that a tiny solver and a tiny coach can play, and models that begin it.

The solver says any key; told one, it says that. Which key fits is known to nobody: whoever learns it learns it from
the verdict on what the solver says.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

from echelon import cli
from echelon.models.lm import tiny
from echelon.train.checkpoint import find_checkpoint
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
    """A model that plays both roles: keys at random where it solves and where it advises, and the key it is told."""
    rows = []
    for door, tried, told in product(DOORS, KEYS, KEYS):
        shown = {"question": door, "attempt": tried, "feedback": told, "example": told}
        rows += [(TEMPLATES[name].format(**shown), told) for name in TEMPLATES]
        rows += [(TEMPLATES["refine"].format(**shown), told)] * 2
    module, tokenizer = tiny([text for row in rows for text in row], vocab_size=300, hidden=32, layers=1, heads=2)
    module.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [json.dumps({"prompt": prompt, "response": said}) for prompt, said in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    words = ["sft", "--model.path", str(folder / "model"), "--data.path", str(folder / "rows.jsonl"), "--threads", "1"]
    words += ["--out", str(folder / "sft"), "--max-steps", "250", "--epochs", "50", "--rows-per-step", "32", "--optim.lr", "1e-2"]
    words += ["--optim.schedule", "cosine", "--optim.warmup-steps", "10"]
    assert cli.main(words) == 0
    return find_checkpoint(folder / "sft")
