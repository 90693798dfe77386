"""Guess My City: find the city by open questions. A hundred real cities and eleven facts about each, so that every
answer is a lookup, and no answer names the city.

After the game of LMRL-Gym (Abdulhai et al., arXiv 2311.18232), where a language model answers. Knows the rules, which
wordings are understood, and two scripted players. The facts are in `cities.csv`, the questions in `city_questions.csv`.
"""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files

from echelon.envs._shared import Player, Search, at_random, need_at_least, need_kind, need_split, user
from echelon.errors import DataError, did_you_mean
from echelon.types import Message, Step, Task

YES, NO, NOT_UNDERSTOOD, HIDDEN = "Yes.", "No.", "I did not understand.", "That would give it away."
LONGEST_QUESTION = 200
"""Characters; anything longer is not a question."""

SUBSET = (
    *("New York", "Chicago", "San Francisco", "Rome", "Venice"),
    *("Tokyo", "Kyoto", "Sydney", "Melbourne", "Singapore"),
)
"""The ten cities of the small game: several in one country, so that one question is seldom enough."""


@dataclass(frozen=True, slots=True)
class Fact:
    """Something one can ask about every city."""

    key: str
    question: str
    """Its canonical wording."""
    wordings: tuple[str, ...]
    """Every listed wording, the canonical one first."""


@dataclass(frozen=True, slots=True, eq=False)
class City:
    """A city to be guessed."""

    name: str
    guess: str
    """The canonical wording of guessing it: "Is it Paris?"."""
    names: tuple[str, ...]
    """Its name and what else it is or was called."""
    facts: Mapping[str, str]
    """Key of a fact → the words that answer it."""


Meaning = Fact | City


class GuessMyCity:
    """Ask open questions until the city is found: -1 a turn, 0 for the turn that names it.

    A game that is not won ends after `max_turns`, and that end is `terminated`: the limit is a rule of the game. So the
    return lies between -max_turns and 0. `subset` plays with ten cities.
    """

    def __init__(self, task: Task, *, subset: bool = False, max_turns: int = 20) -> None:
        self._city = city(task.data["city"])
        self._max_turns, self._turns = max_turns, 0

    @classmethod
    def tasks(cls, split: str, *, subset: bool = False, max_turns: int = 20) -> list[Task]:
        """One task a city. Both splits list the same cities, as in the published task: the skill is the asking."""
        need_split("guess_my_city", split)
        need_at_least("guess_my_city", "max_turns", max_turns, 1, "a game needs a turn")
        return [Task(f"guess_my_city/{city.name}", {"city": city.name}) for city in cities(subset)]

    def start(self) -> list[Message]:
        """The instruction, in one short message. The city in it is not one of those to be guessed."""
        return user(
            f"Guess my city in {self._max_turns} turns. Ask, like: Which country is it in? Or guess: Is it Atlantis?"
        )

    def step(self, action: str) -> Step:
        """Answer a question or a guess. What is outside the grammar is not understood and costs a turn all the same."""
        self._turns += 1
        meaning = understand(action)
        won = meaning is self._city
        ended = won or self._turns >= self._max_turns
        return Step(
            messages=user(answer(meaning, self._city)),
            reward=0.0 if won else -1.0,
            terminated=ended,
            info={"win": float(won), "turns": float(self._turns)} if ended else {},
        )

    @classmethod
    def utterances(cls, *, subset: bool = False, max_turns: int = 20) -> list[str]:
        """Everything a scripted player may say: the canonical questions, then the canonical guesses."""
        return [fact.question for fact in facts()] + [city.guess for city in cities(subset)]

    @classmethod
    def player(
        cls, kind: str, seed: int = 0, *, guess: float = 0.5, subset: bool = False, max_turns: int = 20
    ) -> Player:
        """A scripted player of one episode.

        `random` says a random canonical guess with probability `guess`, else a random canonical question, and never
        listens. `optimal` keeps the cities that fit the answers; no player does better, and `bound` is what it earns.
        """
        need_kind("guess_my_city", kind)
        if kind == "optimal":
            return lambda messages: plan(subset).say(messages)
        questions, guesses = [fact.question for fact in facts()], [city.guess for city in cities(subset)]
        return at_random(seed, lambda draw: draw.choice(guesses if draw.random() < guess else questions))


