"""One level proposes, another chooses: several utterances are drawn for every request, and a critic picks one.

It knows how to compare utterances, not how either level learned. CHAI (arXiv 2204.08426) acts this way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from echelon.data.packing import Sampled, pack_branches
from echelon.models.heads import Places, Spans, UtteranceCritic
from echelon.models.lm import attention_inputs
from echelon.seeds import derive_seed
from echelon.types import Completion, Sampler, SamplingParams

Score = Callable[[list[int], Sequence[list[int]]], list[float]]
"""(prompt, utterances) → how good each is, all as token ids."""


class BestOf:
    """A sampler that draws `candidates` completions from another one and answers with the best.

    Ties go to the one drawn first. The log-probs are those of the chosen tokens under the sampler they came from, not
    the probability of being drawn and chosen: fit for acting, not for a policy gradient.
    """

    def __init__(self, sampler: Sampler, score: Score, candidates: int) -> None:
        assert candidates >= 1, "somebody has to be chosen"
        self.sampler, self.score, self.candidates = sampler, score, candidates

    async def sample(self, prompt: list[int], params: SamplingParams) -> Completion:
        """The best of several completions, each from a random stream of its own that derives from `params.seed`."""
        seeds = [derive_seed(params.seed, "candidate", number) for number in range(self.candidates)]
        drawn = await asyncio.gather(*(self.sampler.sample(prompt, replace(params, seed=seed)) for seed in seeds))
        distinct = list({tuple(completion.tokens): completion for completion in reversed(drawn)}.values())[::-1]
        scores = self.score(prompt, [completion.tokens for completion in distinct])
        return distinct[max(range(len(distinct)), key=scores.__getitem__)]

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand new weights to the sampler below."""
        self.sampler.load(weights, version)


def critic_score(critic: UtteranceCritic) -> Score:
    """The smaller of the critic's two Q, all utterances of a prompt in one row."""

    @torch.no_grad()
    def score(prompt: list[int], utterances: Sequence[list[int]]) -> list[float]:
        rows = [Sampled(prompt, list(utterance), [0.0] * len(utterance)) for utterance in utterances]
        batch = pack_branches(rows).to(next(critic.parameters()).device)
        said = Spans(batch.row_N, batch.state_N, batch.first_N, batch.last_N)
        nowhere = Places(batch.row_N[:0], batch.state_N[:0])
        q_2N, _ = critic(batch.tokens, said, nowhere, **attention_inputs(critic, batch))
        scores: list[float] = q_2N.amin(0).tolist()
        return scores

    return score
