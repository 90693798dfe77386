"""Decisions and conversations made up for tests: what is right in them is known."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

from echelon.models.lm import tiny
from echelon.text.dialogue import INVENTORIES, DialogueState, strategist_prompt

MOODS = ("sad", "angry", "calm", "glad")
TOPICS = ("rain", "work", "dogs", "exams", "money", "friends", "sleep", "cars")
STAGES = ("First", "Then")
ASKED = list(itertools.product(range(2), range(4), range(8)))
"""Every state: stage, mood, topic."""


def prompt(stage: int, mood: int, topic: int) -> str:
    return f"{STAGES[stage]} {MOODS[mood]} about {TOPICS[topic]}"


def best(stage: int, mood: int, topic: int) -> int:
    """The strategy of DailyDialog's four that pays in the long run."""
    return (mood + 1) % 4 if stage == 0 else topic % 4


def write_decisions(path: Path, count: int, *, seed: int = 0) -> Path:
    """Decisions taken at random. What earns something at once, 1, ends the conversation; what leads on earns nothing
    now, and 3 two turns later if the next decision is right. Discounted by 0.85 that is 2.55."""
    draw, rows = random.Random(seed), []
    names = INVENTORIES["daily_dialog"].strategies
    for _ in range(count):
        mood, topic, one, two = (draw.randrange(size) for size in (4, 8, 4, 4))
        goes_on = one == best(0, mood, topic)
        first = {"current_prompt": prompt(0, mood, topic), "strategy": names[one], "reward": float(one == mood)}
        rows.append(first | ({"next_prompt": prompt(1, mood, topic)} if goes_on else {}))
        right = 3.0 * (two == best(1, mood, topic))
        rows.append({"current_prompt": prompt(1, mood, topic), "strategy": names[two], "reward": right})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SAYS = ("I do not know what to do", "nobody listens to me", "it is all my fault", "what would you do")
FOLLOWS = ("Question", "Reflection of feelings", "Affirmation and Reassurance", "Providing Suggestions")
"""What the seeker says, and the strategy that supporters follow then, as ESConv writes it."""


def write_esconv(path: Path, count: int, *, turns: int = 2, seed: int = 0) -> Path:
    """Conversations in the format of ESConv whose supporters always follow the same rule."""
    draw, rows = random.Random(seed), []
    for number in range(count):
        dialog = []
        for _ in range(turns):
            kind, topic = draw.randrange(4), draw.choice(TOPICS)
            seeker = f"{topic}: {SAYS[kind]} {number}"
            dialog.append({"speaker": "seeker", "annotation": {}, "content": seeker})
            annotation = {"strategy": FOLLOWS[kind]}
            dialog.append({"speaker": "supporter", "annotation": annotation, "content": f"I hear you. {topic}."})
        told = {"emotion_type": draw.choice(MOODS), "problem_type": "job crisis", "situation": f"Case {number}."}
        rows.append({**told, "dialog": dialog})
    path.write_text(json.dumps(rows, indent=1))
    return path


def reader(folder: Path, *, layers: int = 2, hidden: int = 64) -> Path:
    """The folder of a model with random weights whose tokenizer knows the words."""
    corpus = [prompt(*state) for state in ASKED]
    for inventory, said in itertools.product(INVENTORIES.values(), SAYS):
        state = DialogueState(said, (("User", said), ("Assistant", "I hear you.")), "sad", "job crisis: Case 1.")
        corpus += [message["content"] for message in strategist_prompt(state, inventory)] * 8
    module, tokenizer = tiny(corpus, vocab_size=600, hidden=hidden, layers=layers, heads=4)
    module.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder


def lines(path: Path, rows: Sequence[object]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
