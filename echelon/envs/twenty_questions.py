"""Twenty Questions: find the thing by asking. The published task (157 everyday things in 17 categories; a subset of
ten) with an exact oracle in place of a language model, so that a yes always means yes.

Knows the rules of the game and two scripted players of it. What is true of a thing and which wordings are
understood is in `knowledge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from echelon.envs import knowledge
from echelon.envs._shared import Player, Search, at_random, need_at_least, need_kind, need_split, user
from echelon.types import Message, Step, Task

EXACT_BELOW = 11
"""With fewer things left than this, the optimal player searches all continuations; above, it halves greedily."""

YES, NO, NOT_UNDERSTOOD = "Yes.", "No.", "I did not understand."


class TwentyQuestions:
    """Ask yes/no questions until the thing is found: -1 a turn, 0 for the turn that names it.

    A game that is not won ends after `max_turns`, and that end is `terminated`: the limit is a rule of the game, the
    dialogue shows how many turns are left, and nothing follows. So the return lies between -max_turns and 0.
    """

    def __init__(self, task: Task, *, subset: bool = False, max_turns: int = 20) -> None:
        self._thing = knowledge.thing(task.data["thing"])
        self._max_turns = max_turns
        self._turns = 0

    @classmethod
    def tasks(cls, split: str, *, subset: bool = False, max_turns: int = 20) -> list[Task]:
        """One task a thing. Both splits list the same things, as in the published task: the skill is the asking."""
        need_split("twenty_questions", split)
        need_at_least("twenty_questions", "max_turns", max_turns, 1, "a game needs a turn")
        return [
            Task(id=f"twenty_questions/{thing.name}", data={"thing": thing.name}) for thing in knowledge.things(subset)
        ]

    def start(self) -> list[Message]:
        """The instruction, in one short message."""
        return user(f"Guess my thing in {self._max_turns} yes/no questions, like: Is it alive? Is it a dog?")

    def step(self, action: str) -> Step:
        """Answer a question or a guess. What is outside the grammar is not understood and costs a turn all the same."""
        self._turns += 1
        meaning = knowledge.understand(action)
        won = meaning is not None and meaning is self._thing
        ended = won or self._turns >= self._max_turns
        return Step(
            messages=user(_answer(meaning, self._thing)),
            reward=0.0 if won else -1.0,
            terminated=ended,
            info={"win": float(won), "turns": float(self._turns)} if ended else {},
        )

    @classmethod
    def questions(cls) -> list[str]:
        """The canonical wording of every property: what a scripted player asks."""
        return [prop.question for prop in knowledge.properties()]

    @classmethod
    def guesses(cls, subset: bool = False) -> list[str]:
        """The canonical guess of every thing that can be the answer."""
        return [thing.guess for thing in knowledge.things(subset)]

    @classmethod
    def utterances(cls, *, subset: bool = False, max_turns: int = 20) -> list[str]:
        """Everything a scripted player may say."""
        return cls.questions() + cls.guesses(subset)

    @classmethod
    def player(
        cls, kind: str, seed: int = 0, *, guess: float = 0.5, subset: bool = False, max_turns: int = 20
    ) -> Player:
        """A scripted player of one episode.

        `random` says a random canonical guess with probability `guess`, else a random canonical question, and never
        listens. `optimal` keeps the things consistent with the answers; it needs no seed.
        """
        need_kind("twenty_questions", kind)
        if kind == "optimal":
            return lambda messages: plan(subset).say(messages)
        questions, guesses = cls.questions(), cls.guesses(subset)
        return at_random(seed, lambda draw: draw.choice(guesses if draw.random() < guess else questions))


class Plan(Search):
    """Asks what leaves the least to find.

    Among ten things or fewer its play has the highest expected return there is; with more it asks the question
    that splits them most evenly, and `bound` says how much that can cost.
    """

    def __init__(self, things: Sequence[knowledge.Thing]) -> None:
        super().__init__(len(things))
        self._things = things
        self._questions = {prop.question: self._where(prop) for prop in knowledge.properties()}
        self._guesses = {thing.guess: self._where(thing) for thing in things}

    def fits(self, said: str, answered: str) -> int:
        """The things of which this is true; everything where nothing was understood."""
        meaning = knowledge.understand(said)
        if meaning is None or answered not in (YES, NO):
            return self.everything
        return self._where(meaning) if answered == YES else ~self._where(meaning)

    def search(self, left: int) -> tuple[float, str]:
        """Tries all questions and guesses, or the most even question where too many things are left for that."""
        questions, guesses = self._questions, self._guesses
        if left.bit_count() >= EXACT_BELOW:
            even = min(questions, key=lambda text: abs(2 * (left & questions[text]).bit_count() - left.bit_count()))
            questions, guesses = {even: questions[even]}, {}
        options = [(self._value(left, yes, wins=False), text) for text, yes in questions.items()]
        options += [(self._value(left, yes, wins=True), text) for text, yes in guesses.items()]
        return max(options, key=lambda option: round(option[0], 9))

    def _value(self, left: int, yes: int, *, wins: bool) -> float:
        """Expected return of words that are true of the things in `yes` and, if `wins`, end the game for them."""
        yes, no = left & yes, left & ~yes
        if not yes or not (no or wins):
            return float("-inf")  # the answer is known already
        after = [part for part in (no, 0 if wins else yes) if part]
        return sum(part.bit_count() * (-1 + self.move(part)[0]) for part in after) / left.bit_count()

    def _where(self, meaning: knowledge.Meaning) -> int:
        return sum(1 << i for i, thing in enumerate(self._things) if knowledge.holds(meaning, thing))


def _answer(meaning: knowledge.Meaning | None, thing: knowledge.Thing) -> str:
    if meaning is None:
        return NOT_UNDERSTOOD
    return YES if knowledge.holds(meaning, thing) else NO


@cache
def bound(count: int) -> float:
    """The expected return no player can beat with `count` equally likely things, whatever may be asked.

    Every question is imagined to split the things exactly as it should.
    """
    if count <= 1:
        return 0.0
    guess = (count - 1) / count * (-1 + bound(count - 1))
    asks = (-1 + (k * bound(k) + (count - k) * bound(count - k)) / count for k in range(1, count // 2 + 1))
    return max(guess, *asks)


@cache
def plan(subset: bool = False) -> Plan:
    """What the optimal player follows; worked out once, in about a second for all things."""
    return Plan(knowledge.things(subset))
