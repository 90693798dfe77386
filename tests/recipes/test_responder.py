"""The responder alone: it learns to do what the strategy in its prompt says, and every way to tell it one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from echelon import cli
from echelon.config import ModelConfig, SamplingConfig
from echelon.models.lm import tiny
from echelon.rollout.setup import open_actor
from echelon.text.dialogue import DialogueState, Inventory, responder_prompt
from echelon.train.checkpoint import find_checkpoint
from tests.recipes.conftest import Train

INVENTORY = Inventory(("Sun", "Rain"))
WORDS = ("bright", "wet")
"""What each strategy wants to be said; the prompt has none of these words."""

REWARDS = f"""
WANTED = {dict(zip(map(INVENTORY.label, range(2)), WORDS, strict=True))!r}


def follows(prompts, completions, strategy):
    return [float(WANTED.get(told) in said.split()) for told, said in zip(strategy, completions)]


def bright(prompts, completions):
    return [float("bright" in said) for said in completions]
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve states with every strategy in each, the rewards, and a model that says any of the words at random."""
    folder = tmp_path_factory.mktemp("weather")
    states = [DialogueState(f"How is it on day {day}?") for day in range(1, 13)]
    with (folder / "decisions.jsonl").open("w") as file:
        for state in states:
            for name in INVENTORY.strategies:
                file.write(json.dumps({"query": state.query, "strategy": name, "reward": 1, "done": True}) + "\n")
    (folder / "rewards.py").write_text(REWARDS)
    drawn = random.Random(0)
    asked = [
        (responder_prompt(state, INVENTORY.label(place)), drawn.choice([*WORDS, WORDS[place]]))
        for state in states
        for place in [*range(2)] * 4
    ]
    with (folder / "talk.jsonl").open("w") as file:
        for messages, word in asked:
            file.write(json.dumps({"messages": [*messages, {"role": "assistant", "content": word}]}) + "\n")
    words = [f"{messages[0]['content']}\n{' '.join(WORDS)}" for messages, _ in asked]
    module, tokenizer = tiny(words, vocab_size=400, hidden=32, layers=2, heads=2)
    for part in (module, tokenizer):
        part.save_pretrained(folder / "model")
    words = f"sft --model.path {folder}/model --data.path {folder}/talk.jsonl --out {folder}/sft --threads 1"
    assert cli.main(f"{words} --epochs 30 --rows-per-step 24 --optim.lr 5e-3".split()) == 0
    return folder


@pytest.fixture
def weather(folder: Path) -> list[str]:
    """Flags that a run needs."""
    words = ["--model.path", str(folder / "sft"), "--data.path", str(folder / "decisions.jsonl")]
    words += ["--strategies", *INVENTORY.strategies, "--reward", f"{folder}/rewards.py:follows"]
    words += ["--sampling.max-tokens", "4", "--episodes-per-step", "24"]
    return [*words, "--low.policy.optim.lr", "2e-3", "--low.value-optim.lr", "2e-3"]


def chances(path: Path, said: DialogueState) -> torch.Tensor:
    """(strategy, word) → probability that a reply begins with the word, given the strategy."""
    actor = open_actor(ModelConfig(path=str(path)), SamplingConfig(), name="responder")
    renderer, rows = actor.role.renderer, []
    first = [actor.tokenizer.encode(word)[0] for word in WORDS]
    for place in range(2):
        ids = [i for part in renderer.segments(responder_prompt(said, INVENTORY.label(place))) for i in part]
        with torch.no_grad():
            rows.append(actor.module(torch.tensor([ids])).logits[0, -1].softmax(-1)[first])
    return torch.stack(rows)


def test_it_learns_to_say_what_the_strategy_in_its_prompt_asks_for(train: Train, weather: list[str], folder: Path) -> None:
    run = train("responder", *weather, "--steps", 40, "--low.policy.minibatches", 1)
    rows = run.rows()
    for key in sorted(rows[0]): print(key, rows[0][key], rows[-1][key])
    print([row["reward/mean"] for row in rows])
    before, after = (chances(path, DialogueState("How is it on day 3?")) for path in (folder / "sft", run.out))
    print(before, after)
    assert 0
