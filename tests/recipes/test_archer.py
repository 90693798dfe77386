"""ArCHer: what Q and V are pulled towards, how the target lags, what the actor is told, and every recipe's promises."""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from echelon import cli
from echelon.config import ModelConfig, OptimConfig, SamplingConfig
from echelon.data.packing import CriticBatch, Sampled, pack, pack_transitions
from echelon.data.replay import Replay, Transition, transitions
from echelon.envs import load_env
from echelon.errors import ConfigError, DataError
from echelon.models.heads import UtteranceCritic
from echelon.models.lm import load_lm, tiny
from echelon.recipes import archer
from echelon.recipes.archer import Config, Levels, open_critic, open_levels, update_actor, update_critic
from echelon.rollout.plays import env_loop
from echelon.rollout.roles import collect
from echelon.rollout.setup import Actor, open_actor
from echelon.sampling.scripted import ScriptedSampler
from echelon.train import critic as critics
from echelon.train.critic import asked_states, critic_loss, judge
from echelon.train.learner import Learner
from echelon.train.policy import PolicyConfig
from echelon.types import Episode

SMALL = ("--steps", 3, "--episodes-per-step", 8, "--warmup-steps", 1, "--critic-updates", 3, "--fresh-updates", 2)
SMALL += ("--critic-episodes", 4, "--actor-episodes", 8)
SAMPLING = SamplingConfig(max_tokens=3, max_prompt_tokens=128)
STILL = ("--steps", 1, "--critic-optim.lr", 0, "--critic-updates", 1)

Critics = dict[str, torch.Tensor]


def config(**settings: Any) -> Config:
    known = {"out": "x", "env": "x", "model": ModelConfig("x", device="cpu"), "sampling": SAMPLING}
    return Config(**{**known, **settings})


def step(state: list[int], action: list[int], after: list[int] | None, reward: float = -1.0, **more: Any) -> Transition:
    """One decision; without a state after it the episode terminated."""
    return Transition(state, action, reward, after, terminated=after is None, logprobs=[0.0] * len(action), **more)


WON = [step([3, 4], [10, 11], [3, 4, 10, 11, 5]), step([3, 4, 10, 11, 5], [12], None)]
CUT = [step([6, 7], [8], [6, 7, 8, 9]), step([6, 7, 8, 9], [13, 14], [6, 7, 8, 9, 13, 14, 5])]
"""Two turns each. The first game is over after them, the second was cut off."""
FRESH = [Sampled(state, [20, 21], [0.0] * 2) for state in ([3, 4], [6, 7, 8, 9])]


def flat(lm: Any, q: Sequence[float] = (-9.0, -8.0), v: Sequence[float] = (-10.0, -12.0)) -> UtteranceCritic:
    """A critic that says the same whatever it reads."""
    critic = UtteranceCritic.from_lm(lm)
    with torch.no_grad():
        for heads, values in ((critic.q, q), (critic.v, v)):
            for head, value in zip(heads, values, strict=True):
                torch.nn.init.zeros_(head[-1].weight)
                head[-1].bias.fill_(value)
    return critic


def lively(lm: Any) -> UtteranceCritic:
    """A critic whose values differ a lot from place to place."""
    critic = UtteranceCritic.from_lm(lm)
    for head in (*critic.q, *critic.v):
        torch.nn.init.normal_(head[-1].weight)
    return critic


def with_targets(
    target: UtteranceCritic,
    episodes: Sequence[Sequence[Transition]],
    asked: Sequence[Sequence[int]] = (),
    fresh: Sequence[Sampled] = (),
    **settings: Any,
) -> CriticBatch:
    if not asked:  # somewhere V must be learned
        asked, fresh = [[0], *([] for _ in episodes[1:])], [Sampled(episodes[0][0].state, [20], [0.0])]
    said = iter(fresh)
    answers = [{turn: next(said) for turn in turns} for turns in asked]
    return critics.with_targets(target, episodes, answers, **{"gamma": 0.95, "tokens_per_pass": 4096, **settings})


@pytest.fixture
def lm(untrained: Path) -> Any:
    return load_lm(str(untrained), device="cpu")


def test_q_shall_be_the_reward_and_what_follows_unless_the_episode_is_over(lm: Any) -> None:
    batch = with_targets(flat(lm), [WON, CUT], gamma=0.95)
    assert batch.q_target is not None
    first, second = batch.q_target.tolist()
    assert first == pytest.approx([-10.5, -1.0, -10.5, -10.5])  # -1 + 0.95 · -10, but -1 where the game was over
    assert second == pytest.approx([-12.4, -1.0, -12.4, -12.4])  # each twin bootstraps from its own


