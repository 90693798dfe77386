"""Where classes stand in their files, found once a file: the standard library parses the file anew for each of them."""

from __future__ import annotations

import ast
import inspect
import linecache
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

Found = tuple[list[str], int]


@cache
def places(file: str) -> dict[str, int]:
    """Qualified name of each class → the index of its first line, that of a decorator if it has one."""
    found: dict[str, int] = {}
    for name, node in _classes(ast.parse(Path(file).read_text(encoding="utf-8")), ""):
        found.setdefault(name, (node.decorator_list or [node])[0].lineno - 1)
    return found


def _classes(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield prefix + node.name, node
            yield from _classes(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _classes(node, f"{prefix}{node.name}.<locals>.")
        else:
            yield from _classes(node, prefix)


def quick(slow: Callable[[Any], Found]) -> Callable[[Any], Found]:
    """`inspect.findsource`, or what stands for it, with classes found in the places of their file."""

    def findsource(thing: Any) -> Found:
        file = inspect.getsourcefile(thing) if inspect.isclass(thing) else None
        place = places(file).get(thing.__qualname__) if file else None
        return slow(thing) if file is None or place is None else (linecache.getlines(file), place)

    return findsource
