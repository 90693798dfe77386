"""What people get wrong in the classic stages: one line says what, why and what to do, and nothing is half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from echelon.config import LoraConfig
from echelon.envs import load_env
from echelon.models import lora
from echelon.models.lm import load_lm, tiny
from tests.cli.conftest import Place, edit, says, without
from tests.recipes.conftest import GAME, made

REWARDS = '''\
def short(prompts, completions):
    return [-float(len(text)) for text in completions]


def raises(prompts, completions):
    raise ZeroDivisionError("a defect")


def few(prompts, completions):
    return [1.0]


def text(prompts, completions):
    return "good"


def words(prompts, completions):
    return ["good" for _ in completions]


def nothing(prompts, completions):
    return None


def nan(prompts, completions):
    return [float("nan") for _ in completions]


def judged(prompts, completions, answer):
    return [1.0 for _ in answer]
'''

HELLO = [{"role": "user", "content": "Guess."}]


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the command lines below name."""
    folder = tmp_path_factory.mktemp("materials")
    prepare(folder)
    return folder


def prepare(folder: Path) -> None:
    good = made(load_env("guess_number", GAME), folder / "good", layers=1)
    other, tokenizer = tiny(["quite other words than those of a game"], vocab_size=300, hidden=16, layers=1, heads=1)
    other.save_pretrained(folder / "other")  # type: ignore[operator]
    tokenizer.save_pretrained(folder / "other")
    shutil.copytree(good, folder / "mute")
    (folder / "mute/chat_template.jinja").unlink()
    shutil.copytree(good, folder / "no_eos")
    edit("tokenizer_config.json", eos_token=None)(folder / "no_eos")
    shutil.copytree(folder / "mute", folder / "endless")
    edit("tokenizer_config.json", eos_token=None)(folder / "endless")
    shutil.copytree(good, folder / "small")
    other.save_pretrained(folder / "small")  # type: ignore[operator]
    adapters(folder, good)
    data(folder)
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "broken.py").write_text("def reward(:\n")


def adapters(folder: Path, good: Path) -> None:
    """An adapter, and the ways in which one may be incomplete."""
    module = lora.attach(load_lm(str(good), device="cpu"), LoraConfig(rank=2))
    (folder / "adapter").mkdir()
    lora.save(module, folder / "adapter")
    changes: dict[str, Callable[[Path], object]] = {
        "lost": edit("adapter_config.json", base_model_name_or_path="./gone"),
        "unnamed": edit("adapter_config.json", base_model_name_or_path=""),
        "empty_adapter": without("adapter_model.safetensors"),
        "ia3": edit("adapter_config.json", peft_type="IA3"),
        "misfit": edit("adapter_config.json", base_model_name_or_path=str(folder / "other")),
        "scores": edit("adapter_config.json", task_type="SEQ_CLS"),
    }
    for name, change in changes.items():
        shutil.copytree(folder / "adapter", folder / name)
        change(folder / name)


def data(folder: Path) -> None:
    def write(name: str, *rows: object) -> None:
        (folder / name).write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))

    answered = [*HELLO, {"role": "assistant", "content": "2"}]
    pair = {"prompt": "Guess.", "chosen": "2", "rejected": "3"}
    write("talk.jsonl", *({"messages": answered} for _ in range(4)))
    write("pairs.jsonl", *({**pair, "prompt": f"Guess {number}."} for number in range(4)))
    write("ask.jsonl", *({"prompt": f"Guess {number}.", "level": 1} for number in range(4)))
    write("nothing.jsonl", "\n")
    write("torn.jsonl", {"messages": answered}, '{"messages": [\n')
    write("array.json", "[1, 2]")
    write("keys.jsonl", {"text": "Hello", "label": 1})
    write("typo.jsonl", {"promt": "Guess.", "response": "2"})
    write("silent.jsonl", {"messages": HELLO})
    write("turns.jsonl", {"messages": [*answered, answered[1]]})
    write("roles.jsonl", {"messages": [{"role": "robot", "content": "Guess."}, answered[1]]})
    write("blank.jsonl", {"prompt": "Guess.", "response": " "})
    write("null.jsonl", {"prompt": "Guess.", "response": None})
    write("holes.jsonl", {"prompt": "Guess.", "response": "2"}, {"prompt": "Guess."})
    write("same.jsonl", pair, {**pair, "rejected": "2"})
    write("margin.jsonl", {**pair, "margin": "wide"})
    write("one.jsonl", {"messages": answered})
    write("long.jsonl", {"messages": [HELLO[0], {"role": "assistant", "content": "1 2 3 4 " * 99}]})
    write("long_pair.jsonl", {**pair, "chosen": "1 2 3 4 " * 99})
    write("long_ask.jsonl", {"prompt": "1 2 3 4 " * 99})
    write("words.txt", "Guess.\n")
    (folder / "empty").mkdir()
    (folder / "bytes.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