def test_a_reward_over_several_turns_is_followed_by_a_value_discounted_as_often(lm: Any) -> None:
    batch = with_targets(flat(lm), [[step([3], [4], [3, 4, 5], -1.5, discount_steps=2)]], gamma=0.5)
    assert batch.q_target is not None
    assert batch.q_target.flatten().tolist() == pytest.approx([-1.5 - 2.5, -1.5 - 3.0])


def test_v_shall_be_q_of_a_fresh_action_where_one_was_asked_for_and_nothing_elsewhere(lm: Any) -> None:
    batch = with_targets(flat(lm), [WON, CUT], [[0], [1]], FRESH)
    assert batch.v_target is not None
    assert batch.v_target[:, [0, 3]].tolist() == [[-9.0, -9.0], [-8.0, -8.0]]
    assert batch.v_target[:, [1, 2]].isnan().all()

    critic = lively(lm)
    batch = with_targets(critic, [WON, CUT], [[0], [1]], FRESH)
    assert batch.v_target is not None
    for place, answer in ((0, FRESH[0]), (3, FRESH[1])):
        alone, _ = judge(critic, pack([answer]), 1000)
        torch.testing.assert_close(batch.v_target[:, place], alone[:, 0], rtol=1e-5, atol=1e-5)


def test_v_may_be_pulled_towards_q_of_what_was_said_then_and_nothing_is_sampled(lm: Any) -> None:
    critic = lively(lm)
    batch = critics.with_targets(critic, [WON, CUT], None, gamma=0.95, tokens_per_pass=4096)
    assert batch.v_target is not None
    torch.testing.assert_close(batch.v_target, judge(critic, pack([*WON, *CUT]), 1000)[0], rtol=1e-5, atol=1e-5)
    assert (batch.denom, batch.v_denom) == (4.0, 4.0)


def test_what_follows_is_v_of_the_state_the_actor_saw_next(lm: Any) -> None:
    """With three turns at a time it lies further along the row; an episode that was cut off ends in its last state."""
    critic, ids, far = lively(lm), [3, 4], []
    for said in range(30, 35):
        far.append([*ids])
        ids = [*ids, said, 5]
    states = [*far, ids]
    episode = [step(states[i], [30 + i], states[min(i + 3, 5)], discount_steps=min(3, 5 - i)) for i in range(5)]
    batch = with_targets(critic, [WON, episode, CUT], gamma=0.9)
    assert batch.q_target is not None
    expected = []
    for transition in [*WON, *episode, *CUT]:
        after = torch.zeros(2)
        if transition.next_state is not None:
            after = judge(critic, pack([Sampled(transition.next_state, [20], [0.0])]), 1000)[1][:, 0]
        expected.append(transition.reward + 0.9**transition.discount_steps * after)
    torch.testing.assert_close(batch.q_target, torch.stack(expected, 1), rtol=1e-5, atol=1e-5)


def test_episodes_in_one_row_have_the_targets_of_their_transitions_packed_one_by_one(lm: Any) -> None:
    critic = lively(lm)
    batch = with_targets(critic, [WON, CUT])
    assert len(batch.tokens) == 2
    assert batch.q_target is not None
    for place, transition in enumerate([*WON, *CUT]):
        alone = with_targets(critic, [[transition]]).q_target
        assert alone is not None
        torch.testing.assert_close(batch.q_target[:, place], alone[:, 0], rtol=1e-5, atol=1e-5)
    values = batch.q_target[:, [0, 2, 3]]
    assert (values[:, :-1] - values[:, 1:]).abs().min() > 1e-3, "or any place would do"


def test_no_gradient_flows_into_targets(lm: Any) -> None:
    batch = with_targets(flat(lm), [WON])
    assert batch.q_target is not None
    assert batch.v_target is not None
    assert not batch.q_target.requires_grad
    assert not batch.v_target.requires_grad


