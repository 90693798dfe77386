"""A conversation at one of its turns, the strategies there are, and what each level reads about both.

Off-line data, play, evaluation and chat all get their prompts here, so a level reads at work what it learned from.
Knows no tokens: how long a prompt is, a caller counts.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from echelon.errors import ConfigError, DataError, ParseError, did_you_mean
from echelon.types import Message

USER, ASSISTANT = "User", "Assistant"
"""Who speaks in a history: the person who is answered, and the one whose replies are chosen and written."""

DIMENSIONS = ("acceptance", "effectiveness", "sensitivity", "fluency", "emotion improvement")
"""What a judge says yes or no to; each yes is a point of satisfaction, 0 to 5."""

_QUESTIONS = (
    "does the user take the reply up rather than turn it down?",
    "does it help with what the user needs now?",
    "does it show that the user's feelings were noticed?",
    "is it fluent, natural language?",
    "does the user feel better after it?",
)


@dataclass(frozen=True, slots=True)
class DialogueState:
    """What is known when a reply is due. The history comes first, then the query."""

    query: str
    """What the user said last. Empty where the assistant spoke last and goes on."""
    history: tuple[tuple[str, str], ...] = ()
    """What was said before the query, oldest first: who spoke, and the words."""
    emotion: str = ""
    """What the user feels, where somebody said so."""
    description: str = ""
    """What the conversation is about."""


@dataclass(frozen=True)
class Inventory:
    """The strategies a level chooses from, and the option each is chosen by, in the same order.

    Without options they are (1) … (K). Raises ConfigError for fewer than two strategies, names or options that are
    empty or the same, and options that are not as many as the strategies.
    """

    strategies: tuple[str, ...]
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        options = self.options or tuple(f"({number})" for number in range(1, len(self.strategies) + 1))
        object.__setattr__(self, "options", options)
        if len(self.strategies) < 2:
            raise ConfigError(f"strategies = {list(self.strategies)}: there is nothing to choose. Name two or more.")
        if len(options) != len(self.strategies):
            raise ConfigError(
                f"options: {len(options)} of them for {len(self.strategies)} strategies. Give one for each, or none "
                f"for (1) to ({len(self.strategies)})."
            )
        for what, names in (("strategies", self.strategies), ("options", options)):
            keys = [_key(name) if what == "strategies" else name.strip() for name in names]
            if "" in keys:
                raise ConfigError(f"{what} = {list(names)}: one of them is empty. Give each a name.")
            twice = [name for place, name in enumerate(names) if keys[place] in keys[:place]]
            if twice:
                raise ConfigError(f"{what}: '{twice[0]}' is there twice, so a choice could mean either. Rename one.")

    def __len__(self) -> int:
        """How many strategies there are."""
        return len(self.strategies)

    def label(self, index: int) -> str:
        """A strategy as prompts write it: `(3) Reflection of Feelings`."""
        return f"{self.options[index]} {self.strategies[index]}"

    def find(self, said: str) -> int:
        """The place of the strategy that a name, an option, a label or a letter (A, B, …) means.

        Case, hyphens, underscores and the s of a plural do not matter in names. A bare number is none of these: whether
        it counts from 0 or from 1, it does not say. Raises ParseError with those there are.
        """
        text, key = said.strip(), _key(said)
        letters = list(string.ascii_uppercase[: len(self)])
        names = [_key(name) for name in self.strategies]
        labels = [self.label(place) for place in range(len(self))]
        for known, meant in ((names, key), (self.options, text), (labels, text), (letters, text)):
            if meant in known:
                return list(known).index(meant)
        raise ParseError(
            f"{said!r} is none of the strategies {', '.join(self.strategies)}.{did_you_mean(text, self.strategies)}"
        )


def _key(name: str) -> str:
    """A name without what people write in different ways: Question and questions are one."""
    return " ".join(word.removesuffix("s") for word in re.split(r"[\W_]+", name.casefold())).strip()


INVENTORIES: Mapping[str, Inventory] = {
    "esconv": Inventory(
        (
            "Question",
            "Restatement or Paraphrasing",
            "Reflection of Feelings",
            "Self-disclosure",
            "Affirmation and Reassurance",
            "Providing Suggestions",
            "Information",
            "Others",
        )
    ),
    "daily_dialog": Inventory(("Inform", "Question", "Directives", "Commissive")),
}
"""Inventories with a name: of ESConv (Liu et al. 2021) and of DailyDialog (Li et al. 2017, its dialogue acts)."""


def inventory(named: str | Sequence[str], options: Sequence[str] | None = None) -> Inventory:
    """The inventory with this name, alone or as the only one of a list, or one of the strategies listed.

    `options` replaces (1) … (K). Raises ConfigError for an unknown name, with a suggestion.
    """
    names = [named] if isinstance(named, str) else list(named)
    if len(names) == 1:
        if names[0] not in INVENTORIES:
            raise ConfigError(
                f"strategies = {names[0]}: there is no such inventory. Give {' or '.join(INVENTORIES)}, or list two or "
                f"more strategies.{did_you_mean(names[0], INVENTORIES)}"
            )
        names = list(INVENTORIES[names[0]].strategies)
    return Inventory(tuple(names), tuple(options or ()))


def strategist_prompt(state: DialogueState, inventory: Inventory) -> list[Message]:
    """What the upper level reads: the conversation and the menu. What answers it is the text of one option."""
    menu = [inventory.label(place) for place in range(len(inventory))]
    return _asked(
        "You plan what an assistant says to a user. Choose the strategy of its next reply.",
        *_block(state),
        "Strategies:",
        *menu,
        f"Answer with one option only, {inventory.options[0]} to {inventory.options[-1]}.",
    )


def responder_prompt(state: DialogueState, strategy: str | None = None) -> list[Message]:
    """What the lower level reads: the conversation and the strategy to follow, given as `Inventory.label` writes it.

    Without one, how to reply is left open.
    """
    return _asked(
        "You are the assistant in this conversation.",
        *_block(state),
        *([] if strategy is None else [f"Strategy: {strategy}"]),
        f"Write one brief reply{'' if strategy is None else ' that follows the strategy'}.",
    )


def judge_prompt(state: DialogueState, reply: str, answer: str = "") -> list[Message]:
    """What a judge reads: the conversation, the reply, what the user answered to it, and five questions.

    The answer is written as `parse_judgement` reads it.
    """
    questions = [f"{name}: {question}" for name, question in zip(DIMENSIONS, _QUESTIONS, strict=True)]
    return _asked(
        "Judge the last reply of the assistant in this conversation.",
        *_block(state),
        f"{ASSISTANT} (the reply): {_line(reply)}",
        *([f"{USER} (after it): {_line(answer)}"] if answer.strip() else []),
        "Questions:",
        *questions,
        "Answer with these five lines only, yes or no in each:",
        *(f"{name}: yes" if place == 0 else f"{name}: no" for place, name in enumerate(DIMENSIONS)),
    )


def _asked(*lines: str) -> list[Message]:
    return [Message(role="user", content="\n".join(lines))]


def _block(state: DialogueState) -> list[str]:
    """What both levels and the judge know, one line for each thing."""
    told = (("Emotion", state.emotion), ("Situation", state.description))
    said = (*state.history, *([(USER, state.query)] if state.query.strip() else []))
    lines = [*((label, text) for label, text in told if text.strip()), *said]
    return [f"{label}: {_line(text)}" if label else _line(text) for label, text in lines]


def _line(text: str) -> str:
    """An utterance on one line: what looks like another speaker's line inside it must not be one."""
    return " ".join(text.split())


