"""One level proposes, another chooses."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import torch

from echelon.data.packing import Sampled, pack
from echelon.models.heads import Places, Spans, UtteranceCritic
from echelon.models.lm import tiny
from echelon.sampling.best_of import BestOf, critic_score
from echelon.sampling.local import LocalSampler
from echelon.types import SamplingParams

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def engine() -> LocalSampler:
    module, tokenizer = tiny(["is it a dog?", "is it alive?"], hidden=32, layers=1, heads=2)
    return LocalSampler(module, tokenizer, concurrency=16)


def draws(engine: LocalSampler, score, candidates: int, seeds: Sequence[int]) -> list[list[int]]:
    async def run() -> list[list[int]]:
        chooser = BestOf(engine, score, candidates)
        said = await asyncio.gather(*(chooser.sample(PROMPT, SamplingParams(max_tokens=4, seed=s)) for s in seeds))
        return [completion.tokens for completion in said]

    return asyncio.run(run())


def test_the_utterance_with_the_largest_score_is_said(engine: LocalSampler) -> None:
    offered: list[list[int]] = []

    def largest_first_token(asked: Sequence[Sampled]) -> list[float]:
        offered.extend(candidate.action for candidate in asked)
        return [float(candidate.action[0]) for candidate in asked]

    [said] = draws(engine, largest_first_token, 8, [3])
    assert len(offered) > 1
    assert said[0] == max(action[0] for action in offered)


def test_the_choice_does_not_depend_on_who_else_is_asked(engine: LocalSampler) -> None:
    def last_token(asked: Sequence[Sampled]) -> list[float]:
        return [float(candidate.action[-1]) for candidate in asked]

    together = draws(engine, last_token, 4, range(12))
    assert [draws(engine, last_token, 4, [seed])[0] for seed in range(12)] == together
    assert len({tuple(tokens) for tokens in together}) > 1


def test_a_score_that_raises_reaches_whoever_asked(engine: LocalSampler) -> None:
    def broken(asked: Sequence[Sampled]) -> list[float]:
        raise ValueError("no opinion")

    with pytest.raises(ValueError, match="no opinion"):
        draws(engine, broken, 2, [0, 1])


def test_the_critics_score_is_the_smaller_q_of_each_utterance_alone(engine: LocalSampler) -> None:
    torch.manual_seed(0)
    critic = UtteranceCritic.from_lm(engine.module)
    asked = [
        Sampled(PROMPT, [10, 11], [0.0, 0.0]),
        Sampled(PROMPT, [12], [0.0]),
        Sampled(PROMPT[:3], [13, 14, 15], [0.0] * 3),
    ]
    for candidate, score in zip(asked, critic_score(critic)(asked), strict=True):
        batch = pack([candidate])
        said = Spans(batch.row_N, batch.state_N, batch.first_N, batch.last_N)
        with torch.no_grad():
            q, _ = critic(batch.tokens, said, Places(batch.row_N, batch.state_N))
        assert score == pytest.approx(float(q.min()), abs=1e-5)
