"""Samplers that choose from a finite set: each answers with the text of one of K options, and remembers all of them.

They know values or a script, not how the values were learned. An option is written in one piece, whatever its tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from echelon.data.candidates import Options
from echelon.data.options import lay_options
from echelon.data.packing import Sampled
from echelon.errors import RolloutError
from echelon.models.options import OptionScorer
from echelon.ops import options as ops
from echelon.sampling.candidates import Offer, Score, Together
from echelon.seeds import derive_seed
from echelon.text.dialogue import ASSISTANT
from echelon.types import Completion, SamplingParams

Legal = Callable[[list[int]], Sequence[bool]]
"""Which of the K options may be chosen after this prompt."""
TakeIn = Callable[[Iterable[tuple[str, Tensor]]], None]
"""Puts weights in place of those that values are read from."""
Pick = Literal["epsilon", "softmax", "greedy"]
"""How a choice is made of values: the best one, but any with probability ε; by softmax(Q / temperature); the best."""


class Strategist:
    """A sampler whose every completion is one of K options, chosen by their values after the prompt.

    `options` are their tokens (`data.options.spell`), `texts` what is written. `legal` says which may be chosen after a
    prompt, by default all. Everything that was offered is kept, under the seed of the request (`Turn.seed`), until
    `take` is called: the K options as completions, without tokens and of value −∞ where one was not legal. Requests
    that come at the same time are scored together, and what is chosen does not depend on who else asks.
    """

    def __init__(
        self,
        score: Score,
        options: Sequence[list[int]],
        texts: Sequence[str],
        *,
        pick: Pick = "epsilon",
        epsilon: float = 0.0,
        temperature: float = 0.5,
        legal: Legal | None = None,
    ) -> None:
        assert len(options) == len(texts) >= 2, "there is something to choose, and each option has a text"
        self.options, self.texts, self.legal = [list(option) for option in options], list(texts), legal
        self.pick, self.epsilon, self.temperature = pick, epsilon, temperature
        self.offers: dict[int, Offer] = {}
        self.version = 0
        self._together = Together(score)
        self._take_in: TakeIn | None = None

    async def sample(self, prompt: list[int], params: SamplingParams) -> Completion:
        """One option. Its log-probs add up to the log of the probability with which it was chosen: it stands on the
        first token, the others follow from it."""
        legal = self._legal(prompt)
        said = [Sampled(prompt, option, [0.0] * len(option)) for option in self._offered(legal)]
        values = iter(await self._together(said))
        q = [next(values) if may else -math.inf for may in legal]
        probs = self.policy(torch.tensor([q], dtype=torch.float64), torch.tensor([legal]))[0]
        draw = np.random.Generator(np.random.Philox(derive_seed(params.seed, "choice"))).random()
        chosen = ops.draw(probs, float(draw))
        best = int(np.argmax(q))
        candidates = [
            self._completion(place, may, float(p)) for place, (may, p) in enumerate(zip(legal, probs, strict=True))
        ]
        self.offers[params.seed] = Offer(prompt, candidates, q, chosen, chosen != best)
        return candidates[chosen]

    def policy(self, q_NK: Float[Tensor, "N K"], legal_NK: Bool[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """The probability with which each option is chosen."""
        if self.pick == "softmax":
            return ops.softmax_policy(q_NK, legal_NK, temperature=self.temperature)
        epsilon = self.epsilon if self.pick == "epsilon" else 0.0
        return ops.epsilon_greedy_policy(q_NK, legal_NK, epsilon=epsilon)

    def take(self) -> dict[int, Offer]:
        """All offers since the last time, by the seed of the request they answered."""
        offers, self.offers = self.offers, {}
        return offers

    def beside(self, score: Score | None = None, take_in: TakeIn | None = None) -> Strategist:
        """One that chooses alike and keeps what it offered to itself, for another thread: by the same values, or by
        those of another score, which changes as `take_in` puts the weights that are loaded where it reads them."""
        twin = copy.copy(self)
        twin.offers, twin._together = {}, self._together.beside(score)
        twin._take_in = take_in
        return twin

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Where the values are read from the live module, only the version is noted."""
        if self._take_in is not None:
            self._take_in(weights)
        self.version = version

    def _legal(self, prompt: list[int]) -> list[bool]:
        legal = [True] * len(self.options) if self.legal is None else [bool(may) for may in self.legal(prompt)]
        if len(legal) != len(self.options) or not any(legal):
            raise RolloutError(
                f"legal said {legal} of {len(self.options)} options: it must say of each whether it may be chosen, and "
                "one of them must be."
            )
        return legal

    def _offered(self, legal: Sequence[bool]) -> list[list[int]]:
        return [option for option, may in zip(self.options, legal, strict=True) if may]

    def _completion(self, place: int, legal: bool, probability: float) -> Completion:
        if not legal:
            return Completion([], [], self.texts[place], "stop", self.version)
        option = self.options[place]
        logprobs = [math.log(probability) if probability else -math.inf, *([0.0] * (len(option) - 1))]
        return Completion(list(option), logprobs, self.texts[place], "stop", self.version)


