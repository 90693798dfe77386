"""Values in what a model wrote: answers that are marked, numbers, programs.

Exact and without a model: numbers are fractions, never floats. Whether an answer is right is for `verify`.
"""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST_NUMBER = 1000
"""Most characters of what is read as a number. Python raises ValueError for an int of more than 4300 digits."""

_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_FENCED = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_WRITTEN = re.compile(r"\\text\{([^{}]*)\}|\\left|\\right|\\[,!;: ]|\\\(|\\\)|[\s$]")


def marked_answer(text: str) -> str | None:
    r"""What stands in the last \boxed{…} that is closed, else after the last ####; None without either."""
    start = text.rfind(r"\boxed{")
    while start >= 0:
        inside = _braced(text, start + len(r"\boxed{"))
        if inside is not None:
            return inside.strip()
        start = text.rfind(r"\boxed{", 0, start)
    _, mark, after = text.rpartition("####")
    return after.strip().partition("\n")[0].strip() if mark and after.strip() else None


def as_number(text: str) -> Fraction | None:
    r"""The number that a text is, exactly: 1,234.50, -3/4, \frac{1}{2}; None if it is anything else, or longer than
    `LONGEST_NUMBER`.

    Signs of dollars and per cent are units, not part of it: 20% is 20.
    """
    plain = _FRACTION.sub(r"\1\2/\3", _plain(text)).rstrip(".").removesuffix("%").removesuffix("\\")
    if len(plain) > LONGEST_NUMBER:
        return None
    if not re.fullmatch(r"[-+]?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?(/0*[1-9]\d*)?|[-+]?\.\d+", plain):
        return None
    above, _, below = plain.replace(",", "").partition("/")
    return Fraction(above) / Fraction(below or 1)


def program_in(text: str) -> str:
    """The program that a text contains: its last block of Python between fences, closed or not; without any, all of it.

    A fence that names no language counts as Python.
    """
    blocks = _FENCED.findall(text)
    written = [block for language, block in blocks if language.lower() in ("", "py", "python", "python3")]
    return str(written[-1]) if written else text


def _braced(text: str, start: int) -> str | None:
    """From `start` to the brace that closes; None if none does."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start:place]
    return None


def _plain(text: str) -> str:
    """Without what does not change the meaning: spaces, dollar signs, sizes of brackets, text in a formula."""
    return _WRITTEN.sub(lambda found: found[1] or "", text).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