def fit(
    state: DialogueState,
    render: Callable[[DialogueState], Sequence[Message]],
    count: Callable[[Sequence[Message]], int],
    budget: int | None,
) -> DialogueState:
    """The state with as much of its latest history as fits: `count(render(state))` is at most `budget`.

    Everything else stays: what is felt and described, the query, the menu and the instruction. Raises DataError where
    these alone are too long. No budget keeps everything.
    """
    if budget is None or count(render(state)) <= budget:
        return state
    drops, keeps = 0, len(state.history)  # dropping `drops` is too few, dropping `keeps` is enough
    bare = count(render(replace(state, history=())))
    if bare > budget:
        raise DataError(
            f"the query, what is known and the instruction alone take {bare} tokens, more than the budget of {budget}. "
            "Raise max_prompt_tokens or shorten them: none of them can be dropped."
        )
    while keeps - drops > 1:
        middle = (drops + keeps) // 2
        if count(render(replace(state, history=state.history[middle:]))) <= budget:
            keeps = middle
        else:
            drops = middle
    return replace(state, history=state.history[keeps:])


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge said of one reply: yes or no in each of the `DIMENSIONS`."""

    dimensions: Mapping[str, bool]

    @property
    def total(self) -> int:
        """Satisfaction, 0 to 5."""
        return sum(self.dimensions.values())


def parse_judgement(text: str) -> Judgement:
    """The five lines that `judge_prompt` asks for, in any order. Raises ParseError for anything more or less."""
    found: dict[str, bool] = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, _, said = (part.strip().lower() for part in line.partition(":"))
        if name not in DIMENSIONS or said.rstrip(".") not in ("yes", "no") or name in found:
            raise ParseError(f"{line!r:.80} is not one of the five lines of a judgement, such as 'fluency: yes'.")
        found[name] = said.startswith("yes")
    missing = _missing(found)
    if missing:
        raise ParseError(f"the judgement says nothing of {', '.join(missing)}.")
    return Judgement({name: found[name] for name in DIMENSIONS})


def _missing(found: Iterable[str]) -> list[str]:
    return [name for name in DIMENSIONS if name not in set(found)]
