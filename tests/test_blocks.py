"""Blocks of code in the documentation: Python runs, JSON and YAML parse. Commands are run by `test_commands.py`.

What needs more than a machine with a CPU and the extras of development carries a marker, `<!-- needs … -->`.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import importlib
import importlib.util
import inspect
import json
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import pytest
import yaml

from echelon import cli
from echelon.envs import load_env
from echelon.envs.players import corpus
from echelon.models.lm import tiny
from tests.test_docs import PAGES, ROOT, names_in

OPENING = re.compile(r"^(?P<indent> *)```(?P<language>\S*)\n(?P<body>.*?)^ *```", re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"<!-- needs [^>]+ -->\s*\Z")
QUOTED = re.compile(r"From \[`[\w.]+`\]\([^)]+\)[^`]*\Z")
"""What stands before a block that another test compares with its file."""
COMMANDS = ("echelon", "make", "mkdir", "python", "pip", "torchrun", "accelerate", "chromium", "for", "OMP_", "VLLM_")
"""How the first line of a block of commands begins."""


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, what it is in, its text, and whether it is said to need something."""

    page: str
    line: int
    language: str
    text: str
    marked: bool
    quoted: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in OPENING.finditer(text):
            before, body = text[: found.start()], textwrap.dedent(found["body"])
            language = found["language"] or ("shell" if body.lstrip().startswith(COMMANDS) else "text")
            line = before.count("\n") + 1
            marked, quoted = bool(MARKER.search(before)), bool(QUOTED.search(before))
            yield Block(str(page.relative_to(ROOT)), line, language, body, marked, quoted)


ALL = list(blocks())


def every(*languages: str) -> pytest.MarkDecorator:
    chosen = [block for block in ALL if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=map(str, chosen))


def test_blocks_are_of_kinds_that_are_checked() -> None:
    assert {block.language for block in ALL} == {"python", "shell", "json", "yaml", "text"}
    assert len(ALL) > 90


@every("json")
def test_json_parses(block: Block) -> None:
    decoder, text = json.JSONDecoder(), block.text.strip()
    while text:
        text = text[decoder.raw_decode(text)[1] :].strip()


@every("yaml")
def test_yaml_parses(block: Block) -> None:
    assert isinstance(yaml.safe_load(block.text), dict)


# Python


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory a reader works in: the repository's folders, and nothing that has been trained."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@cache
def homes() -> dict[str, str]:
    """Public name of echelon → its module; of those that several modules define, the one that exports it, or none."""
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / "echelon").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for name in names_in(file):
            if not name.startswith("_") and "." not in name:
                found.setdefault(name, []).append(module)
    return {name: modules[0] for name, modules in found.items() if len(modules) == 1}


ASSUMED = {
    "Path": "pathlib",
    "Sequence": "collections.abc",
    "dataclass": "dataclasses",
    "field": "dataclasses",
    "Settings": "echelon.config",
    "Config": "",
    "AutoPeftModelForCausalLM": "peft",
    "AutoPeftModelForSequenceClassification": "peft",
    "AutoModelForSequenceClassification": "transformers",
    "AutoTokenizer": "transformers",
}
"""Names that short blocks use without saying where they are from, and where that is."""


def missing(code: CodeType) -> set[str]:
    """The global names that code uses, in its functions and classes, too."""
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*map(missing, inner))


