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

Score = Callable[[Sequence[Sampled]], list[float]]
"""How good each utterance is in the state it answers."""


class BestOf:
    """A sampler that draws `candidates` completions from another one and answers with the best.

    Ties go to the one drawn first. The log-probs are those of the chosen tokens under the sampler they came from, not
    the probability of being drawn and chosen: fit for acting, not for a policy gradient.
    """

    def __init__(self, sampler: Sampler, score: Score, candidates: int) -> None:
        assert candidates >= 1, "somebody has to be chosen"
        self.sampler, self.score, self.candidates = sampler, score, candidates
        self._asked: list[tuple[list[Sampled], asyncio.Future[list[float]]]] = []
        self._scorer: asyncio.Task[None] | None = None

    async def sample(self, prompt: list[int], params: SamplingParams) -> Completion:
        """The best of several completions, each from a random stream of its own that derives from `params.seed`."""
        seeds = [derive_seed(params.seed, "candidate", number) for number in range(self.candidates)]
        drawn = await asyncio.gather(*(self.sampler.sample(prompt, replace(params, seed=seed)) for seed in seeds))
        distinct = list({tuple(completion.tokens): completion for completion in reversed(drawn)}.values())[::-1]
        done: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._asked.append(([Sampled(prompt, completion.tokens, completion.logprobs) for completion in distinct], done))
        if self._scorer is None or self._scorer.done():
            self._scorer = asyncio.create_task(self._score_all())
        scores = await done
        return distinct[max(range(len(distinct)), key=scores.__getitem__)]

    async def _score_all(self) -> None:
        """Score everything that was asked since the last time, together."""
        while self._asked:
            await asyncio.sleep(0)
            asked, self._asked = self._asked, []
            try:
                scores = iter(self.score([candidate for candidates, _ in asked for candidate in candidates]))
            except Exception as error:
                for _, done in asked:
                    done.set_exception(error)
                continue
            for candidates, done in asked:
                found = [next(scores) for _ in candidates]
                if not done.done():
                    done.set_result(found)

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand new weights to the sampler below."""
        self.sampler.load(weights, version)


def critic_score(critic: UtteranceCritic, *, tokens_per_pass: int = 16384) -> Score:
    """The smaller of the critic's two Q; all utterances of a prompt share its row."""

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
