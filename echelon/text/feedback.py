"""The words around a problem, an attempt at it and what was said about the attempt, within a budget of tokens.

Templates in, messages out. Which of them is used when, and what comes of it, is not known here.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from echelon.errors import DataError
from echelon.types import Message

Count = Callable[[Sequence[Message]], int]
"""How many tokens a prompt of these messages has."""


CUT_FIRST = ("attempt", "example")
"""What gives way when a prompt is too long: its beginning goes. The problem, the feedback and the cue stay."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that fits."""

    messages: list[Message]
    cut: int
    """Characters of the attempt, or of the example, that were left out to make it fit."""


def fill(
    template: str, asked: Sequence[Message], parts: Mapping[str, str], *, count: Count, budget: int | None
) -> Prompt:
    """The messages of a problem with its last one put into the template, beside the other parts.

    Over budget the attempt loses its beginning, since answers stand at the end, and no more of it than is needed.
    Raises DataError where even a prompt without it is too long.
    """
    *head, question = asked
    whole = {"question": question["content"], **parts}

    def built(left: int, name: str | None) -> list[Message]:
        shown = whole if name is None else {**whole, name: whole[name][len(whole[name]) - left :]}
        return [*head, Message(role="user", content=template.format(**shown))]

    if budget is None or count(built(0, None)) <= budget:
        return Prompt(built(0, None), 0)
    name = next((part for part in CUT_FIRST if part in parts), None)
    if name is None or count(built(0, name)) > budget:
        needed = count(built(0, name))
        raise DataError(
            f"a prompt takes {needed} tokens without the attempt, more than the budget of {budget}: the problem, the "
            f"feedback and the cue are never cut. Raise sampling.max_prompt_tokens, or leave out the problem that "
            f"begins '{' '.join(question['content'][:40].split())}'."
        )
    low, high = 0, len(whole[name])  # `low` characters fit, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(built(middle, name)) <= budget else (low, middle)
    return Prompt(built(low, name), len(whole[name]) - low)


def slots(template: str) -> set[str]:
    """The names in braces. Raises ValueError for a template that cannot be read, such as one with a single brace."""
    return {slot for _, slot, _, _ in string.Formatter().parse(template) if slot is not None}
