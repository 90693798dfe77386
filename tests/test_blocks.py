"""Blocks of code in the documentation: Python runs, JSON and YAML parse, and commands resolve their settings.

A command goes through the real command line up to the moment at which its recipe would begin; other lines name files,
targets, extras and flags that exist. What needs hardware or other machines carries a marker, `<!-- needs … -->`.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import importlib
import inspect
import json
import re
import shlex
import shutil
import subprocess
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
from echelon.train.launcher import _parse
from tests.test_docs import PAGES, ROOT, names_in

OPENING = re.compile(r"^(?P<indent> *)```(?P<language>\S*)\n(?P<body>.*?)^ *```", re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"<!-- needs [^>]+ -->\s*\Z")
QUOTED = re.compile(r"From \[`[\w.]+`\]\([^)]+\)[^`]*\Z")
"""What stands before a block that another test compares with its file."""
COMMANDS = ("echelon", "make", "python", "pip", "torchrun", "accelerate", "for", "mkdir", "chromium", "OMP_NUM_THREADS=1", "VLLM_SERVER")
"""How the first line of a block of commands begins."""
ELSEWHERE = re.compile(r"\b(launch|torchrun|accelerate|quantization|vllm)\b")
"""What a machine with one CPU does not have."""


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


# Commands


@every("shell")
def test_a_block_that_needs_more_than_a_cpu_says_so(block: Block) -> None:
    needs = [line for line in block.text.splitlines() if ELSEWHERE.search(line) and "# on a GPU" not in line]
    assert block.marked or not needs, "put <!-- needs … --> before the block"


@every("shell")
def test_the_shell_can_read_it(block: Block) -> None:
    said = re.sub(r"<[\w ]+>", "PLACE", block.text)
    done = subprocess.run(["bash", "-n"], input=said, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def simple_commands(text: str) -> Iterator[list[str]]:
    """The words of every simple command, without redirections, assignments and `do`."""
    joined = re.sub(r"<[\w ]+>", "PLACE", text.replace("\\\n", " ")).replace("$seed", "0")
    for line in joined.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|;&"):
                yield words
                words = []
            else:
                words.append(word)


def cut(words: list[str]) -> list[str]:
    """Without what stands before and after the command itself."""
    while words and (words[0] == "do" or re.fullmatch(r"[A-Z_]+=\S*", words[0])):
        words = words[1:]
    ends = [place for place, word in enumerate(words) if word in ("<", ">", ">>")]
    return words[: ends[0]] if ends else words


RECIPES = cli.recipes()
MODEL, PLAY = "model: {path: m}\n", "model: {path: m}\nenv: twenty_questions\n"
FILES = {
    "settings.yaml": {"sft": f"{MODEL}data: {{path: [d]}}\n", "tosca": "responder: {path: m}\nenv: dialogue\n"},
    "runs/quickstart/archer.yaml": {},
    "runs/arithmetic/solver.yaml": {"sft": f"{MODEL}data: {{path: [d]}}\nout: o\n"},
    "runs/arithmetic/coach.yaml": {"sft": f"{MODEL}data: {{path: [d]}}\nout: o\n"},
}
"""Settings files of the reader's: what is in them, by recipe; a model and a game where nothing is said."""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory a reader works in: the repository's folders, and nothing that has been trained."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("echelon.config.need", lambda module, extra: None)  # trackers are as good as installed
    monkeypatch.setattr(cli, "recipes", lambda package="": RECIPES)  # read once: they are parsed each time
    return tmp_path


