"""Environments side by side: where episodes end, where they begin, and how a lane finds its way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")

from echelon.envs.vector import Lanes  # noqa: E402
from echelon.errors import CheckpointError, ConfigError  # noqa: E402


def alone(seed: int, actions: list[int], horizon: int = 0) -> list[Any]:
    """What Gymnasium's own environment says to these actions."""
    env = gymnasium.make("CartPole-v1", **({"max_episode_steps": horizon} if horizon else {}))
    env.reset(seed=seed)
    return [env.step(action) for action in actions]


def test_lanes_move_as_the_environment_does_alone() -> None:
    lanes = Lanes("gymnasium:CartPole-v1", 2)
    lanes.begin({0: 7, 1: 8})
    for actions in ([0, 1], [1, 1], [0, 0]):
        moved = lanes.step(np.array(actions))
    assert np.array_equal(moved.observations[0], alone(7, [0, 1, 0])[-1][0])
    assert np.array_equal(moved.observations[1], alone(8, [1, 1, 0])[-1][0])
    assert (lanes.lanes[0].reward, lanes.length(0)) == (3.0, 3)


def test_the_last_observation_is_the_one_the_action_led_to_and_no_step_is_a_reset() -> None:
    lanes = Lanes("CartPole-v1", 1, horizon=2)
    lanes.begin({0: 7})
    lanes.step(np.array([1]))
    moved = lanes.step(np.array([0]))
    assert (moved.terminated.tolist(), moved.truncated.tolist()) == ([False], [True])
    assert np.array_equal(moved.observations[0], alone(7, [1, 0])[-1][0])
    lanes.begin({0: 9})
    assert np.array_equal(lanes.observations[0], gymnasium.make("CartPole-v1").reset(seed=9)[0])
    assert np.array_equal(lanes.step(np.array([1])).observations[0], alone(9, [1])[-1][0])


def test_falling_is_terminated_and_not_truncated() -> None:
    lanes, steps = Lanes("CartPole-v1", 1), 0
    lanes.begin({0: 7})
    while True:
        moved, steps = lanes.step(np.array([1])), steps + 1
        if moved.ended[0]:
            break
    assert moved.terminated.tolist() == [True]
    assert moved.truncated.tolist() == [False]
    assert abs(moved.observations[0, 2]) > 0.2
    assert steps == lanes.length(0) == lanes.lanes[0].reward


def test_beginning_in_one_lane_leaves_the_others_where_they_are() -> None:
    lanes = Lanes("CartPole-v1", 3)
    lanes.begin({0: 1, 1: 1, 2: 2})
    lanes.step(np.array([0, 0, 0]))
    before = lanes.observations.copy()
    lanes.begin({1: 1})
    assert np.array_equal(lanes.observations[[0, 2]], before[[0, 2]])
    assert [lane.began for lane in lanes.lanes] == [1, 2, 1]
    lanes.begin({0: 1})
    assert np.array_equal(lanes.observations[0], lanes.observations[1])


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_a_loaded_lane_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    def play(lanes: Lanes, seed: int, steps: int) -> None:
        draw = np.random.default_rng(seed)
        for _ in range(steps):
            actions = draw.integers(2, size=2) if name == "CartPole-v1" else draw.normal(size=(2, 1)).astype(np.float32)
            lanes.step(actions)

    one, other = Lanes(name, 2), Lanes(name, 2)
    one.begin({0: 3, 1: 4})
    play(one, 0, 2)
    one.begin({1: 5})
    play(one, 1, 4)
    one.save(tmp_path)
    other.load(tmp_path)
    assert other.lanes == one.lanes
    for lanes in (one, other):
        lanes.begin({0: 6})
    assert np.array_equal(one.observations, other.observations)  # what lane 1 is at has come back too
    for lanes in (one, other):
        play(lanes, 2, 3)
    assert np.array_equal(one.observations, other.observations)
    assert one.lanes == other.lanes
    assert [one.length(lane) for lane in (0, 1)] == [other.length(lane) for lane in (0, 1)] == [3, 7]


def test_an_environment_that_does_not_come_back_is_not_continued(tmp_path: Path) -> None:
    lanes = Lanes("Pendulum-v1", 1)
    lanes.begin({0: 3})
    lanes.step(np.ones((1, 1), dtype=np.float32))
    lanes.save(tmp_path)
    heavier = Lanes("Pendulum-v1", 1, env_kwargs={"g": 5.0})
    with pytest.raises(CheckpointError, match="Pendulum-v1 does not come back to where it was"):
        heavier.load(tmp_path)
    with pytest.raises(CheckpointError, match="1 environments were saved, and there are 2 here"):
        Lanes("Pendulum-v1", 2).load(tmp_path)
    with pytest.raises(CheckpointError, match="no environments were saved there"):
        lanes.load(tmp_path / "nowhere")


def test_an_unknown_environment_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'CartPole-v1'"):
        Lanes("CartPol-v1", 1)