def test_the_loss_is_the_square_of_both_twins_misses_and_v_counts_where_it_was_asked(lm: Any) -> None:
    batch = with_targets(flat(lm), [WON, CUT], [[0], []], FRESH[:1], gamma=0.95)
    loss, stats = critic_loss(flat(lm), batch)
    q = (1.5**2 * 3 + 8.0**2) / 4 + (4.4**2 * 3 + 7.0**2) / 4  # -9 for -10.5 and -1, -8 for -12.4 and -1
    v = (1.0**2 + 4.0**2) / 1  # -10 for -9 and -12 for -8, at the one state of four that was asked
    assert stats["q_loss"] == pytest.approx(q)
    assert stats["v_loss"] == pytest.approx(v)
    assert loss.item() == pytest.approx(q + v)
    assert stats["q_mean"] == pytest.approx(-8.5)
    assert stats["v_mean"] == pytest.approx(-11.0)
    assert stats["q_target"] == pytest.approx(((-10.5 * 3 - 1) / 4 + (-12.4 * 3 - 1) / 4) / 2)


def test_micro_batches_add_up_to_the_loss_and_the_gradient_of_the_whole(lm: Any) -> None:
    critic = lively(lm)
    batch = with_targets(critic, [WON, CUT, WON[1:]], [[0], [1], []], FRESH)
    found = []
    for tokens_per_pass in (1000, 8):
        critic.zero_grad()
        parts = batch.split(tokens_per_pass)
        for part in parts:
            critic_loss(critic, part)[0].backward()
        numbers = [critic_loss(critic, part)[1] for part in parts]
        totals = {name: sum(number[name] for number in numbers) for name in numbers[0]}
        found.append((totals, [parameter.grad.clone() for parameter in critic.parameters()]))
    assert len(parts) == 3
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


def test_a_loss_without_targets_is_an_error_not_zero(lm: Any) -> None:
    batch = pack_transitions(WON)
    with pytest.raises(DataError, match="q_target is missing from the batch"):
        critic_loss(flat(lm), batch)
    batch.q_target = torch.zeros(2, 2)
    with pytest.raises(DataError, match="v_target is missing from the batch"):
        critic_loss(flat(lm), batch)


def test_an_update_sends_a_gradient_to_the_body_and_to_all_four_heads(lm: Any) -> None:
    critic = UtteranceCritic.from_lm(lm)
    learner = Learner(critic, OptimConfig())
    learner.update([with_targets(critic.target(), [WON, CUT], [[0], [1]], FRESH)], critic_loss)
    gradients = {name: parameter.grad for name, parameter in critic.named_parameters()}
    assert {name.rpartition(".")[0][:3] for name in gradients} >= {"bod", "q.0", "q.1", "v.0", "v.1"}
    assert [name for name, grad in gradients.items() if grad is None or not grad.abs().max() > 0] == []


def test_saved_and_loaded_critics_say_the_same(lm: Any, tmp_path: Path) -> None:
    critic, other = lively(lm), lively(lm)
    batch = pack([*WON, *CUT])
    assert not judge(critic, batch, 1000)[0].isclose(judge(other, batch, 1000)[0]).any()
    Learner(critic, OptimConfig()).save(tmp_path)
    Learner(other, OptimConfig()).load(tmp_path)
    for one, same in zip(judge(critic, batch, 1000), judge(other, batch, 1000), strict=True):
        assert one.equal(same)


def test_v_is_learned_at_some_states_of_an_episode_or_at_all() -> None:
    for count in (0, 5, 9):
        assert asked_states(5, count, 0) == [0, 1, 2, 3, 4]
    drawn = [asked_states(5, 2, seed) for seed in range(40)]
    assert drawn == [asked_states(5, 2, seed) for seed in range(40)]
    assert all(turns == sorted(set(turns)) and len(turns) == 2 for turns in drawn)
    assert {turn for turns in drawn for turn in turns} == {0, 1, 2, 3, 4}


@dataclass
class Level:
    """What `main` holds between steps, with a few games in the replay."""

    actor: Actor
    levels: Levels
    played: list[Episode]

    @property
    def critic(self) -> Learner:
        return self.levels.critic

    @property
    def target(self) -> UtteranceCritic:
        return self.levels.target

    def copy(self, module: torch.nn.Module) -> Critics:
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def update(self, cfg: Config, at: int = 0) -> dict[str, float]:
        return update_critic(cfg, at, self.levels)


Begin = Callable[[Config], Level]


@pytest.fixture
def begin(start: Path) -> Begin:
    def begin(cfg: Config) -> Level:
        actor = open_actor(ModelConfig(str(start), device="cpu"), cfg.sampling)
        env = load_env("guess_number", {"low": 1, "high": 4, "max_turns": 3})
        tasks = env.tasks("train") * 2
        played = asyncio.run(collect(tasks, env_loop(env.make, actor.role), seed=0))
        levels = open_levels(cfg, actor)
        levels.replay.add(transitions(episode, "actor", gamma=0.95) for episode in played)
        return Level(actor, levels, played)

    return begin


