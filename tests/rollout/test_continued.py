"""A message that is spoken utterance by utterance: one row of exact ids, whoever decides where an utterance ends."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

import pytest
import torch

from echelon.data.packing import pack
from echelon.data.replay import transitions
from echelon.errors import RolloutError
from echelon.models.lm import tiny, token_logprobs
from echelon.rollout.plays import env_loop
from echelon.rollout.rewards import FunctionJudge, Reward, Rewards
from echelon.rollout.roles import Role, collect
from echelon.sampling.local import LocalSampler
from echelon.text.chat import Renderer
from echelon.types import Episode, Message, SamplingParams, Step, Task


@cache
def small() -> tuple[Any, Any]:
    return tiny(["tell me a tale. a cat, a hat, a bat."], vocab_size=300, hidden=32, layers=2, heads=2)


class Tale:
    """Utterances of at least three characters; the third is the last and earns 1. It answers nothing in between."""

    broken = False

    def __init__(self, task: Task) -> None:
        self.said: list[str] = []

    @classmethod
    def tasks(cls, split: str) -> list[Task]:
        return [Task("tale")]

    def start(self) -> list[Message]:
        return [Message(role="user", content="tell me a tale.")]

    def stop_when(self, utterance: str) -> bool:
        if self.broken:
            raise ZeroDivisionError("a predicate")
        return len(utterance) >= 3

    def step(self, action: str) -> Step:
        self.said.append(action)
        ended = len(self.said) == 3
        return Step(reward=float(ended), terminated=ended)


class Broken(Tale):
    """The predicate raises."""

    broken = True


def actor() -> tuple[Any, Role]:
    module, tokenizer = small()
    params = SamplingParams(max_tokens=20, stop_ids=(10_000,))  # nothing but the predicate ends an utterance
    return module, Role("actor", LocalSampler(module, tokenizer), Renderer(tokenizer), params)


def played(env: type[Tale] = Tale, *, max_turns: int = 10, count: int = 4) -> tuple[Any, list[Episode]]:
    module, role = actor()
    play = env_loop(env, role, max_turns=max_turns)
    return module, asyncio.run(collect(env.tasks("train"), play, seed=0, siblings=count))


def test_utterances_continue_the_exact_ids_and_make_one_row() -> None:
    module, episodes = played()
    for episode in episodes:
        assert [len(turn.text) >= 3 for turn in episode.turns] == [True] * 3
        assert (episode.ending, episode.reward) == ("terminated", 1.0)
        for before, after in zip(episode.turns, episode.turns[1:], strict=False):
            assert after.prompt == before.prompt + before.action
    batch = pack([turn for episode in episodes for turn in episode.turns])
    assert len(batch.rows) == len(episodes)
    with torch.no_grad():
        found = token_logprobs(module, batch)
    assert batch.logprobs is not None
    assert (found - batch.logprobs)[batch.mask].abs().max() < 1e-4


def test_the_utterance_level_sees_a_transition_per_utterance() -> None:
    _, episodes = played(count=1)
    steps = transitions(episodes[0], "actor", gamma=0.9)
    assert [step.terminated for step in steps] == [False, False, True]
    assert steps[0].next_state == steps[0].state + steps[0].action


def test_an_episode_cut_off_bootstraps_from_what_was_said_and_nothing_more() -> None:
    _, (episode,) = played(max_turns=2, count=1)
    last = episode.turns[-1]
    assert episode.ending == "truncated"
    assert episode.final == last.prompt + last.action


def test_the_conversation_is_one_message_and_rewards_see_all_of_it() -> None:
    _, (episode,) = played(count=1)
    said = [turn.text for turn in episode.turns]
    conversation = episode.conversation(episode.turns[-1])
    assert conversation == [
        {"role": "user", "content": "tell me a tale."},
        {"role": "assistant", "content": said[0] + said[1]},
    ]
    seen: list[Any] = []

    def judge(prompts: list[list[Message]], completions: list[str]) -> list[float]:
        seen.append((prompts, completions))
        return [2.0]

    Rewards([Reward("judge", FunctionJudge("judge", judge))]).add([episode])
    assert seen == [([conversation[:1]], ["".join(said)])]
    assert episode.reward == 3.0


def test_a_predicate_that_raises_fails_the_episode_not_the_run() -> None:
    with pytest.raises(RolloutError, match=r"4 of 4 episodes failed.*ZeroDivisionError: a predicate"):
        played(Broken)
