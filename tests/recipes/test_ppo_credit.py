"""Credit per turn in PPO: what the value, return and advantage of a turn are made of, and where values learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.config import ModelConfig, OptimConfig
from echelon.data.packing import Batch, pack
from echelon.errors import ConfigError
from echelon.models.heads import TokenValue
from echelon.models.lm import load_lm
from echelon.recipes.ppo import Config, fit_value, judge, mean_return, over_turns, valued
from echelon.train.learner import Learner
from echelon.train.shaping import ShapingConfig
from echelon.types import Episode, Turn
from tests.ops.test_credit import longhand_gae

SMALL = ("--steps", 3, "--episodes-per-step", 8, "--warmup-steps", 1, "--policy.epochs", 2, "--value-epochs", 2)


def config(**settings: object) -> Config:
    return Config(**{"out": "x", "env": "x", "model": ModelConfig("x"), "whiten": False, "credit": "turn"} | settings)


def played(ending: str, *turns: tuple[int, float], cut: bool = False) -> Episode:
    """Turns of so many tokens with such rewards. With `cut` no prompt continues the turn before it."""
    made, seen = [], [3, 4]
    for place, (tokens, reward) in enumerate(turns):
        prompt = [5 + place] if cut else list(seen)
        made.append(Turn(place, "actor", prompt, [10] * tokens, [0.0] * tokens, "", reward=reward))
        seen += [10] * tokens + [5]
    return Episode("t", turns=made, ending=ending, final=None if ending == "terminated" else [3, 4, 6])


def together(episodes: list[Episode]) -> tuple[Batch, torch.Tensor]:
    """Their batch, and what they earned on the last token of each turn."""
    turns = [turn for episode in episodes for turn in episode.turns]
    batch = pack(turns)
    return batch, batch.at_end(torch.tensor([turn.reward for turn in turns]))


def sampled(batch: Batch, x_BT: torch.Tensor) -> list[float]:
    return x_BT[batch.mask].tolist()


@pytest.fixture
def value(untrained: Path) -> Learner:
    """A value model that says 5, whatever it reads."""
    module = TokenValue.from_lm(load_lm(str(untrained), device="cpu"))
    module.start_at(5.0)
    return Learner(module, OptimConfig(lr=1e-2))


@pytest.mark.parametrize("cut", [False, True])
def test_all_tokens_of_a_turn_get_its_advantage_in_whatever_row_they_lie(value: Learner, cut: bool) -> None:
    """Values are 5: δ = 1 + 5 − 5 and 2 − 5; with λ = 0.5 the first turn gets 1 − 1.5."""
    episodes = [played("terminated", (2, 1.0), (3, 2.0), cut=cut)]
    batch, rewards = together(episodes)
    columns, _ = judge(config(lam=0.5), value, batch, episodes, rewards)
    assert sampled(batch, batch.advantages) == [-0.5, -0.5, -3.0, -3.0, -3.0]
    assert sampled(batch, batch.returns) == [4.5, 0.0, 2.0, 0.0, 0.0]  # A + V, where V is read
    assert columns["advantage"].tolist() == [-0.5, -3.0]
    assert columns["value"].tolist() == [5.0, 5.0]


def test_gamma_counts_turns_and_a_truncated_episode_bootstraps(value: Learner) -> None:
    episodes = [played("truncated", (2, 1.0), (3, 2.0)), played("terminated", (1, 4.0))]
    batch, rewards = together(episodes)
    judge(config(gamma=0.5, lam=1.0), value, batch, episodes, rewards)
    assert sampled(batch, batch.returns)[::2] == [1 + 0.5 * 4.5, 4.5, 0.0]  # 2 + half of 5
    assert sampled(batch, batch.returns)[-1] == 4.0


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 3), st.floats(-3, 3, width=32)), min_size=1, max_size=4),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
    st.floats(0, 1, width=32),
    st.floats(0, 1, width=32),
    st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_it_is_gae_of_each_episode_by_turns(episodes, cut, gamma, lam, seed) -> None:
    """With rewards and values of any size on every token: a turn earns their sum, and its value is the first's."""
    told = [played("terminated", *turns, cut=cut) for turns in episodes]
    batch, _ = together(told)
    draw = torch.Generator().manual_seed(seed)
    rewards, values, final = (torch.randn(shape, generator=draw) for shape in [batch.mask.shape] * 2 + [(len(told),)])
    cfg = config(gamma=gamma, lam=lam)
    advantages, returns, earned = over_turns(cfg, batch, told, rewards, values, final)
    number = 0
    for episode, last in zip(told, final.tolist(), strict=True):
        own = [batch.turn == number + place for place in range(len(episode.turns))]
        number += len(own)
        steps = [(rewards[turn].sum().item(), values[turn][0].item()) for turn in own]
        expected = longhand_gae(steps, last, gamma, lam)
        to_go = longhand_gae([(reward, 0.0) for reward, _ in steps], last, gamma, 1.0)
        for turn, advantage, (_, v), g in zip(own, expected, steps, to_go, strict=True):
            assert advantages[turn].tolist() == pytest.approx([advantage] * int(turn.sum()), abs=1e-4)
            assert returns[turn].tolist() == pytest.approx([advantage + v] + [0.0] * (int(turn.sum()) - 1), abs=1e-4)
            assert earned[turn][0].item() == pytest.approx(g, abs=1e-4)
    assert not advantages[~batch.mask].any()


