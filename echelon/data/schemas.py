"""What a row means: its columns in, a conversation, a comparison or a prompt out. Knows no files, splits or models.

Every complaint begins with the place of the row and is one line: people fix data with an editor, not with a debugger.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from echelon.data.problems import PROBLEMS, asked_as
from echelon.errors import DataError, did_you_mean
from echelon.types import Message

Schema = Literal["sft", "preference", "prompt"]
Columns = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sft:
    """A conversation to imitate. It ends with an assistant message."""

    messages: list[Message]
    completion: str = ""
    """How the last message goes on, if it is only the beginning of what was said; nothing else is learned then."""
    recorded: tuple[str, int] | None = None
    """The episode and the step it was said in, where the row is one of control. Other steps may say the same words."""


@dataclass(frozen=True, slots=True)
class Preference:
    """Two ways to go on after the same prompt, and which of them somebody preferred.

    `chosen` and `rejected` begin with an assistant message, in which they differ, and end with one, usually the same.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    margin: float = 0.0
    """By how much the chosen one is better; 0 where nobody said."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Something to answer. If it ends with an assistant message, that is the beginning of the answer."""

    messages: list[Message]
    columns: dict[str, Any] = field(default_factory=dict)
    """Every other column of the row, as it was read: what reward functions compare answers with."""
    where: str = field(default="", compare=False)
    """Its place, for complaints."""


Row = Sft | Preference | Prompt

_ASKED = ("prompt", "question")
_LAYOUTS: dict[Schema, list[Columns]] = {
    "sft": [
        ("messages", "completion"),
        ("messages",),
        *product(_ASKED, ("response", "response_j", "completion", "chosen")),
        ("question", "answer"),
    ],
    "preference": [
        (asked, *pair) for asked in _ASKED for pair in (("chosen", "rejected"), ("response_j", "response_k"))
    ],
    "prompt": [*PROBLEMS, ("prompt",), ("question",), ("problem",), ("messages",)],
}
"""The columns each schema may be read from; the first that are all there are taken."""

_NEEDS: dict[Schema, str] = {
    "sft": "messages, or prompt or question with response, response_j, completion or chosen, or question with answer",
    "preference": "prompt or question with chosen and rejected, or with response_j and response_k",
    "prompt": "prompt, question, problem or messages, or question with choices or options, text or prompt with "
    "test_list, or prompt with test and entry_point",
}
_ROLES = ("system", "user", "assistant", "tool")
_MAY_FOLLOW = {
    "": {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}


def find_layout(columns: Iterable[str], schema: Schema, where: str) -> Columns:
    """The columns that rows of this schema are read from; DataError with those there are if none of the forms fits."""
    there = list(columns)
    for layout in _LAYOUTS[schema]:
        if all(column in there for column in layout):
            return layout
    others = [other for other, layouts in _LAYOUTS.items() if any(set(layout) <= set(there) for layout in layouts)]
    known = {column for layouts in _LAYOUTS.values() for layout in layouts for column in layout}
    hints = (did_you_mean(column, known) for column in there if column not in known)
    raise DataError(
        f"{where}: the columns {_listed(there)} do not make rows of the schema {schema}, which needs {_NEEDS[schema]}."
        + (f" They fit the schema {_listed(others)}." if others else next(filter(None, hints), ""))
    )


def read_row(cells: Mapping[str, Any], layout: Columns, schema: Schema, where: str) -> Row:
    """One row as an example of its schema. DataError, beginning with `where`, for whatever is missing or broken."""
    for column in layout:
        if column not in cells:
            raise DataError(f"{where}: '{column}' is missing, and the first row has it. Add it, or remove the row.")
    if schema == "sft":
        return _read_sft(cells, layout, where)
    if schema == "preference":
        return _read_preference(cells, layout, where)
    if layout in PROBLEMS:
        question, columns = asked_as(cells, layout, where)
        return Prompt([Message(role="user", content=question)], columns, where)
    (asked,) = layout
    if asked == "messages":
        messages = _conversation(cells[asked], asked, where)
        if messages[-1]["role"] == "assistant" and "completion" not in cells:  # an answer to imitate
            messages = messages[:-1]
    else:
        messages = read_prompt(cells[asked], asked, where)
    return Prompt(messages, {column: value for column, value in cells.items() if column != asked}, where)


def identity(row: Row) -> list[Any]:
    """What makes two rows the same row: everything that is said, and of a step of an episode which one it is."""
    if isinstance(row, Preference):
        return [row.prompt, row.chosen, row.rejected]
    if isinstance(row, Sft) and row.completion:
        return [row.messages, row.completion, *(row.recorded or ())]
    return [row.messages]


def kinship(row: Row) -> list[Any]:
    """What keeps rows on one side of a split: what was said before the last answer, whatever the schema, or the episode
    of a recorded step."""
    if isinstance(row, Preference):
        return [row.prompt]
    if isinstance(row, Sft) and row.recorded:
        return [row.recorded[0]]
    return [row.messages[:-1] if isinstance(row, Sft) and not row.completion else row.messages]


def _read_sft(cells: Mapping[str, Any], layout: Columns, where: str) -> Sft:
    if layout == ("messages", "completion"):
        return _read_completed(cells, where)
    if layout == ("messages",):
        messages = _conversation(cells["messages"], "messages", where)
    else:
        asked, said = layout
        prompt = read_prompt(cells[asked], asked, where)
        answer = _answer(cells[said], said, where, may_be_empty=said == "chosen")
        answer, prompt = _after(prompt, answer, said, where)
        messages = [*prompt, *answer]
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no message is the assistant's, so there is nothing to learn from. Remove the line.")
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the last message is the {messages[-1]['role']}'s, and nothing is learned from it. Let the "
            "conversation end with the assistant's."
        )
    return Sft(messages)


