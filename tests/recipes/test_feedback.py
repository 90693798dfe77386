"""Feedback: who learns from which words, what they are worth, and every promise of the recipe."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from echelon.config import LoraConfig, ModelConfig, OptimConfig, SamplingConfig
from echelon.data.packing import Batch, Sampled
from echelon.envs import EnvSpec
from echelon.errors import ConfigError, DataError
from echelon.recipes.feedback import Config, branching, learn, lessons, open_levels, tokens_per_step, turn_of
from echelon.rollout import feedback_levels
from echelon.rollout.feedback import COACH, SOLVER, TemplateConfig
from echelon.rollout.feedback_credit import CreditConfig, Tree, lay_tree
from echelon.rollout.feedback_judge import Judged, Played, judge_tree
from echelon.rollout.feedback_levels import Level, LevelConfig, Levels
from echelon.rollout.rewards import Rewards
from echelon.rollout.roles import collect
from echelon.train.policy import PolicyConfig, SamplerMismatch
from echelon.train.stale import AsyncConfig, Stale
from echelon.types import Sampler
from tests.recipes.conftest import Run, Train
from tests.recipes.doors import DOORS, GAME, KEYS, TEMPLATES, Doors, pupil

ENV = EnvSpec("doors", Doors)
ONE = SamplingConfig(max_tokens=1, max_prompt_tokens=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model that can play both roles."""
    return str(pupil(tmp_path_factory.mktemp("pupil")))


def config(model: str, *, solver: Any = (), coach: Any = (), **settings: Any) -> Config:
    levels = {
        SOLVER: LevelConfig(**{"model": ModelConfig(model, device="cpu"), "sampling": ONE, **dict(solver)}),
        COACH: LevelConfig(**{"model": ModelConfig(device="cpu"), "sampling": ONE, **dict(coach)}),
    }
    few = {"tasks_per_step": 3, "attempts": 2, "out": "x", "env": GAME, "templates": TemplateConfig(**TEMPLATES)}
    return Config(**{**few, **levels, **settings})


@dataclass
class Stepped:
    """One step as `main` takes it."""

    levels: Levels
    tree: Tree
    judged: Judged
    learned: dict[str, float]


def stepped(cfg: Config, levels: Levels | None = None, *, step: int = 0, env: EnvSpec = ENV) -> Stepped:
    levels = levels or open_levels(cfg)
    levels.publish()
    now = cfg.plans[levels.stages.reached(step)]
    tasks = env.tasks("train")[: now.tasks_per_step]
    episodes = asyncio.run(collect(tasks, branching(now, env, levels, env.tasks("train"), live(levels)), seed=step))
    tree = lay_tree(episodes)
    judged = judge_tree(now, levels, Played(tree, tasks, env, Rewards()), seed=step)
    return Stepped(levels, tree, judged, learn(now, step, levels, tree, judged, seed=step))


def live(levels: Levels) -> dict[str, Sampler]:
    return {name: acting.actor.sampler for name, acting in levels.acting(lambda name: LevelConfig()).items()}


def weights_of(level: Level) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in level.actor.module.state_dict().items()}


def moved(level: Level, before: dict[str, Tensor]) -> bool:
    return any(not tensor.equal(before[name]) for name, tensor in level.actor.module.state_dict().items())


