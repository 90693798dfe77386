"""Tasks written down in a YAML file: what is asked, and three predicates that say when an utterance ends, when the
episode ends, and what it is worth. The format of recurve.

    main_prompt: You are a careful programmer.         # optional: a system message
    items:
      - {prompt: Name three languages., answer: Rust}
    split_fn: newline                                   # does the current utterance end here?
    done_fn: "contains:In short"                        # does the episode end here?
    score_fn: "contains_after:In short"                 # what is it worth, once it has ended?

A predicate is the name of a built-in one, or Python source that defines a function of that name; Python runs only if
the caller trusts the file's code, and then in the sandbox. Knows no model and no tokens.
"""

from __future__ import annotations

import ast
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from echelon.envs._shared import EnvSpec, need_split
from echelon.errors import ConfigError, DataError, did_you_mean
from echelon.sandbox import Limits, Program, ProgramError
from echelon.types import Message, Step, Task

KEYS = ("main_prompt", "items", "score_fn", "done_fn", "split_fn")
LIMITS = Limits(cpu_seconds=1.0, wall_seconds=5.0, memory_mib=256)
"""What one call of a predicate may use."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a predicate may look at."""

    text: str
    """The whole conversation: every role on a line of its own, then what it said."""
    output: str
    """What the assistant has said; for `split_fn` the current utterance alone."""
    answer: str
    """The item's answer."""


Predicate = Callable[[Context], float]


def contains(argument: str, seen: Context) -> float:
    """Whether the output contains the argument (the item's answer, if there is none)."""
    return float((argument or seen.answer) in seen.output)


def contains_after(argument: str, seen: Context) -> float:
    """Whether the answer is in what follows the argument's last occurrence in the output."""
    _, found, after = seen.output.rpartition(argument)
    return float(bool(found) and seen.answer in after)


def exact(argument: str, seen: Context) -> float:
    """Whether the output is the argument (the item's answer, if there is none), blanks around it aside."""
    return float(seen.output.strip() == (argument or seen.answer).strip())


def newline(argument: str, seen: Context) -> float:
    """Whether the output contains the end of a line."""
    return float("\n" in seen.output)


def sentence(argument: str, seen: Context) -> float:
    """Whether the output ends a sentence: a full stop, question or exclamation mark before a blank, or a new line."""
    return float(re.search(r"[.!?][\"')\]]?\s|\n", seen.output) is not None)


def number_close(argument: str, seen: Context) -> float:
    """Whether the last number of the output is the answer's, within the argument (1e-6), absolute or relative."""
    tolerance = float(argument or 1e-6)
    said, wanted = _last_number(seen.output), _last_number(seen.answer)
    if said is None or wanted is None:
        return 0.0
    return float(math.isclose(said, wanted, rel_tol=tolerance, abs_tol=tolerance))


def length(argument: str, seen: Context) -> float:
    """Whether the output has at least so many characters."""
    return float(len(seen.output) >= int(argument))


def never(argument: str, seen: Context) -> float:
    """No: only the model's own end of message, or the limit of tokens, ends it."""
    return 0.0


BUILT_IN: Mapping[str, Callable[[str, Context], float]] = {
    "contains": contains,
    "contains_after": contains_after,
    "exact": exact,
    "length": length,
    "never": never,
    "newline": newline,
    "number_close": number_close,
    "sentence": sentence,
}
"""Name → what it says of the output; `name:argument` in the file. `regex:pattern` is there too, in the sandbox."""

REGEX = "import re\ndef search(pattern, text):\n    return re.search(pattern, text) is not None\n"


class YamlTasks:
    """One item of a task file: the model speaks utterance by utterance until `done_fn` says that it is enough.

    The utterances continue one message: between them the environment says nothing. An utterance that ends without
    `split_fn` (the model ended its message, or the limit of tokens cut it) is the last one.
    """

    file: TaskFile

    def __init__(self, task: Task) -> None:
        self._messages = [Message(role="user", content=str(task.data["prompt"]))]
        if self.file.main_prompt:
            self._messages.insert(0, Message(role="system", content=self.file.main_prompt))
        self._asked = "".join(f"{message['role']}\n\n{message['content']}" for message in self._messages)
        self._answer, self._said = str(task.data["answer"]), ""

    @classmethod
    def tasks(cls, split: str) -> Sequence[Task]:
        """The items of the file; both splits have all of them."""
        need_split(cls.file.name, split)
        return [Task(f"{cls.file.name}/{number}", dict(item)) for number, item in enumerate(cls.file.items)]

    def start(self) -> list[Message]:
        """The main prompt, if there is one, and the item's."""
        return self._messages

    def stop_when(self, utterance: str) -> bool:
        """Whether the utterance ends here; asked after every token."""
        return bool(self.file.split(self._context(utterance, utterance))) or self._done(utterance)

    def step(self, action: str) -> Step:
        """The utterance is part of the message now. The score, once the episode has ended."""
        ends = self._done(action) or not self.file.split(self._context(action, action))
        self._said += action
        if not ends:
            return Step()
        score = self.file.score(self._context("", self._said))
        return Step(reward=score, terminated=True, info={"score": score})

    def _done(self, utterance: str) -> bool:
        return bool(self.file.done(self._context(utterance, self._said + utterance)))

    def _context(self, utterance: str, output: str) -> Context:
        return Context(f"{self._asked}assistant\n\n{self._said}{utterance}", output, self._answer)


@dataclass(frozen=True, slots=True)
class TaskFile:
    """A task file after reading: the items, and the predicates ready to be asked."""

    name: str
    main_prompt: str
    items: Sequence[Mapping[str, Any]]
    score: Predicate
    done: Predicate
    split: Predicate


