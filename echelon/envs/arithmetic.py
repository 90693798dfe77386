"""Sums of two numbers, in one turn. Where each digit needs the carry from the one below, mistakes have a place.

The verdict is about the whole number; which digit was wrong is told to nobody. `column_sum` is addition by somebody who
carries only where told to: a student whose mistakes a coach can name.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence

from echelon.envs._shared import Player, need_at_least, need_kind, need_split, user
from echelon.errors import ConfigError
from echelon.types import Message, Step, Task

PLACES = ("ones", "tens", "hundreds", "thousands", "tenthousands")
"""What the digits of a number are called, from the right."""
TASKS = {"train": 512, "test": 128}
"""Sums in each split; no sum is in both."""


class Arithmetic:
    """Add two numbers of `digits` digits: 1 for the right sum, 0 for any other answer. Every end is `terminated`.

    `carries` is the least number of carries in a sum: more makes it harder. So does a larger `base`, that of all
    numbers: there are more pairs of digits to know. With `spaced` digits are written apart, one token each for most
    tokenizers. What counts as the answer is the last number in the text; `parsed` says whether there was one.
    """

    def __init__(self, task: Task, *, digits: int = 3, carries: int = 1, spaced: bool = False, base: int = 10) -> None:
        self._one, self._other = int(task.data["one"]), int(task.data["other"])
        self._digits, self._spaced, self._base = digits, spaced, base

    @classmethod
    def tasks(
        cls, split: str, *, digits: int = 3, carries: int = 1, spaced: bool = False, base: int = 10
    ) -> list[Task]:
        """Random sums, the same in every run; `data` has both numbers, the question, and the answer as it is written
        in `base`, read as a decimal number."""
        need_split("arithmetic", split)
        need_at_least("arithmetic", "digits", digits, 1, "a number has digits")
        if digits > len(PLACES):
            raise ConfigError(f"arithmetic: digits = {digits}: there are names for {len(PLACES)} places. Use fewer.")
        if not 0 <= carries <= digits:
            raise ConfigError(f"arithmetic: carries = {carries}: a sum has at most one for each of {digits} digits.")
        if not 2 <= base <= 10:
            raise ConfigError(f"arithmetic: base = {base}: digits are 0 to 9, and one needs two of them. Use 2 to 10.")
        draw, found = (
            random.Random(f"arithmetic/{digits}/{carries}" + f"/{base}" * (base != 10)),
            dict[tuple[int, int], None](),
        )
        wanted = sum(TASKS.values())
        for _ in range(200 * wanted):  # of few digits there are few sums
            pair = draw.randrange(base**digits), draw.randrange(base**digits)
            if len(carried(*pair, digits, base)) >= carries:
                found[pair] = None
            if len(found) == wanted:
                break
        pairs = list(found)
        cut = len(pairs) * TASKS["train"] // wanted
        chosen = pairs[:cut] if split == "train" else pairs[cut:]
        return [
            Task(
                id=f"arithmetic/{one}+{other}",
                data={
                    "one": one,
                    "other": other,
                    "question": question(one, other, digits, spaced, base),
                    "answer": int(spell(one + other, 1, base=base)),
                },
            )
            for one, other in chosen
        ]

    def start(self) -> list[Message]:
        """The sum to do."""
        return user(question(self._one, self._other, self._digits, self._spaced, self._base))

    def step(self, action: str) -> Step:
        """Judge an answer."""
        found = last_number(action, spaced=self._spaced, base=self._base)
        right = found == self._one + self._other
        info = {"win": float(right), "parsed": float(found is not None)}
        return Step(messages=user("Right." if right else "Wrong."), reward=float(right), terminated=True, info=info)

    @classmethod
    def utterances(cls, *, digits: int = 3, carries: int = 1, spaced: bool = False, base: int = 10) -> list[str]:
        """Digits, one by one: whole numbers are too many to list."""
        return [str(digit) for digit in range(base)]

    @classmethod
    def player(
        cls, kind: str, seed: int = 0, *, digits: int = 3, carries: int = 1, spaced: bool = False, base: int = 10
    ) -> Player:
        """A scripted player of one episode: `random` says any sum there can be, `optimal` adds."""
        need_kind("arithmetic", kind)

        def guess(messages: Sequence[Message]) -> str:
            return spell(random.Random(seed).randrange(2 * base**digits - 1), digits + 1, spaced, base)

        def add(messages: Sequence[Message]) -> str:
            asked = messages[-1]["content"].rstrip("= ").split("+")
            return spell(sum(int(number.replace(" ", ""), base) for number in asked), digits + 1, spaced, base)

        return add if kind == "optimal" else guess


def question(one: int, other: int, digits: int, spaced: bool, base: int = 10) -> str:
    """A sum as it is asked, both numbers with all their digits."""
    return f"{spell(one, digits, spaced, base)} + {spell(other, digits, spaced, base)} ="


def spell(number: int, digits: int, spaced: bool = False, base: int = 10) -> str:
    """A number with zeros in front up to so many digits."""
    text = ""
    while number or not text:
        number, digit = divmod(number, base)
        text = f"{digit}{text}"
    return (" " if spaced else "").join(text.zfill(digits))


def carried(one: int, other: int, digits: int, base: int = 10) -> list[int]:
    """The places (0 is the ones) that get a carry from the place below when two numbers are added, up to `digits`."""
    found, carry = [], 0
    for place in range(digits):
        carry = int(one // base**place % base + other // base**place % base + carry >= base)
        if carry:
            found.append(place + 1)
    return found


def column_sum(one: int, other: int, digits: int, carries: Collection[int], base: int = 10) -> int:
    """The digits of two numbers added place by place, each without its own carry, plus one at the places named."""
    total = 0
    for place in range(digits + 1):
        digit = one // base**place % base + other // base**place % base + (place in carries)
        total += digit % base * base**place
    return total


def last_number(text: str, *, spaced: bool = False, base: int = 10) -> int | None:
    """The last whole number in a text; None without one, or where it has a digit that there is not in `base`.

    `spaced` reads digits apart by single spaces as one number.
    """
    found = re.findall(r"\d(?: ?\d){0,17}" if spaced else r"\d{1,18}", text)
    last = found[-1].replace(" ", "") if found else ""
    return int(last, base) if last and int(max(last)) < base else None