def perturb(module: nn.Module) -> None:
    """Move what learns away from where it began; an adapter further, since its numbers are multiplied."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_((0.3 if hasattr(module, "peft_config") else 0.05) * torch.randn_like(parameter))


SHARING = {
    "separate": {},
    "shared": {"weights": "shared"},
    "adapters": {"weights": "adapters", "lora": LoraConfig(rank=4)},
}

# who learns


@pytest.mark.parametrize("weights", SHARING)
def test_every_level_that_learns_gets_a_gradient(model: str, weights: str) -> None:
    cfg = config(model, **SHARING[weights])
    levels = open_levels(cfg)
    before = {level.name: weights_of(level) for level in (levels.solver, levels.coach) if level}
    done = stepped(cfg, levels)
    assert done.learned["solver/grad_norm"] > 1e-3
    assert moved(levels.solver, before[SOLVER])
    assert levels.coach is not None
    if weights != "shared":
        assert done.learned["coach/grad_norm"] > 1e-3
        assert moved(levels.coach, before[COACH])


@pytest.mark.parametrize("level", [SOLVER, COACH])
def test_weights_of_both_learn_from_the_turns_of_each(model: str, level: str) -> None:
    cfg = config(model, weights="shared")
    levels = open_levels(cfg)
    before = weights_of(levels.solver)
    done = stepped(replace(cfg, steps=1), levels)
    other_N = ~done.tree.solver_N if level == SOLVER else done.tree.solver_N
    levels = open_levels(cfg)
    done.judged.value_N[other_N] = 0.0  # only the turns of one role are worth anything
    told = learn(cfg, 0, levels, done.tree, done.judged, seed=0)
    assert told["solver/grad_norm"] > 1e-3
    assert moved(levels.solver, before)
    assert not [name for name in told if name.startswith("coach/") and name != "coach/advantage_std"]


@pytest.mark.parametrize("weights", ["separate", "adapters"])
@pytest.mark.parametrize("frozen", [SOLVER, COACH])
def test_a_frozen_level_stays_as_it_is_bit_for_bit_and_has_no_gradient(model: str, weights: str, frozen: str) -> None:
    cfg = config(model, **{frozen: {"train": False}}, **SHARING[weights])
    levels = open_levels(cfg)
    still, learns = (levels.solver, levels.coach) if frozen == SOLVER else (levels.coach, levels.solver)
    assert still is not None
    assert learns is not None
    before, also = weights_of(still), weights_of(learns)
    done = stepped(cfg, levels)
    assert still.policy is None
    assert not moved(still, before)
    assert moved(learns, also)
    assert not any(parameter.grad is not None for parameter in still.actor.module.parameters())
    assert f"{frozen}/grad_norm" not in done.learned


def test_adapters_share_a_base_that_does_not_move(model: str) -> None:
    levels = open_levels(config(model, **SHARING["adapters"]))
    assert levels.coach is not None
    base = levels.solver.actor.module.model
    assert levels.coach.actor.module.model is base
    before = {name: p.detach().clone() for name, p in base.named_parameters() if "lora" not in name}
    stepped(config(model, **SHARING["adapters"]), levels)
    assert all(p.equal(before[name]) for name, p in base.named_parameters() if "lora" not in name)


def test_who_learns_in_which_step(model: str) -> None:
    cfg = config(model, schedule="alternate", cycle=(1, 15))
    learns = [turn_of(cfg, step) for step in range(32)]
    assert learns == ([(SOLVER,)] * 15 + [(COACH,)]) * 2
    assert turn_of(config(model), 7) == (SOLVER, COACH)
    frozen = replace(cfg, coach=replace(cfg.coach, train=False))
    assert {turn_of(frozen, step) for step in range(16)} == {(SOLVER,)}, "no rollout is wasted"
    assert turn_of(config(model, context="none"), 0) == (SOLVER,)


def test_only_the_level_whose_turn_it_is_moves(model: str) -> None:
    plain = {"baseline": "none"}
    cfg = config(model, schedule="alternate", solver=plain, coach=plain)
    levels = open_levels(cfg)
    assert levels.coach is not None
    for step, (learns, rests) in enumerate([(levels.solver, levels.coach), (levels.coach, levels.solver)]):
        before, also = weights_of(learns), weights_of(rests)
        stepped(cfg, levels, step=step)
        assert moved(learns, before)
        assert not moved(rests, also)


def test_the_optimizer_steps_of_a_level_are_known_in_advance(model: str) -> None:
    policy = PolicyConfig(epochs=2, minibatches=3)
    cfg = config(model, solver={"policy": policy}, steps=20, schedule="alternate", cycle=(1, 4))
    assert lessons(cfg, SOLVER) == (16, 96)
    assert lessons(cfg, COACH) == (4, 8)
    late = replace(cfg, schedule="joint", stages=("from 0: coach.train=false", "from 15: coach.train=true"))
    assert lessons(late, COACH) == (5, 10)


# what is learned


@pytest.mark.parametrize("weights", SHARING)
def test_the_first_ratio_is_one_for_both_roles(model: str, weights: str) -> None:
    once = {"policy": PolicyConfig(), "sampling": replace(ONE, temperature=0.7)}
    done = stepped(config(model, solver=once, coach=once, **SHARING[weights]))
    for name in (SOLVER, COACH) if weights != "shared" else (SOLVER,):
        assert done.learned[f"{name}/ratio"] == pytest.approx(1, abs=1e-4)
        assert done.learned[f"{name}/ratio/max"] == pytest.approx(1, abs=1e-4)
        assert done.learned[f"{name}/first_mismatch"] < 1e-4


def test_what_is_learned_is_the_text_that_was_said_with_the_credit_it_earned(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Batch] = {}
    monkeypatch.setattr(
        feedback_levels, "update_policy", lambda policy, batch, **_: seen.update({policy.name: batch}) or {}
    )
    plain = {"baseline": "none"}
    done = stepped(config(model, solver=plain, coach=plain))
    for name, mine_N in ((SOLVER, done.tree.solver_N), (COACH, ~done.tree.solver_N)):
        batch = seen[name]
        values = done.judged.value_N[mine_N].tolist()
        assert batch.advantages is not None
        assert batch.logprobs is not None
        for number, turn in enumerate(done.tree.of(mine_N)):
            here = batch.turn == number
            assert batch.tokens[here].tolist() == turn.action
            assert batch.logprobs[here].tolist() == pytest.approx(turn.logprobs)
            assert batch.advantages[here].tolist() == pytest.approx([values[number]] * len(turn.action))


def test_the_words_of_the_coach_stand_in_the_prompt_of_the_attempt_that_is_learned(model: str) -> None:
    done = stepped(config(model))
    turns, parents = done.tree.turns, done.tree.parent_N.tolist()
    later = [place for place in range(len(turns)) if done.tree.later_N[place]]
    assert len(later) == 3 * 2 * 2 * 2
    for place in later:
        remark = turns[parents[place]]
        attempt = turns[parents[parents[place]]]
        asked = turns[place].heard[-1]["content"]
        assert asked[1:] == f"{attempt.text}!{remark.text}"
        assert asked[0] in DOORS
    assert len({turn.text for turn in turns} & set(KEYS)) > 1


@pytest.mark.parametrize("kind", ["kl_first", "kl_refine", "kl_feedback"])
@pytest.mark.parametrize("weights", SHARING)
def test_kl_in_the_reward_is_what_each_kind_of_turn_pays(model: str, weights: str, kind: str) -> None:
    cfg = config(model, keep_start=True, **SHARING[weights])
    levels = open_levels(cfg)
    for level in (levels.solver, levels.coach):
        assert level is not None
        perturb(level.actor.module)
    free = stepped(cfg, levels)
    levels.publish()
    played = Played(free.tree, ENV.tasks("train")[:3], ENV, Rewards())
    paying = judge_tree(replace(cfg, credit=CreditConfig(**{kind: 0.5})), levels, played, seed=0)
    tree = free.tree
    paid_N = free.judged.value_N - paying.value_N
    kinds = {"kl_first": tree.first_N, "kl_refine": tree.later_N, "kl_feedback": ~tree.solver_N}
    for name, here_N in kinds.items():
        assert bool(paid_N[here_N].abs().max() > 1e-3) == (name == kind)
    role = COACH if kind == "kl_feedback" else SOLVER
    assert abs(paying.metrics[f"{role}/kl_to_start"]) > 1e-3


@pytest.mark.parametrize("level", [SOLVER, COACH])
@pytest.mark.parametrize("weights", SHARING)
def test_kl_as_a_loss_pulls_a_level_back(model: str, weights: str, level: str) -> None:
    pulls = {"policy": PolicyConfig(kl_coef=0.5, kl_loss="k3", max_mismatch=9.0)}
    other = {"policy": PolicyConfig(max_mismatch=9.0)}
    both = {SOLVER: pulls, COACH: pulls} if weights == "shared" else {SOLVER: other, COACH: other, level: pulls}
    cfg = config(model, **both, **SHARING[weights])
    levels = open_levels(cfg)
    mine = levels.solver if level == SOLVER or weights == "shared" else levels.coach
    assert mine is not None
    perturb(mine.actor.module)
    done = stepped(cfg, levels)
    name = SOLVER if weights == "shared" else level
    assert done.learned[f"{name}/kl_to_start"] > 1e-3
    done.judged.value_N[:] = 0.0
    assert learn(cfg, 1, levels, done.tree, done.judged, seed=1)[f"{name}/grad_norm"] > 1e-3


def test_every_baseline_subtracts_what_it_says(model: str) -> None:
    done = stepped(config(model))
    tree, value_N = done.tree, done.judged.value_N
    expected_N = torch.full_like(value_N, 0.25)

    def advantages(**settings: Any) -> Tensor:
        return feedback_levels.compared(LevelConfig(**settings), tree, value_N, tree.later_N, expected_N)[tree.later_N]

    mine = value_N[tree.later_N]
    pairs = mine.reshape(-1, 2)  # two refinements of each remark
    whole = mine.reshape(3, -1)  # all of each question
    assert advantages(baseline="none").equal(mine)
    assert advantages(baseline="value").equal(mine - 0.25)
    torch.testing.assert_close(advantages(baseline="batch"), mine - mine.mean())
    torch.testing.assert_close(advantages(), (pairs - pairs.mean(1, keepdim=True)).flatten())
    torch.testing.assert_close(advantages(baseline="leave_one_out"), (pairs - pairs.flip(1)).flatten())
    torch.testing.assert_close(advantages(compare="question"), (whole - whole.mean(1, keepdim=True)).flatten())
    assert not feedback_levels.compared(LevelConfig(), tree, value_N, tree.later_N, expected_N)[~tree.later_N].any()


def test_a_value_model_reads_the_state_and_learns_what_is_credited(model: str) -> None:
    fast = {"baseline": "value", "value_optim": OptimConfig(lr=1e-2, weight_decay=0.0)}
    cfg = config(model, solver=fast, coach=fast, tasks_per_step=6)
    levels = open_levels(cfg)
    done = stepped(cfg, levels)
    assert {"solver/value/explained_variance", "coach/value/explained_variance"} <= done.learned.keys()
    for level in (levels.solver, levels.coach):
        assert level is not None
        assert level.value is not None
        mine_N = done.tree.later_N if level.name == SOLVER else ~done.tree.solver_N
        turns, credit_n = done.tree.of(mine_N), done.judged.value_N[mine_N]
        fit = {"tokens_per_pass": 4096, "seed": 0}
        told = [
            feedback_levels.learn_value(level.value, cfg.solver, turns, credit_n, credit_n, **fit) for _ in range(10)
        ]
        assert told[-1]["value/loss"] < told[0]["value/loss"]
    assert levels.solver.value is not None
    done = stepped(cfg, levels)
    first = [turn for turn, mine in zip(done.tree.turns, done.tree.first_N.tolist(), strict=True) if mine]
    values = feedback_levels.expect(levels.solver.value, first, torch.zeros(len(first)), 4096)
    by_prompt: dict[tuple[int, ...], set[float]] = {}
    for turn, value in zip(first, values.tolist(), strict=True):
        by_prompt.setdefault(tuple(turn.prompt), set()).add(round(value, 4))
    assert all(len(seen) == 1 for seen in by_prompt.values()), "it has seen the state, not the answer"
    assert len(by_prompt) == len({*by_prompt}) == 3

    state = [Sampled([*first[0].prompt], [*turn.action], [0.0] * len(turn.action)) for turn in (*first, *first)][:4]
    credit_n = torch.tensor([0.0, 1.0, 1.0, 1.0])
    for _ in range(40):
        feedback_levels.learn_value(levels.solver.value, cfg.solver, state, credit_n, credit_n, **fit)
    told = feedback_levels.expect(levels.solver.value, state, credit_n, 4096).tolist()
    assert told == pytest.approx([0.75] * 4, abs=0.05), "what is expected of a state is the mean of what followed it"


# words that are used


def test_the_gain_is_the_log_probability_per_token_that_words_give(model: str) -> None:
    cfg = config(model, keep_start=True)
    levels = open_levels(cfg)
    done = stepped(config(model, solver={"train": True}, steps=1), levels)
    levels = open_levels(cfg)  # as it was when it spoke
    alone = {
        number: levels.solver.actor.role.renderer.render([{"role": "user", "content": door}])
        for number, door in enumerate(DOORS)
    }
    settings = {"temperature": 1.0, "tokens_per_pass": 4096}
    gain_N = feedback_levels_gain(levels, done.tree, [alone[n] for n in range(3)], from_start=False, **settings)
    module = levels.solver.actor.module
    for place in done.tree.later_N.nonzero()[:, 0].tolist():
        turn = done.tree.turns[place]
        prompt = alone[int(done.tree.episode_N[place])]
        without = module(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[turn.action[0]]
        assert gain_N[place].item() == pytest.approx(turn.logprobs[0] - without.item(), abs=1e-4)
    assert not gain_N[~done.tree.later_N].any()
    perturb(module)
    moved_N = feedback_levels_gain(levels, done.tree, [alone[n] for n in range(3)], from_start=False, **settings)
    start_N = feedback_levels_gain(levels, done.tree, [alone[n] for n in range(3)], from_start=True, **settings)
    torch.testing.assert_close(start_N, gain_N, rtol=1e-4, atol=1e-4)
    assert (moved_N - gain_N).abs().max() > 1e-2


def test_the_gain_of_what_older_weights_said_is_that_of_the_weights_of_now(model: str) -> None:
    """Both log-probabilities are read now: what was learned since is no gain of the words."""
    done = stepped(config(model), step=0)
    levels = open_levels(config(model))
    perturb(levels.solver.actor.module)
    alone = [levels.solver.actor.role.renderer.render([{"role": "user", "content": door}]) for door in DOORS]
    settings = {"from_start": False, "temperature": 1.0, "tokens_per_pass": 4096}
    gain_N = feedback_levels_gain(levels, done.tree, alone, older=True, **settings)
    module = levels.solver.actor.module.eval()
    for place in done.tree.later_N.nonzero()[:, 0].tolist():
        turn = done.tree.turns[place]
        prompts = turn.prompt, alone[int(done.tree.episode_N[place])]
        told, without = (module(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[turn.action[0]] for ids in prompts)
        assert gain_N[place].item() == pytest.approx((told - without).item(), abs=1e-4)
    mixed_N = feedback_levels_gain(levels, done.tree, alone, **settings)
    assert (mixed_N - gain_N).abs().max() > 1e-2


def test_a_best_response_follows_the_weights_of_now_also_where_older_ones_have_spoken(model: str) -> None:
    """The look-ahead is corrected as the update is: without, it would refuse turns that others have said."""
    cfg = config(model, credit=CreditConfig(gap=1.0))
    done = stepped(config(model, steps=1))
    levels = open_levels(cfg)
    perturb(levels.solver.actor.module)
    before = weights_of(levels.solver)
    played, stale = Played(done.tree, ENV.tasks("train")[:3], ENV, Rewards()), Stale(AsyncConfig(max_staleness=1), "s")
    with pytest.raises(SamplerMismatch):
        judge_tree(cfg, levels, played, seed=0)
    assert not moved(levels.solver, before)
    asked: list[Tensor] = []

    class Watched:
        """The live engine, and whose weights it was asked with."""

        sampler = levels.solver.actor.sampler

        async def sample(self, prompt: list[int], params: Any) -> Any:
            asked.append(next(levels.solver.actor.module.parameters()).detach().clone())
            return await self.sampler.sample(prompt, params)

        def load(self, weights: Any, version: int) -> None:
            self.sampler.load(weights, version)

    levels.solver.actor.sampler = Watched()
    judged = judge_tree(cfg, levels, played, seed=0, stale=stale)
    assert not moved(levels.solver, before)
    assert "context/gap" in judged.metrics
    assert len(asked) == int(done.tree.later_N.sum())
    now = next(iter(before.values()))
    assert all(0 < (weights - now).abs().max() < 0.01 for weights in asked), "an update away from now, not from then"


def feedback_levels_gain(*given: Any, **settings: Any) -> Tensor:
    from echelon.rollout.feedback_judge import gains

    return gains(given[0].solver, *given[1:], **settings)


@pytest.mark.parametrize("context", ["coach", "none", "fixed", "stranger", "example"])
def test_every_context_is_logged_whether_it_was_used(model: str, context: str) -> None:
    spoken = {"fixed": "2"} if context == "fixed" else {}
    done = stepped(config(model, context=context, **spoken))
    assert "context/gain" in done.judged.metrics
    told = done.judged.metrics["context/gain"]
    assert told > 0.3 if context in ("coach", "fixed", "example", "stranger") else abs(told) < 0.3


@pytest.mark.parametrize("best", ["lookahead", "average"])
@pytest.mark.parametrize("weights", SHARING)
def test_a_gap_leaves_the_solver_as_it_was_and_counts_for_the_coach(model: str, weights: str, best: str) -> None:
    fast = {"policy": PolicyConfig(optim=OptimConfig(lr=0.3), epochs=1)}
    both = {SOLVER: fast, COACH: fast} if weights == "shared" else {SOLVER: fast}
    cfg = config(model, **both, credit=CreditConfig(gap=1.0), best_response=best, lookahead=2, **SHARING[weights])
    levels = open_levels(cfg)
    if best == "average":
        stepped(cfg, levels)  # the average lags
    before, version = weights_of(levels.solver), levels.solver.policy.version if levels.solver.policy else 0
    tasks = ENV.tasks("train")[:3]
    levels.publish()
    episodes = asyncio.run(collect(tasks, branching(cfg, ENV, levels, tasks, live(levels)), seed=0))
    tree = lay_tree(episodes)
    judged = judge_tree(cfg, levels, Played(tree, tasks, ENV, Rewards()), seed=0)
    assert not moved(levels.solver, before)
    assert levels.solver.policy is not None
    assert levels.solver.policy.version == version
    assert judged.metrics["context/gap"] != 0
    again = asyncio.run(collect(tasks, branching(cfg, ENV, levels, tasks, live(levels)), seed=0))
    assert [t.text for e in again for t in e.turns] == [t.text for t in tree.turns], "the sampler has its weights back"


# stages


STAGES = (
    "from 0: credit.first=0 credit.kl_first=0.1 coach.train=false",
    "from 2: credit.first=1 credit.kl_first=0.01 coach.train=true solver.policy.optim.lr=0.5",
)


def test_a_stage_changes_what_it_names_until_another_does(model: str) -> None:
    cfg = config(model, stages=STAGES)
    one, two = cfg.plans
    assert (one.credit.first, one.credit.kl_first, one.coach.train) == (0, 0.1, False)
    assert (two.credit.first, two.credit.kl_first, two.coach.train) == (1, 0.01, True)
    assert two.solver.policy.optim.lr == 0.5
    levels = open_levels(cfg)
    assert levels.solver.reference is not None, "a later stage needs it"
    rows = [stepped(cfg, levels, step=step) for step in range(3)]
    held = rows[0].judged.value_N[rows[0].tree.first_N]
    assert held.abs().max() < 1e-5, "held near the start, where it still is"
    assert "coach/grad_norm" not in rows[1].learned
    assert rows[2].learned["coach/grad_norm"] > 0
    assert [row.learned["solver/lr"] for row in rows] == pytest.approx([3e-4, 3e-4, 0.5])


def test_two_turn_self_correction_is_a_table_of_stages(model: str) -> None:
    table = (
        "from 0: credit.first=0 credit.kl_first=0.1 credit.kl_refine=0.01",
        "from 1: credit.first=1 credit.progress=10 credit.kl_first=0.01",
    )
    cfg = config(model, context="none", weights="separate", stages=table)
    levels = open_levels(cfg)
    assert levels.coach is None
    perturb(levels.solver.actor.module)
    for step in range(2):
        done = stepped(cfg, levels, step=step)
        tree, value_N, kl_N = done.tree, done.judged.value_N, None
        rows = done.judged.rows[SOLVER]
        kl_N = feedback_levels_distances(rows)
        first = 0.0 if step == 0 else 1.0
        weight = 0.1 if step == 0 else 0.01
        wanted = first * tree.score_N - weight * kl_N
        torch.testing.assert_close(value_N[tree.first_N], wanted[tree.first_N])
        gained_N = tree.score_N - tree.score_before_N
        wanted = tree.score_N + (10 * gained_N if step else 0.0) - 0.01 * kl_N
        torch.testing.assert_close(value_N[tree.later_N], wanted[tree.later_N])


def feedback_levels_distances(rows: Any) -> Tensor:
    from echelon.rollout.feedback_judge import distances

    found = distances(rows)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("weights=shared", r"stages: 'from 0: weights=shared': weights is what the run is built of"),
        ("solver.model.path=x", "solver.model.path is what the run is built of"),
        ("lora.rank=3", "lora.rank is what the run is built of"),
        ("steps=3", "steps is what the run is built of"),
        ("asynchronous.max_staleness=1", "asynchronous.max_staleness is what the run is built of"),
        ("seed=3", "seed is what"),
        ("out=y", "out is what"),
        ("env=maze", "env is what"),
        ("env_settings.x=1", "env_settings.x is what"),
        ("judge.url=x", "judge.url is what"),
        ("solver.sampling.ray.workers=3", "solver.sampling.ray.workers is what"),
        ("solver.sampling.server.url=http://x", "solver.sampling.server.url is what"),
        ("coach.sampling.adapters=apart", "coach.sampling.adapters is what"),
        ("coach.policy.optim.weight_decay=1", "coach.policy.optim.weight_decay is what"),
        ("credit.firts=1", r"unknown flag '--credit.firts'. Did you mean"),
        ("credit.first=-1", "first = -1"),
        ("remarks=1", "remarks = 1: they are compared with one another"),
        ("solver.train=false coach.train=false", "nobody would learn"),
    ],
)
def test_a_stage_that_cannot_be_is_refused_before_the_run(model: str, line: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint.replace("(", r"\(")):
        config(model, stages=(f"from 0: {line}",))


# bad input


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"remarks": 1}, "remarks = 1: they are compared with one another, and one alone teaches nothing"),
        ({"refinements": 1}, "refinements = 1: they are compared"),
        ({"attempts": 1}, "attempts = 1: they are compared"),
        ({"attempts": 1, "credit": CreditConfig(first=0, kl_first=0.1)}, "attempts = 1: they are compared"),
        ({"weights": "shared", COACH: {"model": ModelConfig("other")}}, "both levels are one model with one tokenizer"),
        ({"weights": "shared", COACH: {"train": False}}, "coach.train = false: one model cannot learn and stay"),
        ({"weights": "shared", COACH: {"policy": PolicyConfig(epochs=7)}}, "coach.policy is not read"),
        ({"weights": "shared", "schedule": "alternate"}, "schedule = alternate: one model with one optimizer"),
        ({"weights": "shared", COACH: {"sampling": replace(ONE, temperature=0.5)}}, "one model learns from one dist"),
        ({"weights": "shared", "context": "none"}, "there is no coach to share weights with"),
        ({SOLVER: {"train": False}, COACH: {"train": False}}, "solver.train = false: nobody would learn"),
        ({SOLVER: {"train": False}, "context": "none"}, "nobody would learn"),
        ({"schedule": "alternate", "cycle": (0, 3)}, "cycle = .*one of the levels would never have its turn"),
        ({"credit": CreditConfig(gap=1), "context": "fixed"}, "a gap is between two answers to the coach"),
        ({"credit": CreditConfig(gap=1), SOLVER: {"train": False}}, "never learns is its own best response"),
        ({"credit": CreditConfig(utilisation=0.1), "prior": "none"}, "nothing says what an attempt without"),
        ({"rounds": 2, "context": "example"}, "a worked example comes before the one and only attempt"),
        ({SOLVER: {"policy": PolicyConfig(minibatches=9)}}, "solver.policy.minibatches = 9: a step has 3 problems"),
        ({"tasks_per_step": 0}, "tasks_per_step = 0"),
    ],
)
def test_bad_settings_are_refused_with_a_way_out(model: str, settings: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        config(model, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"remarks": 1, COACH: {"baseline": "batch"}},
        {"remarks": 1, COACH: {"compare": "question"}},
        {"remarks": 1, COACH: {"train": False}},
        {"refinements": 1, SOLVER: {"compare": "question"}},
        {"attempts": 1, "credit": CreditConfig(first=0)},
    ],
)
def test_one_is_enough_where_nothing_or_others_are_compared(model: str, settings: Any) -> None:
    done = stepped(config(model, **settings))
    assert done.learned


def test_adapters_with_two_tokenizers_are_refused(model: str, tmp_path: Path) -> None:
    one = open_levels(config(model, **SHARING["adapters"]))
    assert one.coach is not None
    one.coach.actor.tokenizer.add_tokens(["<new>"])
    with pytest.raises(DataError, match=r"their tokenizers differ: '<new>' is no token to one and \d+ to the other"):
        feedback_levels.check_tokenizers(one.solver.actor, one.coach.actor)


FLAGS = [
    *("--env", GAME, "--attempts", 2, "--tasks-per-step", 3),
    *(word for name, text in TEMPLATES.items() for word in (f"--templates.{name.replace('_', '-')}", text)),
    *("--solver.sampling.max-tokens", 1, "--coach.sampling.max-tokens", 1),
]


def test_a_verifier_that_raises_fails_its_episode_within_the_budget(
    train: Train, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*FLAGS, "--solver.model.path", model, "--steps", 1, "--env", "tests.recipes.doors:Fragile"]
    run = train("feedback", *words, "--error-budget", 0.5)
    (row,) = run.rows()
    assert row["episode/failed"] == 1
    failed = [episode for episode in run.rows("episodes") if episode["ending"] == "failed"]
    assert failed[0]["error"] == "ZeroDivisionError: two"
    assert row["accuracy/turn2"] <= 1
    train("feedback", *words, "--error-budget", 0.1, name="strict", status=2)
    assert "more than the error budget of 10%" in capfd.readouterr().err


def test_a_prompt_over_budget_without_the_attempt_is_an_error(
    train: Train, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*FLAGS, "--solver.model.path", model, "--steps", 1, "--solver.sampling.max-prompt-tokens", 3]
    train("feedback", *words, status=2)
    assert "than the budget of 3" in capfd.readouterr().err


# runs


def test_every_attempt_is_judged_by_rewards_where_problems_come_from_a_file(
    train: Train, model: str, tmp_path: Path
) -> None:
    (tmp_path / "ask.jsonl").write_text(
        "".join(json.dumps({"prompt": d, "key": k}) + "\n" for d, k in zip(DOORS, KEYS, strict=True))
    )
    (tmp_path / "judge.py").write_text(
        "def fits(prompts, completions, key):\n    return [float(c == k) for c, k in zip(completions, key)]\n"
    )
    asked = ["--data.path", tmp_path / "ask.jsonl", "--reward", f"{tmp_path}/judge.py:fits"]
    words = [word for word in FLAGS if word not in ("--env", GAME)]
    flags = [*words, "--solver.model.path", model, "--steps", 2, "--credit.gap", 1, "--prior", "start"]
    run = train("feedback", *asked, *flags)
    for row in run.rows("episodes"):
        scores = {turn["text"]: turn["reward"] for turn in row["turns"] if turn["role"] == SOLVER}
        assert not any(turn["reward"] for turn in row["turns"] if turn["role"] == COACH)
        assert list(scores.values()).count(1.0) <= 1, "one key fits"
        assert all(turn["reward"] == scores[turn["text"]] for turn in row["turns"] if turn["role"] == SOLVER)
    assert all("reward/fits" in row and "context/gap" in row for row in run.rows())
    assert any(row["accuracy/turn1"] or row["accuracy/turn2"] for row in run.rows())


def test_reward_mean_is_what_the_last_attempts_earn(train: Train, model: str) -> None:
    run = train("feedback", *FLAGS, "--solver.model.path", model, "--steps", 1, "--rounds", 2)
    (row,) = run.rows()
    last = [
        turn["reward"]
        for episode in run.rows("episodes")
        for turn in episode["turns"]
        if turn["index"] not in {other["parent"] for other in episode["turns"]}
    ]
    assert row["reward/mean"] == pytest.approx(sum(last) / len(last))
    assert row["reward/mean"] == row["accuracy/turn3"]
    assert set(row) >= {
        *("accuracy/turn1", "accuracy/turn2", "accuracy/delta", "flips/wrong_to_right", "flips/right_to_wrong"),
        *("group/solver_zero_variance", "group/coach_zero_variance", "group/all_zero", "group/all_one"),
        *("solver/length", "coach/length", "context/gain", "attempts/unparsed", "prompts/cut"),
    }


RESUMED = {
    "joint": [],
    "shared": ["--weights", "shared", "--keep-start"],
    "adapters": ["--weights", "adapters", "--lora.rank", 4, "--credit.kl-feedback", 0.1],
    "average": ["--credit.gap", 1, "--best-response", "average", "--average-decay", 0.5],
    "lookahead": ["--credit.gap", 1, "--schedule", "alternate"],
    "value": ["--solver.baseline", "value", "--coach.baseline", "value", "--credit.kl-refine", 0.1],
    "plateau": ["--stages", "from 0: credit.first=0", "plateau 1: credit.first=1", "plateau 1: coach.train=false"],
    "frozen": ["--no-coach.train", "--prior", "start"],
    "frozen adapter": ["--no-solver.train", "--weights", "adapters", "--lora.rank", 4, "--keep-start"],
}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    train: Train, killed_at: Callable[[int], None], model: str, kind: str
) -> None:
    few = [*FLAGS, "--solver.model.path", model, "--steps", 5, "--save-every", 1, "--solver.policy.optim.lr", 0.01]
    words = [*few, *RESUMED[kind]]
    whole = train("feedback", *words, name="whole")
    killed_at(3)
    train("feedback", *words, name="halves", status=130)
    killed_at(-1)
    halves = train("feedback", *words, "--resume", name="halves")
    assert halves.rows() == whole.rows()
    assert halves.rows("episodes") == whole.rows("episodes")
    one, other = tensors(whole), tensors(halves)
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    if kind == "plateau":
        assert whole.rows()[-1]["stage"] > 0


def tensors(run: Run) -> dict[str, Tensor]:
    """Everything in the newest checkpoint."""
    newest = sorted((run.out / "checkpoints").iterdir())[-1]
    return {
        f"{file.relative_to(newest)}/{name}": tensor
        for file in newest.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_a_run_can_be_taken_on_from_by_name(train: Train, model: str) -> None:
    run = train("feedback", *FLAGS, "--solver.model.path", model, "--steps", 1)
    more = ["--solver.model.path", run.out, "--coach.model.path", run.out]
    train("feedback", *FLAGS, *more, "--steps", 1, name="more")
    shared = train("feedback", *FLAGS, "--solver.model.path", run.out, "--weights", "shared", "--steps", 1, name="one")
    train(
        "feedback",
        *FLAGS,
        "--solver.model.path",
        shared.out,
        "--coach.model.path",
        shared.out,
        "--steps",
        1,
        name="two",
    )


def test_dry_run_says_how_large_it_will_be(train: Train, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*FLAGS, "--solver.model.path", model, "--coach.baseline", "value", "--keep-start", "--dry-run"]
    train("feedback", *words)
    said = capsys.readouterr().out
    modules, planned = said.split("memory of each rank")
    assert [line.split(":")[0] for line in modules.splitlines()] == [
        *("solver", "solver_reference", "coach", "coach_reference", "coach_value", "tokens per step")
    ]
    held = {line.partition(": ")[0].strip() for line in planned.splitlines()[1:] if ": " in line}
    assert held == {"solver", "solver_reference", "coach", "coach_reference", "coach_value"}
    assert "tokens per step: at most 42" in said  # 3 problems of 2 + 4 + 8 turns of one token


def test_a_best_response_is_sampled_besides(model: str) -> None:
    assert tokens_per_step(config(model)) == 3 * (2 + 4 + 8)
    assert tokens_per_step(config(model, credit=CreditConfig(gap=1))) == 3 * (2 + 4 + 16)
    assert tokens_per_step(config(model, context="none")) == 3 * (2 + 4)
    assert tokens_per_step(config(model, context="example")) == 3 * (2 + 4)


def accuracies(run: Run, turn: int) -> list[float]:
    return [row[f"accuracy/turn{turn}"] for row in run.rows()]


@pytest.mark.seeds(0, 1, 2)
def test_a_coach_learns_what_a_solver_that_does_not_learn_should_be_told(train: Train, model: str, seed: int) -> None:
    """The solver opens one door of three and does as it is told: only words can open more. From 1/3 to 0.9 or more."""
    fast = ["--coach.policy.optim.lr", 0.003, "--no-solver.train", "--remarks", 4, "--seed", seed, "--prior", "none"]
    run = train("feedback", *FLAGS, "--solver.model.path", model, "--steps", 35, *fast)
    first, second = accuracies(run, 1), accuracies(run, 2)
    assert sum(second[:5]) / 5 < 0.5
    assert sum(second[-5:]) / 5 >= 0.9
    assert sum(first) / len(first) < 0.5


@pytest.mark.parametrize("weights", ["separate", "shared"])
def test_both_levels_learn_together(train: Train, model: str, weights: str) -> None:
    """Seed 0: accuracy of the second attempt from 1/3 to 0.9 or more, with two models and with one."""
    fast = ["--solver.policy.optim.lr", 0.003, "--prior", "none"]
    if weights == "separate":
        fast += ["--coach.policy.optim.lr", 0.003]
    run = train("feedback", *FLAGS, "--solver.model.path", model, "--steps", 40, "--weights", weights, *fast)
    second = accuracies(run, 2)
    assert sum(second[:5]) / 5 < 0.5
    assert sum(second[-5:]) / 5 >= 0.9
