"""Several candidates are drawn, one is taken, all are remembered."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from echelon.data.packing import Sampled, pack
from echelon.models.heads import Places, Spans, UtteranceCritic
from echelon.models.lm import tiny
from echelon.models.ranker import Ranker
from echelon.sampling.candidates import Chooser, Offer, Score, critic_score, q_values, ranker_score
from echelon.sampling.local import LocalSampler
from echelon.seeds import derive_seed
from echelon.types import Completion, SamplingParams

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def engine() -> LocalSampler:
    module, tokenizer = tiny(["is it a dog?", "is it alive?"], vocab_size=300, hidden=32, layers=1, heads=2)
    return LocalSampler(module, tokenizer, concurrency=64)


def last_token(asked: Sequence[Sampled]) -> list[float]:
    return [float(candidate.action[-1]) for candidate in asked]


def offers(
    engine: Any, seeds: Sequence[int], *, score: Score = last_token, epsilon: float = 0.0, count: int = 4
) -> tuple[list[Completion], list[Offer]]:
    async def run() -> list[Completion]:
        params = [SamplingParams(max_tokens=4, seed=seed) for seed in seeds]
        return list(await asyncio.gather(*(chooser.sample(PROMPT, one) for one in params)))

    chooser = Chooser(engine, score, count, epsilon=epsilon)
    said, found = asyncio.run(run()), chooser.take()
    assert chooser.take() == {}
    return said, [found[seed] for seed in seeds]


def test_the_one_with_the_largest_score_is_said_and_all_are_kept(engine: LocalSampler) -> None:
    said, found = offers(engine, range(8))
    for completion, offer in zip(said, found, strict=True):
        assert len(offer.candidates) == len(offer.q) == 4
        assert offer.q == [float(candidate.tokens[-1]) for candidate in offer.candidates]
        assert offer.chosen == offer.q.index(max(offer.q))
        assert completion is offer.candidates[offer.chosen]
        assert not offer.explored


def test_candidates_are_draws_of_the_sampler_below_each_from_its_own_stream(engine: LocalSampler) -> None:
    async def alone(seed: int) -> Completion:
        return await engine.sample(PROMPT, SamplingParams(max_tokens=4, seed=seed))

    _, (offer,) = offers(engine, [3])
    for number, candidate in enumerate(offer.candidates):
        expected = asyncio.run(alone(derive_seed(3, "candidate", number)))
        assert candidate.tokens == expected.tokens
        assert candidate.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert len({tuple(candidate.tokens) for candidate in offer.candidates}) > 1


def test_the_choice_does_not_depend_on_who_else_is_asked(engine: LocalSampler) -> None:
    for epsilon in (0.0, 0.5):
        said, _ = offers(engine, range(12), epsilon=epsilon)
        alone = [offers(engine, [seed], epsilon=epsilon)[0][0].tokens for seed in range(12)]
        assert [completion.tokens for completion in said] == alone


def test_a_random_choice_is_any_of_them_alike(engine: LocalSampler) -> None:
    _, found = offers(engine, range(400), epsilon=1.0)
    counts = [sum(offer.chosen == place for offer in found) for place in range(4)]
    assert all(offer.explored for offer in found)
    assert counts == pytest.approx([100] * 4, abs=30)
    _, found = offers(engine, range(400), epsilon=0.25)
    assert sum(offer.explored for offer in found) == pytest.approx(100, abs=30)


def test_equal_texts_are_worth_the_same_whatever_rounding_says(engine: LocalSampler) -> None:
    class Same:
        """Says the same, whoever asks."""

        async def sample(self, prompt: list[int], params: SamplingParams) -> Completion:
            return Completion([7, 8], [-1.0, -1.0], "x", "stop")

        def load(self, weights: Any, version: int) -> None: ...

    asked: list[int] = []

    def score(said: Sequence[Sampled]) -> list[float]:
        asked.append(len(said))
        return [0.5 + len(asked) * 1e-7 for _ in said]

    _, (offer,) = offers(Same(), [0], score=score)
    assert asked == [1]
    assert len(set(offer.q)) == 1


def test_all_who_ask_at_the_same_time_are_scored_in_one_batch(engine: LocalSampler) -> None:
    batches: list[int] = []

    def score(said: Sequence[Sampled]) -> list[float]:
        batches.append(len(said))
        return [0.0] * len(said)

    offers(engine, range(16), score=score)
    assert len(batches) <= 5  # answers end after one to four tokens, and those that end together are asked together


def test_a_score_that_raises_reaches_whoever_asked(engine: LocalSampler) -> None:
    def broken(asked: Sequence[Sampled]) -> list[float]:
        raise ValueError("no opinion")

    with pytest.raises(ValueError, match="no opinion"):
        offers(engine, [0, 1], score=broken)


def test_the_state_is_read_once_for_all_candidates() -> None:
    module, tokenizer = tiny(["is it a dog?"], vocab_size=300, hidden=32, layers=1, heads=2)
    engine = LocalSampler(module, tokenizer)
    read, model = [], engine._model

    def counting(pieces: Any, wanted: Any) -> Any:
        read.append(sum(len(piece.tokens) for piece in pieces))
        return model(pieces, wanted)

    engine._model = counting  # type: ignore[assignment]
    prompt, count = [number % 250 + 5 for number in range(640)], 8

    async def run() -> None:
        await Chooser(engine, last_token, count).sample(prompt, SamplingParams(max_tokens=4))

    asyncio.run(run())
    assert len(prompt) <= sum(read) < len(prompt) + count * (4 + 64)  # a block of the prompt, at most, is read again


def test_the_score_of_a_ranker_is_its_q(engine: LocalSampler) -> None:
    ranker = Ranker.from_lm(engine.module)
    said = [Sampled(PROMPT, [10, 11], [0.0] * 2), Sampled(PROMPT, [12], [0.0]), Sampled(PROMPT[:2], [13], [0.0])]
    assert ranker_score(ranker)(said) == q_values(ranker, said, 16384).tolist()


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