QUICK = {"critic_updates": 2, "critic_episodes": 3, "fresh_updates": 2, "tokens_per_pass": 40}
"""So few tokens a pass that every optimizer step takes several."""


def test_the_target_moves_a_part_of_the_way_after_every_update(begin: Begin) -> None:
    cfg = config(**{**QUICK, "critic_updates": 1, "tau": 0.25})
    level = begin(cfg)
    old = level.copy(level.target)
    level.update(cfg)
    new = level.critic.module.state_dict()
    for name, lagging in level.target.state_dict().items():
        assert lagging.data_ptr() != new[name].data_ptr()
        assert not lagging.equal(old[name]), name
        assert not lagging.equal(new[name]), name
        torch.testing.assert_close(lagging, old[name] + 0.25 * (new[name] - old[name]), rtol=1e-5, atol=1e-6)


def test_the_target_is_copied_every_so_many_optimizer_steps_and_rests_between(begin: Begin) -> None:
    cfg = config(**QUICK, target="hard", target_every=3)
    level = begin(cfg)
    old = level.copy(level.target)
    level.update(cfg, 0)
    assert level.critic.version == 2
    torch.testing.assert_close(level.copy(level.target), old, rtol=0, atol=0)
    level.update(cfg, 1)  # the third step is the first of this call, the fourth follows it
    after = level.copy(level.target)
    assert not any(tensor.equal(old[name]) for name, tensor in after.items())
    assert not any(tensor.equal(after[name]) for name, tensor in level.critic.module.state_dict().items())

    exact = begin(cfg)
    exact.update(cfg, 0)
    level.update(config(**QUICK, target="hard", target_every=6), 2)  # six steps done
    torch.testing.assert_close(level.copy(level.target), level.copy(level.critic.module), rtol=0, atol=0)


def test_replayed_actions_need_no_sampler(begin: Begin) -> None:
    cfg = config(**QUICK, value_actions="replayed")
    level = begin(cfg)
    sampler = ScriptedSampler([], level.actor.tokenizer)
    level.actor.role.sampler = sampler
    level.update(cfg)
    assert sampler.asked == []
    assert level.critic.version == 2


@pytest.mark.parametrize("fresh_states", [0, 1])
@pytest.mark.parametrize("fresh_updates", [1, 2, 5])
def test_fresh_actions_answer_the_states_they_are_asked_for(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, fresh_states: int, fresh_updates: int
) -> None:
    cfg = config(**{**QUICK, "critic_updates": 3, "fresh_updates": fresh_updates, "fresh_states": fresh_states})
    level, seen = begin(cfg), []

    def spy(target: Any, episodes: Any, fresh: Any, **settings: Any) -> CriticBatch:
        wanted = [episode[turn].state for episode, said in zip(episodes, fresh, strict=True) for turn in said]
        answered = [answer.prompt for said in fresh for answer in said.values()]
        seen.append((wanted, answered, [len(said) for said in fresh]))
        return real(target, episodes, fresh, **settings)

    real = archer.with_targets
    monkeypatch.setattr(archer, "with_targets", spy)
    level.update(cfg)
    assert len(seen) == level.critic.version == 3
    for wanted, answered, counts in seen:
        assert wanted == answered
        assert len(counts) == 3
        assert not fresh_states or set(counts) == {1}
    assert len({str(wanted) for wanted, _, _ in seen}) == 3, "every update draws its own episodes"


def test_a_critic_on_the_actors_body_trains_heads_only(begin: Begin) -> None:
    cfg = config(**QUICK, critic_body="actor")
    level = begin(cfg)
    before = level.copy(level.actor.module)
    heads = level.copy(level.critic.module)
    assert all(name.startswith(("q.", "v.")) for name in heads)
    level.update(cfg)
    torch.testing.assert_close(level.copy(level.actor.module), before, rtol=0, atol=0)
    assert not any(tensor.equal(heads[name]) for name, tensor in level.critic.module.state_dict().items())


def test_a_critic_of_its_own_leaves_the_actor_alone(begin: Begin) -> None:
    cfg = config(**QUICK)
    level = begin(cfg)
    before = level.copy(level.actor.module)
    level.update(cfg)
    torch.testing.assert_close(level.copy(level.actor.module), before, rtol=0, atol=0)