def _read_completed(cells: Mapping[str, Any], where: str) -> Sft:
    """A prompt and its completion, which is a message of its own or goes on with the one that the prompt begins."""
    messages = _conversation(cells["messages"], "messages", where)
    completion = _text(cells["completion"], "'completion'", where)
    if messages[-1]["role"] == "assistant":
        episode, step = cells.get("episode"), cells.get("step")
        recorded = (episode, step) if isinstance(episode, str) and isinstance(step, int) else None
        return Sft(messages, completion, recorded)
    answer = [*messages, Message(role="assistant", content=completion)]
    _check_roles(answer, "messages", where)
    return Sft(answer)


def _read_preference(cells: Mapping[str, Any], layout: Columns, where: str) -> Preference:
    asked, better, worse = layout
    prompt = read_prompt(cells[asked], asked, where)
    chosen, before = _after(prompt, _answer(cells[better], better, where, may_be_empty=True), better, where)
    rejected, also = _after(prompt, _answer(cells[worse], worse, where, may_be_empty=True), worse, where)
    if before != also:
        raise DataError(
            f"{where}: '{better}' and '{worse}' begin with different system messages, so they do not answer the same "
            "prompt. Give both the same one."
        )
    if chosen == rejected:
        raise DataError(f"{where}: '{better}' and '{worse}' are the same, so nothing is preferred. Remove the row.")
    shared = _shared_turns(chosen, rejected)
    margin = _margin(cells["margin"], where) if "margin" in cells else 0.0
    return Preference([*before, *chosen[:shared]], chosen[shared:], rejected[shared:], margin)


def _shared_turns(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """How many messages both begin with, up to the assistant message with which they part."""
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    both = (chosen, rejected)
    while same and not all(same < len(side) and side[same]["role"] == "assistant" for side in both):
        same -= 1
    return same


def read_prompt(value: Any, name: str, where: str, *, may_be_empty: bool = False) -> list[Message]:
    """What was said before an answer. With `may_be_empty` the assistant may have said nothing: it was recorded, and
    nobody is to imitate it."""
    messages = _conversation(value, name, where, may_be_empty=may_be_empty)
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"{where}: the last message of '{name}' is the assistant's, so there is nothing to answer. Let it end with "
            "the user's."
        )
    return messages


def _answer(value: Any, name: str, where: str, *, may_be_empty: bool) -> list[Message]:
    """What was said: one assistant message for text; the messages of a list, which may repeat the prompt."""
    if not isinstance(value, list | tuple):
        return [Message(role="assistant", content=_text(value, f"'{name}'", where, may_be_empty=may_be_empty))]
    messages = _messages(value, name, where, may_be_empty=may_be_empty)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: the last message of '{name}' is not the assistant's. Let it end with the answer.")
    return messages


