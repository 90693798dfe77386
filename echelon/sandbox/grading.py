"""What share of its tests a program passes. Both are untrusted Python, each in a child of the sandbox of its own.

The program is asked for values and nothing else (`exchange`): it sees no test, and whether a value is right is decided
where it does not run. So printing what is expected, ending the process early, objects that equal everything, and
builtins that were replaced earn nothing. Knows nothing of rewards.
"""

from __future__ import annotations

import ast
import builtins
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from echelon.sandbox.program import Limits, Program, ProgramError

Reason: TypeAlias = Literal["error", "time", "memory", "output", "crash"]
"""Why a program was ended: it raised before any test or did not parse, or it took too long, took too much memory, wrote
too much, or its process ended."""

LIMITS = Limits(cpu_seconds=2.0, wall_seconds=30.0, memory_mib=512)
"""What a program may use for all of its tests together."""


@dataclass(frozen=True, slots=True)
class Exam:
    """Python that says of every test whether it was passed, with how many there are in each piece, and the names in it
    that the program defines."""

    pieces: tuple[tuple[str, int], ...]
    names: tuple[str, ...]
    entry_point: str = ""
    """What the tests call `candidate`."""

    @property
    def total(self) -> int:
        """How many tests there are."""
        return sum(count for _, count in self.pieces)


@dataclass(frozen=True, slots=True)
class Grade:
    """How many tests a program passed."""

    passed: int
    total: int
    reason: Reason | None = None
    """Why it was ended before the last test."""
    said: str = ""
    """One line about the first test that failed, or about the reason."""

    @property
    def rate(self) -> float:
        """Share of the tests that it passed; none of them counts for a program that was ended."""
        return 0.0 if self.reason else self.passed / self.total


def read_exam(tests: Sequence[str] | str, entry_point: str = "") -> Exam:
    """Tests as data sets have them: a list, each a test, or one text.

    Of a text, every `assert` that stands by itself is a test, and so are functions that are defined and not called:
    `test…()`, and `check(candidate)`, which gets the entry point. A text without any is one test, and so is each of a
    list. Raises ValueError, which says what is wrong.
    """
    texts = [tests] if isinstance(tests, str) else list(tests)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("there must be a test, and every one must be a text")
    if entry_point and not entry_point.isidentifier():
        raise ValueError(f"the entry point '{entry_point}' is no name of a function")
    trees = [_parsed(text) for text in texts]
    names = {name for tree in trees for name in _open_names(tree)} | {entry_point} - {""}
    pieces = [_piece(tree, entry_point, one=not isinstance(tests, str)) for tree in trees]
    return Exam(tuple(pieces), tuple(sorted(names)), entry_point)


class Examiner:
    """Grades programs one after the other: tests run in one child that stays, each program in a child of its own."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self._tests = Program(_exchange(), limits=limits)

    def grade(self, source: str, exam: Exam) -> Grade:
        """Run a program against its tests; whatever it does, it gets a grade."""
        passed, failures = 0, list[str]()
        with _Candidate(self.limits) as candidate:
            try:
                names = candidate.call("open_program", source, exam.names)
                if not isinstance(names, dict):
                    raise _Ended("crash", "it wrote something else than an answer")
                if exam.entry_point in names:
                    names["candidate"] = names[exam.entry_point]
                for source, count in exam.pieces:
                    found = self._examine(source, names, candidate)
                    passed += min(found["passed"], count)
                    failures += [found["said"]] if found["said"] else []
            except _Ended as ended:
                return Grade(passed, exam.total, ended.reason, str(ended))
        return Grade(passed, exam.total, None, failures[0] if failures else "")

    def _examine(self, source: str, names: dict[str, Any], candidate: _Candidate) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self._tests.call(
                "examine", source, names, asked=lambda request: candidate.call("perform", *request)
            )
        except ProgramError as error:  # tests are untrusted too
            return {"passed": 0, "said": str(error)}
        return found

    def close(self) -> None:
        """End the child."""
        self._tests.close()


class _Ended(Exception):
    """The program has come to an end that ends its exam."""

    def __init__(self, reason: Reason, said: str) -> None:
        super().__init__(said)
        self.reason: Reason = reason


class _Candidate(Program):
    """A program that is examined: its limits are those of all calls together, and what breaks them ends the exam."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(_exchange(), limits=limits)
        self.start()
        self._began, self._used = time.monotonic(), self.processor_seconds()

    def call(self, function: str, *arguments: Any, asked: Callable[[Any], Any] | None = None) -> Any:
        try:
            value = super().call(function, *arguments, asked=asked)
            self.check_time(self._began, self._used)
        except ProgramError as error:
            raise _Ended(_reason(error), str(error)) from error
        return value


def _reason(error: ProgramError) -> Reason:
    kind = str(error).partition(":")[0]
    if error.cause != "raised":
        return error.cause
    return {"MemoryError": "memory", "TooMuchOutput": "output"}.get(kind, "error")  # type: ignore[return-value]


def _piece(tree: ast.Module, entry_point: str, *, one: bool) -> tuple[str, int]:
    """The source of tests as `examine` runs it, and how many there are; all together are `one`, or the only one."""
    calls = [statement for call in _left_to_call(tree, entry_point) for statement in _parsed(call).body]
    tests = [*(node for node in tree.body if isinstance(node, ast.Assert)), *calls]
    body = [*tree.body, *calls]
    if one or not tests:
        return ast.unparse(ast.Module([*body, *_parsed("__passed__()").body], [])), 1
    return ast.unparse(ast.Module([_told(node) if node in tests else node for node in body], [])), len(tests)


def _left_to_call(tree: ast.Module, entry_point: str) -> list[str]:
    """Calls of the functions that are tests and that nobody calls."""
    called = {_called(node) for node in tree.body}
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name not in called]
    calls = [f"{node.name}()" for node in defined if node.name.startswith("test") and not node.args.args]
    if any(node.name == "check" for node in defined):
        if not entry_point:
            raise ValueError("check(candidate) needs the column 'entry_point', the function to be checked")
        calls.append("check(candidate)")
    return calls


def _told(test: ast.stmt) -> ast.stmt:
    """A statement that goes on after a test and says whether it was passed."""
    frame = _parsed("try:\n    __passed__()\nexcept Exception as __error__:\n    __failed__(__error__)").body[0]
    assert isinstance(frame, ast.Try)
    frame.body.insert(0, test)
    return frame


def _called(node: ast.stmt) -> str:
    """The function that a statement consists in calling."""
    call = node.value if isinstance(node, ast.Expr) else None
    return call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else ""


def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f" (line {error.lineno})" if isinstance(error, SyntaxError) else ""
        raise ValueError(f"a test does not parse: {getattr(error, 'msg', error)}{where}") from error


def _open_names(tree: ast.Module) -> set[str]:
    """Names that a test uses and nobody in it defines. Builtins are Python's own, whatever the program calls so."""
    used, bound = set[str](), {"candidate", *dir(builtins)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return used - bound


@cache
def _exchange() -> str:
    return Path(__file__).with_name("exchange.py").read_text(encoding="utf-8")
