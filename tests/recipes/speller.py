"""A rule in a Python function, prompts that it judges, and a model that follows it every other time."""

from __future__ import annotations

import json
from pathlib import Path

from echelon.models.lm import tiny
from tests.recipes.conftest import taught

LETTERS = "abc"

REWARDS = """
def same(prompts, completions, answer):
    return [float(said == wanted) for said, wanted in zip(completions, answer, strict=True)]


def brief(prompts, completions):
    return [-float(len(said) > 1) for said in completions]
"""


def speller(folder: Path, *, hidden: int = 32, lr: float = 1e-2) -> Path:
    """The folder with prompts that ask for a letter, rewards, and a model that says this one every other time, and else
    one of two others."""
    rows = [{"prompt": f"say {letter}", "answer": letter} for letter in LETTERS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    games = [{"prompt": row["prompt"], "response": letter} for row in rows for letter in LETTERS + row["answer"]]
    (folder / "games.jsonl").write_text("".join(json.dumps(game) + "\n" for game in games))
    module, tokenizer = tiny([row["prompt"] for row in rows], vocab_size=300, hidden=hidden, layers=1, heads=2)
    module.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    taught(folder / "model", folder / "games.jsonl", folder / "sft", epochs=150, lr=lr)
    return folder


def spelling(folder: Path) -> list[object]:
    """Flags to train on it."""
    words = ["--model.path", folder / "sft", "--data.path", folder / "prompts.jsonl", "--sampling.max-tokens", 3]
    return [*words, "--reward", f"{folder}/rewards.py:same", f"{folder}/rewards.py:brief"]
