"""From what episodes earned to the reward of every token, what is remembered in between, and what others call it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from echelon.data.packing import Batch, pack
from echelon.errors import ConfigError, DataError
from echelon.train.aliases import TRL, trl_names
from echelon.train.shaping import Shaper, ShapingConfig
from echelon.types import Episode, Turn


def episode(*rewards: float, stop: str = "stop") -> Episode:
    """Turns of two tokens each, of log-prob -1, the last of which ended as `stop` says."""
    turns: list[Turn] = []
    for index, reward in enumerate(rewards):
        prompt = [1, 2] if not turns else [*turns[-1].prompt, *turns[-1].action, 3]
        last = index + 1 == len(rewards)
        turns.append(
            Turn(index, "actor", prompt, [4, 5], [-1.0, -1.0], "", reward=reward, stop=stop if last else "stop")
        )
    return Episode("t", turns=turns, ending="terminated")


def packed(*played: Episode, reference: float | None = None) -> Batch:
    batch = pack([turn for one in played for turn in one.turns])
    if reference is not None:
        batch.ref_logprobs = torch.full(batch.tokens.shape, reference)
    return batch


def shaped(settings: ShapingConfig, *played: Episode, reference: float | None = None) -> tuple[list[float], dict]:
    """The rewards of the sampled tokens, and the metrics."""
    batch = packed(*played, reference=reference)
    rewards, metrics = Shaper(settings).rewards(batch, played)
    assert not rewards[~batch.mask].any()
    return rewards[batch.mask].tolist(), metrics


def test_by_default_a_turn_earns_its_reward_at_its_last_token() -> None:
    rewards, metrics = shaped(ShapingConfig(), episode(1.0, 2.0), episode(5.0))
    assert rewards == [0.0, 1.0, 0.0, 2.0, 0.0, 5.0]
    assert metrics == {"shaped/score": 4.0, "shaped/return": 4.0}


def test_kl_is_taken_off_every_token_and_logged_per_episode() -> None:
    rewards, metrics = shaped(ShapingConfig(kl_coef=0.1), episode(1.0, 2.0), episode(5.0), reference=-1.5)
    assert rewards == pytest.approx([-0.05, 0.95, -0.05, 1.95, -0.05, 4.95])
    assert metrics == pytest.approx(
        {"shaped/score": 4.0, "shaped/kl": 1.5, "shaped/kl_coef": 0.1, "shaped/kl_reward": -0.15, "shaped/return": 3.85}
    )


def test_a_missing_reference_is_an_error_and_not_zero() -> None:
    with pytest.raises(DataError, match="ref_logprobs is missing from the batch, and a missing tensor is not zero"):
        shaped(ShapingConfig(kl_coef=0.1), episode(1.0))


def test_a_reference_without_a_weight_is_measured_and_costs_nothing() -> None:
    rewards, metrics = shaped(ShapingConfig(), episode(1.0), reference=-1.5)
    assert rewards == [0.0, 1.0]
    assert metrics["shaped/kl"] == pytest.approx(1.0)
    assert metrics["shaped/return"] == 1.0


def test_rewards_are_normalised_then_bounded_then_penalised() -> None:
    played = [episode(0.0), episode(2.0), episode(4.0), episode(30.0, stop="length")]  # mean 9, deviation 14.11
    settings = ShapingConfig(normalize="standard", clip=1.0, missing_end_penalty=0.5)
    rewards, _ = shaped(settings, *played)
    std = torch.tensor([0.0, 2.0, 4.0, 30.0]).std().item()
    assert rewards[1::2] == pytest.approx([-9 / std, -7 / std, -5 / std, 1.0 - 0.5])


def test_only_a_turn_that_was_cut_off_is_penalised() -> None:
    rewards, _ = shaped(ShapingConfig(missing_end_penalty=1.0), episode(0.0, 0.0, stop="length"), episode(3.0))
    assert rewards == [0.0, 0.0, 0.0, -1.0, 0.0, 3.0]


def test_whitened_rewards_keep_their_mean_and_get_deviation_1() -> None:
    rewards, _ = shaped(ShapingConfig(whiten=True), episode(1.0, 2.0), episode(5.0))
    found = torch.tensor(rewards)
    assert found.mean().item() == pytest.approx(8 / 6, rel=1e-5)
    assert found.std().item() == pytest.approx(1.0, rel=1e-5)


def test_statistics_run_over_all_steps_and_survive_a_kill_bit_for_bit(tmp_path: Path) -> None:
    settings = ShapingConfig(normalize="scale", kl_coef=0.1, kl_target=6.0)

    def step(shaper: Shaper, reward: float) -> list[float]:
        played = [episode(reward), episode(3 * reward)]
        batch = packed(*played, reference=-7.1)
        rewards, metrics = shaper.rewards(batch, played)
        shaper.adapt(metrics, episodes=256)
        return rewards[batch.mask].tolist()

    whole = Shaper(settings)
    first, second = step(whole, 1.0), step(whole, 0.7)
    assert whole.kl_coef == pytest.approx(0.1 * 1.00512**2)  # KL is 12.2
    killed = Shaper(settings)
    assert step(killed, 1.0) == first
    killed.save(tmp_path)
    resumed = Shaper(settings)
    assert step(resumed, 0.7) != second
    resumed.load(tmp_path)
    assert step(resumed, 0.7) == second
    assert (resumed.kl_coef, resumed.moments) == (whole.kl_coef, whole.moments)


def test_a_weight_without_a_target_stays() -> None:
    shaper = Shaper(ShapingConfig(kl_coef=0.1))
    shaper.adapt({"shaped/kl": 100.0}, episodes=256)
    assert shaper.kl_coef == 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": 0.0}, "clip = 0.0: every reward would be the same"),
        ({"kl_coef": -0.1}, "kl_coef = -0.1: a negative one rewards being far from the start"),
        ({"missing_end_penalty": -1.0}, "missing_end_penalty = -1.0: a negative one rewards being cut off"),
        ({"kl_target": 6.0}, "kl_target = 6.0: a weight of 0 stays 0"),
        ({"kl_coef": 0.1, "kl_target": 0.0}, "kl_target = 0.0: KL is positive"),
        ({"kl_horizon": 0}, "kl_horizon = 0: it counts episodes"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ShapingConfig(**settings)


def test_trl_names_stand_beside_ours_for_what_was_logged() -> None:
    played = [episode(1.0, 2.0), episode(5.0, stop="length")]
    found = trl_names({"shaped/kl": 1.5, "policy/ratio": 1.01, "reward/mean": 4.0}, played, 96)
    assert found == {
        "objective/kl": 1.5,
        "val/ratio": 1.01,
        "episode": 96.0,
        "objective/entropy": 3.0,  # 6 tokens of log-prob -1 in 2 episodes
        "val/num_eos_tokens": 2.0,
    }
    assert not set(TRL) & set(TRL.values())