@cache
def facts() -> tuple[Fact, ...]:
    """All that can be asked."""
    return tuple(
        Fact(row["fact"], row["question"], (row["question"], *_split(row["other_wordings"])))
        for row in _rows("city_questions.csv")
    )


def cities(subset: bool = False) -> tuple[City, ...]:
    """All cities, by continent; or the ten of the subset."""
    return tuple(city(name) for name in SUBSET) if subset else _table()


@cache
def _table() -> tuple[City, ...]:
    keys = [fact.key for fact in facts()]
    return tuple(
        City(
            name=row["city"],
            guess=f"Is it {row['city']}?",
            names=(row["city"], *_split(row["also_called"])),
            facts={key: row[key] for key in keys},
        )
        for row in _rows("cities.csv")
    )


def city(name: str) -> City:
    """The city of that name; a DataError when it is not in the table."""
    found = next((city for city in cities() if city.name == name), None)
    if found is None:
        known = [city.name for city in cities()]
        raise DataError(f"Nothing is known about '{name}'. Add it to cities.csv.{did_you_mean(name, known)}")
    return found


def answer(meaning: Meaning | None, city: City) -> str:
    """What is said about `city` to a question or a guess; never a text with one of its names in it."""
    if meaning is None:
        return NOT_UNDERSTOOD
    if isinstance(meaning, City):
        return YES if meaning is city else NO
    words = city.facts[meaning.key]
    return HIDDEN if names_city(words, city) else f"{words[0].upper()}{words[1:]}."


def names_city(text: str, city: City) -> bool:
    """Whether a text holds a name of the city, also inside another word ("Tunisia") or without its "City"."""
    told = _plain(text)
    return any(_plain(name).removesuffix(" city") in told for name in city.names)


@lru_cache(maxsize=10_000)
def understand(text: str) -> Meaning | None:
    """The fact asked about or the city guessed; None when the text is outside the grammar.

    Case, accents, punctuation and small words do not matter. A question that names a value ("Is it in France?", "Do
    they speak French?") asks for its fact, and the name of a city guesses it.
    """
    return _forms().get(normal_form(text)) if len(text) <= LONGEST_QUESTION else None


_OPENING = re.compile(
    r"^(?:(?:so|ok|okay|well|then|hmm|and|now|maybe|perhaps|please|let me guess|final answer|my answer is|question"
    r"|guess|my (?:final )?guess is|i (?:think|guess|say|believe)(?: that)?|(?:can|could|will) you tell me|tell me"
    r"|\d+) )+"
)
_SUBJECT = re.compile(
    r"\b(?:the|your|this|that|my|secret|mystery)(?: (?:secret|mystery))* (?:city|town|place|hometown)\b"
)
_SMALL = re.compile(
    r"\b(?:an?|the|which|what|whats|is|its|are|was|be|it|there|this|that|in|on|at|by|from|to|for|do|does|they|you|your"
    r"|people|located|situated|lies?|has|have|most|main|called)\b"
)


def normal_form(text: str) -> str:
    """The words of a question with everything removed that does not change what it asks."""
    text = re.sub(r"[^a-z0-9]+", " ", re.sub(r"['’]s?", "", _plain(text))).strip()
    text = _SMALL.sub(" ", _SUBJECT.sub(" ", _OPENING.sub("", text)))
    return " ".join(text.split())


@cache
def _forms() -> dict[str, Meaning]:
    """Normal form to meaning. A form with two meanings would make answers ambiguous: the tables must not have one."""
    forms: dict[str, Meaning] = {}
    listed: list[tuple[str, Meaning]] = [(wording, fact) for fact in facts() for wording in fact.wordings]
    listed += [(name, city) for city in cities() for name in city.names]
    for wording, meaning in listed:
        form = normal_form(wording)
        assert form, f"'{wording}' says nothing"
        assert forms.setdefault(form, meaning) is meaning, f"'{wording}' means both {forms[form]} and {meaning}"
    values = {
        (value, fact) for fact in facts() for city in cities() for value in _values(fact.key, city.facts[fact.key])
    }
    for form, fact in sorted(values, key=lambda value: value[0]):
        if not isinstance(forms.setdefault(form, fact), City):  # "Is it Singapore?" guesses
            assert forms[form] is fact, f"'{form}' is a value of both {forms[form]} and {fact}"
    return forms