def advise(level: Level, cfg: Config, critic: UtteranceCritic) -> tuple[list[float], dict[str, float]]:
    """The advantages of all sampled tokens of the games, and what was logged."""
    batch = pack([turn for episode in level.played for turn in episode.turns])
    policy = Learner(copy.deepcopy(level.actor.module), cfg.policy.optim)  # the games were sampled before it learned
    logged = update_actor(cfg, 0, replace(level.levels, policy=policy, online=critic), batch)
    assert batch.advantages is not None
    return batch.advantages[batch.mask].tolist(), logged


def test_every_token_is_told_how_much_better_its_utterance_is_than_its_state(begin: Begin) -> None:
    level = begin(config())
    critic = flat(level.actor.module, q=(-9.0, -8.0), v=(-10.5, -9.5))
    found, logged = advise(level, config(actor_states="rollout", advantages="raw"), critic)
    assert found == [1.5] * len(found)  # min Q - min V = -9 + 10.5
    assert logged["policy/advantage_std"] == 0
    assert logged["policy/grad_norm"] > 0
    for advantages in ("centred", "whitened"):  # what is equally good everywhere teaches nothing
        found, logged = advise(level, config(actor_states="rollout", advantages=advantages), critic)
        assert found == [0.0] * len(found)
        assert logged["policy/grad_norm"] == 0


def test_centred_and_whitened_advantages_weigh_utterances_alike_however_long(begin: Begin) -> None:
    settings = {"actor_states": "rollout", "sampling": SamplingConfig(max_tokens=3, temperature=3.0)}
    level = begin(config(**settings))
    critic = lively(level.actor.module)
    raw, centred, whitened = (
        torch.tensor(advise(level, config(**settings, advantages=advantages), critic)[0])
        for advantages in ("raw", "centred", "whitened")
    )
    lengths = [len(turn.action) for episode in level.played for turn in episode.turns]
    assert len(set(lengths)) > 1, "or tokens and utterances would be the same"
    first = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    assert raw[first].mean().abs() > 1e-2
    torch.testing.assert_close(centred, raw - raw[first].mean(), rtol=0, atol=1e-5)
    torch.testing.assert_close(whitened, centred / raw[first].std(), rtol=1e-4, atol=1e-5)


def test_a_critic_may_start_from_another_model_that_reads_the_same_tokens(untrained: Path, tmp_path: Path) -> None:
    actor = open_actor(ModelConfig(str(untrained), device="cpu"), SamplingConfig())
    other, _ = tiny(["a"], vocab_size=400, hidden=16, layers=1, heads=1)
    other.resize_token_embeddings(len(actor.tokenizer))
    other.save_pretrained(tmp_path / "other")
    actor.tokenizer.save_pretrained(tmp_path / "other")
    critic = open_critic(config(critic_path=str(tmp_path / "other")), actor)
    assert critic.config.hidden_size == 16
    copied = dict(critic.body.named_parameters())
    assert all(copied[name].equal(tensor) for name, tensor in other.model.named_parameters())


