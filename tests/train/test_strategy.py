"""The level that chooses: what its values are pulled towards, when its target moves, and what survives a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from echelon.config import LoraConfig, OptimConfig, RunConfig
from echelon.data.candidates import Choice, Options
from echelon.errors import ConfigError
from echelon.models import lora
from echelon.models.lm import load_lm, tiny
from echelon.models.options import read_description
from echelon.text.dialogue import Inventory
from echelon.train.checkpoint import Checkpoints, find_checkpoint
from echelon.train.strategy import StrategyConfig, Upper, option_table

SPELLED = [[40, 11, 41], [40, 12, 41], [40, 13, 41]]
MENU = Inventory(("ask", "tell", "wait"))
HERE, NEXT = Options([5, 6, 7], SPELLED), Options([5, 6, 8, 9], SPELLED)
FEW = Options([5, 6, 8, 9], [SPELLED[0], [], SPELLED[2]])
GOES_ON, OVER = Choice(HERE, 1, 0.5, NEXT), Choice(NEXT, 0, 2.0, None)


def upper(seed: int = 0, *, adapter: bool = False, tokens_per_pass: int = 1000, **settings: Any) -> Upper:
    lm: Any = tiny(["a cat sat"], vocab_size=300, hidden=16, layers=2, heads=2, seed=seed)[0]
    if adapter:
        lm = lora.attach(lm, LoraConfig(rank=2))
    cfg = StrategyConfig(**{"optim": OptimConfig(lr=1e-2), **settings})
    return Upper(lm, cfg, MENU, SPELLED, tokens_per_pass=tokens_per_pass)


def apart(one: Upper, seed: int) -> Upper:
    """The same level with another target."""
    one.target.load_state_dict(upper(seed).target.state_dict())
    return one


def q(scorer: Any, options: Options) -> list[float]:
    return list(option_table(scorer, [options], 1000)[0][0].tolist())


def test_q_shall_be_the_reward_and_the_targets_value_of_what_the_online_network_likes_best() -> None:
    differ = 0
    for seed in range(6):
        level = apart(upper(seed, gamma=0.85), seed + 100)
        best = max(range(3), key=q(level.online, NEXT).__getitem__)
        batch = level.prepare([GOES_ON, OVER])
        assert batch.wanted_N is not None
        assert batch.wanted_N.tolist() == pytest.approx([0.5 + 0.85 * q(level.target, NEXT)[best], 2.0], abs=1e-5)
        assert not batch.wanted_N.requires_grad
        differ += best != max(range(3), key=q(level.target, NEXT).__getitem__)
    assert differ, "the two always agreed: a plain maximum would pass"


def test_without_double_the_target_picks_too() -> None:
    for seed in range(4):
        level = apart(upper(seed, gamma=0.5, double=False), seed + 100)
        wanted = level.prepare([GOES_ON]).wanted_N
        assert wanted is not None
        assert wanted.item() == pytest.approx(0.5 + 0.5 * max(q(level.target, NEXT)), abs=1e-5)


def test_what_is_not_legal_is_not_bootstrapped_from() -> None:
    found = 0
    for seed in range(6):
        level = upper(seed, gamma=1.0)
        wanted = level.prepare([Choice(HERE, 0, 0.0, FEW)]).wanted_N
        values = q(level.target, NEXT)
        assert wanted is not None
        assert wanted.item() == pytest.approx(max(values[0], values[2]), abs=1e-5)
        found += values[1] == max(values)
    assert found, "what is not legal was never the best: no mask would pass"


def test_a_table_has_a_row_for_every_state_and_says_what_is_legal() -> None:
    level = upper()
    values, legal = level.table([None, FEW, NEXT])
    assert legal.tolist() == [[False] * 3, [True, False, True], [True] * 3]
    assert values[1, [0, 2]].tolist() == pytest.approx(values[2, [0, 2]].tolist(), abs=1e-5)
    assert values[0].tolist() == [0.0] * 3
    assert level.table([None])[1].tolist() == [[False]]


@pytest.mark.parametrize("kind", ["squared", "huber"])
def test_the_loss_is_a_mean_and_adds_up_over_micro_batches(kind: Any) -> None:
    level = upper(loss=kind, huber_delta=0.5)
    drawn = [GOES_ON, OVER, Choice(HERE, 2, -3.0, None), OVER]
    wanted = level.prepare(drawn).wanted_N
    assert wanted is not None
    said = [q(level.online, choice.options)[choice.chosen] for choice in drawn]
    errors = [abs(a - b) for a, b in zip(said, wanted.tolist(), strict=True)]
    bent = [0.5 * e**2 if e < 0.5 else 0.5 * (e - 0.25) for e in errors]
    expected = sum(e**2 for e in errors) / 4 if kind == "squared" else sum(bent) / 4
    gradients = []
    for tokens_per_pass in (1000, 5):
        level.online.zero_grad()
        parts = [level.loss(level.online.lm, part) for part in level.prepare(drawn).split(tokens_per_pass)]
        sum(loss for loss, _ in parts).backward()  # type: ignore[union-attr]
        assert sum(loss.item() for loss, _ in parts) == pytest.approx(expected, rel=1e-4)
        for name, one in (("q_mean", said), ("td_error", errors), ("reward", [0.5, 2.0, -3.0, 2.0])):
            assert sum(stats[name] for _, stats in parts) == pytest.approx(sum(one) / 4, rel=1e-4)
        gradients.append([p.grad.clone() for p in level.online.parameters() if p.grad is not None])
    assert len(parts) > 1
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens_per_pass", [1000, 5])
def test_the_target_is_copied_every_so_many_optimizer_steps_however_many_micro_batches(tokens_per_pass: int) -> None:
    level = upper(target_every=3, tokens_per_pass=tokens_per_pass)
    begun = q(level.target, HERE)
    assert len(level.prepare([GOES_ON, OVER] * 2).split(tokens_per_pass)) == (1 if tokens_per_pass == 1000 else 4)
    ages = []
    for _ in range(2):
        ages.append(level.update([GOES_ON, OVER] * 2)["high/target_age"])
        assert q(level.target, HERE) == begun != q(level.online, HERE)
    ages.append(level.update([GOES_ON, OVER] * 2)["high/target_age"])
    assert q(level.target, HERE) == q(level.online, HERE) != begun
    ages.append(level.update([GOES_ON, OVER] * 2)["high/target_age"])
    assert q(level.target, HERE) != q(level.online, HERE)
    assert ages == [1, 2, 0, 1]


def test_polyak_moves_the_target_a_part_of_the_way() -> None:
    level = upper(target="polyak", tau=0.25)
    old = level.target.lm.lm_head.weight.clone()  # type: ignore[operator, union-attr]
    level.update([GOES_ON, OVER])
    new = level.online.lm.lm_head.weight  # type: ignore[union-attr]
    torch.testing.assert_close(level.target.lm.lm_head.weight, old + 0.25 * (new - old))  # type: ignore[union-attr]


def test_q_starts_at_the_value_it_is_told_and_what_is_best_stays_best() -> None:
    level = upper(shift=20.0)
    before = q(level.online, HERE), q(level.online, NEXT)
    level.start_at(1.5, [HERE, NEXT, FEW])
    after = q(level.online, HERE), q(level.online, NEXT)
    values, legal = level.table([HERE, NEXT, FEW])
    assert values[legal].mean().item() == pytest.approx(1.5, abs=1e-5)
    assert q(level.target, HERE) == after[0]
    moved = [new - old for one, other in zip(after, before, strict=True) for new, old in zip(one, other, strict=True)]
    assert moved == pytest.approx([moved[0]] * 6, abs=1e-5)


def test_a_level_that_goes_on_reads_its_values_as_they_were_read() -> None:
    before = upper(score="logprob", shift=3.0)
    after = Upper(before.online.lm, StrategyConfig(), MENU, SPELLED, reading=before.online.reading)
    assert q(after.online, HERE) == q(after.target, HERE) == q(before.online, HERE)


def test_values_learn_what_was_earned() -> None:
    level = upper(gamma=0.5)
    for _ in range(150):
        logged = level.update([GOES_ON, OVER, Choice(HERE, 0, -1.0, None), Choice(NEXT, 1, 0.0, None)])
    assert q(level.online, NEXT)[0] == pytest.approx(2.0, abs=0.1)
    assert q(level.online, HERE)[1] == pytest.approx(0.5 + 0.5 * max(q(level.online, NEXT)), abs=0.1)
    assert logged["high/loss"] < 1e-2
    assert {"high/grad_norm", "high/lr", "high/q_mean", "high/q_target", "high/td_error", "high/reward"} < logged.keys()


@pytest.mark.parametrize("adapter", [False, True])
def test_what_is_saved_goes_on_exactly_where_it_was(tmp_path: Path, adapter: bool) -> None:
    drawn = [GOES_ON, OVER, Choice(HERE, 0, -1.0, FEW)]
    tiny(["a cat sat"], vocab_size=300, hidden=16, layers=2, heads=2)[0].save_pretrained(tmp_path / "base")  # type: ignore[operator]

    def opened() -> Upper:
        lm: Any = load_lm(str(tmp_path / "base"), device="cpu")
        if adapter:
            lm = lora.attach(lm, LoraConfig(rank=2))
        return Upper(lm, StrategyConfig(target_every=3, optim=OptimConfig(lr=1e-2)), MENU, SPELLED)

    whole = opened()
    whole.start_at(0.7, [HERE, NEXT])
    for _ in range(4):
        whole.update(drawn)
    with Checkpoints(tmp_path / "run", config=RunConfig(out="r")) as checkpoints:
        checkpoints.save(4, whole.parts())
    folder = find_checkpoint(tmp_path / "run", "strategist")
    assert read_description(folder) == (whole.online.reading, MENU)
    resumed = opened()
    with Checkpoints(tmp_path / "run", config=RunConfig(out="r"), resume=True) as checkpoints:
        assert checkpoints.restore(resumed.parts())[0] == 4
    for _ in range(4):
        assert resumed.update(drawn) == whole.update(drawn)
    assert q(resumed.online, HERE) == q(whole.online, HERE)
    assert q(resumed.target, HERE) == q(whole.target, HERE) != q(whole.online, HERE)


def test_what_values_cannot_say_is_refused() -> None:
    StrategyConfig().check_range((0.0, 5.0))
    StrategyConfig(score="prob", gamma=0.0).check_range((0.0, 1.0))
    StrategyConfig(score="prob", scale=34.0).check_range((0.0, 5.0))
    StrategyConfig(score="logprob", shift=34.0).check_range((0.0, 5.0))
    with pytest.raises(ConfigError) as told:
        StrategyConfig(score="prob").check_range((0.0, 5.0))
    assert str(told.value) == (
        "score = prob: Q would lie between 0 and 1, and with rewards from 0 to 5 and gamma 0.85 returns lie between 0 "
        "and 33.3333. Use score = logit, or set scale and shift so that they fit."
    )
    with pytest.raises(ConfigError, match="score = logprob: Q would lie between -inf and 0, and with rewards from 0"):
        StrategyConfig(score="logprob").check_range((0.0, 5.0))
    with pytest.raises(ConfigError, match="score = prob: Q would lie between 0 and 1"):
        StrategyConfig(score="prob", gamma=0.0).check_range((-1.0, 1.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 1.5}, "gamma = 1.5: a discount lies between 0 and 1. Give 0.85."),
        ({"scale": 0.0}, "scale = 0.0: the most likely option would be the worst. Give 1, or more."),
        ({"target_every": 0}, "target_every = 0: it counts optimizer steps. Give 1 or more."),
        ({"tau": 0.0}, "tau = 0.0: the target would never move, or overshoot. Give a number in (0, 1]."),
        ({"huber_delta": 0.0}, "huber_delta = 0.0: it is a distance. Give 1, or near it."),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as told:
        StrategyConfig(**settings)
    assert str(told.value) == message
