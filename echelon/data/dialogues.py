"""Conversations whose replies are annotated with strategies, to decisions: the forms of ESConv and of DailyDialog.

They have no rewards: what a decision earns is for `strategies`. Knows no settings and no models.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from echelon.data.sources import Source, Table
from echelon.data.transitions import Cells, Transition, decoded, speaker, strategy_index
from echelon.errors import DataError
from echelon.text.dialogue import ASSISTANT, INVENTORIES, USER, DialogueState, Inventory

EMOTIONS = ("", "anger", "disgust", "fear", "happiness", "sadness", "surprise")
"""DailyDialog's, by number; the first is none."""

_TOPICS = {
    "1": "ordinary life",
    "2": "school life",
    "3": "culture and education",
    "4": "attitude and emotion",
    "5": "relationship",
    "6": "tourism",
    "7": "health",
    "8": "work",
    "9": "politics",
    "10": "finance",
}
"""DailyDialog's, by number."""


def is_conversation(cells: Cells) -> bool:
    """Whether a row is a whole conversation, not one decision of it."""
    return _said(cells) is not None


def read_conversation(cells: Cells, inventory: Inventory, where: str) -> list[Transition]:
    """The decisions of one conversation, in order, without rewards. Raises DataError, beginning with `where`.

    Of ESConv, every supporter's utterance is one, but for one that opens the conversation: there is nothing to answer.
    Of DailyDialog, every utterance but the first is one, and whoever says it is the assistant.
    """
    cells = _unpacked(cells)
    said = _said(cells) or []
    if any(isinstance(one, Mapping) and "speaker" in one for one in said):
        return _esconv(cells, said, inventory, where)
    return _daily_dialog(cells, said, inventory, where)


@dataclass(frozen=True, slots=True)
class _Decision:
    state: DialogueState
    strategy: int
    reply: str
    answer: str = ""


def _esconv(cells: Cells, said: Sequence[Any], inventory: Inventory, where: str) -> list[Transition]:
    told = [str(cells.get(key) or "").strip() for key in ("emotion_type", "problem_type", "situation")]
    emotion, description = told[0], ": ".join(filter(None, told[1:]))
    history: list[tuple[str, str]] = []
    heard: list[str] = []
    decisions: list[_Decision] = []
    for number, one in enumerate(said, 1):
        place = f"{where}: utterance {number}"
        who, words, strategy = _utterance(one, inventory, place)
        if not words:
            continue
        if who == USER:
            heard.append(words)
            continue
        if history or heard:
            if strategy is None:
                raise DataError(f"{place} is the supporter's and has no strategy. Annotate it, or remove it.")
            state = DialogueState(" ".join(heard), tuple(history), emotion, description)
            decisions.append(_Decision(state, strategy, words))
        history += [(USER, " ".join(heard))] if heard else []
        history.append((ASSISTANT, words))
        heard = []
    answers = [*(decision.state.query for decision in decisions[1:]), " ".join(heard)]
    answered = [replace(decision, answer=answer) for decision, answer in zip(decisions, answers, strict=False)]
    return _chain(answered, step=1, name=_fingerprint([told, list(said)]), where=where)


def _utterance(one: Any, inventory: Inventory, where: str) -> tuple[str, str, int | None]:
    """Who speaks, the words, and by which strategy, if that is said."""
    one = one if isinstance(one, Mapping) else {}
    words, who = one.get("content", one.get("text")), one.get("speaker")
    if not isinstance(words, str) or not isinstance(who, str):
        raise DataError(f'{where} is not {{"speaker": …, "content": …, "annotation": {{"strategy": …}}}}.')
    label = speaker(who)
    if label not in (USER, ASSISTANT):
        raise DataError(f"{where} is by {who!r:.40}. Speakers are seeker and supporter, or usr and sys.")
    noted = one.get("annotation") or {}
    named = one.get("strategy") or (noted.get("strategy") if isinstance(noted, Mapping) else None)
    strategy = strategy_index(named, inventory, None, where) if named and label == ASSISTANT else None
    return label, " ".join(words.split()), strategy


def _daily_dialog(cells: Cells, said: Sequence[Any], inventory: Inventory, where: str) -> list[Transition]:
    if inventory.strategies != INVENTORIES["daily_dialog"].strategies:
        raise DataError(
            f"{where}: this is a conversation of DailyDialog, whose strategies are "
            f"{', '.join(INVENTORIES['daily_dialog'].strategies)}. Set strategies to daily_dialog."
        )
    words, acts, emotions = _columns(cells, said, where)
    labels = (ASSISTANT, USER)
    decisions: list[_Decision] = []
    for at in range(1, len(words)):
        history = tuple((labels[(at - place) % 2], words[place]) for place in range(at - 1))
        state = DialogueState(words[at - 1], history, emotions[at - 1], str(cells.get("topic") or ""))
        answer = words[at + 1] if at + 1 < len(words) else ""
        decisions.append(_Decision(state, _act(acts[at], inventory, f"{where}: utterance {at + 1}"), words[at], answer))
    return _chain(decisions, step=2, name=_fingerprint([words]), where=where)


