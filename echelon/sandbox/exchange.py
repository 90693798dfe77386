"""Runs inside the sandbox, on both sides of an exam: where the program under test gives values, where the tests get
them.

Only data crosses: numbers, text, and collections of them. Everything else stays with the program, and the tests have a
`Thing` by which to call it, read its attributes, index it and walk through it. So nothing of the program runs where the
tests run: it cannot see what they expect, and two values are equal when the tests' own interpreter says so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

ask: Callable[[Any], Any]
"""Asks the process that started this one; the worker puts it here."""

_program: dict[str, Any] = {}
_things: list[Any] = []


class Thing:
    """Something of the program's that is no data, by its number there."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _asked("attribute", self._number, name)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return _asked("call", self._number, list(arguments), keywords)

    def __getitem__(self, key: Any) -> Any:
        return _asked("attribute", self._number, "__getitem__")(key)

    def __len__(self) -> Any:
        try:
            return _asked("attribute", self._number, "__len__")()
        except AttributeError as error:
            raise TypeError(str(error)) from None

    def __bool__(self) -> bool:
        try:
            return len(self) > 0
        except TypeError:
            return True

    def __iter__(self) -> Iterator[Any]:
        each = _asked("attribute", _asked("attribute", self._number, "__iter__")()._number, "__next__")
        while True:
            try:
                value = each()
            except StopIteration:
                return
            yield value

    def __str__(self) -> str:
        return str(_asked("attribute", self._number, "__str__")())


def encode(value: Any) -> Any:
    """A value as JSON. What is no data becomes a number if this is the program's side."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return {"float": repr(float(value))}
    if isinstance(value, complex):
        return {"complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": list(value)}
    if isinstance(value, list):
        return [encode(item) for item in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, Thing):
        return {"thing": value._number}
    if not _program:
        raise TypeError(f"a {type(value).__name__} cannot be given to the program: only data can")
    _things.append(value)
    return {"thing": len(_things) - 1}


def decode(value: Any) -> Any:
    """The value that was encoded."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inside),) = value.items()
    if kind == "dict":
        return {decode(key): decode(item) for key, item in inside}
    if kind == "thing":
        return _things[inside] if _program else Thing(inside)
    if kind == "complex":
        return complex(float(inside[0]), float(inside[1]))
    makers: dict[str, Callable[[Any], Any]] = {"float": float, "bytes": bytes}
    makers |= {"tuple": tuple, "set": set, "frozenset": frozenset}
    return makers[kind](inside if kind in ("float", "bytes") else [decode(item) for item in inside])


def open_program(source: str, names: list[str]) -> dict[str, Any]:
    """Run the program under test; of these names, those it defines, with their values."""
    _program["__name__"] = "__program__"
    exec(compile(source, "<program>", "exec"), _program)  # the process is the wall
    return {name: encode(_program[name]) for name in names if name in _program}


def perform(what: str, number: int, *rest: Any) -> dict[str, Any]:
    """Do what the tests ask of something of the program's: the value and the arguments now, or what it raised."""
    try:
        if what == "attribute":
            return {"value": encode(getattr(_things[number], rest[0])), "after": []}
        arguments = decode(rest[0])
        value = _things[number](*arguments, **decode(rest[1]))
        return {"value": encode(value), "after": [encode(item) for item in arguments]}
    except MemoryError:
        raise
    except BaseException as error:  # SystemExit is the program's too
        kind = next(base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins")
        return {"raised": kind, "said": str(error)[:500]}


def examine(source: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run tests where these names of the program are known: how many were passed, and what the first other one raised.

    The source says itself when one is passed or failed (`__passed__()`, `__failed__(error)`).
    """
    random.seed(0)
    passed, failed = list[bool](), list[str]()

    def fail(error: BaseException) -> None:
        failed.append(f"{type(error).__name__}: {error}".partition("\n")[0][:500].rstrip(": "))

    space = {"__name__": "tests", "__passed__": lambda: passed.append(True), "__failed__": fail}
    try:
        exec(compile(source, "<program>", "exec"), space | {name: decode(value) for name, value in names.items()})
    except Exception as error:
        fail(error)
    return {"passed": len(passed), "said": failed[0] if failed else ""}


def _asked(what: str, number: int, *rest: Any) -> Any:
    answer = ask([what, number, *map(encode, rest)])
    if "raised" in answer:
        raise _errors().get(answer["raised"], RuntimeError)(answer["said"])
    for given, after in zip(rest[0] if what == "call" else (), answer["after"]):  # noqa: B905 - the program may lie
        _become(given, decode(after))
    return decode(answer["value"])


def _become(given: Any, after: Any) -> None:
    """Have an argument that the program may change in place be as it left it."""
    if type(given) is not type(after):
        return
    if isinstance(given, list):
        given[:] = after
    elif isinstance(given, set | dict):
        given.clear()
        given.update(after)


def _errors() -> dict[str, type[Exception]]:
    """The exceptions that any program knows and that are made of a text."""
    found, left = dict[str, type[Exception]](), [Exception]
    while left:
        kind = left.pop()
        left += kind.__subclasses__()
        if kind.__module__ == "builtins" and not issubclass(kind, UnicodeError):
            found[kind.__name__] = kind
    return found
