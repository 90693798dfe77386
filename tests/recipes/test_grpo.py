"""GRPO: who is compared with whom, what each token gets, and that a run can be cut, resumed, and can lose episodes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from echelon.config import ModelConfig
from echelon.errors import ConfigError
from echelon.recipes.grpo import Config, compare
from echelon.types import Episode, Turn

SMALL = ("--steps", 2, "--tasks-per-step", 2, "--group-size", 4, "--policy.epochs", 2)


def episode(reward: float, *tokens: int) -> Episode:
    """One turn per number, of that many tokens; the reward comes with the last."""
    turns = [Turn(place, "actor", [1], [2] * count, [0.0] * count, "") for place, count in enumerate(tokens)]
    turns[-1].reward = reward
    return Episode(task="t", turns=turns, ending="terminated")


def config(**settings: object) -> Config:
    return Config(out="x", env="x", model=ModelConfig("x"), **settings)


def test_every_turn_gets_the_return_of_its_episode_less_the_mean_of_its_group() -> None:
    played = [episode(3.0, 1, 1), episode(1.0, 1), episode(7.0, 2), episode(7.0, 2)]
    advantages, metrics = compare(config(scale="none", weigh="tokens"), played, [0, 0, 1, 1])
    assert advantages.tolist() == [1.0, 1.0, -1.0, 0.0, 0.0]
    assert metrics["group/zero_variance"] == 0.5


def test_leaving_one_out_and_scaling_are_settings() -> None:
    played = [episode(3.0, 1), episode(1.0, 1)]
    assert compare(config(scale="none", leave_one_out=True), played, [0, 0])[0].tolist() == [2.0, -2.0]
    assert compare(config(scale="std"), played, [0, 0])[0].tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=1e-5)


def test_an_episode_whose_siblings_failed_has_nothing_to_compare_with_and_gets_zero() -> None:
    advantages, metrics = compare(config(), [episode(5.0, 1), episode(0.0, 1), episode(1.0, 1)], [0, 1, 1])
    assert advantages[0] == 0
    assert metrics["group/zero_variance"] == 0.5


def test_weighing_episodes_gives_each_the_same_sum_over_its_tokens() -> None:
    played = [episode(1.0, 1), episode(-1.0, 2, 1)]  # four tokens: the loss will divide by 4, two each
    advantages, _ = compare(config(scale="none", weigh="episodes"), played, [0, 0])
    assert advantages.tolist() == pytest.approx([2.0, -2 / 3, -2 / 3])
    assert (advantages * torch.tensor([1.0, 2.0, 1.0])).tolist() == pytest.approx([2.0, -4 / 3, -2 / 3])


def test_a_run_leaves_metrics_episodes_and_a_model(train, game: list[str], start: Path) -> None:
    run = train("grpo", *game, *SMALL, "--sampling.temperature", 0.7)
    assert [row["step"] for row in run.rows()] == [0, 1]
    for row in run.rows():
        assert {"reward/mean", "group/zero_variance", "policy/kl", "policy/clipped", "policy/entropy"} <= row.keys()
        assert row["policy/first_mismatch"] < 1e-4  # ratio 1 before the first update: sampler and trainer agree
        assert row["policy/grad_norm"] > 0
    assert len(run.rows("episodes")) == 16
    assert (run.out / "checkpoints/step_000002/actor/config.json").is_file()
    before = load_file(start / "model.safetensors")
    assert not any(torch.equal(tensor, before[name]) for name, tensor in run.weights().items())


def test_a_task_drawn_twice_in_a_step_makes_two_groups(train, game: list[str]) -> None:
    one_task = ("--env-settings", "low=2", "high=2", "--scale", "none", "--weigh", "tokens", "--steps", 1)
    run = train("grpo", *game, *SMALL, *one_task)
    assert {row["task"] for row in run.rows("episodes")} == {"guess_number/2"}
    rewards = torch.tensor([row["reward"] for row in run.rows("episodes")]).view(2, 4)
    given = torch.tensor([row["turns"][0]["advantage"] for row in run.rows("episodes")]).view(2, 4)
    torch.testing.assert_close(given, rewards - rewards.mean(1, keepdim=True))
    assert rewards[0].mean() != rewards[1].mean()


def test_the_size_of_a_pass_does_not_change_the_update(train, game: list[str]) -> None:
    flags = (*game, *SMALL, "--steps", 1, "--policy.kl-coef", 0.1, "--policy.entropy-coef", 0.01)
    flags += ("--policy.optim.eps", 1e-3)  # otherwise Adam makes a whole step of the rounding in a gradient near 0
    whole, parts = train("grpo", *flags, name="whole"), train("grpo", *flags, "--tokens-per-pass", 60, name="parts")
    assert whole.rows()[0] == pytest.approx(parts.rows()[0], rel=1e-5, abs=1e-5)
    torch.testing.assert_close(whole.weights(), parts.weights(), rtol=0, atol=1e-6)


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(train, game: list[str], killed_at) -> None:
    flags = (*game, *SMALL, "--steps", 4, "--save-every", 2, "--policy.kl-coef", 0.1, "--policy.minibatches", 2)
    whole = train("grpo", *flags, name="whole")
    killed_at(3)
    train("grpo", *flags, name="killed", status=130)
    killed_at(-1)
    resumed = train("grpo", *flags, "--resume", name="killed")
    assert len(whole.rows()) == 4
    assert resumed.rows() == whole.rows()
    assert resumed.rows("episodes") == whole.rows("episodes")
    for part in ("actor", "reference"):
        torch.testing.assert_close(resumed.weights(part), whole.weights(part), rtol=0, atol=0)


def test_the_starting_policy_stays_and_the_policy_leaves_it(train, game: list[str], start: Path) -> None:
    run = train("grpo", *game, *SMALL, "--policy.kl-coef", 0.1)
    distances = [row["policy/kl_to_start"] for row in run.rows()]
    assert 0 < distances[0] < distances[1]  # 0 in the first pass of the first step, not in the second pass
    torch.testing.assert_close(run.weights("reference"), load_file(start / "model.safetensors"), rtol=0, atol=0)


def test_failed_episodes_are_counted_and_the_others_learned_from(train, fragile: list[str]) -> None:
    run = train("grpo", *fragile, *SMALL, "--error-budget", 0.9)
    assert all(0 < row["episode/failed"] < 8 for row in run.rows())
    assert all(row["policy/grad_norm"] > 0 for row in run.rows())
    failed = [row for row in run.rows("episodes") if row["ending"] == "failed"]
    assert {row["error"] for row in failed} == {"ZeroDivisionError: three"}
    assert not any("advantage" in turn for row in failed for turn in row["turns"])


def test_more_failures_than_the_budget_end_the_run(
    train, fragile: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train("grpo", *fragile, *SMALL, status=2)
    message = capsys.readouterr().err
    assert "episodes failed, more than the error budget of 10%" in message
    assert "ZeroDivisionError: three" in message


def test_a_dry_run_prints_sizes_and_writes_nothing(train, game: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = train("grpo", *game, *SMALL, "--dry-run", "--max-turns", 3)
    assert "tokens per step: at most 72" in capsys.readouterr().out  # 2 tasks, 4 siblings, 3 turns, 3 tokens
    assert not run.out.exists()


def test_a_group_of_one_is_refused() -> None:
    message = "^group_size = 1: siblings are compared, so there must be at least 2. Raise it, or use ppo"
    with pytest.raises(ConfigError, match=message):
        config(group_size=1)


@pytest.mark.learning
def test_it_learns_which_key_fits_which_door(train, locksmith: Path) -> None:
    doors = ("--model.path", locksmith, "--env", "text_lock", "--env-settings", "doors=2", "keys=3")
    run = train("grpo", *doors, "--sampling.max-tokens", 4, "--steps", 40, "--policy.optim.lr", 2e-3)
    rewards = [row["reward/mean"] for row in run.rows()]
    assert sum(rewards[:3]) / 3 < 0.45  # one key in three fits
    assert sum(rewards[-3:]) / 3 > 0.8