def _columns(cells: Cells, said: Sequence[Any], where: str) -> tuple[list[str], list[Any], list[str]]:
    """Words, acts and emotions of every utterance."""
    if said and all(isinstance(one, Mapping) for one in said):
        words, acts, felt = ([one.get(key) for one in said] for key in ("text", "act", "emotion"))
    else:
        words = list(said)
        acts = list(_first(cells, "act", "acts") or [])
        felt = list(_first(cells, "emotion", "emotions") or [0] * len(words))
    if not len(words) == len(acts) == len(felt):
        raise DataError(
            f"{where}: {len(words)} utterances, {len(acts)} acts and {len(felt)} emotions: each utterance has one of "
            "both. Correct the row, or remove it."
        )
    if not all(isinstance(one, str) for one in words):
        raise DataError(f"{where}: an utterance is not text. Correct the row, or remove it.")
    return [" ".join(one.split()) for one in words], acts, [_emotion(one, where) for one in felt]


def _act(said: Any, inventory: Inventory, where: str) -> int:
    """DailyDialog's own numbers begin at 1; 0 is none."""
    return strategy_index(said, inventory, 1, where)


def _emotion(said: Any, where: str) -> str:
    """Of a name or a number of DailyDialog's."""
    name = str(said).strip().lower()
    if re.fullmatch(r"no[ _]emotion|none", name):
        return ""
    found = EMOTIONS[int(name)] if name in map(str, range(len(EMOTIONS))) else name
    if found not in EMOTIONS:
        raise DataError(
            f"{where}: the emotion {said!r:.40} is none of DailyDialog's, which are 0 to {len(EMOTIONS) - 1} or "
            f"{', '.join(EMOTIONS[1:])}."
        )
    return found


def _chain(decisions: Sequence[_Decision], *, step: int, name: str, where: str) -> list[Transition]:
    """Decisions of one conversation; whoever takes one takes the next one `step` later."""
    states = [decision.state for decision in decisions]
    return [
        Transition(
            id=f"{name}/{number}",
            dialogue=name,
            state=decision.state,
            strategy=decision.strategy,
            reward=None,
            after=states[number + step] if number + step < len(states) else None,
            reply=decision.reply,
            answer=decision.answer,
            where=where,
        )
        for number, decision in enumerate(decisions)
    ]


def _fingerprint(said: Any) -> str:
    """A name that depends on what is said alone, so that copies of a conversation are one."""
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=8).hexdigest()


def _unpacked(cells: Cells) -> Cells:
    """A row whose only column is a conversation written as JSON."""
    found = decoded(cells["text"]) if set(cells) == {"text"} else None
    return found if isinstance(found, dict) else cells


def _said(cells: Cells) -> Sequence[Any] | None:
    """The list of utterances, if the row has one."""
    found = decoded(_first(_unpacked(cells), "dialog", "dialogue", "utterances"))
    return found if isinstance(found, list | tuple) else None


def _first(cells: Cells, *names: str) -> Any:
    return next((cells[name] for name in names if cells.get(name) is not None), None)


def raw_daily_dialog(source: Source) -> list[Table] | None:
    """DailyDialog as its authors publish it, as rows: a folder of dialogues_*.txt, or one such file; None elsewhere.

    Of a folder, the file of the split, in a folder of that name or not, or else the one file of all splits.
    """
    place, split = source.place, source.split
    if source.is_file:
        return [_raw(place)] if re.fullmatch(r"dialogues_\w+\.txt", place.name) else None
    names = (f"{split}/dialogues_{split}.txt", f"dialogues_{split}.txt", "dialogues_text.txt")
    return next(([_raw(place / name)] for name in names if (place / name).is_file()), None)


def _raw(text: Path) -> Table:
    kind = text.stem.removeprefix("dialogues_")
    suffix = "" if kind == "text" else f"_{kind}"
    acts, emotions = (text.with_name(f"dialogues_{what}{suffix}.txt") for what in ("act", "emotion"))
    for beside in (acts, emotions):
        if not beside.is_file():
            raise DataError(f"{text}: {beside.name} does not lie beside it, so what was said is not annotated.")
    topics = text.with_name("dialogues_topic.txt")
    files = [text, acts, emotions, *([topics] if topics.is_file() and kind == "text" else [])]
    return Table(str(text), _raw_rows(text, [file.read_text(encoding="utf-8").splitlines() for file in files]))


def _raw_rows(text: Path, columns: Sequence[list[str]]) -> Iterator[tuple[str, Cells]]:
    """One conversation a line: utterances ended by __eou__, and a number for each."""
    if len({len(lines) for lines in columns}) > 1:
        raise DataError(f"{text}: its lines and those of the files beside it are not as many. Get them again.")
    for number, (said, acts, emotions, *topic) in enumerate(zip(*columns, strict=True), 1):
        words = [part.strip() for part in said.split("__eou__")]
        cells = {"dialog": words[:-1] if not words[-1] else words, "act": acts.split(), "emotion": emotions.split()}
        if topic and topic[0].strip() in _TOPICS:
            cells["topic"] = _TOPICS[topic[0].strip()]
        yield f"{text}:{number}", cells
