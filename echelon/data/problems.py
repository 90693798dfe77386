"""Problems in the columns that public data sets have them in: how each is asked. What an answer is worth is not known.

MBPP (`text`, `test_list`), HumanEval (`prompt`, `test`, `entry_point`) and questions with `choices` or `options` become
a prompt that says all one has to know to be judged: which function to write, what to choose from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from echelon.errors import DataError

LETTERS = "ABCDEFGHIJ"

PROBLEMS: list[tuple[str, ...]] = [
    ("text", "test_list"),
    ("prompt", "test_list"),
    ("prompt", "test", "entry_point"),
    ("question", "choices"),
    ("question", "options"),
]
"""Columns that make a row a problem of a known kind; the first is what is asked."""


def asked_as(cells: Mapping[str, Any], layout: tuple[str, ...], where: str) -> tuple[str, dict[str, Any]]:
    """What is asked, and the columns that judge it: as they are, with `tests` added for a program.

    Raises DataError for tests or choices that cannot be used.
    """
    columns = {name: value for name, value in cells.items() if name != layout[0]}
    question = cells[layout[0]]
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: '{layout[0]}' is no text, and it is what is asked. Fill it in, or remove the row.")
    if layout[1] == "test_list":
        tests = _texts(cells, "test_list", where)
        setup = str(cells.get("test_setup_code") or "\n".join(cells.get("test_imports") or []))
        columns["tests"] = [f"{setup}\n{test}".strip() for test in tests]
        return f"{question.strip()}\n\n{_hint(tests[0])}", columns
    if layout[1] == "test":
        columns["tests"] = cells["test"]
        return (
            f"Complete this function, and answer with all of it in one block of Python.\n\n```python\n"
            f"{question.rstrip()}\n```\n\nThe function must be named `{cells['entry_point']}`."
        ), columns
    return f"{question.strip()}\n\n{_menu(_choices(cells, layout[1], where))}", columns


def _hint(test: str) -> str:
    """Which function is to be written, by the first test that calls one."""
    found = re.search(r"assert\s+(?:not\s+)?(?:\w+\s*\(\s*)*?([A-Za-z_]\w*)\s*\(", test)
    called = [name for name in re.findall(r"([A-Za-z_]\w*)\s*\(", test) if name not in _WRAPPERS]
    name = called[0] if called else found[1] if found else ""
    say = f"The function must be named `{name}`. " if name else ""
    return f"{say}Answer with the program in one block of Python. It must pass tests such as:\n{test.strip()}"


_WRAPPERS = {
    "assert",
    "set",
    "sorted",
    "list",
    "tuple",
    "dict",
    "len",
    "round",
    "abs",
    "str",
    "int",
    "float",
    "isclose",
}
"""What a test may put around the call of the function."""


def _menu(choices: Sequence[str]) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join(
        [*lines, "", f"Answer with the letter of one choice, {LETTERS[0]} to {LETTERS[len(choices) - 1]}."]
    )


def _choices(cells: Mapping[str, Any], name: str, where: str) -> list[str]:
    listed = cells[name]
    if isinstance(listed, Mapping):  # {"text": […], "label": […]}, or a letter for each
        listed = listed.get("text") or list(listed.values())
    if not isinstance(listed, list | tuple) or not 2 <= len(listed) <= len(LETTERS):
        raise DataError(f"{where}: '{name}' is no list of 2 to {len(LETTERS)} choices. Give them as a list of texts.")
    return [str(choice).strip() for choice in listed]


def _texts(cells: Mapping[str, Any], name: str, where: str) -> list[str]:
    listed = cells[name]
    if not isinstance(listed, list | tuple) or not listed or not all(isinstance(test, str) for test in listed):
        raise DataError(f"{where}: '{name}' is no list of tests. Give a list of texts, each a test.")
    return list(listed)
