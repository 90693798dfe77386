"""One of K options is chosen by its value, at random, or by a script, and all of them are remembered."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import pytest

from echelon.data.candidates import Options
from echelon.data.options import lay_options
from echelon.data.packing import Sampled
from echelon.errors import RolloutError
from echelon.models.lm import tiny
from echelon.models.options import OptionScorer, Reading
from echelon.sampling.candidates import Offer
from echelon.sampling.choices import RandomStrategist, ScriptedStrategist, Strategist, in_order, option_score
from echelon.types import Completion, SamplingParams

PROMPT = [5, 6, 7, 8, 9]
OPTIONS = [[20, 11, 21], [20, 12, 21], [20, 13, 21]]
TEXTS = ["(1)", "(2)", "(3)"]


def by_number(asked: Sequence[Sampled]) -> list[float]:
    """The second option is worth most: 1, 3 and 2."""
    return [{11: 1.0, 12: 3.0, 13: 2.0}[said.action[1]] for said in asked]


def asked(strategist: Any, seeds: Sequence[int], prompt: list[int] = PROMPT) -> tuple[list[Completion], list[Offer]]:
    async def run() -> list[Completion]:
        return list(await asyncio.gather(*(strategist.sample(prompt, SamplingParams(seed=seed)) for seed in seeds)))

    said, found = asyncio.run(run()), strategist.take()
    assert strategist.take() == {}
    return said, [found[seed] for seed in seeds]


def test_the_best_option_is_chosen_and_all_are_kept() -> None:
    said, offers = asked(Strategist(by_number, OPTIONS, TEXTS, pick="greedy"), range(4))
    for completion, offer in zip(said, offers, strict=True):
        assert (completion.tokens, completion.text, completion.stop) == ([20, 12, 21], "(2)", "stop")
        assert completion.logprobs == [0.0, 0.0, 0.0]
        assert (offer.prompt, offer.q, offer.chosen, offer.explored) == (PROMPT, [1.0, 3.0, 2.0], 1, False)
        assert [candidate.text for candidate in offer.candidates] == TEXTS
        assert offer.candidates[1] is completion


def test_log_probs_are_those_of_the_choice() -> None:
    said, offers = asked(Strategist(by_number, OPTIONS, TEXTS, epsilon=0.3), range(60))
    for completion, offer in zip(said, offers, strict=True):
        likely = 0.8 if offer.chosen == 1 else 0.1
        assert completion.logprobs == pytest.approx([math.log(likely), 0.0, 0.0])
        assert offer.explored == (offer.chosen != 1)
    soft, offers = asked(Strategist(by_number, OPTIONS, TEXTS, pick="softmax", temperature=2.0), [0])
    total = sum(math.exp(q / 2) for q in (1, 3, 2))
    expected = [math.log(math.exp(q / 2) / total) for q in (1, 3, 2)]
    assert [candidate.logprobs[0] for candidate in offers[0].candidates] == pytest.approx(expected)
    assert soft[0].logprobs[0] == pytest.approx(expected[offers[0].chosen])


def test_options_are_taken_as_often_as_they_are_likely() -> None:
    def counts(strategist: Strategist) -> list[int]:
        _, offers = asked(strategist, range(600))
        return [sum(offer.chosen == place for offer in offers) for place in range(3)]

    assert counts(Strategist(by_number, OPTIONS, TEXTS, epsilon=0.3)) == pytest.approx([60, 480, 60], abs=35)
    total = sum(math.exp(q) for q in (1, 3, 2))
    soft = [600 * math.exp(q) / total for q in (1, 3, 2)]
    assert counts(Strategist(by_number, OPTIONS, TEXTS, pick="softmax", temperature=1.0)) == pytest.approx(soft, abs=40)
    assert counts(RandomStrategist(OPTIONS, TEXTS)) == pytest.approx([200] * 3, abs=40)


def test_what_is_not_legal_is_neither_scored_nor_chosen() -> None:
    scored: list[int] = []

    def score(said: Sequence[Sampled]) -> list[float]:
        scored.extend(one.action[1] for one in said)
        return by_number(said)

    for pick in ("greedy", "softmax", "epsilon"):
        strategist = Strategist(score, OPTIONS, TEXTS, pick=pick, epsilon=1.0, legal=lambda prompt: [True, False, True])  # type: ignore[arg-type]
        said, offers = asked(strategist, range(30))
        assert {completion.text for completion in said} <= {"(1)", "(3)"}
        assert offers[0].candidates[1].tokens == []
        assert offers[0].q == [1.0, -math.inf, 2.0]
        assert all(offer.candidates[offer.chosen].tokens for offer in offers)
    assert set(scored) == {11, 13}
    for wrong in ([False] * 3, [True] * 2):
        with pytest.raises(RolloutError, match="it must say of each whether it may be chosen"):
            asked(Strategist(score, OPTIONS, TEXTS, legal=lambda prompt, wrong=wrong: wrong), [0])  # type: ignore[misc]


def test_the_choice_does_not_depend_on_who_else_is_asked() -> None:
    for settings in ({"epsilon": 0.5}, {"pick": "softmax"}):
        strategist = Strategist(by_number, OPTIONS, TEXTS, **settings)  # type: ignore[arg-type]
        together = [completion.text for completion in asked(strategist, range(20))[0]]
        assert together == [asked(strategist, [seed])[0][0].text for seed in range(20)]
        assert len(set(together)) > 1


def test_all_who_ask_at_the_same_time_are_scored_in_one_batch() -> None:
    batches: list[int] = []

    def score(said: Sequence[Sampled]) -> list[float]:
        batches.append(len(said))
        return by_number(said)

    asked(Strategist(score, OPTIONS, TEXTS), range(16))
    assert batches == [16 * 3]


def test_a_random_strategist_values_nothing() -> None:
    said, offers = asked(RandomStrategist(OPTIONS, TEXTS), [0])
    assert offers[0].q == [0.0] * 3
    assert said[0].logprobs == pytest.approx([math.log(1 / 3), 0.0, 0.0])


def test_a_script_is_followed_and_its_end_is_said() -> None:
    strategist = ScriptedStrategist([2, 0], OPTIONS, TEXTS)
    said, offers = asked(strategist, [0, 1])
    assert [completion.text for completion in said] == ["(3)", "(1)"]
    assert [offer.chosen for offer in offers] == [2, 0]
    assert said[0].logprobs == [0.0] * 3
    with pytest.raises(RolloutError, match="the script has 2 choices and was asked for one more"):
        asked(strategist, [2])
    with pytest.raises(RolloutError, match=r"the script says option 3 \(from 0\) of 3, which is not legal here"):
        asked(ScriptedStrategist([3], OPTIONS, TEXTS), [0])


def test_an_order_is_followed_by_the_number_of_replies_so_far() -> None:
    texts = {0: "User: hello", 1: "User: a\nAssistant: b\nUser: c", 2: "Assistant: b\nUser: c\nAssistant: d"}
    script = in_order([2, 0], lambda prompt: texts[prompt[0]])
    assert [script([turn]) for turn in range(3)] == [2, 0, 2]


def test_the_score_of_a_language_model_is_its_q_and_states_are_read_once() -> None:
    lm, _ = tiny(["a cat sat"], vocab_size=300, hidden=16, layers=2, heads=2)
    scorer = OptionScorer(lm, Reading("logprob", "mean"))
    other = [9, 9, 9]
    states = [Options(PROMPT, OPTIONS), Options(other, OPTIONS[1:]), Options(other, OPTIONS)]
    said = [Sampled(state.state, option, [0.0] * 3) for state in states for option in state.candidates]
    batch = lay_options(states, scorer.layout)
    assert option_score(scorer)(said) == scorer.values(batch, 1000).tolist()
    assert len(batch.tokens) == 3
    _, (offer,) = asked(Strategist(option_score(scorer), OPTIONS, TEXTS, pick="greedy"), [0])
    assert offer.q == pytest.approx(option_score(scorer)(said)[:3], abs=1e-6)
    assert offer.q[offer.chosen] == max(offer.q)
