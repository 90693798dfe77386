"""What the turns of a step of feedback are worth: asks how levels began, what words gave, what a best response earns.

Episodes and levels in, credit and rows out. Who learns from it, and when, is for the recipe.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from echelon.data.packing import Sampled, pack_siblings
from echelon.envs import EnvSpec
from echelon.models.lm import token_logprobs
from echelon.ops import losses
from echelon.ops.trees import child_mean
from echelon.rollout.best_response import looking_ahead, response_scores
from echelon.rollout.feedback import COACH, SOLVER, TemplateConfig, problem_alone
from echelon.rollout.feedback_credit import CreditConfig, Tree, credits, group_metrics, state_keys, verdicts
from echelon.rollout.feedback_levels import Level, LevelConfig, Levels, Rows, compared, expect, learn_policy
from echelon.rollout.rewards import Rewards
from echelon.train.learner import Learner
from echelon.train.policy import reference_logprobs
from echelon.train.stale import Stale
from echelon.types import Task


class Settings(Protocol):
    """What judging depends on of the settings of a run."""

    @property
    def solver(self) -> LevelConfig: ...
    @property
    def coach(self) -> LevelConfig: ...
    @property
    def credit(self) -> CreditConfig: ...
    @property
    def templates(self) -> TemplateConfig: ...
    @property
    def prior(self) -> Literal["empty_context", "start", "none"]: ...
    @property
    def lookahead(self) -> int: ...
    @property
    def tokens_per_pass(self) -> int: ...
    def level(self, name: str) -> LevelConfig: ...


@dataclass(frozen=True, slots=True)
class Played:
    """What was played in a step, and who judges it."""

    tree: Tree
    tasks: Sequence[Task]
    """The problem of each episode."""
    env: EnvSpec
    rewards: Rewards


@dataclass(slots=True)
class Judged:
    """What every turn of a step is worth, and what is known about it."""

    rows: dict[str, Rows]
    """What each set of weights learns from, by level."""
    value_N: Float[Tensor, "N"]
    """What each turn is credited with."""
    expected_N: Float[Tensor, "N"]
    """What a value model expected of the state each turn answered; 0 without one."""
    metrics: dict[str, float]


def judge_tree(cfg: Settings, levels: Levels, played: Played, *, seed: int, stale: Stale | None = None) -> Judged:
    """Pack the turns of each level, ask how it began, what its words gave and what a best response earns, and say what
    every turn is worth. `stale` says that older weights than the solver's of now have said its turns."""
    tree = played.tree
    rows, kl_N, metrics = lay_levels(cfg, levels, tree)
    gain_N = None
    if cfg.prior != "none" and tree.later_N.any():
        role = levels.solver.role(cfg.solver.sampling)
        asked = problem_alone(played.env.make, played.tasks, role, cfg.templates)
        reading = {"temperature": cfg.solver.sampling.temperature, "tokens_per_pass": cfg.tokens_per_pass}
        how = {"from_start": cfg.prior == "start", "older": stale is not None}
        gain_N = gains(levels.solver, tree, asyncio.run(asked), **how, **reading)  # type: ignore[arg-type]
        told_N = gain_N[tree.later_N]
        metrics |= {"context/gain": float(told_N.mean()), "context/used": float((told_N > 0).float().mean())}

    # The solver's credit asks for no best response, so that what a solver learns by looking ahead is known before.
    value_N = credits(cfg.credit, tree, kl_N=kl_N, gain_N=gain_N, response_N=torch.zeros(len(tree.turns)))
    expected_N = torch.zeros(len(tree.turns))
    for level, mine_N in levels.turns(tree):
        if level.name == COACH and cfg.credit.gap:
            response_N, told = respond(cfg, levels, played, rows, value_N, expected_N, seed=seed, stale=stale)
            value_N = credits(cfg.credit, tree, kl_N=kl_N, gain_N=gain_N, response_N=response_N)
            metrics |= told
        if level.value is not None and cfg.level(level.name).baseline == "value" and mine_N.any():
            expected_N[mine_N] = expect(level.value, tree.of(mine_N), value_N[mine_N], cfg.tokens_per_pass)
    metrics |= group_metrics(tree, verdicts(cfg.credit, tree), state_keys(tree, "state"))
    return Judged(rows, value_N, expected_N, metrics)


def lay_levels(
    cfg: Settings, levels: Levels, tree: Tree
) -> tuple[dict[str, Rows], Float[Tensor, "N"], dict[str, float]]:
    """The turns of each level as rows, how far each turn is from where its level began (NaN where that is not known),
    and what to log of both."""
    rows: dict[str, Rows] = {}
    metrics: dict[str, float] = {}
    kl_N = torch.full((len(tree.turns),), math.nan)
    for level, mine_N in levels.learners(tree):
        if not mine_N.any():
            continue
        if level.policy is None:
            kl_N[mine_N] = 0.0
            continue
        temperature = cfg.level(level.name).sampling.temperature
        rows[level.name] = lay_rows(level, tree, mine_N, temperature=temperature, tokens_per_pass=cfg.tokens_per_pass)
        found = distances(rows[level.name])
        if found is not None:
            kl_N[mine_N] = found
    for level, mine_N in levels.turns(tree):
        if mine_N.any():
            metrics[f"{level.name}/length"] = sum(len(turn.action) for turn in tree.of(mine_N)) / int(mine_N.sum())
            if not kl_N[mine_N].isnan().any():
                metrics[f"{level.name}/kl_to_start"] = float(kl_N[mine_N].mean())
    return rows, kl_N, metrics


