"""Guess the number: higher or lower, in as few turns as possible. The smallest game in which asking well pays."""

from __future__ import annotations

import re
from collections.abc import Sequence

from echelon.envs._shared import Player, at_random, exchanges, need_at_least, need_kind, need_split, user
from echelon.errors import ConfigError
from echelon.types import Message, Step, Task

HIGHER, LOWER, CORRECT, NOT_UNDERSTOOD = "Higher.", "Lower.", "Correct.", "Say one number."


class GuessNumber:
    """Find the number from `low` to `high`: -1 a turn, 0 for the turn that names it.

    A game that is not won ends after `max_turns`, and that end is `terminated`: the limit is a rule of the game. So
    the return lies between -max_turns and 0.
    """

    def __init__(self, task: Task, *, low: int = 1, high: int = 10, max_turns: int = 5) -> None:
        self._number = int(task.data["number"])
        self._low, self._high, self._max_turns = low, high, max_turns
        self._turns = 0

    @classmethod
    def tasks(cls, split: str, *, low: int = 1, high: int = 10, max_turns: int = 5) -> list[Task]:
        """One task a number. Both splits list the same numbers: the skill is the searching."""
        need_split("guess_number", split)
        need_at_least("guess_number", "max_turns", max_turns, 1, "a game needs a turn")
        if low > high:
            raise ConfigError(f"guess_number: low = {low}, high = {high}: there is no number between. Swap them.")
        return [Task(id=f"guess_number/{number}", data={"number": number}) for number in range(low, high + 1)]

    def start(self) -> list[Message]:
        """The instruction, in one short message."""
        return user(f"Guess my number from {self._low} to {self._high}.")

    def step(self, action: str) -> Step:
        """Answer a guess. The text must contain one number; other text is not understood and costs a turn."""
        self._turns += 1
        guess = number_in(action)
        won = guess == self._number
        ended = won or self._turns >= self._max_turns
        return Step(
            messages=user(self._answer(guess)),
            reward=0.0 if won else -1.0,
            terminated=ended,
            info={"win": float(won), "turns": float(self._turns)} if ended else {},
        )

    @classmethod
    def utterances(cls, *, low: int = 1, high: int = 10, max_turns: int = 5) -> list[str]:
        """Everything a scripted player may say."""
        return [str(number) for number in range(low, high + 1)]

    @classmethod
    def player(cls, kind: str, seed: int = 0, *, low: int = 1, high: int = 10, max_turns: int = 5) -> Player:
        """A scripted player of one episode: `random` says any number and never listens, `optimal` bisects."""
        need_kind("guess_number", kind)

        def bisect(messages: Sequence[Message]) -> str:
            least, most = low, high
            for said, answered in exchanges(messages):
                guess = number_in(said)
                if guess is not None and answered == HIGHER:
                    least = max(least, guess + 1)
                elif guess is not None and answered == LOWER:
                    most = min(most, guess - 1)
            return str((least + most) // 2)

        return bisect if kind == "optimal" else at_random(seed, lambda draw: str(draw.randint(low, high)))

    def _answer(self, guess: int | None) -> str:
        if guess is None:
            return NOT_UNDERSTOOD
        if guess == self._number:
            return CORRECT
        return HIGHER if guess < self._number else LOWER


def number_in(text: str) -> int | None:
    """The one whole number a text contains (of at most nine digits), or None."""
    numbers = re.findall(r"-?[0-9]+", text)
    return int(numbers[0]) if len(numbers) == 1 and len(numbers[0]) <= 10 else None