def run(block: Block, given: dict[str, Any]) -> dict[str, Any]:
    """Execute a block. Names that it neither imports nor is given are echelon's."""
    code = compile(block.text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    names: dict[str, Any] = {"__name__": __name__, "__builtins__": builtins}
    for name in missing(code):
        if name in ASSUMED or name in homes():
            home = ASSUMED.get(name) or homes().get(name)
            names |= {name: getattr(importlib.import_module(home), name)} if home else {}
        elif (ROOT / "echelon" / "models" / f"{name}.py").is_file() or name == "copy":
            names[name] = importlib.import_module("copy" if name == "copy" else f"echelon.models.{name}")
    names |= given
    result = eval(code, names)
    if inspect.iscoroutine(result):
        asyncio.run(result)
    return names


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model that knows the words of a game."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = corpus(load_env("guess_number", {"high": 10}))
    module, tokenizer = tiny(texts, vocab_size=300, hidden=64, layers=1, heads=2)  # heads as wide as vLLM wants them
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def provided(page: str, model: Path) -> dict[str, Any]:
    """What the words of a page take for granted: files in the working directory, and names."""
    for place in ("DIR", "models/base"):
        shutil.copytree(model, place)
    for file in ("pairs.jsonl", "data/preferences.jsonl", "runs/a/metrics.jsonl"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": f"Say {number}.", "chosen": f"{number}", "rejected": "no"} for number in range(20)]
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PROVIDED.get(page, dict)()


def an_engine() -> dict[str, Any]:
    from echelon import LocalSampler, load_lm, pack
    from echelon.data.packing import Sampled
    from echelon.models import lora
    from echelon.models.lm import load_tokenizer

    module, tokenizer = load_lm("DIR"), load_tokenizer("DIR")
    said = Sampled(prompt=[5, 6, 7], action=[8, 9], logprobs=[-1.0, -1.0])
    own = {"tokenizer": tokenizer, "sampler": LocalSampler(module, tokenizer), "prompt_ids": [5, 6, 7]}
    return {**own, "batch": pack([said]), "lora": lora}


def adapters() -> dict[str, Any]:
    """Two folders as `sft` and `reward` leave them with an adapter, and a model with two of them."""
    import peft
    from transformers import AutoModelForSequenceClassification

    from echelon import load_lm
    from echelon.config import LoraConfig
    from echelon.models import lora

    small = {"r": 2, "target_modules": ["q_proj"]}
    scorer = AutoModelForSequenceClassification.from_pretrained("DIR", num_labels=1)
    config = peft.LoraConfig(task_type="SEQ_CLS", **small)
    peft.get_peft_model(scorer, config).save_pretrained("runs/reward/best")
    config = peft.LoraConfig(task_type="CAUSAL_LM", **small)
    peft.get_peft_model(load_lm("DIR"), config).save_pretrained("runs/sft/best")
    module = lora.attach(load_lm("DIR"), LoraConfig(rank=2), name="high")
    lora.attach(module, LoraConfig(rank=2), name="low")
    return {**an_engine(), "module": module}


def a_reward_model() -> dict[str, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained("DIR", num_labels=1).save_pretrained("runs/reward/best")
    AutoTokenizer.from_pretrained("DIR").save_pretrained("runs/reward/best")
    return {}


def a_controller() -> dict[str, Any]:
    import torch

    flags = "--steps 1 --envs 2 --rollout 16 --minibatches 1 --eval-episodes 1 --threads 1 --out runs/cartpole/mlp_ppo"
    assert cli.main(["control-mlp", "configs/control_mlp/cartpole_ppo.yaml", *flags.split()]) == 0
    return {"observations": torch.zeros(3, 4)}


def count_down() -> dict[str, Any]:
    (block,) = (block for block in ALL if block.page == "README.md" and "class CountDown" in block.text)
    return run(block, {})


def answers() -> dict[str, Any]:
    from echelon import Episode, Task

    task = Task("t", {"answer": "4"})
    messages, text = [{"role": "user", "content": "2 + 2?"}], "It is 4."
    judged = {"task": task, "messages": messages, "text": text, "episodes": list[Episode]()}
    return {**judged, "short": lambda completions: [float(len(text) < 9) for text in completions]}


PROVIDED: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/engine.md": adapters,
    "docs/adapters.md": adapters,
    "docs/algorithms/reward.md": a_reward_model,
    "docs/algorithms/control-mlp.md": a_controller,
    "docs/rewards.md": answers,
    "docs/environments.md": count_down,
}


NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
RUN = [
    pytest.param(block, marks=NEEDS_VLLM if block.marked else [], id=str(block))
    for block in ALL
    if block.language == "python" and not block.quoted
]


@pytest.mark.parametrize("block", RUN)
def test_python_runs(block: Block, desk: Path, model: Path) -> None:
    given = provided(block.page, model)
    after = run(block, given if "class CountDown" not in block.text else {})
    if check := SAYS.get((block.page, block.text.splitlines()[0])):
        check(SimpleNamespace(**after))


def brief(after: SimpleNamespace) -> None:
    assert after.brief(None, ["blue", "The blue one"], [6, 8]) == [1.0, 0.0]


def debates(after: SimpleNamespace) -> None:
    """Two scripted roles speak in turns until one is done."""
    from echelon import Renderer, Role, SamplingParams, Task, collect
    from echelon.models.lm import load_tokenizer
    from echelon.sampling.scripted import ScriptedSampler

    tokenizer = load_tokenizer("DIR")
    roles = [
        Role(name, ScriptedSampler(said, tokenizer), Renderer(tokenizer), SamplingParams(max_tokens=40))
        for name, said in (("one", ["3", "4"]), ("other", ["5", "done"]))
    ]
    task = Task("t", {"question": "1"})
    (episode,) = asyncio.run(collect([task], after.debate(*roles), seed=0))
    assert [(turn.role, turn.text) for turn in episode.turns] == [
        *(("one", "3"), ("other", "5")),
        *(("one", "4"), ("other", "done")),
    ]


SAYS: dict[tuple[str, str], Callable[[SimpleNamespace], None]] = {
    ("docs/howto/reward.md", "def brief(prompts, completions, limit):"): brief,
    ("docs/plays.md", "from echelon.types import Message"): debates,
}
"""What some blocks define, and that it does what the page says."""