def lay_rows(level: Level, tree: Tree, mine_N: Bool[Tensor, "N"], *, temperature: float, tokens_per_pass: int) -> Rows:
    """The turns as rows, with their log-probs as the level began where that is kept."""
    batch = pack_siblings(tree.of(mine_N))
    if level.reference is not None and level.policy is not None:
        batch.ref_logprobs = reference_logprobs(
            level.reference, batch, temperature=temperature, tokens_per_pass=tokens_per_pass
        )
    return Rows(mine_N.nonzero()[:, 0], batch)


def distances(rows: Rows) -> Float[Tensor, "n"] | None:
    """The KL of each turn to where its level began, one sample of it summed over its tokens; None where that is not
    known."""
    if rows.batch.ref_logprobs is None:
        return None
    old = losses.require(rows.batch.logprobs, "logprobs", "The sampler must return them.")
    return rows.batch.pool(losses.kl_k1(old, rows.batch.ref_logprobs, rows.batch.mask))


def gains(
    level: Level,
    tree: Tree,
    alone: Sequence[Sequence[int]],
    *,
    from_start: bool,
    temperature: float,
    tokens_per_pass: int,
    older: bool = False,
) -> Float[Tensor, "N"]:
    """How much more likely, per token, each later attempt is for what its prompt tells than for the problem alone.

    `alone` are the prompts of the problems alone, by episode. Log-probabilities as sampled, less those of the prior:
    the solver as it is, or as it began. What `older` weights have said is read again by those of now: the gain is of
    the words, not of what was learned since. 0 for turns that are no later attempts.
    """
    read = partial(token_logprobs, temperature=temperature)
    later = tree.later_N.nonzero()[:, 0]
    pairs = [(alone[int(tree.episode_N[place])], tree.turns[place]) for place in later.tolist()]
    batch = pack_siblings([Sampled(list(prompt), turn.action, turn.logprobs) for prompt, turn in pairs])
    if from_start or level.policy is None:
        assert level.reference is not None, "the start is kept where it is the prior"
        prior_BT = reference_logprobs(level.reference, batch, temperature=temperature, tokens_per_pass=tokens_per_pass)
    else:
        prior_BT = level.policy.evaluate(batch, read, tokens_per_pass)
    gained_n = batch.pool(losses.require(batch.logprobs, "logprobs", "The sampler must return them.") - prior_BT)
    if older:
        assert level.policy is not None, "what does not learn is never old"
        said = pack_siblings([turn for _, turn in pairs])
        sampled = losses.require(said.logprobs, "logprobs", "The sampler must return them.")
        gained_n += said.pool(level.policy.evaluate(said, read, tokens_per_pass) - sampled)
    gain_N = torch.zeros(len(tree.turns))
    gain_N[later] = gained_n / batch.pool(batch.mask.float())
    return gain_N


def respond(
    cfg: Settings,
    levels: Levels,
    played: Played,
    rows: dict[str, Rows],
    value_N: Float[Tensor, "N"],
    expected_N: Float[Tensor, "N"],
    *,
    seed: int,
    stale: Stale | None = None,
) -> tuple[Float[Tensor, "N"], dict[str, float]]:
    """For each turn of feedback, what a best response of the solver earned after it; the solver is as before. It
    follows the weights of now, whichever have said the turns."""
    tree, solver, policy = played.tree, levels.solver, levels.solver.policy
    assert policy is not None, "where there is a gap the solver learns"

    role = solver.role(cfg.solver.sampling)

    def ahead(learner: Learner) -> None:
        loss = cfg.solver.policy.loss
        loss = "clipped" if loss == "reinforce" and cfg.lookahead > 1 else loss  # that one takes a single step
        steps = replace(cfg.solver.policy, loss=loss, epochs=cfg.lookahead, minibatches=1, optim=learner.optim)
        settings = replace(cfg.solver, policy=steps)
        advantages_N = compared(cfg.solver, tree, value_N, tree.solver_N, expected_N)
        tokens = cfg.tokens_per_pass
        learn_policy(learner, settings, rows[SOLVER], advantages_N, tokens_per_pass=tokens, seed=seed, stale=stale)

    with levels.average.in_place() if levels.average else looking_ahead(policy, ahead):
        levels.publish()
        found = response_scores(tree, played.tasks, played.env.make, role, played.rewards)
    levels.publish()
    earned_N = child_mean(tree.score_N, tree.parent_N)[0]
    gap = float((earned_N - found.score_N)[~tree.solver_N].mean())
    return found.score_N, {"context/gap": gap, "context/response_failed": float(found.failed)}
