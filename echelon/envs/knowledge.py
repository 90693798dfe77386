"""What is known about everyday things, and the grammar of yes/no questions about them.

The facts are two readable tables next to this file: `things.csv` says which properties hold of which thing, and
`questions.csv` gives each property one canonical question and its other wordings. Answers are exact lookups; no
model is asked, and no dialogue or reward is known here.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files

from echelon.errors import DataError, did_you_mean

LONGEST_QUESTION = 200
"""Characters; anything longer is not a question."""

SUBSET = ("football", "dog", "banana", "truck", "pants", "computer", "piano", "chair", "pen", "scissors")
"""The ten things of the small game."""


@dataclass(frozen=True, slots=True)
class Property:
    """Something that is true or false of every thing; a category is one of them."""

    key: str
    question: str
    """Its canonical wording."""
    wordings: tuple[str, ...]
    """Every listed wording, the canonical one first."""


@dataclass(frozen=True, slots=True)
class Thing:
    """A thing to be guessed."""

    name: str
    guess: str
    """The canonical wording of guessing it: "Is it a dog?"."""
    category: str
    properties: frozenset[str]
    """Keys of the properties that hold, its category among them."""
    names: tuple[str, ...]
    """Its name and what else it is called."""


Meaning = Property | Thing


@cache
def properties() -> tuple[Property, ...]:
    """All properties, the categories first."""
    return tuple(
        Property(row["property"], row["question"], (row["question"], *_split(row["other_wordings"])))
        for row in _rows("questions.csv")
    )


@cache
def things(subset: bool = False) -> tuple[Thing, ...]:
    """All things, by category; or the ten of the subset, in their published order."""
    if subset:
        by_name = {thing.name: thing for thing in things()}
        return tuple(by_name[name] for name in SUBSET)
    return tuple(
        Thing(
            name=row["thing"],
            guess=" ".join(filter(None, ("Is it", row["article"], row["thing"]))) + "?",
            category=row["category"],
            properties=frozenset((row["category"], *row["properties"].split())),
            names=(row["thing"], *_split(row["also_called"])),
        )
        for row in _rows("things.csv")
    )


def thing(name: str) -> Thing:
    """The thing of that name; a DataError when it is not in the table."""
    found = next((thing for thing in things() if thing.name == name), None)
    if found is None:
        known = [thing.name for thing in things()]
        raise DataError(f"Nothing is known about '{name}'. Add it to things.csv.{did_you_mean(name, known)}")
    return found


@lru_cache(maxsize=10_000)
def understand(text: str) -> Meaning | None:
    """The property asked about or the thing guessed; None when the text is outside the grammar.

    Case, punctuation and articles do not matter; a bare name or category ("dog", "animals") is read as "Is it …?".
    """
    if len(text) > LONGEST_QUESTION:
        return None
    form = normal_form(text)
    known = _forms()
    for candidate in (form, f"is it {form}"):
        for variant in _number_variants(candidate):
            if variant in known:
                return known[variant]
    return None


def holds(meaning: Meaning, thing: Thing) -> bool:
    """The true answer about `thing`: does the property hold, or is it the thing guessed?"""
    return meaning.key in thing.properties if isinstance(meaning, Property) else meaning.name == thing.name


_AUX = r"(?:is|are|was|were|does|do|did|can|could|will|would|might|may|has|have)"
_FILLER = r"\b(?:an?|the|some|any|please|usually|normally|typically|generally|mostly|often|really|also)\b"
_OPENING = (
    r"(?:so|ok|okay|well|then|hmm|and|now|maybe|perhaps|tell me|let me guess|final answer|my answer is"
    r"|my (?:final )?guess is|(?:final )?(?:question|guess|q)(?: ?\d+)?|i (?:think|guess|say|believe)(?: that)?|\d+)"
)
_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"'", ""),
        (r"[^a-z0-9]+", " "),
        (_FILLER, " "),
        (r" +", " "),
        (r"^ | $", ""),
        (rf"^(?:{_OPENING} )+", ""),
        (r"\b(?:kind|type|sort|pair) of ", ""),
        # the subject is "it" or "you", whatever it was called
        (rf"^({_AUX}) (?:(?:this|that|your|secret|mystery) )*(?:thing|object|item|word|answer)s?\b(?= )", r"\1 it"),
        (rf"^({_AUX}) (?:this|that|these|those|they)\b", r"\1 it"),
        (rf"^({_AUX}) (?:we|i|people|most people|one|someone|anyone|humans?)\b", r"\1 you"),
        (r"^(?:its|it is|this is|that is|they are|are you thinking of|is answer)\b", "is it"),
        (r"^it (has|have)\b", "does it have"),
        (r"^it can\b", "does it"),
        # one auxiliary for each of three frames: is it, does it, can you
        (r"^(?:can|could|will|would|might|may) it be\b", "is it"),
        (r"^(?:are|was|were) it\b", "is it"),
        (r"^(?:has|have) it(?: got)?\b", "does it have"),
        (r"^(?:do|did|can|could|will|would|might|may) it\b", "does it"),
        (r"^(?:do|does|did|could|will|would|might|may) you\b", "can you"),
        (r"^is it possible to\b", "can you"),
        (r"^is it able to\b", "does it"),
        (r"^is it (?:something|thing)(?: that| which)? you (?:(?:can|could|would) )?(.+)$", r"can you \1 it"),
        (r"^is it (?:something|thing)(?: that| which) (?:is|are)\b", "is it"),
        (r"^is it (?:(?:something|thing)(?: that| which) ha(?:s|ve)|(?:something |thing )?with)\b", "does it have"),
    )
)


def normal_form(text: str) -> str:
    """The words of a question with everything removed that does not change what it asks."""
    text = text.lower()
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


@cache
def _forms() -> dict[str, Meaning]:
    """Normal form to meaning. A form with two meanings would make answers ambiguous: the tables must not have one."""
    forms: dict[str, Meaning] = {}
    listed: list[tuple[str, Meaning]] = [(wording, prop) for prop in properties() for wording in prop.wordings]
    listed += [(f"is it {name}", thing) for thing in things() for name in thing.names]
    for wording, meaning in listed:
        form = normal_form(wording)
        assert forms.setdefault(form, meaning) is meaning, f"'{wording}' means both {forms[form]} and {meaning}"
    return forms


def _number_variants(form: str) -> Iterator[str]:
    """The form itself, then with its last word made singular or plural."""
    yield form
    for ending, replacement in (("ies", "y"), ("es", ""), ("s", "")):
        if form.endswith(ending):
            yield form[: -len(ending)] + replacement
    yield form + "s"


def _rows(name: str) -> list[dict[str, str]]:
    text = (files(__package__) / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _split(cell: str) -> tuple[str, ...]:
    return tuple(part for part in cell.split("|") if part)
