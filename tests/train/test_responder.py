"""The lower level: each term of its reward by hand, credit that stops where settings say, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from echelon.config import OptimConfig
from echelon.data.packing import pack
from echelon.errors import ConfigError, DataError
from echelon.models.heads import TokenValue
from echelon.models.lm import tiny, token_logprobs
from echelon.train.policy import PolicyConfig, SamplerMismatch
from echelon.train.responder import Lower, ResponderConfig
from echelon.train.shaping import ShapingConfig
from echelon.train.value import gae_of_chains
from echelon.types import Turn

PLAIN = ResponderConfig(shaping=ShapingConfig(), whiten=False, lam=1.0)
"""No term but satisfaction, and advantages that are returns less values."""

Make = Callable[..., Lower]


@pytest.fixture
def module() -> nn.Module:
    return tiny(["a few words"], vocab_size=270, hidden=16, layers=1, heads=2)[0]


@pytest.fixture
def make(module: nn.Module) -> Make:
    def make(settings: ResponderConfig = PLAIN, **more: Any) -> Lower:
        return Lower(settings, module, TokenValue.from_lm(module), tokenizer=None, **more)

    return make


@pytest.fixture
def turns(module: nn.Module) -> list[Turn]:
    """Two dialogues: a reply of two tokens and, going on in the same conversation, one of three; and one of a token."""
    said = [([7, 8], [20, 21]), ([7, 8, 20, 21, 9], [22, 23, 24]), ([6], [25])]
    turns = [
        Turn(index, "responder", prompt, action, [0.0] * len(action), "") for index, (prompt, action) in enumerate(said)
    ]
    batch = pack(turns)
    with torch.no_grad():
        logprobs = token_logprobs(module, batch)
    for turn, row, first, last in zip(turns, batch.row_N, batch.first_N, batch.last_N, strict=True):
        turn.logprobs = logprobs[row, first : last + 1].tolist()
    assert len(batch.rows) == 2, "the first two share a row"
    return turns


REWARDS = torch.tensor([2.0, 3.0, 4.0])


def rewards(lower: Lower, turns: list[Turn], **more: Any) -> tuple[list[float], dict[str, float]]:
    """What the tokens are paid, and the metrics: with λ = 1 and no values, differences of what is to come."""
    judged = lower.judge(turns, REWARDS, **more)
    returns = judged.batch.returns[judged.batch.mask]
    paid, begin = [], 0
    for turn in turns:
        own = returns[begin : begin + len(turn.action)]
        paid += (own - torch.cat([own[1:], torch.zeros(1)])).tolist()
        begin += len(turn.action)
    return paid, judged.metrics


def test_by_default_a_reply_is_paid_at_its_last_token(make: Make, turns: list[Turn]) -> None:
    paid, metrics = rewards(make(), turns)
    assert paid == pytest.approx([0, 2, 0, 0, 3, 4], abs=1e-6)
    assert (metrics["low/satisfaction"], metrics["low/term/satisfaction"], metrics["low/return"]) == (3, 3, 3)
    assert metrics["low/length"] == 2
    assert not any("kl" in name or "shared" in name or name == "low/term/surprisal" for name in metrics)


@pytest.mark.parametrize(
    ("dense", "expected"),
    [("literal", [2, 2, 3, 3, 3, 4]), ("length_neutral", [1, 1, 1, 1, 1, 4])],
)
def test_dense_satisfaction(make: Make, turns: list[Turn], dense: Any, expected: list[float]) -> None:
    paid, metrics = rewards(make(replace(PLAIN, dense=dense)), turns)
    assert paid == pytest.approx(expected, abs=1e-5)
    assert metrics["low/satisfaction"] == 3
    assert metrics["low/term/satisfaction"] == pytest.approx(sum(expected) / 3)


def test_what_another_level_adds_is_paid_at_the_last_token_whatever_is_dense(make: Make, turns: list[Turn]) -> None:
    shared = torch.tensor([0.5, -1.0, 0.0])
    paid, metrics = rewards(make(replace(PLAIN, dense="length_neutral")), turns, shared_N=shared)
    assert paid == pytest.approx([1, 1.5, 1, 1, 0, 4], abs=1e-5)
    assert metrics["low/term/shared"] == pytest.approx(-0.5 / 3)
    assert metrics["low/satisfaction"] == 3


def test_surprisal_is_paid_raw_or_less_its_running_mean(make: Make, turns: list[Turn]) -> None:
    surprise = torch.tensor([-logprob for turn in turns for logprob in turn.logprobs])
    base = torch.tensor([0.0, 2, 0, 0, 3, 4])
    paid, metrics = rewards(make(replace(PLAIN, surprisal_coef=0.01, surprisal="raw")), turns)
    torch.testing.assert_close(torch.tensor(paid), base + 0.01 * surprise, atol=1e-5, rtol=0)
    assert metrics["low/term/surprisal"] == pytest.approx(0.01 * float(surprise.sum()) / 3, rel=1e-4)
    assert metrics["low/surprisal"] == pytest.approx(float(surprise.mean()))

    lower = make(replace(PLAIN, surprisal_coef=0.01))
    paid, metrics = rewards(lower, turns)
    torch.testing.assert_close(torch.tensor(paid), base + 0.01 * (surprise - surprise.mean()), atol=1e-5, rtol=0)
    assert metrics["low/term/surprisal"] == pytest.approx(0.0, abs=1e-7)
    lower.surprisal = 10.0  # what was usual before
    rewards(lower, turns)
    assert lower.surprisal == pytest.approx(0.9 * 10 + 0.1 * float(surprise.mean()))


def test_kl_to_the_start_is_taken_off_every_token_and_a_missing_reference_is_no_zero(
    make: Make, turns: list[Turn]
) -> None:
    lower = make(replace(PLAIN, shaping=ShapingConfig(kl_coef=0.1)))
    assert rewards(lower, turns)[1]["low/kl"] == pytest.approx(0, abs=1e-6)
    assert lower.reference is not None
    with torch.no_grad():
        for parameter in lower.reference.parameters():
            parameter.mul_(0.5)
    paid, metrics = rewards(lower, turns)
    assert metrics["low/term/kl"] == pytest.approx(-0.1 * metrics["low/kl"])
    assert metrics["low/return"] == pytest.approx(3 + metrics["low/term/kl"], rel=1e-5)
    assert sum(paid) == pytest.approx(9 + 3 * metrics["low/term/kl"], rel=1e-4)
    lower.reference = None
    with pytest.raises(DataError, match="ref_logprobs is missing from the batch, and a missing tensor is not zero"):
        lower.judge(turns, REWARDS)


def test_nothing_leaks_from_one_reply_to_another_that_shares_its_row(make: Make, turns: list[Turn]) -> None:
    lower = make(replace(PLAIN, lam=0.95))
    lower.updates = 1  # values are 0, and stay so
    for second in (3.0, -30.0):
        batch = lower.judge(turns, torch.tensor([2.0, second, 4.0])).batch
        assert batch.advantages[batch.turn == 0].tolist() == pytest.approx([0.95 * 2, 2])
        assert batch.advantages[batch.turn == 1].tolist() == pytest.approx([0.95**2 * second, 0.95 * second, second])


def test_with_the_whole_dialogue_as_horizon_a_reply_answers_for_later_ones(make: Make, turns: list[Turn]) -> None:
    settings, dialogues = replace(PLAIN, horizon="episode"), {"episode_N": [0, 0, 1], "final": [None, None]}
    judged = make(settings).judge(turns, REWARDS, **dialogues)
    assert judged.batch.returns[judged.batch.mask].tolist() == pytest.approx([5, 5, 3, 3, 3, 4], abs=1e-5)
    assert judged.metrics["low/return"] == pytest.approx(4.5)  # of a dialogue
    assert judged.metrics["low/satisfaction"] == 3  # of a reply
    with pytest.raises(DataError, match="nothing says to which dialogue each reply belongs"):
        make(settings).judge(turns, REWARDS)


def test_a_dialogue_that_was_cut_off_is_followed_by_the_value_of_the_state_it_was_cut_off_in(
    make: Make, turns: list[Turn]
) -> None:
    lower = make(replace(PLAIN, horizon="episode"))
    lower.updates = 1  # the value model says what it says
    lower.online.start_at(7.0)
    judged = lower.judge(turns, REWARDS, episode_N=[0, 0, 1], final=[[7, 8, 9], None])
    assert judged.batch.returns[judged.batch.mask].tolist() == pytest.approx([12, 12, 10, 10, 10, 4], abs=1e-5)


def test_gae_of_a_reply_by_hand(turns: list[Turn]) -> None:
    batch = pack(turns)
    paid, values = torch.zeros(batch.tokens.shape), torch.zeros(batch.tokens.shape)
    paid[batch.turn == 1] = torch.tensor([-0.1, 0.2, 1.0])
    values[batch.turn == 1] = torch.tensor([0.5, 0.4, 0.3])
    credited = {"gamma": 0.9, "lam": 0.8}
    advantages, returns = gae_of_chains(
        batch, torch.arange(3), paid, values, **credited, after_C=torch.tensor([0.0, 0.0, 0.0])
    )
    assert advantages[batch.turn == 1].tolist() == pytest.approx([0.17328, 0.574, 0.7])
    assert returns[batch.turn == 1].tolist() == pytest.approx([0.67328, 0.974, 1.0])
    after = gae_of_chains(batch, torch.arange(3), paid, values, **credited, after_C=torch.tensor([0.0, 0.6, 0.0]))
    assert after[0][batch.turn == 1].tolist() == pytest.approx([0.453216, 0.9628, 1.24])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "rewards is missing from the batch, and a missing tensor is not zero"),
        (torch.tensor([1.0, 2.0]), r"rewards: \(2,\) for 3 replies. Give one number per reply"),
        (torch.tensor([1.0, float("nan"), 2.0]), "that of reply 1 is nan. A reward that is missing is not zero"),
    ],
)
def test_a_missing_reward_is_an_error(make: Make, turns: list[Turn], given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make().update(turns, given, seed=0)


def test_an_update_moves_both_models_the_first_ratio_is_one_and_every_term_is_logged(
    make: Make, turns: list[Turn]
) -> None:
    policy = PolicyConfig(optim=OptimConfig(lr=1e-2), entropy_coef=0.01, kl_coef=0.1)
    settings = ResponderConfig(policy=policy, surprisal_coef=0.01, self_likelihood_coef=0.1, ema_decay=0.5)
    lower = make(settings)
    before = [parameter.clone() for learner in (lower.policy, lower.value) for parameter in learner.trained]
    metrics = lower.update(turns, REWARDS, seed=0, shared_N=torch.ones(3))
    after = [parameter for learner in (lower.policy, lower.value) for parameter in learner.trained]
    assert sum(not old.equal(new) for old, new in zip(before, after, strict=True)) > len(before) / 2
    assert metrics["low/policy/ratio"] == pytest.approx(1, abs=1e-4)
    assert metrics["low/policy/first_mismatch"] < 1e-4
    assert metrics["low/policy/self_nll"] == pytest.approx(metrics["low/surprisal"], rel=1e-3)
    named = ("term/satisfaction", "term/shared", "term/surprisal", "term/kl", "kl", "kl_coef", "policy/entropy")
    named += ("policy/kl_to_start", "policy/loss", "value/loss", "value/explained_variance")
    assert {f"low/{name}" for name in named} <= metrics.keys()


def test_replies_that_were_not_sampled_from_the_responder_are_refused(make: Make, turns: list[Turn]) -> None:
    turns[0].logprobs[0] -= 0.5
    with pytest.raises(SamplerMismatch, match=r"differ by up to 0\.5"):
        make().update(turns, REWARDS, seed=0)


def test_self_likelihood_makes_what_was_said_more_likely_though_it_earned_nothing(
    module: nn.Module, make: Make, turns: list[Turn]
) -> None:
    policy = PolicyConfig(optim=OptimConfig(lr=1e-3), minibatches=1)
    lower = make(replace(PLAIN, policy=policy, self_likelihood_coef=1.0, whiten=True))
    metrics = lower.update(turns, torch.zeros(3), seed=0)
    assert metrics["low/policy/rows_left_out"] == 0
    with torch.no_grad():
        now = token_logprobs(module, pack(turns))[pack(turns).mask].mean()
    assert now > -metrics["low/surprisal"]


def test_while_warming_up_only_the_value_model_learns(module: nn.Module, make: Make, turns: list[Turn]) -> None:
    lower = make(replace(PLAIN, warmup_steps=1))
    before = [parameter.clone() for parameter in module.parameters()]
    metrics = lower.update(turns, REWARDS, seed=0)
    assert all(old.equal(new) for old, new in zip(before, module.parameters(), strict=True))
    assert "low/value/loss" in metrics
    assert "low/policy/loss" not in metrics
    assert "low/policy/loss" in lower.update(turns, REWARDS, seed=0)


def test_values_start_at_the_mean_of_what_is_to_come(make: Make, turns: list[Turn]) -> None:
    judged = make().judge(turns, REWARDS)
    assert judged.batch.values[judged.batch.mask].tolist() == pytest.approx([(2 * 2 + 3 * 3 + 4) / 6] * 6, abs=1e-5)
    assert judged.columns["return"].tolist() == pytest.approx([2, 3, 4])


def test_what_it_remembers_besides_weights_is_saved(make: Make, turns: list[Turn], tmp_path: Path) -> None:
    shaping = ShapingConfig(kl_coef=0.1, kl_target=1.0, kl_horizon=2, normalize="scale")
    lower = make(replace(PLAIN, surprisal_coef=0.01, shaping=shaping))
    lower.update(turns, REWARDS, seed=0)
    assert lower.shaper.kl_coef < 0.1  # KL was 0, below its target
    lower.save(tmp_path)
    other = make(replace(PLAIN, surprisal_coef=0.01, shaping=shaping))
    other.load(tmp_path)
    assert (other.updates, other.surprisal) == (1, lower.surprisal)
    assert (other.shaper.kl_coef, other.shaper.moments) == (lower.shaper.kl_coef, lower.shaper.moments)
    assert json.loads((tmp_path / "lower.json").read_text())["updates"] == 1
    assert set(lower.parts()) == {"responder", "value", "shaping", "reference"}
    assert set(make(replace(PLAIN, ema_decay=0.9)).parts()) == {"responder", "value", "shaping", "ema"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"surprisal_coef": -0.1},
            "surprisal_coef = -0.1: a negative weight does the opposite, and self_likelihood_coef",
        ),
        ({"self_likelihood_coef": -1.0}, "self_likelihood_coef = -1.0: a negative weight .* surprisal_coef raises it"),
        ({"lam": 1.5}, "lam = 1.5: a discount lies between 0 and 1"),
        ({"value_clip": 0.0}, "value_clip = 0.0: no value could move"),
        ({"warmup_steps": -1}, "warmup_steps = -1"),
    ],
)
def test_settings_that_cannot_work(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ResponderConfig(**setting)