@every("shell")
def test_commands_are_accepted(block: Block, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    checked = 0
    for words in map(cut, simple_commands(block.text)):
        if not words or words[0] in ("for", "done"):
            continue
        name = Path(words[0]).name
        assert name in CHECKS, f"nothing checks {words[0]}"
        wrong = CHECKS[name](words[1:], desk, monkeypatch)
        assert not wrong, f"{shlex.join(words)}: {wrong or ''} {capsys.readouterr().err}"
        checked += 1
    assert checked


def wrong_recipe(words: list[str], desk: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Resolve the settings of `echelon <words>` and stop where the recipe would begin."""
    if words[0] == "launch":
        words = _parse(words[1:])[1]
    began: list[object] = []
    if (recipe := words[0]) in cli.recipes():
        module = importlib.import_module(f"echelon.recipes.{recipe.replace('-', '_')}")
        monkeypatch.setattr(module, "main", began.append)
        for file in FILES.keys() & set(words):
            (desk / file).parent.mkdir(parents=True, exist_ok=True)
            (desk / file).write_text(FILES[file].get(recipe, PLAY))
    status = cli.main(words)
    done = bool(began) or "--help" in words or recipe in ("list", "doctor", "completion")
    fits = (0, 1) if recipe == "doctor" else (0,)  # 1: it looked, and this machine does not have all that is asked for
    return "" if status in fits and done else f"status {status}"


def wrong_make(words: list[str], *_: object) -> str:
    targets = [word for word in words if "=" not in word]
    known = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return "" if set(targets) <= set(known) else "there is no such target"


def wrong_pip(words: list[str], *_: object) -> str:
    extras = {extra for word in words for found in re.findall(r"\[([\w,]+)\]", word) for extra in found.split(",")}
    return "" if words[0] in ("install", "uninstall") and extras <= cli.EXTRAS.keys() else "there is no such extra"


def wrong_python(words: list[str], desk: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if words[:2] == ["-m", "echelon"]:
        return wrong_recipe(words[2:], desk, monkeypatch)
    if words[:2] in (["-m", "pytest"], ["-m", "venv"]):
        files = [word for word in words[2:] if word.endswith(".py")]
        return "" if all((ROOT / file).is_file() for file in files) else "there is no such file"
    if words[0] == "-m":
        file = ROOT / f"{words[1].replace('.', '/')}.py"
        return "" if file.is_file() and "main" in names_in(file) else "there is no such module"
    file = ROOT / words[0]
    flags = [word for word in words[1:] if word.startswith("--")]
    text = file.read_text() if file.is_file() else ""
    takes = [flag in text or flag[2:].replace("-", "_") in text for flag in flags]
    return "" if text and all(takes) else "there is no such script or flag"


def wrong_batch(words: list[str], *_: object) -> str:
    return "" if (ROOT / words[0]).is_file() else "there is no such file"


def wrong_launcher(words: list[str], desk: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return wrong_python(words[words.index("-m") :], desk, monkeypatch)


CHECKS: dict[str, Callable[[list[str], Path, pytest.MonkeyPatch], str]] = {
    "echelon": wrong_recipe,
    "make": wrong_make,
    "pip": wrong_pip,
    "python": wrong_python,
    "torchrun": wrong_launcher,
    "accelerate": wrong_launcher,
    "sbatch": wrong_batch,
}


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("echelon grpo settings.yaml --group-size 1 --out x", "status 2"),
        ("echelon grppo settings.yaml", "status 2"),
        ("make everything", "there is no such target"),
        ("pip install 'echelon[everything]'", "there is no such extra"),
        ("python examples/nothing.py", "there is no such script or flag"),
        ("python examples/arithmetic.py --speed 3", "there is no such script or flag"),
        ("torchrun --nproc-per-node 2 -m echelon grpo settings.yaml --out x --steps none", "status 2"),
    ],
)
def test_a_wrong_command_is_found(line: str, wrong: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = filter(None, simple_commands(line))
    assert CHECKS[words[0]](words[1:], desk, monkeypatch) == wrong


# Python


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
    module, tokenizer = tiny(texts, vocab_size=300, hidden=32, layers=1, heads=2)
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
    "docs/engine.md": an_engine,
    "docs/adapters.md": adapters,
    "docs/algorithms/reward.md": a_reward_model,
    "docs/algorithms/control-mlp.md": a_controller,
    "docs/rewards.md": answers,
    "docs/environments.md": count_down,
}


@every("python")
def test_python_runs(block: Block, desk: Path, model: Path) -> None:
    if block.marked or block.quoted:
        ast.parse(block.text)
        return
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