def test_values_are_learned_where_they_are_read(value: Learner) -> None:
    """Once per turn, however long: the mean that is logged is over turns, and after many steps that is what is said."""
    episodes = [played("terminated", (1, 2.0)), played("terminated", (9, 4.0))]
    batch, rewards = together(episodes)
    cfg = config(lam=1.0, value_epochs=1)
    assert mean_return(cfg, batch, episodes, rewards) == pytest.approx(3.0)
    assert mean_return(config(credit="token"), batch, episodes, rewards) == pytest.approx((2 + 9 * 4) / 10)
    assert valued(cfg, batch).sum() == 2
    judge(cfg, value, batch, episodes, rewards)
    logged = fit_value(cfg, value, batch, seed=0)
    assert logged["value/return"] == pytest.approx(3.0)
    assert logged["value/mean"] == pytest.approx(5.0)
    assert logged["value/loss"] == pytest.approx(0.5 * (3**2 + 1**2) / 2)
    assert batch.mask.sum() == 10  # the policy still learns from every token


def test_how_much_values_explain_is_measured_at_turns(value: Learner) -> None:
    episodes = [played("terminated", (1, 2.0)), played("terminated", (9, 4.0))]
    batch, rewards = together(episodes)
    values = torch.full(batch.mask.shape, 99.0)
    values[batch.row_N, batch.first_N] = torch.tensor([2.0, 4.0])
    value.evaluate = lambda *_: values
    assert judge(config(), value, batch, episodes, rewards)[1]["value/explained_variance"] == pytest.approx(1.0)
    assert judge(config(credit="token"), value, batch, episodes, rewards)[1]["value/explained_variance"] < 0


def test_rewards_of_tokens_that_are_summed_are_not_whitened() -> None:
    with pytest.raises(
        ConfigError, match=r"^shaping.whiten = true: it whitens the rewards of tokens, and credit = turn"
    ):
        config(shaping=ShapingConfig(whiten=True))
    assert config(credit="token", shaping=ShapingConfig(whiten=True)).shaping.whiten


def test_credit_by_state_needs_siblings(train, game: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    train("ppo", *game, "--credit", "state", status=2)
    assert "credit state: expected one of token, turn" in capsys.readouterr().err


def test_it_runs_on_turns_that_had_to_be_cut_and_with_kl_in_the_reward(train, game: list[str]) -> None:
    flags = ("--credit", "turn", "--warmup-steps", 0, "--sampling.max-prompt-tokens", 24, "--shaping.kl-coef", 0.1)
    run = train("ppo", *game, *SMALL, *flags, "--value-clip", 0.5, "--value-minibatches", 2)
    for row in run.rows():
        assert row["policy/first_mismatch"] < 1e-4
        assert row["value/grad_norm"] > 0
        assert row["policy/grad_norm"] > 0


def test_answers_of_one_turn_are_worth_what_the_prompt_promised_and_more(
    train, untrained: Path, tmp_path: Path
) -> None:
    """The values are those of prompts, all the same at the start: an advantage is the reward less its mean."""
    (tmp_path / "ask.jsonl").write_text("".join(f'{{"prompt": "guess {n}"}}\n' for n in range(8)))
    (tmp_path / "rewards.py").write_text(
        "def f(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
    )
    flags = ("--model.path", untrained, "--data.path", tmp_path / "ask.jsonl", "--reward", f"{tmp_path}/rewards.py:f")
    flags += ("--credit", "turn", "--steps", 1, "--episodes-per-step", 8, "--value-epochs", 1)
    run = train("ppo", *flags, "--sampling.max-tokens", 4)
    rows = run.rows("episodes")
    mean = sum(row["reward"] for row in rows) / len(rows)
    for row in rows:
        assert row["turns"][0]["advantage"] == pytest.approx(row["reward"] - mean, abs=1e-4)


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(train, game: list[str], killed_at) -> None:
    flags = (*game, *SMALL, "--credit", "turn", "--gamma", 0.9, "--steps", 4, "--save-every", 2, "--warmup-steps", 0)
    whole = train("ppo", *flags, name="whole")
    killed_at(3)
    train("ppo", *flags, name="killed", status=130)
    killed_at(-1)
    resumed = train("ppo", *flags, "--resume", name="killed")
    assert len(whole.rows()) == 4
    assert resumed.rows() == whole.rows()
    assert resumed.rows("episodes") == whole.rows("episodes")
    for part in ("actor", "value"):
        torch.testing.assert_close(resumed.weights(part), whole.weights(part), rtol=0, atol=0)


@pytest.mark.learning
@pytest.mark.slow
def test_it_learns_which_key_fits_which_door(train, locksmith: Path) -> None:
    doors = ("--model.path", locksmith, "--env", "text_lock", "--env-settings", "doors=2", "keys=3", "--credit", "turn")
    run = train(
        "ppo", *doors, "--sampling.max-tokens", 4, "--warmup-steps", 2, "--steps", 40, "--policy.optim.lr", 2e-3
    )
    rewards = [row["reward/mean"] for row in run.rows()]
    assert sum(rewards[:3]) / 3 < 0.45  # one key in three fits
    assert sum(rewards[-3:]) / 3 > 0.8
