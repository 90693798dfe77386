"""One row of a file of strategy decisions, whatever its columns are called, to one `Transition`.

What a column means is decided here and nowhere later. Knows no files, no tokens and no models.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from echelon.config import demand
from echelon.errors import DataError, ParseError, did_you_mean
from echelon.text.dialogue import ASSISTANT, USER, DialogueState, Inventory

Cells = Mapping[str, Any]
PREFIX = "next_"
"""What the columns of the next state usually begin with."""
State = DialogueState | str
"""A conversation, or the whole prompt of the upper level, ready as somebody wrote it."""


@dataclass(frozen=True, slots=True)
class Transition:
    """One decision of the upper level: where it was taken, what was chosen, what that earned, and what came of it."""

    id: str
    dialogue: str
    """Which conversation it is part of: one conversation is on one side of a split."""
    state: State
    strategy: int
    """The place of the strategy in the inventory."""
    reward: float | None
    """None where the file does not say."""
    after: State | None
    """The state of the next decision; None exactly where the conversation is over."""
    legal: tuple[int, ...] = ()
    """The strategies there were to choose from; empty for all."""
    legal_after: tuple[int, ...] = ()
    reply: str = ""
    """What was said by this strategy, where the file has it."""
    answer: str = ""
    """What the user answered to that."""
    truncated: bool = False
    """Cut off right after it: what follows still counts."""
    where: str = ""
    """File and line: complaints begin with it."""

    @property
    def terminated(self) -> bool:
        """Whether nothing follows."""
        return self.after is None


@dataclass(frozen=True)
class TransitionConfig:
    """How the columns of a file of decisions are called, and what its numbers mean. Conversations need none of it."""

    strategy_key: str = ""
    """Column of the strategy; empty finds it by its usual names."""
    reward_key: str = ""
    """Column of the reward; empty finds it by its usual names."""
    done_key: str = ""
    """Column that says whether the conversation ends; empty finds it by its usual names."""
    current_input_key: str = ""
    """Column of a ready prompt, to be read in place of emotion, description, history and query."""
    next_input_key: str = ""
    """Column of the ready prompt of the next decision."""
    next_state_prefix: str = PREFIX
    """What the columns of the next state begin with."""
    index_base: Literal[0, 1] | None = None
    """Where strategies that are given as numbers begin; without it such a column is refused."""
    reward_range: tuple[float, float] = (0.0, 5.0)
    """The least and the most that a reward may be; one outside is an error in the file."""

    def __post_init__(self) -> None:
        demand(self, "next_state_prefix", bool(self.next_state_prefix), "both states would be one. Give next_.")
        low, high = self.reward_range
        demand(self, "reward_range", low < high, "it is the least and the most. Give two numbers that ascend.")


ALIASES: Mapping[str, tuple[str, ...]] = {
    "emotion": ("emotion", "emo", "user_emotion"),
    "description": ("description", "desc", "situation", "topic"),
    "history": ("history", "hist", "dialogue_history"),
    "query": ("query", "current_query", "utterance", "input"),
    "strategy": ("strategy", "stra", "action", "label", "selected_strategy", "predicted_strategy"),
    "reward": ("reward", "rsat", "satisfaction", "score"),
    "done": ("done", "terminal", "is_terminal"),
    "dialogue": ("dialogue_id", "dialog_id", "conversation_id"),
    "reply": ("reply", "response"),
}
"""What each thing may be called, the first name first. Those of a state come after the prefix in the next one."""

_SPEAKERS = {
    **dict.fromkeys(("user", "usr", "seeker", "human", "customer", "client", "patient", "speaker"), USER),
    **dict.fromkeys(("assistant", "supporter", "sys", "bot", "gpt", "ai", "agent", "listener"), ASSISTANT),
    **dict.fromkeys(("counselor", "counsellor", "therapist", "model", "chatbot"), ASSISTANT),
}
_LABELLED = re.compile(r"\s*([^\W\d_][\w.-]*(?: [\w.-]+){0,2})\s*:(?!//)\s*(.*)")


def speaker(label: str) -> str:
    """Who speaks as prompts write it: User or Assistant where the label says so, else the label itself."""
    return _SPEAKERS.get(label.strip().casefold(), label.strip())


def read_transition(cells: Cells, inventory: Inventory, columns: TransitionConfig, where: str) -> Transition:
    """One row. Raises DataError, beginning with `where`, for whatever is missing, broken or could mean two things."""
    state = _state(cells, "", columns, where)
    if state is None:
        raise DataError(
            f"{where}: the columns {', '.join(cells)} hold no state: a query ({', '.join(ALIASES['query'])}), an "
            "object 'state', or a ready prompt in 'current_prompt'. Name its column with columns.current_input_key."
        )
    after = _next_state(cells, state, columns, where)
    strategy = _strategy(cells, inventory, columns, where)
    terminated, truncated = _ending(cells, columns, has_next=after is not None, where=where)
    legal = _legal(cells, "", inventory, columns, where)
    legal_after = () if terminated else _legal(cells, columns.next_state_prefix, inventory, columns, where)
    if legal and strategy not in legal:
        raise DataError(f"{where}: {inventory.strategies[strategy]} was chosen, and is not among the legal ones.")
    if legal and not terminated and not legal_after:
        raise DataError(
            f"{where}: 'legal' says what could be chosen here, and nothing says it of the next state. Add "
            f"'{columns.next_state_prefix}legal'."
        )
    answer = after.query if isinstance(after, DialogueState) else ""
    return Transition(
        id=_text(cells.get("id"), where) or where,
        dialogue=_text(_found(cells, ALIASES["dialogue"]), where),
        state=state,
        strategy=strategy,
        reward=_reward(cells, columns, where),
        after=None if terminated else after,
        legal=legal,
        legal_after=legal_after,
        reply=_text(_found(cells, ALIASES["reply"]), where),
        answer=answer,
        truncated=truncated,
        where=where,
    )


def strategy_index(said: Any, inventory: Inventory, index_base: int | None, where: str) -> int:
    """The strategy that a cell means: a name, an option, a letter, or a number where it is said what numbers begin at.

    Raises DataError for anything else; for a number without `index_base` too, since 1 may be the first or the second.
    """
    number = _integer(said)
    if isinstance(said, str):
        try:
            return inventory.find(said)
        except ParseError as error:
            if number is None:
                raise DataError(f"{where}: {error}") from error
    if number is None:
        raise DataError(f"{where}: the strategy is {said!r:.40}. Give a name, an option, a letter or a number.")
    if index_base is None:
        raise DataError(
            f"{where}: the strategy is the number {number}, and nothing says whether the first one is 0 or 1. Set "
            "columns.index_base to 0 or to 1."
        )
    if not 0 <= number - index_base < len(inventory):
        raise DataError(
            f"{where}: the strategy is the number {number}; with index_base = {index_base} they are {index_base} to "
            f"{len(inventory) - 1 + index_base}."
        )
    return number - index_base


def _state(cells: Cells, prefix: str, columns: TransitionConfig, where: str) -> State | None:
    """The state whose columns begin with the prefix; None where there is none."""
    setting = "next_input_key" if prefix else "current_input_key"
    ready = getattr(columns, setting)
    if ready and ready not in cells:
        raise DataError(_no_column(f"columns.{setting}", ready, cells, where))
    if ready or columns.current_input_key:
        return _text(cells.get(ready or f"{prefix}{columns.current_input_key}"), where) or None
    nested = decoded(cells.get(f"{prefix}state"))
    if nested is not None:
        if not isinstance(nested, Mapping):
            raise DataError(f"{where}: '{prefix}state' is {nested!r:.40}, not an object. Write {{\"query\": …}}.")
        cells, prefix = nested, ""
    query = _text(_found(cells, ALIASES["query"], prefix), where)
    history = read_history(_found(cells, ALIASES["history"], prefix), where)
    if not query and not history:
        return None if nested is not None else _text(cells.get(f"{prefix or 'current_'}prompt"), where) or None
    told = (_text(_found(cells, ALIASES[name], prefix), where) for name in ("emotion", "description"))
    return DialogueState(query, history, *told)


def _next_state(cells: Cells, state: State, columns: TransitionConfig, where: str) -> State | None:
    """What follows. What it does not say again of emotion and description is as it was; what was said, it must say."""
    after = _state(cells, columns.next_state_prefix, columns, where)
    if isinstance(state, str) or after is None:
        if after is not None and not isinstance(after, str):
            raise DataError(f"{where}: this state is a ready prompt and the next one is not. Give both in one form.")
        return after
    if isinstance(after, str):
        raise DataError(f"{where}: the next state is a ready prompt and this one is not. Give both in one form.")
    if state.history and not after.history:
        raise DataError(
            f"{where}: the next state has a query and no history, and this one has both. Add "
            f"'{columns.next_state_prefix}history', which ends with the reply."
        )
    return replace(after, emotion=after.emotion or state.emotion, description=after.description or state.description)


def read_history(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    """What was said before: lines of `Speaker: words`, or a list of such lines, of pairs, or of objects.

    Objects are {role, content}, {speaker, text} or {from, utterance}, in any pairing.
    """
    value = decoded(value)
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return tuple(_lines(value))
    if not isinstance(value, Sequence):
        raise DataError(f"{where}: the history is {value!r:.40}. Give text, or a list of who spoke and what was said.")
    said: list[tuple[str, str]] = []
    for number, item in enumerate(value, 1):
        if isinstance(item, str):
            said += _lines(item)
            continue
        if isinstance(item, Mapping):
            item = (_found(item, ("role", "speaker", "from")), _found(item, ("content", "text", "utterance", "value")))
        if not isinstance(item, Sequence) or len(item) != 2 or not all(isinstance(part, str) for part in item):
            raise DataError(
                f"{where}: utterance {number} of the history does not say who spoke and what. Give "
                '{"role": …, "content": …}, {"speaker": …, "text": …} or {"from": …, "utterance": …}.'
            )
        said.append((speaker(item[0]), item[1].strip()))
    return tuple(said)


def _lines(text: str) -> list[tuple[str, str]]:
    """Utterances from text; a line that nobody is named in goes on with the one before."""
    said: list[tuple[str, str]] = []
    for line in filter(str.strip, text.splitlines()):
        labelled = _LABELLED.fullmatch(line)
        if labelled:
            said.append((speaker(labelled[1]), labelled[2].strip()))
        elif said:
            said[-1] = (said[-1][0], f"{said[-1][1]} {line.strip()}")
        else:
            said.append(("", line.strip()))
    return said


def _strategy(cells: Cells, inventory: Inventory, columns: TransitionConfig, where: str) -> int:
    value = _named(cells, columns.strategy_key, "strategy", where)
    if value is None:
        raise DataError(
            f"{where}: the columns {', '.join(cells)} hold no strategy ({', '.join(ALIASES['strategy'])}). Fill it in, "
            "or name its column with columns.strategy_key."
        )
    return strategy_index(value, inventory, columns.index_base, where)


def _legal(cells: Cells, prefix: str, inventory: Inventory, columns: TransitionConfig, where: str) -> tuple[int, ...]:
    value = decoded(cells.get(f"{prefix}legal"))
    if value is None or value == "":
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{where}: '{prefix}legal' is {value!r:.40}, not a list of strategies.")
    return tuple(sorted({strategy_index(one, inventory, columns.index_base, where) for one in value}))


def _reward(cells: Cells, columns: TransitionConfig, where: str) -> float | None:
    value = _named(cells, columns.reward_key, "reward", where)
    if value is None:
        return None
    try:
        reward = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        reward = math.nan
    low, high = columns.reward_range
    if not low <= reward <= high:
        raise DataError(
            f"{where}: the reward is {value!r:.40}, and rewards are numbers from {low:g} to {high:g}. Correct it, or "
            "set columns.reward_range."
        )
    return reward


def _ending(cells: Cells, columns: TransitionConfig, *, has_next: bool, where: str) -> tuple[bool, bool]:
    """Whether the conversation is over after this, and whether it was cut off."""
    done = _flag(_named(cells, columns.done_key, "done", where), "done", where)
    terminated = _flag(cells.get("terminated"), "terminated", where)
    truncated = bool(_flag(cells.get("truncated"), "truncated", where))
    if terminated is None:
        terminated = False if truncated else done
    if terminated is None:
        terminated = not has_next  # the file says nothing else
    if not has_next and not terminated:
        why = "was cut off (truncated)" if truncated else "goes on (done is false)"
        raise DataError(
            f"{where}: the conversation {why}, and there is no next state to go on from. Add it, or say that it ends."
        )
    return terminated, truncated and not terminated


def _named(cells: Cells, key: str, what: str, where: str) -> Any:
    """The cell of the column that a setting names, or else of the one that has a usual name."""
    if key:
        if key not in cells:
            raise DataError(_no_column(f"columns.{what}_key", key, cells, where))
        return None if cells[key] == "" else cells[key]
    there = {name: cells[name] for name in ALIASES[what] if not _blank(cells.get(name))}
    if len({json.dumps(value, default=str) for value in there.values()}) > 1:
        raise DataError(f"{where}: {' and '.join(there)} differ. Set columns.{what}_key to the column that is meant.")
    return next(iter(there.values()), None)


def _no_column(setting: str, key: str, cells: Cells, where: str) -> str:
    return f"{where}: {setting} = {key}: the row has {', '.join(cells)}.{did_you_mean(key, cells)}"


def _found(cells: Cells, names: Sequence[str], prefix: str = "") -> Any:
    """The first of these that is filled in."""
    return next((cells[prefix + name] for name in names if not _blank(cells.get(prefix + name))), None)


def _blank(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _text(value: Any, where: str) -> str:
    if _blank(value):
        return ""
    if isinstance(value, Mapping | list | tuple):
        raise DataError(f"{where}: {value!r:.40} stands where text should be.")
    return str(value).strip()


def decoded(value: Any) -> Any:
    """A list or an object that a table holds as text; anything else, and text that is no JSON, as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _integer(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"\s*-?\d+\s*", value) else None
    return value if isinstance(value, int) else None


def _flag(value: Any, name: str, where: str) -> bool | None:
    """Yes, no, or nothing said."""
    if _blank(value):
        return None
    words = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}
    said = words.get(str(value).strip().lower())
    if said is None:
        raise DataError(f"{where}: '{name}' is {value!r:.40}, neither true nor false.")
    return said
