"""The written controllers: what they earn on their tasks, and what is said where there is none."""

import numpy as np
import pytest

from echelon.envs.experts import EXPERTS, expert
from echelon.errors import ConfigError

gymnasium = pytest.importorskip("gymnasium")


@pytest.mark.parametrize(
    ("env_id", "least"), [("CartPole-v1", 500), ("Acrobot-v1", -95), ("MountainCar-v0", -120), ("Pendulum-v1", -190)]
)
def test_experts_earn_what_solves_the_task(env_id: str, least: float) -> None:
    """Chance earns about 22, −500, −200 and −1200."""
    simulator, acts, returns = gymnasium.make(env_id), expert(env_id), []
    for seed in range(10):
        observation, _ = simulator.reset(seed=seed)
        total, ended = 0.0, False
        while not ended:
            action = acts(observation)
            assert simulator.action_space.contains(action)
            observation, reward, terminated, truncated, _ = simulator.step(action)
            total, ended = total + float(reward), terminated or truncated
        returns.append(total)
    assert np.mean(returns) >= least


def test_the_cart_is_pushed_towards_where_the_pole_falls() -> None:
    assert expert("CartPole-v1")([0, 0, 0.1, 0]) == 1
    assert expert("CartPole-v1")([0, 0, -0.1, 0]) == 0


def test_the_pendulum_is_braked_at_the_top_and_driven_at_the_bottom() -> None:
    assert expert("Pendulum-v1")(np.array([1.0, 0.0, 0.5])) == pytest.approx([-1.0])
    assert expert("Pendulum-v1")(np.array([-1.0, 0.0, 0.5])) == pytest.approx([2.0])
    assert expert("Pendulum-v1")(np.array([-1.0, 0.0, -0.5])) == pytest.approx([-2.0])


def test_an_environment_without_an_expert_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no scripted expert for 'CartPole-v2'. Did you mean 'CartPole-v1'\?"):
        expert("CartPole-v2")
    with pytest.raises(ConfigError, match="There is one for Acrobot-v1, CartPole-v1, MountainCar-v0, Pendulum-v1;"):
        expert("HalfCheetah-v5")
    assert expert("gymnasium:CartPole-v1") is EXPERTS["CartPole-v1"]
