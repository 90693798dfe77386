"""Several utterances are drawn in every state, somebody values them, one is taken, and all of them are remembered.

It knows how candidates are drawn and chosen, not how those who value them learned.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from echelon.data.packing import Batch, Said, Sampled, pack, pack_branches, pack_siblings
from echelon.models.heads import Places, Spans, UtteranceCritic
from echelon.models.lm import attention_inputs
from echelon.models.ranker import Ranker
from echelon.ops.ranking import epsilon_greedy
from echelon.seeds import derive_seed
from echelon.types import Completion, Sampler, SamplingParams

Score = Callable[[Sequence[Sampled]], list[float]]
"""How good each utterance is in the state it answers."""


@dataclass(slots=True)
class Offer:
    """What was drawn in a state, how good each is thought to be, and which was taken."""

    prompt: list[int]
    candidates: list[Completion]
    q: list[float]
    chosen: int
    explored: bool
    """Whether it was taken at random."""

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Offer:
        """The offer of which `dataclasses.asdict` has been written as JSON."""
        return cls(**{**saved, "candidates": [Completion(**candidate) for candidate in saved["candidates"]]})


class Chooser:
    """A sampler that draws `candidates` completions from another one and answers with one of them, ε-greedily.

    The best is the one with the largest score, drawn first among equals; at random, each is as likely as the others, so
    that what is said is what the sampler below would have said. Everything that was drawn is kept in `offers`, under
    the seed of the request (`Turn.seed`), until `take` is called. Candidates have a random stream each. `follow` is
    called when new weights are loaded: it brings what the score reads up to date, where that is not live.
    """

    def __init__(
        self,
        sampler: Sampler,
        score: Score,
        candidates: int,
        *,
        epsilon: float = 0.0,
        follow: Callable[[], None] = lambda: None,
    ) -> None:
        assert candidates >= 1, "somebody has to be chosen"
        self.sampler, self.candidates, self.epsilon = sampler, candidates, epsilon
        self._follow = follow
        self.offers: dict[int, Offer] = {}
        self._together = Together(score)

    async def sample(self, prompt: list[int], params: SamplingParams) -> Completion:
        """One of several completions, each from a random stream of its own that derives from `params.seed`.

        The log-probs are those of its tokens under the sampler they came from, not the probability of being drawn and
        chosen.
        """
        seeds = [derive_seed(params.seed, "candidate", number) for number in range(self.candidates)]
        drawn = await asyncio.gather(*(self.sampler.sample(prompt, replace(params, seed=seed)) for seed in seeds))
        # Equal texts are valued once: rounding must not tell them apart.
        distinct = {tuple(said.tokens): Sampled(prompt, said.tokens, said.logprobs) for said in drawn}
        values = dict(zip(distinct, await self._together(list(distinct.values())), strict=True))
        q = [values[tuple(completion.tokens)] for completion in drawn]
        explore, pick = np.random.Generator(np.random.Philox(derive_seed(params.seed, "choice"))).random(2).tolist()
        chosen = epsilon_greedy(torch.tensor(q, dtype=torch.float64), epsilon=self.epsilon, explore=explore, pick=pick)
        self.offers[params.seed] = Offer(prompt, list(drawn), q, chosen, explore < self.epsilon)
        return drawn[chosen]

    def take(self) -> dict[int, Offer]:
        """All offers since the last time, by the seed of the request they answered."""
        offers, self.offers = self.offers, {}
        return offers

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand new weights to the sampler below."""
        self.sampler.load(weights, version)
        self._follow()


class Together:
    """A score that is asked by many at the same time and computed for all of them at once."""

    def __init__(self, score: Score) -> None:
        self._score = score
        self._asked: list[tuple[list[Sampled], asyncio.Future[list[float]]]] = []
        self._scorer: asyncio.Task[None] | None = None

    def beside(self, score: Score | None = None) -> Together:
        """The same score, or another one, asked in another event loop."""
        return Together(score or self._score)

    async def __call__(self, said: list[Sampled]) -> list[float]:
        """The scores of these. What the score raises goes to everybody who waits."""
        done: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._asked.append((said, done))
        if self._scorer is None or self._scorer.done():
            self._scorer = asyncio.create_task(self._answer())
        return await done

    async def _answer(self) -> None:
        while self._asked:
            await asyncio.sleep(0)
            asked, self._asked = self._asked, []
            try:
                scores = iter(self._score([candidate for candidates, _ in asked for candidate in candidates]))
            except Exception as error:
                for _, done in asked:
                    if not done.done():
                        done.set_exception(error)
                continue
            for candidates, done in asked:
                found = [next(scores) for _ in candidates]
                if not done.done():
                    done.set_result(found)


def ranker_score(ranker: Ranker, *, tokens_per_pass: int = 16384) -> Score:
    """The ranker's Q."""

    def score(asked: Sequence[Sampled]) -> list[float]:
        found: list[float] = q_values(ranker, asked, tokens_per_pass).tolist()
        return found

    return score


def critic_score(critic: UtteranceCritic, *, tokens_per_pass: int = 16384) -> Score:
    """The smaller of an utterance critic's two Q; all utterances of a prompt share its row."""

    @torch.no_grad()
    def score(asked: Sequence[Sampled]) -> list[float]:
        scores = torch.zeros(len(asked))
        for batch in pack_branches(asked).split(tokens_per_pass):
            batch = batch.to(next(critic.parameters()).device)
            said = Spans(batch.row_N, batch.state_N, batch.first_N, batch.last_N)
            nowhere = Places(batch.row_N[:0], batch.state_N[:0])
            q_2N, _ = critic(batch.tokens, said, nowhere, **attention_inputs(critic, batch))
            scores[batch.index_N.cpu()] = q_2N.amin(0).cpu()
        found: list[float] = scores.tolist()
        return found

    return score


@torch.no_grad()
def q_values(ranker: Ranker, said: Sequence[Said], tokens_per_pass: int) -> Float[Tensor, "N"]:
    """Q of each utterance in its state, on the CPU. Utterances of one state that are next to each other share it."""
    q_N = torch.zeros(len(said))
    if said:
        for batch in lay_candidates(said, branches=ranker.shares_prompts).split(tokens_per_pass):
            q_N[batch.index_N] = q_of(ranker, batch.to(next(ranker.parameters()).device)).cpu()
    return q_N


def lay_candidates(said: Sequence[Said], *, branches: bool) -> Batch:
    """Candidates as rows: those of one state branch off it, where the model can be told so and that computes less."""
    return pack_siblings(said) if branches else pack(said)


def q_of(ranker: Ranker, batch: Batch) -> Float[Tensor, "N"]:
    """Q of every utterance of a micro-batch, in its order."""
    q_N: Tensor = ranker(batch.tokens, batch.row_N, batch.last_N, batch.lengths, **attention_inputs(ranker, batch))
    return q_N