def _after(prompt: list[Message], answer: list[Message], name: str, where: str) -> tuple[list[Message], list[Message]]:
    """What is new in the answer, and the prompt: with the system message, where only the answer repeats it with one."""
    if answer[0]["role"] != "assistant":
        system = answer[:1] if answer[0]["role"] == "system" and prompt[0]["role"] != "system" else []
        prompt = [*system, *prompt]
        if [_bare(message) for message in answer[: len(prompt)]] != [_bare(message) for message in prompt]:
            raise DataError(
                f"{where}: '{name}' does not begin with the prompt. Begin with its messages, unchanged, or give the "
                "answer alone."
            )
        answer = answer[len(prompt) :]
    _check_roles([*prompt, *answer], name, where)
    return answer, prompt


def _bare(message: Message) -> tuple[str, str]:
    return message["role"], message["content"].strip()


def _conversation(value: Any, name: str, where: str, *, may_be_empty: bool = False) -> list[Message]:
    """Text as the message of a user, a list as the messages it holds; `messages` may also be a list written as JSON."""
    if name == "messages" and isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(
                f"{where}: 'messages' is text that is not JSON ({error}). Write a list of messages."
            ) from error
    if not isinstance(value, list | tuple) and (name != "messages" or value is None):
        return [Message(role="user", content=_text(value, f"'{name}'", where))]
    messages = _messages(value, name, where, may_be_empty=may_be_empty)
    _check_roles(messages, name, where)
    return messages


def _messages(value: Any, name: str, where: str, *, may_be_empty: bool = False) -> list[Message]:
    """A list of role and content, other keys left out. Only a system message may say nothing."""
    wanted = '[{"role": …, "content": …}, …]'
    if not isinstance(value, list | tuple):
        raise DataError(f"{where}: '{name}' is {_kind(value)}, not a list of messages. Write {wanted}.")
    if not value:
        raise DataError(f"{where}: '{name}' is an empty list, so nothing is said. Remove the row.")
    found = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(f"{where}: message {number} of '{name}' has no role and content. Write {wanted}.")
        role = message["role"]
        if role not in _ROLES:
            hint = did_you_mean(str(role), _ROLES)
            raise DataError(
                f"{where}: message {number} of '{name}' has the role {role!r}. Roles are {', '.join(_ROLES)}.{hint}"
            )
        silent = role == "system" or (role == "assistant" and may_be_empty)
        content = _text(message["content"], f"message {number} of '{name}'", where, may_be_empty=silent)
        found.append(Message(role=role, content=content))
    return found


def _check_roles(messages: Sequence[Message], name: str, where: str) -> None:
    """System first, if at all; then the user (or a tool) and the assistant in turn."""
    before = ""
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in _MAY_FOLLOW[before]:
            after = f"follows the {before}'s" if before else "comes first"
            raise DataError(
                f"{where}: the roles of '{name}' do not alternate: message {number} is the {role}'s and {after}. Begin "
                "with the user's, after a system message if there is one, and let user and assistant take turns."
            )
        before = role


def _text(value: Any, what: str, where: str, *, may_be_empty: bool = False) -> str:
    """Text as it is, and a number, true or false as a reader of tables found it written: readers guess types."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{where}: {what} is null. Fill it in, or remove the row.")
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} is {_kind(value)}, not text. Write text, or remove the row.")
    if not may_be_empty and not value.strip():
        raise DataError(f"{where}: {what} is empty. Fill it in, or remove the row.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {what} holds half of a surrogate pair (character {error.start + 1}), which no tokenizer takes. "
            "Write the character in full, or remove it."
        ) from error
    return value


def _margin(value: Any, where: str) -> float:
    try:
        margin = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        margin = math.nan
    if not math.isfinite(margin):
        raise DataError(
            f"{where}: 'margin' is {value!r}, not a finite number. Write by how much the chosen answer is better, or 0."
        )
    return margin


def _kind(value: Any) -> str:
    """A type in words, to follow "is"."""
    words = {dict: "an object", list: "a list", tuple: "a list", str: "text", bytes: "bytes", bool: "true or false"}
    number = "a number" if isinstance(value, int | float) else type(value).__name__
    return words.get(type(value), "null" if value is None else number)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(str, names)) or "(none)"
