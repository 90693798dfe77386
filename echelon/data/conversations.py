"""Conversations to imitate as token rows: what was seen and what was said, in the very ids of play."""

from __future__ import annotations

from echelon.data.schemas import Sft
from echelon.text.chat import Example, Renderer


def imitated(renderer: Renderer, row: Sft) -> list[Example]:
    """Every assistant message of a conversation with the prompt it answers; of a row with a completion, that alone.

    The ids of such a prompt are those that `render` gives for it, and the model is asked with in play; nothing of it is
    dropped, however long it is.
    """
    if not row.completion:
        return renderer.examples(row.messages)
    prompt = [token for part in renderer.segments(row.messages) for token in part]
    return [Example(prompt, renderer.action_ids(row.completion))]
