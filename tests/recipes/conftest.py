"""The command line as a function, runs as things to look at, and a model small enough to train in every test."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from echelon import cli
from echelon.envs import EnvSpec, load_env
from echelon.envs.players import corpus, make_player, play
from echelon.models.lm import tiny
from echelon.text.dialogue import DialogueState, responder_prompt, strategist_prompt
from echelon.train.checkpoint import find_checkpoint
from echelon.train.log import Log
from echelon.types import Task
from tests.recipes.talk import Talk

GAME = {"low": 1, "high": 4, "max_turns": 3}
"""Guess a number from 1 to 4: small enough that guessing sometimes works, so returns differ."""
REWARDS = "def long(prompts, completions):\n    return [float(len(said) % 6) for said in completions]\n"


@dataclass
class Run:
    """A run directory after the command."""

    out: Path

    def rows(self, name: str = "metrics") -> list[dict[str, Any]]:
        """The rows of a JSONL file, without the clock."""
        rows = [json.loads(line) for line in (self.out / f"{name}.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]

    def weights(self, part: str = "actor") -> dict[str, Tensor]:
        """The weights of one part of the newest checkpoint."""
        newest = sorted((self.out / "checkpoints").iterdir())[-1]
        return load_file(newest / part / "model.safetensors")


Train = Callable[..., Run]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Run a recipe into a folder of this test; a second run under the same name needs --resume."""

    def train(recipe: str, *flags: object, name: str = "run", status: int = 0) -> Run:
        words = [recipe, "--out", str(tmp_path / name), "--threads", "1", *map(str, flags)]
        assert cli.main(words) == status
        return Run(tmp_path / name)

    return train


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the process be interrupted when it has worked through a step and is about to record it; -1 for never."""
    record = Log.metrics

    def killed_at(step: int) -> None:
        def metrics(log: Log, at: int, values: dict[str, float]) -> None:
            if at == step:
                raise KeyboardInterrupt
            record(log, at, values)

        monkeypatch.setattr(Log, "metrics", metrics)

    return killed_at


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Games of the random and the optimal player, as data for supervised fine-tuning."""
    kinds = ("optimal", "random", "random", "random")
    return recorded(load_env("guess_number", GAME), kinds, 40, tmp_path_factory.mktemp("data") / "games.jsonl")


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a one-layer model with random weights whose tokenizer knows the words of the game."""
    return made(load_env("guess_number", GAME), tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture(scope="session")
def start(untrained: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that model after it has learned to say numbers: what reinforcement learning starts from."""
    return taught(untrained, conversations, tmp_path_factory.mktemp("sft") / "run", epochs=8)


@pytest.fixture(scope="session")
def locksmith(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that tries one of three keys at each of two doors, at random: it earns one third."""
    env, folder = load_env("text_lock", {"doors": 2, "keys": 3}), tmp_path_factory.mktemp("doors")
    games = recorded(env, ("random",), 128, folder / "games.jsonl")
    return taught(made(env, folder / "model", layers=2), games, folder / "run", epochs=6)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model of one layer with random weights that knows the words of `Talk` and of `Vary`, rows, and their reward."""
    folder, menu = tmp_path_factory.mktemp("start"), Talk.inventory()
    prompt = responder_prompt(Talk(Task("0")).state, menu.label(0))
    words = [*(message["content"] for message in prompt), "I am 1. And? What would you do? " * 3]
    module, tokenizer = tiny(words * 3, vocab_size=400, hidden=32, layers=1, heads=2)
    module.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"query": DialogueState(f"I am {number}.").query, "strategy": name, "reward": 1, "done": True}
        for number in range(3)
        for name in menu.strategies
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    return {"model": f"{folder}/model", "rows": f"{folder}/rows.jsonl", "rewards": f"{folder}/rewards.py"}


@pytest.fixture(scope="session")
def tosca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of tosca after one step: two one-layer models, in the built-in dialogues."""
    folder, menu = tmp_path_factory.mktemp("tosca"), load_env("dialogue").cls.inventory()
    state = DialogueState("I lost my job.", (("User", "Hello."), ("Assistant", "How are you?")), "sad", "work")
    prompts = [*strategist_prompt(state, menu), *responder_prompt(state, menu.label(0))]
    words = [prompt["content"] for prompt in prompts] * 3
    module, tokenizer = tiny(words, vocab_size=400, hidden=32, layers=1, heads=2)
    module.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    flags = {
        "--responder.path": folder / "model",
        "--env": "dialogue",
        "--out": folder / "run",
        "--threads": 1,
        "--steps": 1,
        "--episodes-per-step": 2,
        "--max-turns": 2,
        "--high-updates": 1,
        "--high-batch": 2,
        "--sampling.max-tokens": 4,
        "--low.policy.minibatches": 1,
        "--low.value-minibatches": 1,
    }
    assert cli.main(["tosca", *(str(word) for flag in flags.items() for word in flag)]) == 0
    return folder / "run"


def recorded(env: EnvSpec, kinds: tuple[str, ...], games: int, path: Path) -> Path:
    """Games of these players in turn, as a JSONL file of conversations; the environment's last word is not answered."""
    tasks = env.tasks("train")
    with path.open("w") as file:
        for number in range(games):
            player = make_player(env, kinds[number % len(kinds)], seed=number)
            messages = play(env, tasks[number % len(tasks)], player).messages
            file.write(json.dumps({"messages": messages[:-1]}) + "\n")
    return path


def made(env: EnvSpec, folder: Path, *, layers: int) -> Path:
    module, tokenizer = tiny(corpus(env), vocab_size=400, hidden=32, layers=layers, heads=2)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def taught(model: Path, data: Path, out: Path, *, epochs: int, lr: float = 1e-2) -> Path:
    words = ["sft", "--model.path", str(model), "--data.path", str(data), "--out", str(out), "--threads", "1"]
    words += ["--epochs", str(epochs), "--rows-per-step", "8", "--optim.lr", str(lr)]
    assert cli.main(words) == 0
    return find_checkpoint(out)


@pytest.fixture(scope="session")
def apprentice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that tries one of three keys at each of two doors, and the right one every other time.

    It has to know what a key and a door have in common, or no critic that starts from it learns to compare them: with
    six seeds of six it does, with twice the rate by chance.
    """
    env, folder = load_env("text_lock", {"doors": 2, "keys": 3}), tmp_path_factory.mktemp("doors")
    games = recorded(env, ("optimal", "random", "random"), 96, folder / "games.jsonl")
    return taught(made(env, folder / "model", layers=1), games, folder / "run", epochs=64, lr=5e-3)


@pytest.fixture
def game(start: Path) -> list[str]:
    """Flags that every recipe that plays needs."""
    settings = [f"{key}={value}" for key, value in GAME.items()]
    words = ["--model.path", str(start), "--env", "guess_number", "--env-settings", *settings]
    return [*words, "--sampling.max-tokens", "3", "--sampling.max-prompt-tokens", "128"]


@pytest.fixture
def fragile(start: Path, tmp_path: Path) -> list[str]:
    """The same game with a defect: it raises when somebody says 3."""
    (tmp_path / "fragile.py").write_text(
        "from echelon.envs.guess_number import GuessNumber\n\n\n"
        "class Fragile(GuessNumber):\n"
        "    def step(self, action):\n"
        "        if action.strip() == '3':\n"
        "            raise ZeroDivisionError('three')\n"
        "        return super().step(action)\n"
    )
    words = ["--model.path", str(start), "--env", f"{tmp_path}/fragile.py:Fragile"]
    return [*words, "--env-settings", "high=4", "max_turns=3", "--sampling.max-tokens", "3"]
