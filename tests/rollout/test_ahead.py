"""Steps that are played ahead: with which weights, beside what, and what is left when something goes wrong."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from echelon.config import DistConfig, LoraConfig, OptimConfig, SamplingConfig
from echelon.errors import ConfigError, RolloutError
from echelon.models import lora
from echelon.models.lm import tiny
from echelon.rollout.ahead import Level, Played, Rollouts, Run, read_episode
from echelon.rollout.candidates import Offered
from echelon.rollout.roles import Role
from echelon.rollout.setup import Actor, open_copy
from echelon.sampling.candidates import Offer
from echelon.sampling.local import LocalSampler
from echelon.text.chat import Renderer
from echelon.train import dist
from echelon.train.learner import Learner
from echelon.train.stale import AsyncConfig
from echelon.types import Completion, Episode, SamplingParams, Turn

SAMPLING = SamplingConfig(max_tokens=2)
PARAMS = SamplingParams(max_tokens=2)


@pytest.fixture
def level() -> Level:
    module, tokenizer = tiny(["a few words"], vocab_size=270, hidden=16, layers=1, heads=2)
    sampler = LocalSampler(module, tokenizer)
    role = Role("actor", sampler, Renderer(tokenizer), PARAMS)
    return Level(Actor(module, tokenizer, sampler, role), Learner(module, OptimConfig()), SAMPLING)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert threads() == []


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("rollout")]


def train(level: Level) -> None:
    """A step of training: every weight grows by one."""
    with torch.no_grad():
        for weight in level.learner.trained:
            weight.add_(1.0)
    level.learner.version += 4  # optimizer steps


def one_turn(role: Role, run: Run) -> Episode:
    episode = Episode("t", seed=1, ending="terminated")
    run(role.act(episode, [{"role": "user", "content": "a few"}]))
    return episode


def rollouts(level: Level, play: Any, staleness: int, *, steps: int = 6) -> Rollouts[Played]:
    settings = AsyncConfig(max_staleness=staleness)
    return Rollouts(settings, {"actor": level}, play, steps=steps, read=Played.from_json)


def test_in_turn_a_step_is_played_when_it_is_asked_for_by_who_acts_on_the_live_weights(level: Level) -> None:
    seen = []

    def play(roles: Mapping[str, Role], step: int, run: Run) -> Played:
        seen.append((step, roles["actor"] is level.actor.role, run is asyncio.run, threading.current_thread()))
        return Played([])

    with rollouts(level, play, 0) as ahead:
        assert (ahead.parts(), ahead.take(3).episodes, ahead.metrics(), ahead.stale("actor")) == ({}, [], {}, None)
        level.learner.version = 7
        ahead.publish()
    assert seen == [(3, True, True, threading.main_thread())]
    assert level.actor.sampler.version == 7


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_a_step_is_played_with_the_weights_of_so_many_steps_before(level: Level, staleness: int) -> None:
    """Whatever is faster: even steps take long to train, odd ones long to play."""
    own = next(iter(level.learner.trained))
    first, found = float(own.detach().flatten()[0]), {}

    def play(roles: Mapping[str, Role], step: int, run: Run) -> Played:
        weight = next(roles["actor"].sampler.module.parameters()).flatten()
        before = float(weight[0])
        episode = one_turn(roles["actor"], run)
        time.sleep(0.01 * (step % 2))
        found[step] = before - first, float(weight[0]) - first
        return Played([episode])

    with rollouts(level, play, staleness) as ahead:
        for step in range(6):
            (episode,) = ahead.take(step).episodes
            old = max(0, step - staleness)
            assert found[step] == pytest.approx((old, old))  # nor do they move while it is played
            assert episode.turns[0].version == 4 * old
            assert ahead.metrics() == {"policy/staleness": step - old}
            assert (ahead.stale("actor") is None) is (step == 0)
            time.sleep(0.01 * (step % 2 == 0))
            train(level)
    assert sorted(found) == list(range(6)), "nothing is played beyond the last step"


def test_every_role_has_weights_of_its_own_and_is_old_by_itself(level: Level) -> None:
    """One level learns in every step, the other one rests: what it said is never old."""
    role = Role("coach", LocalSampler(level.actor.module, level.actor.tokenizer), level.actor.role.renderer, PARAMS)
    module = copy.deepcopy(level.actor.module)
    rests = Level(replace(level.actor, module=module, role=role), Learner(module, OptimConfig()), SAMPLING)

    def play(roles: Mapping[str, Role], step: int, run: Run) -> Played:
        episodes = [one_turn(role, run) for role in roles.values()]
        assert [episode.turns[0].role for episode in episodes] == ["actor", "coach"]
        return Played(episodes)

    both = {"actor": level, "coach": rests}
    with Rollouts(AsyncConfig(max_staleness=1), both, play, steps=4, read=Played.from_json) as ahead:
        for step in range(4):
            versions = [episode.turns[0].version for episode in ahead.take(step).episodes]
            assert versions == [4 * max(0, step - 1), 0]
            assert (ahead.stale("actor") is None, ahead.stale("coach")) == (step == 0, None)
            train(level)


def test_two_roles_that_speak_with_one_set_of_weights_are_handed_one_copy(level: Level) -> None:
    """Under the name of either, a turn of other weights is refused."""

    def play(roles: Mapping[str, Role], step: int, run: Run) -> Played:
        assert roles["coach"].sampler is roles["actor"].sampler
        coach = Role("coach", roles["coach"].sampler, roles["coach"].renderer, PARAMS)
        episodes = [one_turn(roles["actor"], run), one_turn(coach, run)]
        episodes[1].turns[0].version -= step == 2
        return Played(episodes)

    both = {"actor": level, "coach": level}
    with Rollouts(AsyncConfig(max_staleness=1), both, play, steps=3, read=Played.from_json) as ahead:
        for step in range(2):
            versions = [episode.turns[0].version for episode in ahead.take(step).episodes]
            assert versions == [0, 0]
            train(level)
            assert (ahead.stale("coach") is None) is (ahead.stale("actor") is None)
        with pytest.raises(RolloutError, match=r"a turn of 'coach' in step 2 was sampled with weights of version 3"):
            ahead.take(2)


def test_of_several_adapters_on_one_base_each_is_copied_with_it(level: Level) -> None:
    """The copy of one has nothing in common with the others, and says what it says when it speaks."""
    base = lora.attach(level.actor.module, LoraConfig(rank=2), name="solver")
    base = lora.attach(base, LoraConfig(rank=2), name="coach")
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if "lora_B" in name:
                weight.add_(0.3 if "solver" in name else -0.2)
    ids, said = torch.tensor([[7, 8, 9]]), {}
    views = {name: lora.AdapterView(base, name) for name in ("solver", "coach")}
    own = {id(weight) for weight in base.parameters()}
    for name, view in views.items():
        actor = replace(level.actor, module=view)
        role = open_copy(actor, SAMPLING)
        role.sampler.load(lora.merged_weights(view), 1)
        assert not own & {id(weight) for weight in role.sampler.module.parameters()}
        with torch.no_grad():
            said[name] = role.sampler.module(input_ids=ids).logits
            torch.testing.assert_close(said[name], view(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert (said["solver"] - said["coach"]).abs().max() > 1e-2
    assert lora.names(base) == ["solver", "coach"], "no adapter has been added for a copy"


def test_the_next_step_is_played_while_this_one_trains(level: Level) -> None:
    begun, trained = {step: threading.Event() for step in range(3)}, {step: threading.Event() for step in range(3)}

    def play(roles: Mapping[str, Role], step: int, run: Run) -> Played:
        begun[step].set()
        if step:
            assert trained[step - 1].wait(30)
        return Played([])

    with rollouts(level, play, 1, steps=3) as ahead:
        for step in range(3):
            ahead.take(step)
            if step < 2:
                assert begun[step + 1].wait(30)  # it has begun and is not over: it waits for what follows
            trained[step].set()


def test_what_a_rollout_raises_is_raised_when_its_step_is_taken(level: Level) -> None:
    def play(roles: Mapping[str, Role], step: int, run: Run) -> Played:
        if step == 1:
            raise RolloutError("too many failed")
        return Played([])

    with rollouts(level, play, 2) as ahead:
        ahead.take(0)
        with pytest.raises(RolloutError, match="too many failed"):
            ahead.take(1)


@pytest.mark.parametrize("waits", [True, False])
def test_an_interruption_calls_off_what_is_under_way(level: Level, waits: bool) -> None:
    """Of two rollouts: one that waits for an answer that never comes, and one that would wait for a second one."""
    begun, cancelled = threading.Event(), []

    async def forever() -> None:
        begun.set()
        try:
            await asyncio.sleep(60 if waits else 0.05)
        except asyncio.CancelledError:
            cancelled.append("once")
            raise

    def play(roles: Mapping[str, Role], step: int, run: Run) -> Played:
        if step:
            while True:
                run(forever())
        return Played([])

    def interrupted() -> None:
        with rollouts(level, play, 1) as ahead:
            ahead.take(0)
            assert begun.wait(30)
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - start < 30
    assert threads() == []
    assert not waits or cancelled == ["once"]


def test_a_turn_that_other_weights_sampled_than_were_handed_over_is_refused(level: Level) -> None:
    def play(roles: Mapping[str, Role], step: int, run: Run) -> Played:
        episode = one_turn(roles["actor"], run)
        episode.turns[0].version -= step == 2
        lost = Episode("t", turns=[Turn(0, "actor", [], [], [], "")], ending="failed")  # never trained on
        other = Episode("t", turns=[Turn(0, "user", [], [], [], "", version=-9)])  # nobody hands it weights
        return Played([episode, lost, other])

    with rollouts(level, play, 1) as ahead:
        for step in range(2):
            ahead.take(step)
            train(level)
        with pytest.raises(RolloutError, match=r"in step 2 was sampled with weights of version 3, and .* version 4"):
            ahead.take(2)


def test_a_copy_is_of_all_weights_with_what_an_adapter_adds_and_goes_its_own_way(level: Level) -> None:
    adapted = lora.attach(level.actor.module, LoraConfig(rank=2))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.add_(0.3)
    learner = Learner(adapted, OptimConfig())
    role = open_copy(Actor(adapted, level.actor.tokenizer, level.actor.sampler, level.actor.role), SAMPLING)
    role.sampler.load(learner.weights(), 5)
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        torch.testing.assert_close(role.sampler.module(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
        for weight in learner.trained:
            weight.add_(1.0)
        torch.testing.assert_close(role.sampler.module(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert role.sampler.version == 5
    assert not any(weight.requires_grad for weight in role.sampler.module.parameters())


def test_weights_that_were_not_given_are_no_silent_gap(level: Level) -> None:
    role = open_copy(level.actor, SAMPLING)
    with pytest.raises(AssertionError, match="weights that were not given would stay old"):
        role.sampler.load(list(level.learner.weights())[:3], 1)


def test_rollouts_under_way_come_back_from_a_checkpoint_as_they_were(level: Level, tmp_path: Path) -> None:
    def play(roles: Mapping[str, Role], step: int, run: Run) -> Played:
        return Played([one_turn(roles["actor"], run)], {"reward/mean": step / 3})

    with rollouts(level, play, 2) as ahead:
        ahead.take(0)
        train(level)
        ahead.take(1)
        train(level)
        ahead.parts()["rollouts"].save(tmp_path)
        expected = [ahead.take(2), ahead.take(3)]

    def fresh(roles: Mapping[str, Role], step: int, run: Run) -> Played:
        assert step > 3, "these have been played"
        return Played([])

    with rollouts(level, fresh, 2) as ahead:
        ahead.load(tmp_path)
        assert [ahead.take(2), ahead.take(3)] == expected
        assert ahead.metrics() == {"policy/staleness": 2.0}
        assert ahead.stale("actor") is not None


def test_an_episode_is_the_same_after_json() -> None:
    heard = ({"role": "user", "content": "é"},)
    turns = [
        Turn(0, "actor", [1, 2], [3], [-0.1], "a", seed=9, starts=(1, 2), heard=heard, info={"parsed": 1.0}),
        Turn(1, "coach", [4], [5, 6], [-1e-9, -7.25], "b", parent=0, stop="length", version=3, reward=1 / 3),
    ]
    data = {"answer": [1, "x"], "nested": {"y": None}}
    episode = Episode("t", 2**62, turns, "truncated", [1, 2], heard, {"win": 0.1}, None, data)
    assert read_episode(json.loads(json.dumps(asdict(episode)))) == episode


def test_several_ranks_are_refused(level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "_ranks", dist.Ranks(0, 2, 2, DistConfig()))
    with pytest.raises(ConfigError, match=r"asynchronous.max_staleness = 1: 2 ranks play and train in step"):
        rollouts(level, None, 1)


def test_what_was_offered_is_the_same_after_json() -> None:
    """Also what was no legal choice, which is worth minus infinity."""
    said = [Completion([5, 6], [-1e-9, -math.inf], "a", "stop", 3), Completion([], [], "b", "length")]
    offers = {2**62: Offer([1, 2], said, [1 / 3, -math.inf], 0, True)}
    found = Offered([Episode("t", ending="terminated")], {"reward/mean": 0.1}, offers)
    assert Offered.from_json(json.loads(json.dumps(found.to_json(), default=float))) == found
