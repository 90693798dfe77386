"""Policies of numbers at play: whose step is whose, and which episode begins where."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium")

from echelon.envs.vector import Lanes
from echelon.models.mlp import MlpPolicy, make_policy
from echelon.rollout.lanes import Steps, episode_returns, evaluate, play_episodes, play_steps


def opened(count: int, horizon: int = 0, name: str = "CartPole-v1") -> tuple[Lanes, MlpPolicy]:
    lanes = Lanes(name, count, horizon=horizon)
    return lanes, make_policy(lanes.width, lanes.actions, hidden=(8,))


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_episodes_go_on_from_one_play_to_the_next() -> None:
    lanes, policy = opened(2, horizon=7)
    asked: list[tuple[int, int]] = []

    def seed_of(lane: int, number: int) -> int:
        asked.append((lane, number))
        return 10 * lane + number

    first = play_steps(lanes, policy, 5, seed_of=seed_of, generator=draws())
    second = play_steps(lanes, policy, 5, seed_of=seed_of, generator=draws(1))
    assert asked == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert first.episode_N.tolist() == [0] * 5 + [1] * 5
    assert first.last_N.tolist() == [False, False, False, False, True] * 2
    assert first.finished == []
    assert second.episode_N.tolist() == [0, 0, 2, 2, 2, 1, 1, 3, 3, 3]
    assert [(one.seed, one.reward, one.length, one.terminated) for one in second.finished] == [
        (0, 7.0, 7, False),
        (10, 7.0, 7, False),
    ]
    assert torch.equal(second.observations_ND[0], first.next_ND[4])
    assert torch.equal(second.next_ND[0], second.observations_ND[1])
    assert not torch.equal(second.next_ND[1], second.observations_ND[2])  # the end of one, the beginning of another


def test_whole_episodes_do_not_depend_on_how_many_lanes_there_are() -> None:
    seeds = [3, 3, 4, 5, 6]
    found = []
    for count in (1, 2, 8):
        lanes, policy = opened(count)
        played = play_episodes(lanes, policy, seeds, generator=None)
        found.append(episode_returns(played, 5).tolist())
        assert sorted(one.seed for one in played.finished) == seeds
        assert sum(one.length for one in played.finished) == len(played.rewards_N)
        assert torch.bincount(played.episode_N).tolist() == found[-1]
        assert int(played.last_N.sum()) == int(played.terminated_N.sum()) == 5
    assert found[0] == found[1] == found[2]
    assert found[0][0] == found[0][1]


def test_siblings_begin_alike_and_part_by_what_they_draw() -> None:
    lanes, policy = opened(4)
    played = play_episodes(lanes, policy, [3, 3, 3, 3], generator=draws())
    first_N = torch.cat([torch.tensor([True]), played.last_N[:-1]])
    assert torch.unique(played.observations_ND[first_N], dim=0).shape[0] == 1
    assert len(set(episode_returns(played, 4).tolist())) > 1


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_log_probabilities_recorded_are_those_of_the_policy(name: str) -> None:
    lanes, policy = opened(3, horizon=9, name=name)
    played = play_steps(lanes, policy, 12, seed_of=lambda lane, number: lane, generator=draws())
    logprobs = policy.logprobs(played.observations_ND, played.chosen)[0]
    assert torch.allclose(logprobs, played.logprobs_N, atol=1e-5)


def test_an_evaluation_repeats_itself() -> None:
    lanes, policy = opened(4)
    found = evaluate(lanes, policy, 6, seed=1)
    assert found == evaluate(lanes, policy, 6, seed=1)
    assert evaluate(lanes, policy, 6, seed=1, greedy=False) == evaluate(lanes, policy, 6, seed=1, greedy=False) != found
    assert found["eval/reward/low"] <= found["eval/reward/mean"] <= found["eval/reward/high"]
    assert found["eval/episode/length"] == found["eval/reward/mean"]


def test_mini_batches_are_all_steps_once() -> None:
    steps = Steps(torch.arange(5.0)[:, None], torch.arange(5), denom=5.0, logprobs_N=torch.arange(5.0))
    parts = steps.shuffle_split(2, seed=0)
    assert [part.denom for part in parts] == [3.0, 2.0]
    assert sorted(np.concatenate([part.chosen for part in parts])) == [0, 1, 2, 3, 4]
    assert all(torch.equal(part.observations_ND[:, 0], part.logprobs_N) for part in parts)
    assert parts[0].returns_N is None
    assert len(steps.shuffle_split(9, seed=0)) == 5