def yaml_env(path: str | Path, *, trust_code: bool = False) -> EnvSpec:
    """The tasks of a file as an environment. `trust_code` lets Python in the file run, in the sandbox.

    Raises DataError, one line, for a file that is not of the format; ConfigError, with the code, for Python in a file
    that nobody said to trust. What a predicate does wrong while it is asked fails the episode, not the run.
    """
    path = Path(path)
    tree = _read(path)
    if unknown := [key for key in tree if key not in KEYS]:
        raise DataError(f"{path}: unknown key '{unknown[0]}'.{did_you_mean(str(unknown[0]), KEYS)}")
    main_prompt = tree.get("main_prompt") or ""
    if not isinstance(main_prompt, str):
        raise DataError(f"{path}: main_prompt is not text. Write the system message, or leave it out.")
    parts = {name: _predicate(path, name, tree, trust_code) for name in ("score_fn", "done_fn", "split_fn")}
    score, done, split = parts.values()
    file = TaskFile(path.stem, main_prompt, _items(path, tree), score, done, split)
    return EnvSpec(str(path), type("YamlTasks", (YamlTasks,), {"file": file}))


def _read(path: Path) -> Mapping[Any, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        nearby = [other.name for other in path.parent.glob("*.y*ml")]
        raise DataError(f"{path}: no such file.{did_you_mean(path.name, nearby)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, Mapping):
        raise DataError(f"{path}: expected the keys {', '.join(KEYS)}.")
    return tree


def _items(path: Path, tree: Mapping[Any, Any]) -> list[Mapping[str, Any]]:
    items = tree.get("items")
    if not isinstance(items, list) or not items:
        raise DataError(f"{path}: items is missing or empty. Give a list of prompt and answer.")
    for number, item in enumerate(items, 1):
        if not isinstance(item, Mapping) or not {"prompt", "answer"} <= item.keys():
            raise DataError(f"{path}: item {number} has no prompt and answer. Give both.")
        if not isinstance(item["prompt"], str) or not item["prompt"].strip():
            raise DataError(f"{path}: the prompt of item {number} is not text. Write what is asked.")
        if not isinstance(item["answer"], str | int | float):
            raise DataError(f"{path}: the answer of item {number} is neither text nor a number. Write one of them.")
    return [{"prompt": item["prompt"], "answer": str(item["answer"])} for item in items]


def _predicate(path: Path, name: str, tree: Mapping[Any, Any], trust_code: bool) -> Predicate:
    given = tree.get(name)
    if not isinstance(given, str) or not given.strip():
        raise DataError(f"{path}: {name} is missing. {_known()}, or write a Python function.")
    kind, _, argument = given.strip().partition(":")
    if kind.strip() not in (*BUILT_IN, "regex") and ("def " in given or "\n" in given.strip()):
        return _python(path, name, given, trust_code)
    if kind == "regex":
        return _regex(path, name, argument)
    if kind not in BUILT_IN:
        raise DataError(f"{path}: {name}: there is no predicate '{kind}'.{did_you_mean(kind, BUILT_IN)} {_known()}.")
    if kind == "contains_after" and not argument:
        raise DataError(f"{path}: {name}: contains_after what? Write contains_after:text.")
    try:
        BUILT_IN[kind](argument, Context("", "1", "1"))
    except ValueError:
        raise DataError(f"{path}: {name}: '{argument}' after '{kind}:' is not a number.") from None
    return partial(BUILT_IN[kind], argument)


def _known() -> str:
    return f"Predicates are {', '.join(sorted([*BUILT_IN, 'regex']))}"


def _regex(path: Path, name: str, pattern: str) -> Predicate:
    """`{answer}` in the pattern stands for the item's answer. Searched in the sandbox: a pattern can take for ever."""
    try:
        re.compile(pattern.replace("{answer}", "x"))
    except re.error as error:
        raise DataError(f"{path}: {name}: '{pattern}' is no regular expression: {error}.") from error
    program = Program(REGEX, limits=LIMITS, modules=("re",))

    def search(seen: Context) -> float:
        wanted = pattern.replace("{answer}", re.escape(seen.answer))
        return float(bool(program.call("search", wanted, seen.output)))

    return search


def _python(path: Path, name: str, source: str, trust_code: bool) -> Predicate:
    source = textwrap.dedent(source)
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise DataError(f"{path}: {name}: line {error.lineno} is not Python: {error.msg}.") from error
    functions = {node.name: len(node.args.args) for node in tree.body if isinstance(node, ast.FunctionDef)}
    wanted = 2 if name == "score_fn" else 1
    if functions.get(name) != wanted:
        takes = "text and answer" if wanted == 2 else "the text"
        raise DataError(f"{path}: {name}: expected a function '{name}' that takes {takes}.")
    if not trust_code:
        shown = textwrap.shorten(" ⏎ ".join(filter(str.strip, source.splitlines())), 300, placeholder=" …")
        raise ConfigError(
            f"{path}: {name} is Python, and code of a data file runs only if you say so. Read it, then give "
            f"--trust-task-code, or use a built-in predicate. It is: {shown}"
        )
    program = Program(source, limits=LIMITS)

    def ask(seen: Context) -> float:
        arguments = (seen.text, seen.answer) if name == "score_fn" else (seen.text,)
        if name == "split_fn":
            arguments = (seen.output,)
        value = program.call(name, *arguments)
        if not isinstance(value, bool | int | float):
            raise ProgramError(f"{name} returned {type(value).__name__}, not a number and not true or false")
        return float(value)

    return ask


def _last_number(text: str) -> float | None:
    found = re.findall(r"-?\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?", text)
    return float(found[-1].replace(",", "").rstrip(".")) if found else None
