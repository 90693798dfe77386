"""The loop of the two levels: who reads what, who earns what, and what the strategist is told of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from echelon.data.candidates import Choice, Options
from echelon.data.packing import Sampled
from echelon.envs._shared import EnvSpec
from echelon.errors import ConfigError, DataError
from echelon.models.lm import tiny
from echelon.rollout.candidates import after
from echelon.rollout.dialogue import (
    Dialogists,
    advantages,
    choice_record,
    dialogue_metrics,
    env_inventory,
    fitted,
    spelled,
    state_of,
    strategy_choices,
    strategy_rows,
)
from echelon.rollout.roles import Role, collect
from echelon.sampling.candidates import Offer
from echelon.sampling.choices import ScriptedStrategist, Strategist
from echelon.sampling.scripted import ScriptedSampler
from echelon.text.chat import Renderer
from echelon.text.dialogue import DialogueState, Inventory, strategist_prompt
from echelon.text.endpoint import Unanswered
from echelon.train.log import episode_rows
from echelon.types import Completion, Episode, Message, SamplingParams, Step, Task, Turn

THREE = Inventory(("Question", "Reflection of Feelings", "Others"))


class Talk:
    """A user who counts: the reply to its n-th message earns n; over after three, cut off by itself after two."""

    def __init__(self, task: Task) -> None:
        self.task, self.replies = task, list[str]()

    @classmethod
    def tasks(cls, split: str) -> list[Task]:
        return [Task("talk")]

    @property
    def state(self) -> DialogueState:
        said = [("User", f"I say {number}.") for number in range(len(self.replies) + 1)]
        both = [
            one for pair in zip(said, [("Assistant", reply) for reply in self.replies], strict=False) for one in pair
        ]
        return DialogueState(said[-1][1], tuple(both), emotion="sad")

    def start(self) -> list[Message]:
        return [Message(role="user", content="Reply.")]

    def step(self, action: str) -> Step:
        self.replies.append(action)
        count = len(self.replies)
        info = {"win": float(count == 3)}
        return Step([Message(role="user", content="More.")], float(count), terminated=count == 3, info=info)


class Cut(Talk):
    def step(self, action: str) -> Step:
        step = super().step(action)
        return Step(step.messages, step.reward, truncated=len(self.replies) == 2, info=step.info)


class Broken(Talk):
    """Its judge does not answer when it hears "no"; it pays what cannot be paid for "nan"."""

    def step(self, action: str) -> Step:
        if action == "no":
            raise Unanswered("the judge said nothing that can be read")
        return Step(reward=math.nan if action == "nan" else 1.0, terminated=True)


class Silent:
    def __init__(self, task: Task) -> None:
        self.task = task

    def start(self) -> list[Message]:
        return []


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = ["You plan what an assistant says to a user. (1) (2) (3) Question Reflection of Feelings Others I say 0."]
    return tiny(words, vocab_size=400, hidden=32, layers=1, heads=2)[1]


def players(
    tokenizer: Any,
    script: Any = (0, 1, 2, 0),
    replies: Sequence[str] = ("one", "two", "three"),
    budget: int | None = None,
    strategist: bool = True,
) -> Dialogists:
    renderer = Renderer(tokenizer, max_tokens=budget)
    params = SamplingParams(max_tokens=8)
    responder = Role("responder", ScriptedSampler(list(replies), tokenizer), renderer, params)
    blank = Role("strategist", responder.sampler, renderer, params)
    sampler = ScriptedStrategist(script, spelled(blank, THREE), THREE.options)
    above = Role("strategist", sampler, renderer, params) if strategist else None
    return Dialogists(above, responder, THREE)


def played(env: type, who: Dialogists, *, max_turns: int = 10, seed: int = 0) -> tuple[Episode, dict[int, Offer]]:
    play = who.play(env, max_turns=max_turns)
    (episode,) = asyncio.run(collect([Task("talk")], play, seed=seed, error_budget=0.99))
    return episode, who.take()


def read(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


def test_every_reply_answers_a_strategy_that_stands_in_its_prompt(tokenizer: Any) -> None:
    who = players(tokenizer, script=[2, 0, 1])
    episode, _ = played(Talk, who)
    assert [turn.role for turn in episode.turns] == ["strategist", "responder"] * 3
    assert [turn.parent for turn in episode.turns] == [None, 0, 1, 2, 3, 4]
    assert all(turn.afresh for turn in episode.turns)
    for chosen, reply in zip(episode.turns[::2], episode.turns[1::2], strict=True):
        place = THREE.options.index(chosen.text)
        shown = read(tokenizer, reply.prompt)
        assert f"Strategy: {THREE.label(place)}\n" in shown
        assert not any(THREE.label(other) in shown for other in range(3) if other != place)
        assert chosen.action == spelled(who.responder, THREE)[place]
    assert episode.ending == "terminated"


def test_both_levels_read_the_conversation_so_far_and_the_strategist_the_menu(tokenizer: Any) -> None:
    episode, _ = played(Talk, players(tokenizer))
    for number, turn in enumerate(episode.turns):
        shown = read(tokenizer, turn.prompt)
        assert f"User: I say {number // 2}." in shown
        assert all(f"Assistant: {said}\n" in shown for said in ("one", "two", "three")[: number // 2])
        assert ("Strategies:" in shown) == (turn.role == "strategist")


def test_what_a_reply_earned_is_what_its_strategy_is_told(tokenizer: Any) -> None:
    episode, offers = played(Talk, players(tokenizer, script=[2, 0, 1]))
    found = strategy_choices(episode, offers)
    assert [turn.reward for turn in episode.of("responder")] == [1.0, 2.0, 3.0]
    assert [turn.reward for turn in episode.of("strategist")] == [0.0] * 3
    assert [choice.reward for choice in found] == [1.0, 2.0, 3.0]
    assert [choice.chosen for choice in found] == [2, 0, 1]
    assert [choice.options.state for choice in found] == [turn.prompt for turn in episode.of("strategist")]
    assert [choice.after for choice in found] == [found[1].options, found[2].options, None]
    shared = strategy_choices(episode, offers, {turn.index: 0.5 * turn.index for turn in episode.of("responder")})
    assert [choice.reward for choice in shared] == [1.5, 3.5, 5.5]


@pytest.mark.parametrize(("env", "most"), [(Cut, 10), (Talk, 2)])
def test_a_dialogue_that_is_cut_off_bootstraps_from_the_state_it_was_cut_off_in(
    tokenizer: Any, env: type, most: int
) -> None:
    who = players(tokenizer, script=[0, 1, 2])
    episode, offers = played(env, who, max_turns=most)
    assert episode.ending == "truncated"
    assert len(episode.turns) == 4
    last = offers[after(episode.turns[-1])]
    found = strategy_choices(episode, offers)
    assert found[-1] == Choice(found[-1].options, 1, 2.0, Options(last.prompt, spelled(who.responder, THREE)))
    assert not found[-1].terminated
    assert "User: I say 2." in read(tokenizer, last.prompt)
    assert episode.final is not None
    shown = read(tokenizer, episode.final)  # what the responder would have read
    assert f"Strategy: {THREE.label(2)}" in shown
    assert "User: I say 2." in shown
    assert next(iter(episode.unanswered))["content"] in shown


def test_without_a_strategist_there_are_replies_only_and_no_strategy_in_their_prompts(tokenizer: Any) -> None:
    episode, offers = played(Cut, players(tokenizer, strategist=False))
    assert [turn.role for turn in episode.turns] == ["responder"] * 2
    assert [turn.parent for turn in episode.turns] == [None, 0]
    assert not offers
    assert "Strategy" not in "".join(read(tokenizer, turn.prompt) for turn in episode.turns)
    assert episode.final is not None
    assert "Strategy" not in read(tokenizer, episode.final)


def test_prompts_stay_within_the_budget_and_keep_query_menu_and_cue(tokenizer: Any) -> None:
    who = players(tokenizer)
    assert who.strategist is not None
    bare = len(who.strategist.state(Episode("x"), strategist_prompt(Talk(Task("x")).state, THREE), None))
    budget = bare + 8
    episode, _ = played(Talk, players(tokenizer, budget=budget))
    assert max(len(turn.prompt) for turn in episode.turns) <= budget
    for number, turn in enumerate(episode.of("strategist")):
        shown = read(tokenizer, turn.prompt)
        assert f"User: I say {number}." in shown
        assert all(THREE.label(place) in shown for place in range(3))
        assert shown.endswith("<|assistant|>")
    whole = [len(turn.prompt) for turn in played(Talk, players(tokenizer))[0].turns]
    assert max(whole) > budget
    with pytest.raises(DataError, match="more than the budget of 20"):
        fitted(players(tokenizer, budget=20).responder, Talk(Task("x")).state, lambda s: strategist_prompt(s, THREE))


def test_a_dialogue_whose_judge_failed_is_dropped_and_never_worth_zero(tokenizer: Any) -> None:
    who = players(tokenizer, script=[0, 0, 0, 0], replies=["yes", "no", "yes", "yes"])
    play = who.play(Broken, max_turns=3)
    episodes = asyncio.run(collect([Task("a"), Task("b")], play, seed=0, siblings=2, error_budget=0.5))
    offers = who.take()
    endings = [episode.ending for episode in episodes]
    assert sorted(endings) == ["failed", "terminated", "terminated", "terminated"]
    failed = episodes[endings.index("failed")]
    assert failed.error == "Unanswered: the judge said nothing that can be read"
    told = dialogue_metrics(episodes, offers, THREE)
    assert told["episode/failed"] == 1.0
    assert told["reward/mean"] == told["dialogue/satisfaction"] == 1.0
    with pytest.raises(AssertionError, match="means nothing"):
        strategy_choices(failed, offers)


def test_a_reward_that_is_no_number_ends_the_run(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"Broken: task 'talk': step\(\) gave the reward nan"):
        played(Broken, players(tokenizer, replies=["nan"]))


def test_an_environment_without_a_state_is_refused() -> None:
    with pytest.raises(DataError, match="Silent has no `state` that is a DialogueState"):
        state_of(Silent(Task("x")))  # type: ignore[arg-type]


def test_strategies_come_from_the_settings_or_from_the_environment() -> None:
    class Knows(Talk):
        @classmethod
        def inventory(cls, *, few: bool = False) -> Inventory:
            return Inventory(("A", "B")) if few else THREE

    assert env_inventory(EnvSpec("k", Knows)) == THREE
    assert env_inventory(EnvSpec("k", Knows, {"few": True})).strategies == ("A", "B")
    assert env_inventory(EnvSpec("k", Knows), options=("x", "y", "z")).options == ("x", "y", "z")
    assert len(env_inventory(EnvSpec("k", Knows), ("esconv",))) == 8
    with pytest.raises(ConfigError, match="strategies: talk names none, so there is nothing to choose"):
        env_inventory(EnvSpec("talk", Talk))


def offer(q: list[float], chosen: int, probabilities: list[float]) -> Offer:
    said = [Completion([5], [math.log(p) if p else -math.inf], "x", "stop") for p in probabilities]
    legal = [c if value > -math.inf else Completion([], [], "x", "stop") for c, value in zip(said, q, strict=True)]
    return Offer([1], legal, q, chosen, False)


def test_the_advantage_of_a_choice_is_its_q_less_what_is_usually_chosen() -> None:
    offers = {1: offer([1.0, 3.0, -math.inf], 1, [0.25, 0.75, 0.0]), 2: offer([2.0, 0.0, 1.0], 2, [0.5, 0.25, 0.25])}
    turns = [Turn(0, "strategist", [], [], [], "", seed=seed) for seed in (1, 2)]
    assert advantages(turns, offers).tolist() == pytest.approx([3 - (0.25 + 2.25), 1 - (1 + 0.25)])


def test_shares_of_strategies_and_the_spread_of_their_values_are_logged(tokenizer: Any) -> None:
    episode, offers = played(Talk, players(tokenizer, script=[0, 0, 1]))
    for turn, q in zip(
        episode.of("strategist"), ([1.0, 2.0, 4.0], [0.0, 0.0, 1.0], [2.0, -math.inf, 2.0]), strict=True
    ):
        offers[turn.seed].q = q
    told = dialogue_metrics([episode], offers, THREE)
    shares = (told["strategy/question"], told["strategy/reflection_of_feelings"], told["strategy/others"])
    assert shares == pytest.approx((2 / 3, 1 / 3, 0))
    assert told["strategy/entropy"] == pytest.approx(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    assert told["strategy/spread"] == pytest.approx((3 + 1 + 0) / 3)
    assert told["dialogue/win"] == 1.0
    assert told["dialogue/satisfaction"] == 2.0
    assert told["episode/turns"] == 3.0
    assert told["reward/mean"] == 6.0


def test_episodes_tell_the_q_table_the_choice_and_the_strategy(tokenizer: Any) -> None:
    episode, offers = played(Talk, players(tokenizer, script=[2, 0, 1]))
    offers[episode.turns[0].seed].q = [0.5, -math.inf, 1.5]
    (row,) = strategy_rows(episode_rows([episode]), [episode], offers, THREE)
    first, reply = row["turns"][:2]
    assert (first["strategy"], first["chosen"], first["explored"]) == ("Others", 2, False)
    assert [(c["strategy"], c["text"], c["q"]) for c in first["candidates"]] == [
        ("Question", "(1)", 0.5),
        ("Reflection of Feelings", "(2)", None),
        ("Others", "(3)", 1.5),
    ]
    assert "candidates" not in reply
    assert reply["reward"] == 1.0
    assert choice_record(offers[episode.turns[2].seed], THREE)["strategy"] == "Question"


def test_who_else_plays_changes_no_choice(tokenizer: Any) -> None:
    def score(asked: Sequence[Sampled]) -> list[float]:
        return torch.zeros(len(asked)).tolist()

    found = []
    for count in (1, 5):
        who = players(tokenizer, replies=["yes"] * 30)
        assert who.strategist is not None
        who.strategist.sampler = Strategist(score, spelled(who.responder, THREE), THREE.options, epsilon=1.0)
        episodes = asyncio.run(collect([Task("a")], who.play(Talk, max_turns=9), seed=8, siblings=count))
        found.append([turn.text for turn in episodes[0].turns])
    assert found[0] == found[1]
    assert len(set(found[0][::2])) > 1