def _values(key: str, words: str) -> list[str]:
    """The forms of a question that names what a city has, as it is answered or in part."""
    parts = [words]
    if key in ("continent", "language"):
        parts += re.split(r", | and ", words)
    values = [form for form in map(normal_form, parts) if form]
    if key == "language":
        values += [f"speak {value}" for value in values] + [f"{value} spoken" for value in values]
    if key == "fame":
        values += [f"{known} {value}" for value in values for known in ("known", "famous")]
    if key == "sea":
        values += [short for value in values if (short := re.sub(r" (?:sea|ocean)$", "", value)) != value]
    return values


def _plain(text: str) -> str:
    """Small letters without accents."""
    return "".join(mark for mark in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(mark))


def _rows(name: str) -> list[dict[str, str]]:
    text = (files(__package__) / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _split(cell: str) -> tuple[str, ...]:
    return tuple(part for part in cell.split("|") if part)


class Plan(Search):
    """Says what leaves the least to find: the highest expected return, found by searching all continuations."""

    def __init__(self, cities: Sequence[City]) -> None:
        super().__init__(len(cities))
        self._cities = cities
        self._parts = {fact.question: self._answers(fact) for fact in facts()}

    def fits(self, said: str, answered: str) -> int:
        """The cities about which this would be answered."""
        meaning = understand(said)
        return sum(1 << i for i, city in enumerate(self._cities) if answer(meaning, city) == answered)

    def search(self, left: int) -> tuple[float, str]:
        """Tries the questions from the most promising one on, then the guesses."""
        count = left.bit_count()
        members = [i for i in range(len(self._cities)) if left >> i & 1]
        best = (float("-inf"), self._cities[members[0]].guess)
        for most, question, parts in self._asking(left):
            if most > best[0]:
                best = max(best, (self._after(parts, count), question), key=lambda option: round(option[0], 9))
        for i in members:
            others = left & ~(1 << i)
            if (count - 1) / count * (at_best(count - 1) - 1) > best[0] or count == 1:
                value = (count - 1) / count * (self.move(others)[0] - 1) if others else 0.0
                best = max(best, (value, self._cities[i].guess), key=lambda option: round(option[0], 9))
        return best

    def _asking(self, left: int) -> list[tuple[float, str, list[int]]]:
        """The questions whose answer is open, the most promising first: the most each can earn, and its parts."""
        count = left.bit_count()
        asking = []
        for question, answers in self._parts.items():
            parts = [left & part for part in answers if left & part]
            if len(parts) > 1:
                most = sum(part.bit_count() * (at_best(part.bit_count()) - 1) for part in parts) / count
                asking.append((most, question, parts))
        return sorted(asking, key=lambda option: -option[0])

    def _after(self, parts: Sequence[int], count: int) -> float:
        return sum(part.bit_count() * (self.move(part)[0] - 1) for part in parts) / count

    def _answers(self, fact: Fact) -> list[int]:
        """The cities by what is answered about them."""
        parts: dict[str, int] = {}
        for i, city in enumerate(self._cities):
            told = answer(fact, city)
            parts[told] = parts.get(told, 0) | 1 << i
        return list(parts.values())


def at_best(count: int) -> float:
    """The expected return no player can beat with `count` equally likely cities, whatever may be asked.

    One question tells them all apart at best; with one or two of them, guessing at once is as good or better.
    """
    return -min(1.0, (count - 1) / 2)


@cache
def plan(subset: bool = False) -> Plan:
    """What the optimal player follows."""
    return Plan(cities(subset))


def bound(subset: bool = False) -> float:
    """The expected return of the best play there is with the questions that are understood."""
    return plan(subset).move((1 << len(cities(subset))) - 1)[0]
