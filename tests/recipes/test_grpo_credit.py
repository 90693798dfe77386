"""Credit per turn in GRPO: what each turn gets, on the same episodes under every scheme, and that it trains."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from echelon.config import ModelConfig, SamplingConfig
from echelon.data.packing import Batch, pack
from echelon.envs import load_env
from echelon.errors import ConfigError
from echelon.recipes.grpo import Config, assign, at_first, compare, differs, play_groups
from echelon.rollout.rewards import Rewards
from echelon.train.policy import PolicyConfig
from echelon.types import Episode, Task, Turn
from tests.ops.test_exact_gradient import (
    THREE_TURNS,
    Play,
    exact_gradient,
    expected_gradient,
    uniform,
)
from tests.recipes.conftest import made, recorded, taught


def episode(*rewards: float, tokens: int = 1, states: Sequence[int] = ()) -> Episode:
    """One turn per reward. Its prompt is that of the turn before and what was said since, or else the given state."""
    turns, seen = [], [1]
    for place, reward in enumerate(rewards):
        prompt = [1, states[place]] if states else list(seen)
        turns.append(Turn(place, "actor", prompt, [2] * tokens, [0.0] * tokens, "", reward=reward))
        seen += [2] * tokens + [3]
    return Episode(task="t", turns=turns, ending="terminated")


def config(**settings: object) -> Config:
    settings = {"scale": "none", "weigh": "tokens", "env": "x", "out": "x", "model": ModelConfig("x")} | settings
    return Config(**settings)


def compared(cfg: Config, *groups: Sequence[Episode]) -> tuple[list[float], Batch, dict[str, float]]:
    """The advantage of every turn, weight included, the batch they were given to, and what was logged."""
    batch = pack([turn for group in groups for episode in group for turn in episode.turns])
    metrics = compare(cfg, batch, groups)
    return at_first(batch).tolist(), batch, metrics


PAIR = ([episode(1.0, 0.0, 2.0), episode(0.0, 1.0)],)
"""To go: 3, 2, 2 and 1, 1. The second episode was over when the first one took its third turn."""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"credit": "episode"}, [1.0, 1.0, 1.0, -1.0, -1.0]),
        ({"credit": "turn"}, [1.0, 0.5, 1.0, -1.0, -0.5]),
        ({"credit": "turn", "compare_with": "reached"}, [1.0, 0.5, 0.0, -1.0, -0.5]),
        ({"credit": "turn", "baseline": "leave_one_out"}, [2.0, 1.0, 2.0, -2.0, -1.0]),
        ({"credit": "turn", "baseline": "none"}, [3.0, 2.0, 2.0, 1.0, 1.0]),
        ({"credit": "turn", "gamma": 0.5, "baseline": "none"}, [1.5, 1.0, 2.0, 0.5, 1.0]),
        ({"credit": "turn", "gamma": 0.0}, [0.5, -0.5, 1.0, -0.5, 0.5]),
        ({"credit": "turn", "scale": "std"}, [0.5**0.5, 0.5**0.5, 0.5**0.5, -(0.5**0.5), -(0.5**0.5)]),
        ({"credit": "state"}, [2.0, 1.5, 1.0, -2.0, -1.5]),  # in the same state in two turns, alone in the third
        ({"credit": "state", "state_weight": 0.5}, [1.5, 1.25, 1.0, -1.5, -1.25]),
        ({"credit": "state", "gamma": 0.5}, [1.5, 1.0, 1.0, -1.5, -1.0]),  # returns are not discounted
    ],
)
def test_one_group_under_every_scheme(settings: dict[str, object], expected: list[float]) -> None:
    advantages, _, _ = compared(config(**settings), *PAIR)
    assert advantages == pytest.approx(expected, rel=1e-5)


def test_a_state_is_the_exact_prompt() -> None:
    """Three siblings: 7 is met in another turn each time; nobody else was in 8 or 9."""
    group = [episode(0.0, 4.0, states=(9, 7)), episode(1.0, states=(7,)), episode(1.0, 0.0, states=(8, 7))]
    advantages, _, metrics = compared(config(credit="state"), group)
    returns = [2.0, 2.0, -1.0, -1.0, -1.0]  # of 4, 1 and 1
    in_seven = [0.0, 4 - 5 / 3, 1 - 5 / 3, 0.0, 0 - 5 / 3]
    assert advantages == pytest.approx([r + s for r, s in zip(returns, in_seven, strict=True)])
    assert metrics["credit/shared"] == pytest.approx(3 / 5)


def test_groups_are_told_apart_and_with_the_batch_as_baseline_are_one() -> None:
    groups = [episode(1.0, 1.0), episode(0.0, 1.0)], [episode(5.0, 1.0), episode(5.0, 1.0)]
    turn = compared(config(credit="turn"), *groups)[0]
    assert turn == [0.5, 0.0, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    turn = compared(config(credit="turn", baseline="batch"), *groups)[0]
    assert turn == pytest.approx([2 - 3.75, 0, 1 - 3.75, 0, 6 - 3.75, 0, 6 - 3.75, 0])
    state = compared(config(credit="state", baseline="batch"), *groups)[0]
    assert state == pytest.approx([-3.5, -1.75, -5.5, -2.75, 4.5, 2.25, 4.5, 2.25])  # the first turn counts twice


def test_every_token_of_a_turn_gets_its_advantage() -> None:
    group = [episode(1.0, 0.0, tokens=3), episode(0.0, 1.0, tokens=2)]
    _, batch, _ = compared(config(credit="turn"), group)
    assert batch.advantages[batch.mask].tolist() == pytest.approx([0.0] * 3 + [-0.5] * 3 + [0.0] * 2 + [0.5] * 2)


def test_what_length_and_kl_cost_is_charged_to_the_turn_it_is_about() -> None:
    """Length in the first turn of the first, KL in the second turn of the second; what comes later pays for neither."""
    cfg = config(credit="turn", baseline="none", overlong_cache=2, sampling=SamplingConfig(max_tokens=4))
    group = [episode(1.0, 1.0, tokens=4), episode(1.0, 1.0)]
    group[0].turns[1].action, group[0].turns[1].logprobs = [2], [0.0]
    assert compared(cfg, group)[0] == pytest.approx([1.0, 1.0, 2.0, 1.0])

    cfg = config(credit="turn", baseline="none", kl_in="episodes", policy=PolicyConfig(kl_coef=0.5))
    group = [episode(1.0, 1.0), episode(1.0, 1.0)]
    batch = pack([turn for e in group for turn in e.turns])
    batch.ref_logprobs = batch.logprobs.masked_scatter(batch.mask, torch.tensor([0.0, 0.0, 0.0, -1.0]))
    compare(cfg, batch, [group])
    assert at_first(batch).tolist() == pytest.approx([2.0, 1.0, 1.5, 0.5])


def test_what_is_logged_about_turns() -> None:
    metrics = compared(config(credit="turn"), *PAIR)[2]
    assert metrics["credit/shared"] == pytest.approx(4 / 5)  # the third turn has no company
    advantages = torch.tensor([1.0, 0.5, 1.0, -1.0, -0.5])
    assert metrics["policy/advantage_std"] == pytest.approx(advantages.std(correction=0).item())
    assert 0 < metrics["credit/within_episodes"] < 0.1
    assert not any(name.startswith("credit/") for name in compared(config(), *PAIR)[2])
    flat = [episode(1.0, 0.0), episode(0.0, 0.0)]
    assert compared(config(credit="turn"), flat)[2]["credit/within_episodes"] == pytest.approx(0.5)


def test_a_group_that_earned_the_same_in_other_turns_teaches_turns() -> None:
    early, late = episode(1.0, 0.0), episode(0.0, 1.0)
    assert not differs([early, late])
    assert differs([early, late], by_turn=True)
    assert not differs([early, episode(1.0)], by_turn=True)  # nothing was earned in the turn the second did not take
    assert differs([early, episode(1.0, 0.5)], by_turn=True)


def test_groups_are_replaced_if_they_do_not_differ_in_the_eyes_of_the_scheme() -> None:
    """Every sibling earns 1, the first one in another turn than the others."""

    async def play(task: Task, played: Episode) -> None:
        first = not seen.get(task.id)
        seen[task.id] = True
        played.turns, played.ending = episode(*((1.0, 0.0) if first else (0.0, 1.0))).turns, "terminated"

    tasks = [Task(id=str(number)) for number in range(8)]
    for scheme, drawn in (("episode", 5), ("turn", 2), ("state", 2)):
        seen: dict[str, bool] = {}
        cfg = config(credit=scheme, tasks_per_step=2, group_size=3, replacements=3)
        found = play_groups(cfg, tasks, play, Rewards(), drawn=0, seed=0)
        assert found.tasks == drawn
        assert found.metrics["group/zero_variance"] == (scheme == "episode")


def through_the_recipe(cfg: Config) -> Callable[[Sequence[Play]], torch.Tensor]:
    """The credit of the recipe for plays of an enumerable game, whose states are prompts."""
    numbers = {state: number for number, state in enumerate(THREE_TURNS)}

    def credit(group: Sequence[Play]) -> torch.Tensor:
        played = [episode(*play.rewards, states=[numbers[state] for state in play.states]) for play in group]
        owner = torch.tensor([i for i, play in enumerate(group) for _ in play.states])
        rewards = torch.tensor(list(itertools.chain(*(play.rewards for play in group))), dtype=torch.float64)
        return assign(cfg, played, rewards, owner, ["task"] * len(group))[0].double()

    return credit


@pytest.mark.parametrize("settings", [{"credit": "episode"}, {"credit": "turn"}])
def test_the_recipe_follows_the_exact_gradient(settings: dict[str, str]) -> None:
    """In float32, which is what it computes in; what the schemes do is shown in tests/ops."""
    policy = uniform(THREE_TURNS)
    exact = exact_gradient(THREE_TURNS, policy)
    fair = through_the_recipe(config(baseline="leave_one_out", **settings))
    got = expected_gradient(THREE_TURNS, policy, fair, 2)
    for state, gradient in exact.items():
        torch.testing.assert_close(got[state], gradient, atol=1e-6, rtol=0)


def test_the_recipe_weighs_states_and_late_turns_by_their_chance_of_company() -> None:
    """Of two siblings the other one got to turn 2 with 2/3, to turn 3 with 1/3, to either state of turn 2 with 1/3."""
    policy = uniform(THREE_TURNS)
    exact = {state: gradient.detach() for state, gradient in exact_gradient(THREE_TURNS, policy).items()}
    weights = {
        ("turn", "reached"): {"start": 1.0, "left": 2 / 3, "right": 2 / 3, "end": 1 / 3},
        ("state", "all"): {"start": 2.0, "left": 4 / 3, "right": 4 / 3, "end": 4 / 3},
    }
    for (scheme, siblings), factor in weights.items():
        cfg = config(credit=scheme, compare_with=siblings, baseline="leave_one_out")
        got = expected_gradient(THREE_TURNS, policy, through_the_recipe(cfg), 2)
        for state in exact:
            torch.testing.assert_close(got[state], factor[state] * exact[state], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 0.9}, "gamma = 0.9: an episode's return is not discounted. Use credit = turn or state"),
        ({"gamma": 1.1, "credit": "turn"}, "gamma = 1.1: a discount lies between 0 and 1"),
        ({"compare_with": "reached"}, "compare_with = reached: only turns are compared with siblings"),
        ({"compare_with": "reached", "credit": "state"}, "compare_with = reached: only turns are compared"),
        (
            {"compare_with": "reached", "credit": "turn", "baseline": "none"},
            "compare_with = reached: nothing is compared there",
        ),
        ({"state_weight": 0.5, "credit": "turn"}, "state_weight = 0.5: no states are compared. Use credit = state"),
        ({"state_weight": 0.0, "credit": "state"}, "state_weight = 0.0: it weighs what is added"),
        ({"state_weight": math.inf, "credit": "state"}, "state_weight = .inf: it weighs what is added"),
        ({"credit": "state", "baseline": "none"}, "credit = state: episodes and states are compared"),
        ({"credit": "turn", "max_turns": 1}, "credit = turn: every episode has one turn"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**settings)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["turn", "state"])
def test_answers_of_one_turn_have_no_turns_to_tell_apart(
    train, capsys: pytest.CaptureFixture[str], scheme: str
) -> None:
    asked = ("--model.path", "x", "--data.path", "x.jsonl", "--reward", "x.py:f")
    train("grpo", *asked, "--credit", scheme, status=2)
    assert f"credit = {scheme}: every episode has one turn" in capsys.readouterr().err


SMALL = ("--steps", 4, "--tasks-per-step", 2, "--group-size", 4, "--policy.epochs", 2)


@pytest.mark.parametrize(
    "flags",
    [
        ("--credit", "turn", "--gamma", 0.9, "--replacements", 2),
        ("--credit", "state", "--policy.kl-coef", 0.1, "--kl-in", "tokens"),
    ],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    train, game: list[str], killed_at, flags: tuple[object, ...]
) -> None:
    flags = (*game, *SMALL, "--save-every", 2, *flags)
    whole = train("grpo", *flags, name="whole")
    killed_at(3)
    train("grpo", *flags, name="killed", status=130)
    killed_at(-1)
    resumed = train("grpo", *flags, "--resume", name="killed")
    assert len(whole.rows()) == 4
    assert resumed.rows() == whole.rows()
    assert resumed.rows("episodes") == whole.rows("episodes")
    assert all(0 < row["credit/shared"] <= 1 for row in whole.rows())
    assert any(row["credit/within_episodes"] > 0 for row in whole.rows())
    turns = [turn["advantage"] for row in whole.rows("episodes") for turn in row["turns"] if len(row["turns"]) > 1]
    assert len(set(turns)) > 2


@pytest.fixture(scope="session")
def corridor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that tries one of three keys at each of twelve doors, at random."""
    env, folder = load_env("text_lock", TWELVE), tmp_path_factory.mktemp("corridor")
    games = recorded(env, ("random",), 128, folder / "games.jsonl")
    return taught(made(env, folder / "model", layers=2), games, folder / "run", epochs=6)


TWELVE = {"doors": 12, "keys": 3}


@pytest.mark.learning
@pytest.mark.slow
@pytest.mark.seeds(0, 1)
def test_with_many_doors_credit_per_turn_learns_from_fewer_episodes(train, corridor: Path, seed: int) -> None:
    """320 episodes in 40 steps of eight. Doors opened in the last 15 steps, on seeds 0 to 4: 0.61 to 0.77, and with one
    number per episode, 0.32 to 0.45. Discounted, since a key opens no door but its own."""
    doors = ("--model.path", corridor, "--env", "text_lock", "--env-settings", *(f"{k}={v}" for k, v in TWELVE.items()))
    few = ("--sampling.max-tokens", 4, "--tasks-per-step", 2, "--group-size", 4, "--steps", 40, "--seed", seed)

    def opened(name: str, *flags: object) -> float:
        rows = train("grpo", *doors, *few, "--policy.optim.lr", 1e-3, *flags, name=name).rows()
        return sum(row["reward/mean"] for row in rows[25:]) / 15

    turn, whole = opened("turn", "--credit", "turn", "--gamma", 0.5), opened("episode")
    assert turn > 0.5
    assert turn > whole + 0.1
