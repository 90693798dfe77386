"""The child process of `algebra`: loads math-verify, then answers comparisons until its pipe closes.

A script of its own that knows nothing of echelon. Each request and each answer is one line of JSON.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
from typing import Any


def give_up(memory_bytes: int) -> None:
    """No files to write, no processes to start, no memory beyond the limit; where the system lacks one, the others."""
    for name, most in {"FSIZE": 0, "NPROC": 0, "CORE": 0, "AS": memory_bytes}.items():
        try:
            number = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(number)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(number, (most, most))
        except (AttributeError, ValueError, OSError):
            continue


def same(said: str, right: str) -> bool | None:
    """Whether two formulas mean the same; None where the first cannot be read. Raises ValueError for the second."""
    from math_verify import LatexExtractionConfig, parse, verify  # type: ignore[import-untyped]

    def read(formula: str) -> list[Any]:
        return list(parse(f"${formula}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None))

    wanted = read(right)
    if not wanted:
        raise ValueError(f"the right answer '{right[:60]}' cannot be read")
    found = read(said)
    if not found:
        return None
    return bool(
        verify(wanted, found, float_rounding=12, strict=True, allow_set_relation_comp=True, timeout_seconds=None)
    )


def main() -> None:
    """Answer requests."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the library prints is no answer
    settings = json.loads(sys.stdin.readline())
    logging.disable(logging.CRITICAL)
    same("1", "1")
    give_up(settings["memory_bytes"])
    out.write(json.dumps({"value": None, "printed": ""}) + "\n")
    for line in sys.stdin:
        try:
            answer = {"value": same(*json.loads(line)["arguments"]), "printed": ""}
        except BaseException as error:  # a recursion that is too deep, memory that ends, the library's own time-out
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        out.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