def test_a_critic_that_reads_other_tokens_is_refused_before_anything_is_written(
    train, game: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, tokenizer = tiny(["some other words altogether"], vocab_size=300, hidden=16, layers=1, heads=1)
    module.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    run = train("archer", *game, *SMALL, "--critic-path", tmp_path / "other", status=2)
    assert capsys.readouterr().err == (
        f"critic_path = {tmp_path}/other: its tokenizer is not the actor's, so it would misread the actor's tokens. "
        "Use a model with the same tokenizer, or leave critic_path empty.\n"
    )
    assert not run.out.exists()


def test_critics_of_one_seed_begin_alike_and_of_another_differ(begin: Begin) -> None:
    one, same, other = (begin(config(seed=seed)).critic.module.state_dict() for seed in (0, 0, 1))
    assert all(tensor.equal(same[name]) for name, tensor in one.items())
    assert not any(
        tensor.equal(other[name])
        for name, tensor in one.items()
        if name.startswith(("q.", "v.")) and name.endswith("weight")
    )


@pytest.mark.parametrize("states", ["rollout", "replay"])
def test_a_run_leaves_metrics_episodes_and_both_levels(train, game: list[str], start: Path, states: str) -> None:
    run = train("archer", *game, *SMALL, "--actor-states", states, "--sampling.temperature", 0.7)
    warming, *rows = run.rows()
    assert not any(name.startswith("policy/") for name in warming)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["policy/first_mismatch"] < 1e-4  # sampler and trainer agree, in rows with branches too
        assert row["policy/grad_norm"] > 0
    for row in run.rows():
        assert row["critic/grad_norm"] > 0
        assert {"reward/mean", "critic/q_loss", "critic/v_loss", "critic/explained_variance"} <= row.keys()
    said = [turn for row in run.rows("episodes") for turn in row["turns"]]
    assert len(run.rows("episodes")) == 24
    assert all({"value", "advantage"} <= turn.keys() for turn in said)
    assert [folder.name for folder in sorted((run.out / "checkpoints").iterdir())] == ["step_000000", "step_000003"]
    for name, tensor in run.weights().items():
        assert not tensor.equal(load_file(start / "model.safetensors")[name]), name
    begun = load_file(run.out / "checkpoints/step_000000/critic/model.safetensors")
    for name, tensor in run.weights("critic").items():
        assert not tensor.equal(begun[name]), name
        assert not run.weights("target")[name].equal(tensor), name


def test_only_the_critic_learns_while_warming_up(train, game: list[str], start: Path) -> None:
    run = train("archer", *game, *SMALL, "--steps", 1)
    torch.testing.assert_close(run.weights(), load_file(start / "model.safetensors"), rtol=0, atol=0)


def test_values_and_targets_start_at_the_mean_return_of_the_first_episodes(train, game: list[str]) -> None:
    run = train("archer", *game, *SMALL, *STILL, "--gamma", 1)
    returns = []
    for row in run.rows("episodes"):
        rewards = [turn["reward"] for turn in row["turns"]]
        returns += [sum(rewards[place:]) for place in range(len(rewards))]
    (row,) = run.rows()
    mean = sum(returns) / len(returns)
    assert mean < -0.5
    assert row["critic/v_mean"] == pytest.approx(mean, abs=0.1)
    assert row["critic/q_mean"] == pytest.approx(mean, abs=0.1)
    for part in ("critic", "target"):
        assert run.weights(part)["q.1.2.bias"].item() == pytest.approx(mean)


def test_an_episode_cut_off_bootstraps_and_one_that_was_won_does_not(train, game: list[str]) -> None:
    """Every game lasts one turn, so rewards are -1 and 0 and values start at the mean; what is aimed at tells them."""
    run = train("archer", *game, *SMALL, *STILL, "--gamma", 1, "--max-turns", 1, "--critic-episodes", 64)
    folder = run.out / "checkpoints/step_000001/replay"
    stored = Replay(1000)
    stored.load(folder)
    found = [transition for episode in stored.episodes() for transition in episode]
    assert {(transition.reward, transition.terminated) for transition in found} == {(-1.0, False), (0.0, True)}
    assert all(
        transition.next_state[: len(transition.state)] == transition.state
        for transition in found
        if transition.next_state
    )


def test_the_starting_policy_is_kept_and_left(train, game: list[str], start: Path) -> None:
    run = train("archer", *game, *SMALL, "--policy.kl-coef", 0.1)
    torch.testing.assert_close(run.weights("reference"), load_file(start / "model.safetensors"), rtol=0, atol=0)
    first, second = (row["policy/kl_to_start"] for row in run.rows()[1:])
    assert first == pytest.approx(0, abs=1e-6)
    assert second > 1e-5


def test_an_adapter_knows_its_own_start_so_no_copy_of_the_actor_is_saved(train, game: list[str]) -> None:
    run = train("archer", *game, *SMALL, "--policy.kl-coef", 0.1, "--lora.rank", 2)
    assert [row["policy/kl_to_start"] for row in run.rows()[1:]] == [
        pytest.approx(0, abs=1e-6),
        pytest.approx(0, abs=1),
    ]
    parts = {path.name for path in (run.out / "checkpoints/step_000003").iterdir() if path.is_dir()}
    assert parts == {"actor", "critic", "target", "replay"}
    resumed = train("archer", *game, *SMALL, "--policy.kl-coef", 0.1, "--lora.rank", 2, "--steps", 4, "--resume")
    assert resumed.rows()[3]["policy/kl_to_start"] > 1e-9


def test_without_kl_no_starting_policy_is_kept(train, game: list[str]) -> None:
    run = train("archer", *game, *SMALL, "--steps", 1)
    parts = {path.name for path in (run.out / "checkpoints/step_000001").iterdir() if path.is_dir()}
    assert parts == {"actor", "critic", "target", "replay"}


def test_a_critic_on_the_actors_body_is_saved_as_heads(train, game: list[str]) -> None:
    run = train("archer", *game, *SMALL, "--critic-body", "actor")
    for part in ("critic", "target"):
        assert {name[:2] for name in run.weights(part)} == {"q.", "v."}
    assert all(row["policy/first_mismatch"] < 1e-4 for row in run.rows()[1:])


def test_the_size_of_a_pass_does_not_change_the_updates(train, game: list[str]) -> None:
    flags = (*game, *SMALL, "--steps", 1, "--warmup-steps", 0, "--policy.kl-coef", 0.1)
    flags += ("--policy.optim.eps", 1e-3, "--critic-optim.eps", 1e-3)  # otherwise Adam makes steps of rounding
    whole, parts = train("archer", *flags, name="whole"), train("archer", *flags, "--tokens-per-pass", 60, name="parts")
    assert whole.rows()[0] == pytest.approx(parts.rows()[0], rel=1e-4, abs=1e-5)
    for part in ("critic", "target", "actor"):
        torch.testing.assert_close(whole.weights(part), parts.weights(part), rtol=0, atol=2e-6)


VARIANTS = {
    "warming up": ("--warmup-steps", 4),
    "after it": ("--warmup-steps", 1, "--policy.kl-coef", 0.1, "--n-step", 2),
    "rollout states": ("--warmup-steps", 0, "--actor-states", "rollout", "--fresh-states", 1, "--replay-capacity", 40),
    "hard target, shared body": ("--target", "hard", "--target-every", 4, "--critic-body", "actor"),
    "both levels act": ("--warmup-steps", 1, "--candidates", 3, "--value-actions", "replayed"),
    "regression": ("--warmup-steps", 1, "--policy.loss", "awr", "--policy.epochs", 2),
    "schedules": ("--critic-optim.schedule", "linear", "--policy.optim.schedule", "cosine"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(train, game: list[str], killed_at, variant: str) -> None:
    flags = (*game, *SMALL, "--steps", 4, "--save-every", 2, "--env-settings", "max_turns=6", *VARIANTS[variant])
    whole = train("archer", *flags, name="whole")
    killed_at(3)
    train("archer", *flags, name="killed", status=130)
    killed_at(-1)
    resumed = train("archer", *flags, "--resume", name="killed")
    assert len(whole.rows()) == 4
    assert resumed.rows() == whole.rows()
    assert resumed.rows("episodes") == whole.rows("episodes")
    one, other = (run.out / "checkpoints/step_000004" for run in (whole, resumed))
    files = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    assert files == {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
    # Where the run lies and that it was resumed; the global random state, which one process has for both runs.
    told_apart = {Path("config.yaml"), Path("manifest.json"), Path("rng.safetensors")}
    assert [name for name in files - told_apart if (one / name).read_bytes() != (other / name).read_bytes()] == []


def test_prompts_that_had_to_be_cut_make_more_rows_and_still_agree_with_the_sampler(train, game: list[str]) -> None:
    run = train("archer", *game, *SMALL, "--warmup-steps", 0, "--sampling.max-prompt-tokens", 24)
    assert all(row["policy/first_mismatch"] < 1e-4 for row in run.rows())


def test_failed_episodes_are_counted_and_the_others_learned_from(train, fragile: list[str]) -> None:
    run = train("archer", *fragile, *SMALL, "--error-budget", 0.9)
    assert all(0 < row["episode/failed"] < 8 for row in run.rows())
    failed = [row for row in run.rows("episodes") if row["ending"] == "failed"]
    assert {row["error"] for row in failed} == {"ZeroDivisionError: three"}
    assert not any("advantage" in turn for row in failed for turn in row["turns"])


def test_more_failures_than_the_budget_end_the_run(
    train, fragile: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train("archer", *fragile, *SMALL, status=2)
    assert "episodes failed, more than the error budget of 10%" in capsys.readouterr().err


def test_an_episode_longer_than_the_replay_is_one_clear_line(
    train, game: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train("archer", *game, *SMALL, "--replay-capacity", 1, status=2)
    message = capsys.readouterr().err
    assert "transitions and the replay holds 1: it can never be stored whole. Raise the replay's capacity." in message


def test_a_dry_run_prints_sizes_and_writes_nothing(train, game: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = train("archer", *game, *SMALL, "--dry-run", "--max-turns", 3)
    out = capsys.readouterr().out
    assert "critic: UtteranceCritic" in out
    assert "tokens per step: at most 72" in out  # 8 episodes, 3 turns, 3 tokens
    assert not run.out.exists()


def test_what_an_adapter_drops_depends_on_the_seed_alone(train, game: list[str]) -> None:
    flags = (*game, "--lora.rank", 2, "--lora.dropout", 0.5, "--steps", 2, "--episodes-per-step", 4)
    flags += ("--warmup-steps", 0, "--critic-updates", 1, "--policy.epochs", 2, "--policy.loss", "clipped")
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        found.append(train("archer", *flags, name=f"run{state}").rows())
    assert found[0] == found[1]


@pytest.mark.learning
@pytest.mark.seeds(0, 1, 2)
def test_it_learns_which_key_fits_which_door(train, apprentice: Path, seed: int) -> None:
    """The share of doors opened, first three steps to last three: 0.49 to 0.61, and 0.98 to 0.99 with seeds 0 to 5;
    nothing is learned in the first eight steps, which warm up."""
    flags = ("--model.path", apprentice, "--env", "text_lock", "--env-settings", "doors=2", "keys=3", "--seed", seed)
    flags += ("--sampling.max-tokens", 4, "--steps", 20, "--warmup-steps", 8, "--critic-updates", 16)
    flags += ("--critic-episodes", 32, "--critic-optim.lr", 3e-3)
    run = train("archer", *flags, "--policy.loss", "clipped", "--policy.epochs", 4, "--policy.optim.lr", 3e-3)
    rewards = [row["reward/mean"] for row in run.rows()]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15


COUNT = "it counts something there must be one of. Give 1 or more."
NUMBER = "it is a number of things. Give 0 or more."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({name: 0}, f"{name} = 0: {COUNT}") for name in ("steps", "episodes_per_step", "max_turns", "n_step")),
        *(({name: 0}, f"{name} = 0: {COUNT}") for name in ("replay_capacity", "actor_updates", "critic_episodes")),
        *(({name: 0}, f"{name} = 0: {COUNT}") for name in ("fresh_updates", "target_every", "actor_episodes")),
        ({"tokens_per_pass": 0}, f"tokens_per_pass = 0: {COUNT}"),
        ({"fresh_states": -1}, f"fresh_states = -1: {NUMBER}"),
        ({"warmup_steps": -1}, f"warmup_steps = -1: {NUMBER}"),
        ({"error_budget": 1.0}, "error_budget = 1.0: it is a fraction of the episodes. Give 0 to 0.99."),
        ({"gamma": 1.5}, "gamma = 1.5: a discount lies between 0 and 1. Try 0.95."),
        ({"gamma": math.nan}, "gamma = .nan: a discount lies between 0 and 1. Try 0.95."),
        ({"tau": 0.0}, "tau = 0.0: the target would never move, or overshoot. Give a number in (0, 1]."),
        ({"tau": 1.1}, "tau = 1.1: the target would never move, or overshoot. Give a number in (0, 1]."),
        (
            {"critic_path": "other", "critic_body": "actor"},
            "critic_path = other: critic_body = actor reads with the actor's body. Set critic_body = own.",
        ),
        ({"env": ""}, "env is missing: nothing sets it. Put it in a settings file, or give --env."),
        (
            {"model": ModelConfig()},
            "model.path is missing: nothing sets it. Put it in a settings file, or give --model.path.",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(**settings)
    assert str(refused.value) == message


def test_the_edges_of_the_rules_are_allowed() -> None:
    assert config(tau=1.0, gamma=0.0, fresh_states=0, warmup_steps=0, error_budget=0.0).tau == 1.0
    assert config(gamma=1.0, critic_path="other", policy=PolicyConfig(loss="clipped", epochs=4)).policy.epochs == 4


def test_choosing_needs_states_the_actor_can_answer_itself(game: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["archer", *map(str, game), "--out", "nowhere", "--candidates", "2", "--actor-states", "rollout"]
    assert cli.main(words) == 2
    assert "candidates = 2: what the critic picked is not what the actor would draw." in capsys.readouterr().err


def test_a_frozen_actor_stays_as_it_was(train, game: list[str], start: Path) -> None:
    run = train("archer", *game, *SMALL, "--steps", 3, "--warmup-steps", 1, "--candidates", 2, "--freeze-actor")
    before = load_file(start / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.weights().items())
    assert not any("policy/loss" in row for row in run.rows())
