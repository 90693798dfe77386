"""Three doors, three keys: a game of one turn that a tiny solver and a tiny coach can play, and models that begin it.

The solver says any key; told one, it says that. Which key fits is known to nobody: whoever learns it learns it from
the verdict on what the solver says.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

from echelon.models.lm import tiny
from echelon.types import Message, Step, Task
from tests.recipes.conftest import taught

DOORS = ("red", "green", "blue")
KEYS = ("one", "two", "three")
GAME = "tests.recipes.doors:Doors"
TEMPLATES = {
    "solve": "{question}",
    "feedback": "{question} {attempt} ?",
    "refine": "{question} {attempt} {feedback}",
    "retry": "{question} {attempt} again",
    "example": "{question} example",
    "solve_with_example": "{question} {example}",
}


class Doors:
    """Say the key of a door: red is opened by one, green by two, blue by three."""

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
    """It raises at a second attempt at the first blue door that says two."""

    def step(self, action: str) -> Step:
        if self.door == "blue" and action.strip() == "two":
            raise ZeroDivisionError("two")
        return super().step(action)


def pupil(folder: Path, *, epochs: int = 20) -> Path:
    """A model that plays both roles: keys at random where it solves and where it advises, and the key it is told."""
    rows = []
    for door, tried, told in product(DOORS, KEYS, KEYS):
        shown = {"question": door, "attempt": tried, "feedback": told, "example": told}
        rows += [(TEMPLATES["refine"].format(**shown), told), (TEMPLATES["solve_with_example"].format(**shown), told)]
        for name in ("solve", "feedback", "retry", "example"):
            rows.append((TEMPLATES[name].format(**shown), told))
    module, tokenizer = tiny([text for row in rows for text in row], vocab_size=330, hidden=32, layers=2, heads=2)
    module.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [json.dumps({"prompt": prompt, "response": said}) for prompt, said in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return taught(folder / "model", folder / "rows.jsonl", folder / "sft", epochs=epochs)