class RandomStrategist(Strategist):
    """One that never learns: every legal option is as likely as the others, and worth nothing."""

    def __init__(self, options: Sequence[list[int]], texts: Sequence[str], *, legal: Legal | None = None) -> None:
        super().__init__(_nothing, options, texts, epsilon=1.0, legal=legal)


class ScriptedStrategist(Strategist):
    """One that follows a script: a function from the prompt to the place of an option, or places in the order of the
    requests. Raises RolloutError when a list has no place left, or says one that is not legal.
    """

    def __init__(
        self,
        script: Callable[[list[int]], int] | Sequence[int],
        options: Sequence[list[int]],
        texts: Sequence[str],
        *,
        legal: Legal | None = None,
    ) -> None:
        super().__init__(_nothing, options, texts, legal=legal)
        self._script, self._asked = script, 0

    async def sample(self, prompt: list[int], params: SamplingParams) -> Completion:
        """The option the script names, with probability 1."""
        legal, place = self._legal(prompt), self._next(prompt)
        if not 0 <= place < len(legal) or not legal[place]:
            raise RolloutError(f"the script says option {place} (from 0) of {len(legal)}, which is not legal here.")
        candidates = [self._completion(number, may, float(number == place)) for number, may in enumerate(legal)]
        self.offers[params.seed] = Offer(prompt, candidates, [0.0 if may else -math.inf for may in legal], place, False)
        return candidates[place]

    def _next(self, prompt: list[int]) -> int:
        if callable(self._script):
            return self._script(prompt)
        self._asked += 1
        if self._asked > len(self._script):
            raise RolloutError(
                f"the script has {len(self._script)} choices and was asked for one more. Give it as many as there are "
                "turns, or a function of the prompt (in_order)."
            )
        return self._script[self._asked - 1]


def in_order(order: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Callable[[list[int]], int]:
    """A script: the n-th reply of a conversation follows the n-th strategy, after the last one again from the first.

    Where in a conversation a prompt stands is how many replies its history has, so a history that was cut starts anew.
    """

    def script(prompt: list[int]) -> int:
        said = sum(line.startswith(f"{ASSISTANT}: ") for line in decode(prompt).splitlines())
        return order[said % len(order)]

    return script


def option_score(scorer: OptionScorer, *, tokens_per_pass: int = 16384) -> Score:
    """The scorer's Q. Options of one prompt, next to each other, are scored together."""

    def score(asked: Sequence[Sampled]) -> list[float]:
        states: list[Options] = []
        for said in asked:
            if not states or states[-1].state != said.prompt or said.action in states[-1].candidates:
                states.append(Options(said.prompt, []))
            states[-1].candidates.append(said.action)
        batch = lay_options(states, scorer.layout)
        found: list[float] = scorer.values(batch, tokens_per_pass).tolist()
        return found

    return score


def _nothing(asked: Sequence[Sampled]) -> list[float]:
    return [0.0] * len(asked)
