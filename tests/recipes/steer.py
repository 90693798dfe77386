"""A point on a line of four places that has to be at one of them in the end; and a pupil that moves it anyhow.

Small enough that every number can be worked out by hand. What was done on the way earns nothing: credit has to travel.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from echelon.config import OptimConfig
from echelon.data.packing import pack
from echelon.models.lm import tiny
from echelon.recipes.sft import loss_fn
from echelon.rollout.control import GOAL, GOAL_END, with_goal
from echelon.rollout.setup import task_batch
from echelon.text.chat import Example, Renderer
from echelon.train.learner import Learner
from echelon.types import Message, Step, Task

PLACES = 4
STEPS = 4
MOVES = {"l": -1, "s": 0, "r": 1}
ENV = "tests.recipes.steer:Steer"
QUESTION = "?"


class Steer:
    """Be at `target` after four steps: l, s or r. Anything else stays where it is, and is asked for again twice."""

    afresh = True

    def __init__(self, task: Task, *, cut: bool = False) -> None:
        self.place, self.target = int(task.data["place"]), int(task.data["target"])
        self.cut, self.steps, self.again = cut, 0, 0

    @classmethod
    def tasks(cls, split: str, *, cut: bool = False) -> list[Task]:
        return [
            Task(f"{place}{target}", {"place": place, "target": target})
            for place, target in product(range(PLACES), range(PLACES))
        ]

    @property
    def observation(self) -> NDArray[np.float32]:
        """Where it is, where it has to be, and how many steps are left."""
        return np.array([self.place, self.target, STEPS - self.steps], dtype=np.float32)

    def start(self) -> list[Message]:
        return self._told()

    def step(self, action: str) -> Step:
        move = MOVES.get(action.strip())
        if move is None and self.again < 2:
            self.again += 1
            return Step(self._told(), info={"length": float(self.steps)})
        self.steps, self.again = self.steps + 1, 0
        self.place = min(max(self.place + (move or 0), 0), PLACES - 1)
        over = self.steps == STEPS
        there = over and self.place == self.target
        info = {"length": float(self.steps)}
        return Step(self._told(), float(there), over and not self.cut, over and self.cut, info=info)

    def _told(self) -> list[Message]:
        return told(self.place, self.target, STEPS - self.steps)


def told(place: int, target: int, left: int) -> list[Message]:
    return [Message(role="user", content=f"{place}{target}{left}")]


def pupil(folder: Path, *, obeys: bool = True) -> Path:
    """A model that moves at random; told a goal, it does that; asked for one, it says any. It ends what it says."""
    states = list(product(range(PLACES), range(PLACES), range(1, STEPS + 1)))
    said: list[tuple[list[Message], str]] = []
    for state, move in product(states, MOVES):
        (message,) = told(*state)
        said.append(([message], move))
        if obeys:
            asked = Message(role="user", content=f"{message['content']}\n\n{QUESTION}")
            said.append(([asked, Message(role="assistant", content=GOAL)], f"{move}{GOAL_END}"))
            said.append((with_goal([message], move), move))
    texts = [message["content"] for messages, _ in said for message in messages] + [text for _, text in said]
    module, tokenizer = tiny(texts, vocab_size=300, hidden=32, layers=1, heads=2)
    renderer = Renderer(tokenizer)
    rows = [Example(renderer.render(messages), renderer.action_ids(text)) for messages, text in said]
    learner = Learner(module, OptimConfig(lr=1e-2, schedule="linear", warmup_steps=20), total_steps=300)
    for step in range(300):
        learner.update([pack(task_batch(rows, step, 64, seed=0))], loss_fn)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
