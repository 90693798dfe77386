"""Wordle over a short list of common words: name the word in six turns, told of each letter whether it is in place.

Knows the rules and two scripted players, and no model. The words are in `words.txt`, one a line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from echelon.envs._shared import Player, Search, at_random, need_at_least, need_kind, need_split, user
from echelon.errors import ConfigError, DataError, did_you_mean
from echelon.types import Message, Step, Task

HERE, ELSEWHERE, NOWHERE = "+", "?", "-"
NOT_UNDERSTOOD = "Say one word of the list."


class Wordle:
    """Name the five-letter word: -1 a turn, 0 for the turn that names it.

    `words` is how many of the list can be the answer, and only those are understood. The answer tells of each letter
    whether it is in its place (+), elsewhere in the word (?) or not in it (-). A game that is not won ends after
    `max_turns`, and that end is `terminated`: the limit is a rule of the game.
    """

    def __init__(self, task: Task, *, words: int = 50, max_turns: int = 6) -> None:
        self._word, self._words = str(task.data["word"]), word_list(words)
        if self._word not in self._words:
            raise DataError(
                f"wordle: '{self._word}' is not one of the first {words} words.{did_you_mean(self._word, self._words)} "
                "Use the task's own settings."
            )
        self._max_turns, self._turns = max_turns, 0

    @classmethod
    def tasks(cls, split: str, *, words: int = 50, max_turns: int = 6) -> list[Task]:
        """One task a word. Both splits list the same words: the skill is reading what the letters tell."""
        need_split("wordle", split)
        need_at_least("wordle", "max_turns", max_turns, 1, "a game needs a turn")
        return [Task(f"wordle/{word}", {"word": word}) for word in word_list(words)]

    def start(self) -> list[Message]:
        """The instruction, in one short message."""
        return user(
            f"Guess my five-letter word in {self._max_turns} turns. "
            f"{HERE} is a letter in its place, {ELSEWHERE} elsewhere, {NOWHERE} not in it."
        )

    def step(self, action: str) -> Step:
        """Mark a guess. The text must name exactly one word of the list; other text is not marked and costs a turn."""
        self._turns += 1
        guess = word_in(action, self._words)
        won = guess == self._word
        ended = won or self._turns >= self._max_turns
        return Step(
            messages=user(NOT_UNDERSTOOD if guess is None else told(guess, marks(guess, self._word))),
            reward=0.0 if won else -1.0,
            terminated=ended,
            info={"win": float(won), "turns": float(self._turns)} if ended else {},
        )

    @classmethod
    def utterances(cls, *, words: int = 50, max_turns: int = 6) -> list[str]:
        """Everything a scripted player may say."""
        return list(word_list(words))

    @classmethod
    def player(cls, kind: str, seed: int = 0, *, words: int = 50, max_turns: int = 6) -> Player:
        """A scripted player of one episode: `random` says any word and never listens, `optimal` searches everything.

        No player does better than the optimal one; `bound` is what it earns.
        """
        need_kind("wordle", kind)
        return plan(words).say if kind == "optimal" else at_random(seed, lambda draw: draw.choice(word_list(words)))


@cache
def word_list(count: int) -> tuple[str, ...]:
    """The first `count` words, the most everyday ones first."""
    every = tuple((files(__package__) / "words.txt").read_text(encoding="utf-8").split())
    if not 1 <= count <= len(every):
        raise ConfigError(f"wordle: words = {count}: the list has {len(every)}. Use 1 to {len(every)}.")
    return every[:count]


def word_in(text: str, words: Sequence[str]) -> str | None:
    """The one word of the list that a text names, or None."""
    named = set(re.findall(r"[a-z]+", text.lower())) & set(words)
    return named.pop() if len(named) == 1 else None


def marks(guess: str, word: str) -> str:
    """What is told about each letter of a guess: + in its place, ? elsewhere, - nowhere (else).

    A letter of the word is spent on one letter of the guess: first on the one in its place, then from left to right.
    """
    spare = Counter(letter for letter, guessed in zip(word, guess, strict=True) if letter != guessed)
    marked = []
    for letter, guessed in zip(word, guess, strict=True):
        mark = HERE if letter == guessed else ELSEWHERE if spare[guessed] else NOWHERE
        spare[guessed] -= mark == ELSEWHERE
        marked.append(mark)
    return "".join(marked)


def told(guess: str, marked: str) -> str:
    """Marks as they are said: each letter with its mark, apart from the next ("a+ p? p- l- e-")."""
    return " ".join(letter + mark for letter, mark in zip(guess, marked, strict=True))


class Plan(Search):
    """Says the word with the highest expected return there is, found by searching all continuations."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__(len(words))
        self._words = words
        self._parts = [self._told_apart(guess) for guess in words]

    def fits(self, said: str, answered: str) -> int:
        """The words of which this would be told about the guess."""
        guess = word_in(said, self._words)
        if guess is None:
            return self.everything
        return sum(1 << i for i, word in enumerate(self._words) if told(guess, marks(guess, word)) == answered)

    def search(self, left: int) -> tuple[float, str]:
        """Tries the guesses from the most promising one on, until none of the others can be better."""
        best = (float("-inf"), "")
        for most, i, parts in self._guesses(left):
            if most <= best[0] + 1e-9:
                break
            after = sum(part.bit_count() * (self.move(part)[0] - 1) for part in parts) / left.bit_count()
            best = max(best, (after, self._words[i]), key=lambda option: round(option[0], 9))
        return best

    def _guesses(self, left: int) -> list[tuple[float, int, list[int]]]:
        """The most each guess can earn, the guess, and what may be left after it when it is wrong."""
        count = left.bit_count()
        found = []
        for i, parts in enumerate(self._parts):
            rest = [left & part for part in parts if left & part & ~(1 << i)]
            if rest != [left]:
                most = sum(part.bit_count() * (at_best(part.bit_count()) - 1) for part in rest) / count
                found.append((most, i, rest))
        return sorted(found, key=lambda option: (-option[0], option[1]))

    def _told_apart(self, guess: str) -> list[int]:
        parts: dict[str, int] = {}
        for i, word in enumerate(self._words):
            marked = marks(guess, word)
            parts[marked] = parts.get(marked, 0) | 1 << i
        return list(parts.values())


def at_best(count: int) -> float:
    """The expected return no player can beat with `count` equally likely words: a guess that tells all others apart."""
    return -(count - 1) / count


@cache
def plan(words: int) -> Plan:
    """What the optimal player follows."""
    return Plan(word_list(words))


def bound(words: int = 50) -> float:
    """The expected return of the best play there is, when `max_turns` is long enough for it."""
    return plan(words).move((1 << words) - 1)[0]
