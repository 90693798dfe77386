"""Messages in, token ids out, by the chat template of the model's own tokenizer; and back.

The one renderer of training, evaluation and chat. It never re-tokenises what a model said: a conversation grows by
appending ids to ids, so earlier ids cannot change whatever a template does with earlier messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from echelon.errors import DataError
from echelon.types import Message

_SAID = "@@what-the-assistant-said@@"
_ASKED: Message = {"role": "user", "content": "x"}
_ANSWER: Message = {"role": "assistant", "content": _SAID}

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{% if message['role'] == 'user' %}Question: {{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Answer:\n' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}"
    "{% else %}{{ message['role'] | capitalize }}: {{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n\nAnswer:\n' }}{% endif %}"
)
"""Who speaks in words any model knows, a blank line between messages, EOS at the end of an answer: no new tokens.

Answers begin on a line of their own. After `Answer: ` with its space they would begin in the middle of what most
tokenizers make one token.
"""


@dataclass(frozen=True, slots=True)
class Example:
    """One assistant message of a conversation as it would have been sampled: what was seen, what was said."""

    prompt: list[int]
    action: list[int]


def set_up_template(tokenizer: Any) -> bool:
    """Give a tokenizer that has no chat template the plain one; whether it needed it. Saved with it like any other.

    It begins with the beginning-of-sequence token if the tokenizer puts one before every text. Raises DataError for a
    tokenizer without EOS: its model could never finish a message.
    """
    if getattr(tokenizer, "chat_template", None):
        return False
    if tokenizer.eos_token is None:
        raise DataError(
            f"the tokenizer of '{_name(tokenizer)}' has neither a chat template nor an EOS token, so a model could "
            "never finish a message. Set tokenizer.eos_token and save it again."
        )
    begins = tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + PLAIN_CHAT_TEMPLATE
    return True


class Renderer:
    """Turns messages into the tokens a model sees, and keeps prompts within a token budget.

    `max_tokens` bounds every prompt. What is dropped first is the oldest exchange; the instruction (everything before
    the first assistant message), the latest observation and the cue that asks for the answer are never dropped.
    """

    def __init__(self, tokenizer: Any, *, max_tokens: int | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"the tokenizer of '{_name(tokenizer)}' has no chat template, so messages cannot become tokens. "
                "Use an instruction-tuned model, or set tokenizer.chat_template and save the tokenizer again."
            )
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
        self._after: dict[tuple[tuple[str, str], ...], list[int]] = {}
        self._check_cue()
        self.stop_ids: tuple[int, ...] = tuple(self._turn_ends(self._follow([_ASKED])))

    def render(self, messages: Sequence[Message]) -> list[int]:
        """A whole conversation, ending with the cue for the next assistant message.

        Where the last message is the assistant's it is not closed: the prompt ends with its words, to be continued.
        Assistant messages inside it get exactly the ids they would have had if a model had said them, so rendering
        more messages never changes the ids of earlier ones.
        """
        return self.fit(self.segments(messages))

    def segments(self, messages: Sequence[Message]) -> list[list[int]]:
        """The parts of a prompt, as `join` takes them: first the instruction, then one part per exchange, which is an
        assistant message and what was answered to it. The last part ends with the cue for the next one, and with the
        words of an assistant message that comes last."""
        messages, begun = _begun(messages)
        if not messages:
            raise DataError("nothing to answer: a prompt needs messages, the first of them not the assistant's.")
        head, exchanges = _split(messages)
        parts = [self._encode(self._template(head, cue=True))]
        for said, heard in exchanges:
            parts.append(self.extend(self.action_ids(said["content"]), heard))
        parts[-1] += self._encode(begun)
        return parts

    def extend(self, ids: Sequence[int], messages: Sequence[Message]) -> list[int]:
        """Continue exact ids, prompt and sampled action, with what was answered and the cue for the next message.

        Works whether or not the action ends with its stop token. The result starts with `ids`, unchanged; it is `ids`
        where nothing was answered, and the message just goes on. Where the last message is the assistant's, its words
        follow the cue, to be continued.
        """
        messages, begun = _begun(messages)
        if not messages:
            return [*ids, *self._encode(begun)]
        follow = self._follow(messages)
        ended = bool(ids) and ids[-1] == follow[0] and ids[-1] in self.stop_ids
        return [*ids, *(follow[1:] if ended else follow), *self._encode(begun)]

    def action_ids(self, text: str) -> list[int]:
        """The ids of an assistant message as a model would say it, stop token included."""
        return [*self._encode(text), self.stop_ids[0]]

    def examples(self, messages: Sequence[Message]) -> list[Example]:
        """Every assistant message of a conversation with the prompt it answers: rows for supervised learning.

        Nothing is dropped, however long it is: how long a row may be is for the caller to say.
        """
        head, exchanges = _split(messages, answered=False)
        ids = self._encode(self._template(head, cue=True))
        found: list[Example] = []
        for said, heard in exchanges:
            action = self.action_ids(said["content"])
            found.append(Example(prompt=list(ids), action=action))
            if heard:
                ids = self.extend([*ids, *action], heard)
        return found

    def fit(self, segments: Sequence[Sequence[int]]) -> list[int]:
        """Join a prompt from its parts: the head, then one part per exchange; dropped, oldest first, if too long.

        When something must go, a quarter of the budget is freed at once, so that the next few turns again extend
        this prompt instead of each starting anew.
        """
        return self.join(segments)[0]

    def join(self, segments: Sequence[Sequence[int]]) -> tuple[list[int], tuple[int, ...]]:
        """`fit`, and where each kept part after the head begins."""
        head, parts = list(segments[0]), [list(part) for part in segments[1:]]
        budget = self.max_tokens
        if budget is not None and len(head) + sum(map(len, parts)) > budget:
            needed = len(head) + (len(parts[-1]) if parts else 0)
            if needed > budget:
                raise DataError(
                    f"the instruction and the latest observation alone take {needed} tokens, more than the budget of "
                    f"{budget}. Raise max_prompt_tokens or shorten them: neither can be dropped."
                )
            while len(parts) > 1 and len(head) + sum(map(len, parts)) > max(needed, budget * 3 // 4):
                parts.pop(0)
        ids, starts = head, []
        for part in parts:
            starts.append(len(ids))
            ids.extend(part)
        return ids, tuple(starts)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled tokens, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))  # templates bring their own special tokens

    def _follow(self, messages: Sequence[Message]) -> list[int]:
        """Ids between the last word of an assistant message and the first of the next one."""
        key = tuple((message["role"], message["content"]) for message in messages)
        if key not in self._after:
            if len(self._after) > 4096:
                self._after.clear()
            _, after = self._around([_ASKED, _ANSWER, *messages], cue=True)
            follow, bare = self._encode(after), self._encode(after.lstrip())
            # A space between the last word and the end-of-turn token is the template's, and no model says it.
            self._after[key] = bare if bare and bare[0] in self._special else follow
        return self._after[key]

    def _around(self, messages: Sequence[Message], *, cue: bool) -> tuple[str, str]:
        """What the template writes before and after the words of the one assistant message."""
        text = self._template(messages, cue=cue)
        if text.count(_SAID) != sum(message["content"].count(_SAID) for message in messages):
            raise DataError(
                f"the chat template of '{_name(self.tokenizer)}' does not repeat assistant messages word for word, "
                "so a conversation cannot be continued from its tokens. Use a template that does."
            )
        before, _, after = text.partition(_SAID)
        return before, after

    def _check_cue(self) -> None:
        """Refuse a template that cannot open the assistant's message without its words."""
        prompt = self._template([_ASKED], cue=True)
        if prompt == self._template([_ASKED], cue=False):
            opened, _ = self._around([_ASKED, _ANSWER], cue=False)
            if opened.strip() != prompt.strip():
                raise DataError(
                    f"the chat template of '{_name(self.tokenizer)}' ignores add_generation_prompt, so prompts would "
                    "end before the assistant's message begins. Add the cue to the template and save it again."
                )

    def _turn_ends(self, follow: Sequence[int]) -> list[int]:
        """Tokens that end an assistant message: the template's, if it is a special token, and the tokenizer's EOS."""
        ends = [follow[0]] if follow and follow[0] in self._special else []
        eos = self.tokenizer.eos_token_id
        if eos is not None and eos not in ends:
            ends.append(eos)
        if not ends:
            raise DataError(
                f"the tokenizer of '{_name(self.tokenizer)}' has no end-of-turn token in its chat template and no EOS, "
                "so a model could never finish a message. Set tokenizer.eos_token and save it again."
            )
        return ends

    def _template(self, messages: Sequence[Message], *, cue: bool) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=cue))
        except Exception as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"the chat template of '{_name(self.tokenizer)}' refuses the roles [{roles}]: {error}. "
                "Many templates take no system message or need user and assistant to alternate."
            ) from error


def _begun(messages: Sequence[Message]) -> tuple[Sequence[Message], str]:
    """The messages before an assistant message that comes last, and its words: the beginning of what is sampled."""
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, ""


def _split(
    messages: Sequence[Message], *, answered: bool = True
) -> tuple[list[Message], list[tuple[Message, list[Message]]]]:
    """The messages before the first assistant one, then each assistant message with what was heard after it."""
    head: list[Message] = []
    exchanges: list[tuple[Message, list[Message]]] = []
    for message in messages:
        if message["role"] == "assistant":
            exchanges.append((message, []))
        elif exchanges:
            exchanges[-1][1].append(message)
        else:
            head.append(message)
    silent = [index for index, (_, heard) in enumerate(exchanges) if not heard]
    if not head or (silent and (answered or silent != [len(exchanges) - 1])):
        raise DataError(
            f"a conversation of roles [{', '.join(message['role'] for message in messages)}] cannot be rendered: it "
            "must begin with an instruction, and two assistant messages may not follow each other."
        )
    return head, exchanges


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
