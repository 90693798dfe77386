"""Token PPO: what each token's value, return and advantage are made of, and the same promises as every recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from echelon.config import ModelConfig, OptimConfig
from echelon.data.packing import Batch, pack
from echelon.errors import ConfigError, DataError
from echelon.models.heads import TokenValue
from echelon.models.lm import load_lm
from echelon.recipes.ppo import Config, final_values, judge, mean_return
from echelon.train.learner import Learner
from echelon.train.value import before_turns, value_loss
from echelon.types import Episode, Turn

SMALL = ("--steps", 3, "--episodes-per-step", 8, "--warmup-steps", 1, "--policy.epochs", 2, "--value-epochs", 2)
STILL = ("--value-optim.lr", 0, "--value-epochs", 1, "--steps", 1)


def config(**settings: object) -> Config:
    return Config(out="x", env="x", model=ModelConfig("x"), whiten=False, **settings)


def turn(index: int, prompt: list[int], action: list[int], reward: float) -> Turn:
    return Turn(index, "actor", prompt, action, [0.0] * len(action), "", reward=reward)


def two_turns(ending: str, *, cut: bool = False) -> Episode:
    """Rewards 1 and 2; two tokens, then three. With `cut` the second prompt does not continue the first turn."""
    second = [5] if cut else [3, 4, 10, 11, 5]
    turns = [turn(0, [3, 4], [10, 11], 1.0), turn(1, second, [12, 13, 14], 2.0)]
    return Episode("t", turns=turns, ending=ending, final=None if ending == "terminated" else [3, 4, 10, 11, 5, 6])


@pytest.fixture
def value(untrained: Path) -> Learner:
    """A value model that says 5, whatever it reads."""
    module = TokenValue.from_lm(load_lm(str(untrained), device="cpu"))
    module.start_at(5.0)
    return Learner(module, OptimConfig())


def earned(batch: Batch, played: list[Episode]) -> torch.Tensor:
    """What the environment gave, on the last token of each turn."""
    return batch.at_end(torch.tensor([turn.reward for episode in played for turn in episode.turns]))


def sampled(batch: Batch, x_BT: torch.Tensor) -> list[float]:
    return x_BT[batch.mask].tolist()


def test_a_terminated_episode_is_worth_what_it_earned_and_nothing_after(value: Learner) -> None:
    played = [two_turns("terminated")]
    batch = pack(played[0].turns)
    columns, _ = judge(config(lam=1.0), value, batch, played, earned(batch, played))
    assert sampled(batch, batch.returns) == [3.0, 3.0, 2.0, 2.0, 2.0]
    assert sampled(batch, batch.advantages) == [-2.0, -2.0, -3.0, -3.0, -3.0]
    assert columns["value"].tolist() == [5.0, 5.0]
    assert columns["advantage"].tolist() == [-2.0, -3.0]


def test_a_truncated_episode_bootstraps_from_the_state_it_was_cut_off_in(value: Learner) -> None:
    played = [two_turns("truncated")]
    batch = pack(played[0].turns)
    judge(config(lam=1.0), value, batch, played, earned(batch, played))
    assert sampled(batch, batch.returns) == [8.0, 8.0, 7.0, 7.0, 7.0]


def test_gae_counts_sampled_tokens_and_skips_what_the_environment_said(value: Learner) -> None:
    played = [two_turns("terminated")]
    batch = pack(played[0].turns)
    judge(config(gamma=0.5, lam=0.0), value, batch, played, earned(batch, played))
    assert sampled(batch, batch.returns) == [2.5, 1 + 2.5, 2.5, 2.5, 2.0]  # r + half of the next V
    judge(config(gamma=0.5, lam=1.0), value, batch, played, earned(batch, played))
    assert sampled(batch, batch.returns) == [0.5 * 1.25, 1 + 0.5 * 0.5, 0.5, 1.0, 2.0]


def test_values_before_turns_are_those_before_their_first_tokens() -> None:
    played = [two_turns("truncated", cut=True), two_turns("terminated")]
    batch = pack([turn for episode in played for turn in episode.turns])
    assert len(batch.tokens) == 3
    values_BT = torch.arange(3.0)[:, None] * 100 + torch.arange(batch.tokens.shape[1])
    assert before_turns(batch, values_BT).tolist() == [2.0, 101.0, 202.0, 205.0]


@pytest.mark.parametrize("ending", ["terminated", "truncated"])
@pytest.mark.parametrize("credit", ["token", "turn"])
def test_in_which_rows_the_turns_of_an_episode_lie_changes_nothing(value: Learner, credit: str, ending: str) -> None:
    found = []
    for cut in (False, True):
        played = [two_turns(ending, cut=cut), two_turns("terminated", cut=cut)]
        batch = pack([turn for episode in played for turn in episode.turns])
        assert len(batch.tokens) == (4 if cut else 2)
        cfg, paid = config(credit=credit, gamma=0.9, lam=0.8), earned(batch, played)
        columns, metrics = judge(cfg, value, batch, played, paid)
        read = [batch.by_turn(x_BT) for x_BT in (batch.advantages, batch.returns)]
        found.append((read, columns["advantage"].tolist(), metrics, mean_return(cfg, batch, played, paid)))
    assert found[0] == found[1]


def test_final_values_are_read_after_the_last_token_of_each_cut_off_state(untrained: Path) -> None:
    module = TokenValue.from_lm(load_lm(str(untrained), device="cpu"))
    torch.nn.init.normal_(module.head.weight)
    states = [[3, 4, 5], [7], [3, 4, 5, 6, 7, 8]]
    played = [Episode("t", ending="truncated", final=state) for state in states]
    played.insert(1, Episode("t", ending="terminated"))
    alone = [module(torch.tensor([state]))[0, -1].item() for state in states]
    for tokens_per_pass in (1, 7, 100):
        found = final_values(Learner(module, OptimConfig()), played, tokens_per_pass)
        assert found.tolist() == pytest.approx([alone[0], 0.0, *alone[1:]], abs=1e-5)


def test_whitened_advantages_have_mean_0_and_deviation_1_over_sampled_tokens(value: Learner) -> None:
    played = [two_turns("terminated"), two_turns("truncated")]
    batch = pack([turn for episode in played for turn in episode.turns])
    columns, metrics = judge(
        Config(out="x", env="x", model=ModelConfig("x")), value, batch, played, earned(batch, played)
    )
    advantages = torch.tensor(sampled(batch, batch.advantages))
    assert advantages.mean().item() == pytest.approx(0, abs=1e-6)
    assert advantages.std().item() == pytest.approx(1, rel=1e-5)
    assert columns["advantage"].std() != 1
    assert metrics["policy/advantage_std"] > 1


def test_the_value_model_starts_at_the_mean_return() -> None:
    played = [two_turns("terminated"), two_turns("truncated")]
    batch = pack([turn for episode in played for turn in episode.turns])
    assert mean_return(config(), batch, played, earned(batch, played)) == pytest.approx((2 * 3 + 3 * 2) / 5)


def test_the_value_loss_is_half_the_square_and_its_clipped_form_the_worse_of_two(value: Learner) -> None:
    batch = pack(two_turns("terminated").turns)
    with pytest.raises(DataError, match="values is missing from the batch"):
        value_loss(value.module, batch, clip=None)
    batch.values, batch.returns = torch.full(batch.tokens.shape, 4.5), torch.full(batch.tokens.shape, 6.0)
    loss, stats = value_loss(value.module, batch, clip=None)
    assert loss.item() == pytest.approx(0.5)
    assert stats == {"mean": pytest.approx(5.0), "return": pytest.approx(6.0)}
    assert value_loss(value.module, batch, clip=0.2)[0].item() == pytest.approx(0.5 * 1.3**2)  # 4.5 + 0.2 misses by 1.3


def test_a_run_leaves_metrics_episodes_and_two_models(train, game: list[str], start: Path) -> None:
    run = train("ppo", *game, *SMALL, "--sampling.temperature", 0.7)
    warming, *rows = run.rows()
    assert not any(name.startswith("policy/") for name in warming if name != "policy/advantage_std")
    assert {"value/explained_variance", "value/loss", "value/mean", "value/return"} <= warming.keys()
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["policy/first_mismatch"] < 1e-4  # ratio 1 before the first update: sampler and trainer agree
        assert row["policy/grad_norm"] > 0
        assert row["value/grad_norm"] > 0
    said = [turn for row in run.rows("episodes") for turn in row["turns"]]
    assert all({"value", "advantage"} <= turn.keys() for turn in said)
    assert (run.out / "checkpoints/step_000003/actor/config.json").is_file()
    before = load_file(start / "model.safetensors")
    assert not any(torch.equal(tensor, before[name]) for name, tensor in run.weights().items())
    body = {name.removeprefix("body."): tensor for name, tensor in run.weights("value").items()}
    assert not any(torch.equal(body[name.removeprefix("model.")], tensor) for name, tensor in before.items())


def test_only_the_value_model_learns_while_warming_up(train, game: list[str], start: Path) -> None:
    run = train("ppo", *game, *SMALL, "--steps", 1)
    torch.testing.assert_close(run.weights(), load_file(start / "model.safetensors"), rtol=0, atol=0)
    assert run.weights("value")["head.weight"].abs().max() > 0


def test_values_start_at_the_mean_return_of_the_first_batch(train, game: list[str]) -> None:
    (row,) = train("ppo", *game, *SMALL, *STILL, "--lam", 1).rows()
    assert row["value/mean"] < -1
    assert row["value/mean"] == pytest.approx(row["value/return"], rel=1e-5)


def test_an_episode_cut_off_by_max_turns_bootstraps_and_one_that_was_won_does_not(train, game: list[str]) -> None:
    run = train("ppo", *game, *SMALL, *STILL, "--lam", 1, "--max-turns", 1)
    endings = set()
    for row in run.rows("episodes"):
        endings.add(row["ending"])
        (only,) = row["turns"]
        after = only["value"] if row["ending"] == "truncated" else 0.0  # values are the same everywhere at the start
        assert only["advantage"] == pytest.approx(only["reward"] + after - only["value"], abs=1e-6)
    assert endings == {"truncated", "terminated"}


def test_the_size_of_a_pass_does_not_change_the_update(train, game: list[str]) -> None:
    flags = (*game, *SMALL, "--steps", 1, "--warmup-steps", 0, "--policy.kl-coef", 0.1, "--max-turns", 2)
    flags += ("--policy.optim.eps", 1e-3, "--value-optim.eps", 1e-3)  # otherwise Adam makes steps of rounding
    whole, parts = train("ppo", *flags, name="whole"), train("ppo", *flags, "--tokens-per-pass", 60, name="parts")
    assert whole.rows()[0] == pytest.approx(parts.rows()[0], rel=1e-5, abs=1e-5)
    for part in ("actor", "value"):
        torch.testing.assert_close(whole.weights(part), parts.weights(part), rtol=0, atol=1e-6)


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(train, game: list[str], killed_at, warmup: int) -> None:
    flags = (*game, *SMALL, "--steps", 4, "--save-every", 2, "--warmup-steps", warmup, "--policy.kl-coef", 0.1)
    flags += ("--value-minibatches", 2, "--env-settings", "max_turns=12")  # long enough for cached prefixes to matter
    whole = train("ppo", *flags, name="whole")
    killed_at(3)
    train("ppo", *flags, name="killed", status=130)
    killed_at(-1)
    resumed = train("ppo", *flags, "--resume", name="killed")
    assert len(whole.rows()) == 4
    assert resumed.rows() == whole.rows()
    assert resumed.rows("episodes") == whole.rows("episodes")
    for part in ("actor", "value", "reference"):
        torch.testing.assert_close(resumed.weights(part), whole.weights(part), rtol=0, atol=0)


def test_prompts_that_had_to_be_cut_make_more_rows_and_still_agree_with_the_sampler(train, game: list[str]) -> None:
    run = train("ppo", *game, *SMALL, "--warmup-steps", 0, "--sampling.max-prompt-tokens", 24)
    assert all(row["policy/first_mismatch"] < 1e-4 for row in run.rows())


def test_failed_episodes_are_counted_and_the_others_learned_from(train, fragile: list[str]) -> None:
    run = train("ppo", *fragile, *SMALL, "--error-budget", 0.9)
    assert all(0 < row["episode/failed"] < 8 for row in run.rows())
    failed = [row for row in run.rows("episodes") if row["ending"] == "failed"]
    assert {row["error"] for row in failed} == {"ZeroDivisionError: three"}
    assert not any("advantage" in turn for row in failed for turn in row["turns"])


def test_more_failures_than_the_budget_end_the_run(
    train, fragile: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train("ppo", *fragile, *SMALL, status=2)
    assert "episodes failed, more than the error budget of 10%" in capsys.readouterr().err


def test_a_dry_run_prints_sizes_and_writes_nothing(train, game: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = train("ppo", *game, *SMALL, "--dry-run", "--max-turns", 3)
    out = capsys.readouterr().out
    assert "value: TokenValue" in out
    assert "tokens per step: at most 72" in out  # 8 episodes, 3 turns, 3 tokens
    assert not run.out.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": 1.5}, r"^lam = 1.5: a discount lies between 0 and 1"),
        ({"value_clip": 0.0}, r"^value_clip = 0.0: no value could move"),
        ({"warmup_steps": -1}, r"^warmup_steps = -1: it counts steps"),
        ({"error_budget": 1.0}, r"^error_budget = 1.0: it is a fraction"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)


@pytest.mark.learning
def test_it_learns_which_key_fits_which_door(train, locksmith: Path) -> None:
    doors = ("--model.path", locksmith, "--env", "text_lock", "--env-settings", "doors=2", "keys=3")
    run = train(
        "ppo", *doors, "--sampling.max-tokens", 4, "--warmup-steps", 2, "--steps", 40, "--policy.optim.lr", 2e-3
    )
    rewards = [row["reward/mean"] for row in run.rows()]
    assert sum(rewards[:3]) / 3 < 0.45  # one key in three fits
    assert sum(rewards[-3:]) / 3 > 0.8
