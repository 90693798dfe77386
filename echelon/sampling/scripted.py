"""A sampler that reads its answers from a script: tests, demonstrations and fixed opponents need no weights.

It stops where a model's completion would stop, and may take its time. It knows no model and gives every token
probability 1 unless told otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from echelon.errors import RolloutError
from echelon.types import Completion, SamplingParams, StopReason

Answer = str | Completion
"""A text, said with log-probs 0, or a completion that is returned as it is."""


class ScriptedSampler:
    """Answers with a function of (prompt ids, params), or with the texts of a list in the order of the requests.

    A text is encoded, ended with the first stop id (the tokenizer's EOS if there is none), and cut where `params` stop
    it. `delay` is how many seconds a request takes: answers can be made to arrive in another order than asked for.
    `asked` keeps every request. Raises RolloutError when a list has no answer left.
    """

    def __init__(
        self,
        answers: Callable[[list[int], SamplingParams], Answer] | Sequence[Answer],
        tokenizer: Any,
        *,
        delay: Callable[[list[int], SamplingParams], float] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.version = 0
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self._answers = answers
        self._delay = delay

    async def sample(self, prompt: list[int], params: SamplingParams) -> Completion:
        """The scripted answer to this request."""
        self.asked.append((list(prompt), params))
        answer = self._answers(prompt, params) if callable(self._answers) else self._next(self._answers)
        if self._delay is not None:
            await asyncio.sleep(self._delay(prompt, params))
        return answer if isinstance(answer, Completion) else self._say(answer, params)

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """A script learns nothing: only the version is noted."""
        self.version = version

    def _next(self, answers: Sequence[Answer]) -> Answer:
        if len(self.asked) > len(answers):
            raise RolloutError(
                f"the script has {len(answers)} answers and was asked for one more. Give it as many as there are "
                "turns, or a function of the prompt."
            )
        return answers[len(self.asked) - 1]

    def _say(self, text: str, params: SamplingParams) -> Completion:
        eos = self.tokenizer.eos_token_id
        ends = params.stop_ids or (() if eos is None else (eos,))
        tokens = [*self.tokenizer.encode(text, add_special_tokens=False), *ends[:1]]
        assert tokens, "an empty answer needs a token to end with"
        count = next((n for n in range(1, len(tokens)) if self._stops(tokens[:n], params)), len(tokens))
        said = tokens[:count]
        words = self._decode(said[:-1] if said[-1] in ends else said)
        return Completion(said, [0.0] * count, words, self._stops(said, params) or "stop", self.version)

    def _stops(self, said: list[int], params: SamplingParams) -> StopReason | None:
        text = self._decode(said)
        if said[-1] in params.stop_ids or any(stop in text for stop in params.stop):
            return "stop"
        if params.stop_when is not None and params.stop_when(text):
            return "stop"
        return "length" if len(said) >= params.max_tokens else None

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
