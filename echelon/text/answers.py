"""Answers and the prompts they are judged by, within a budget of tokens: the answer is never cut, the prompt is.

Messages in, ids out. What an answer is worth, and to whom, is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from echelon.errors import DataError
from echelon.text.chat import Renderer
from echelon.types import Message


class AnswerTooLong(DataError):
    """An answer does not fit into the budget even behind an empty prompt."""


@dataclass(frozen=True, slots=True)
class Spoken:
    """What follows a prompt: one assistant message as a rule, or several with what was said in between."""

    ids: list[int]
    """The last one is the end-of-turn token of the last message."""
    said: list[bool]
    """Which of them the assistant said."""


def spoken(renderer: Renderer, messages: Sequence[Message]) -> Spoken:
    """The ids of messages that follow a prompt. The first and the last must be the assistant's."""
    roles = [message["role"] for message in messages]
    if not roles or roles[0] != "assistant" or roles[-1] != "assistant":
        raise DataError(
            f"an answer of roles [{', '.join(roles)}] cannot be judged: its first and its last message must be the "
            "assistant's."
        )
    ids: list[int] = []
    said: list[bool] = []
    heard: list[Message] = []
    for message in messages:
        if message["role"] != "assistant":
            heard.append(message)
            continue
        if ids and not heard:
            raise DataError("two assistant messages may not follow each other. Join them, or leave the row out.")
        if heard:
            ids = renderer.extend(ids, heard)
            said += [False] * (len(ids) - len(said))
            heard = []
        words = renderer.action_ids(message["content"])
        ids, said = ids + words, said + [True] * len(words)
    return Spoken(ids, said)


def prompt_for(
    renderer: Renderer, prompt: Sequence[Message], answers: Sequence[Sequence[Message]], *, max_tokens: int
) -> tuple[list[int], list[Spoken]]:
    """The ids of a prompt and of each answer to it, such that the prompt and any one answer are `max_tokens` at most.

    All answers see the same prompt. What does not fit is dropped from it, oldest first: whole exchanges, then the
    beginning of the texts that are left, the system message last of all; the template around them stays whole. Raises
    AnswerTooLong where that is not enough.
    """
    found = [spoken(renderer, answer) for answer in answers]
    longest = max(range(len(found)), key=lambda index: len(found[index].ids))
    room = max_tokens - len(found[longest].ids)
    ids = _shortened(renderer, prompt, room)
    if ids is None:
        begin = " ".join(answers[longest][0]["content"][:40].split())
        raise AnswerTooLong(
            f"the answer that begins '{begin}' has {len(found[longest].ids)} tokens, and max_tokens = {max_tokens} "
            "leaves no room for a prompt. An answer is never cut: raise max_tokens, or leave the row out."
        )
    return ids, found


def _shortened(renderer: Renderer, messages: Sequence[Message], room: int) -> list[int] | None:
    """The prompt within `room` tokens; None if there is no room for the template itself."""
    parts = renderer.segments(messages)
    while len(parts) > 2 and sum(map(len, parts)) > room:
        parts.pop(1)
    if sum(map(len, parts)) <= room:
        return _joined(parts)
    if room < 1:
        return None
    kept = _without_middle(messages)
    for place in sorted(range(len(kept)), key=lambda place: kept[place]["role"] == "system"):
        message = kept[place]

        def ending(length: int, place: int = place, message: Message = message) -> list[int]:
            """The prompt with the last `length` characters of this message."""
            text = message["content"][len(message["content"]) - length :]
            return _joined(renderer.segments([*kept[:place], {**message, "content": text}, *kept[place + 1 :]]))

        if len(ending(0)) <= room:
            return ending(_largest(len(message["content"]), lambda length: len(ending(length)) <= room))
        kept[place] = {**message, "content": ""}
    return None


def _joined(parts: Sequence[Sequence[int]]) -> list[int]:
    return [token for part in parts for token in part]


def _without_middle(messages: Sequence[Message]) -> list[Message]:
    """All before the first assistant message, and the last exchange."""
    said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return [*messages[: said[0]], *messages[said[-1] :]] if said else list(messages)


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number below `limit` that fits, found by halving; 0 fits and `limit` does not."""
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
