"""Pairs whose preference follows a rule that is known, as files; and a model that can read them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from echelon.models.lm import tiny

WORDS = ("red", "green", "blue", "tree", "house", "stone", "river", "bird", "cloud", "road", "wind", "lamp", "door")
POLITE = ("please", "thanks", "kindly", "sorry")

RULES: dict[str, Callable[[list[str]], float]] = {
    "length": len,
    "letter": lambda words: " ".join(words).count("o"),
    "polite": lambda words: sum(word in POLITE for word in words),
}
"""What makes an answer better: words, letters `o`, words of politeness."""


def write_pairs(path: Path, rule: str, count: int, *, seed: int = 0) -> Path:
    """A file of pairs: the chosen answer is the better one by the rule, and nothing else tells them apart."""
    draw, better = random.Random(seed), RULES[rule]
    with path.open("w") as file:
        for _ in range(count):
            one, other = sorted((answer(draw, rule) for _ in range(2)), key=better)
            while better(one) == better(other):
                one, other = sorted((answer(draw, rule) for _ in range(2)), key=better)
            prompt = f"Say something about a {draw.choice(WORDS)} and a {draw.choice(WORDS)}."
            row = {"prompt": prompt, "chosen": " ".join(other), "rejected": " ".join(one)}
            file.write(json.dumps(row) + "\n")
    return path


def answer(draw: random.Random, rule: str) -> list[str]:
    """Some words; with the rule `polite`, one of politeness among them or not."""
    words = [draw.choice(WORDS) for _ in range(draw.randint(2, 7))]
    if rule == "polite" and draw.random() < 0.5:
        words[draw.randrange(len(words))] = draw.choice(POLITE)
    return words


def reader(folder: Path, *, hidden: int = 32, layers: int = 2) -> Path:
    """A small model with random weights whose tokenizer has a token for every word."""
    module, tokenizer = tiny(
        [f" {word} {word}" for word in (*WORDS, *POLITE)] * 4 + ["Say something about a and a ."],
        vocab_size=400,
        hidden=hidden,
        layers=layers,
        heads=2,
    )
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
