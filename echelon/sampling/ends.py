"""When a completion ends, and what it is then: one rule for every engine that gets its tokens one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from echelon.types import Completion, SamplingParams, StopReason


class Ending:
    """Watches one completion grow: says when a stop id, a stop string, a predicate or the limit ends it."""

    def __init__(self, params: SamplingParams, tokenizer: Any) -> None:
        self.params, self.tokenizer = params, tokenizer
        self.stop_ids = frozenset(params.stop_ids)
        self.text = _Text(tokenizer) if params.stop or params.stop_when else None

    def reason(self, tokens: Sequence[int]) -> StopReason | None:
        """Why the completion ends with the last of these tokens, or None if it goes on. Called once per token.

        What the caller's own predicate raises passes through.
        """
        params = self.params
        if tokens[-1] in self.stop_ids:
            return "stop"
        if self.text is not None:
            text = self.text.add(tokens)
            if any(stop in text for stop in params.stop) or (params.stop_when is not None and params.stop_when(text)):
                return "stop"
        return "length" if len(tokens) >= params.max_tokens else None

    def completion(self, tokens: list[int], logprobs: list[float], reason: StopReason, version: int) -> Completion:
        """What is answered: all tokens, and their text without the stop token."""
        ended = reason == "stop" and tokens[-1] in self.stop_ids
        text = str(self.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True))
        return Completion(tokens, logprobs, text, reason, version)


def cut(
    tokens: list[int], logprobs: list[float], params: SamplingParams, tokenizer: Any, version: int
) -> Completion | None:
    """An answer that was drawn without looking, up to the token that ends it; None if none does."""
    ending = Ending(params, tokenizer)
    for count in range(1, len(tokens) + 1):
        if reason := ending.reason(tokens[:count]):
            return ending.completion(tokens[:count], logprobs[:count], reason, version)
    return None


class _Text:
    """Text of tokens as they arrive, decoding only the newest ones: for stop strings and predicates."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.text = ""
        self.context, self.read = 0, 0

    def add(self, tokens: Sequence[int]) -> str:
        """The whole text so far; `tokens` are all tokens so far."""
        before = self.tokenizer.decode(tokens[self.context : self.read], skip_special_tokens=True)
        after = self.tokenizer.decode(tokens[self.context :], skip_special_tokens=True)
        if not after.endswith("\ufffd"):  # an incomplete character waits for its remaining bytes
            self.text += after[len(before) :]
            self.context, self.read = self.read, len(tokens)
        return self.text
