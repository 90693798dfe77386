"""Feedback: a coach says something about the solver's attempt, the solver tries again, and both learn from the verdict.

MLMT-RL (OpenReview u1RjV99DPu) and its successor Bi-NAC (arXiv 2605.24547). An episode is a tree: attempts at one
problem, remarks about each, new attempts after each remark, for as many rounds as asked for. Every attempt is judged,
nobody is told the verdict, and each level compares its turns with those of siblings that answered the very same state.
The coach is credited with what its words change, r3 - r1; with `credit.gap` it is also credited with what a solver
would make of them that has already learned to use them, which is the two-level objective by its value function.

Deviations from the papers, each a setting or told in docs/algorithms/feedback.md: siblings are the baseline unless a
value model is asked for; the bonus for progress is 0; feedback is credited with improvement; the best response is a few
updates ahead or an average of the past; KL, where it counts, has its reference or the run does not start.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from echelon.config import (
    LoraConfig,
    ModelConfig,
    OptimConfig,
    SamplingConfig,
    TaskConfig,
    demand,
    overridden,
    require,
    to_yaml,
)
from echelon.data.packing import Batch, Sampled, pack_siblings
from echelon.envs import EnvSpec
from echelon.models.heads import TokenValue, values_before
from echelon.models.lm import token_logprobs
from echelon.ops import credit, losses
from echelon.ops.masked import explained_variance, masked_whiten
from echelon.ops.trees import child_mean
from echelon.rollout.best_response import looking_ahead, response_scores
from echelon.rollout.evaluate import rollout_metrics
from echelon.rollout.feedback import COACH, SOLVER, Context, Shape, TemplateConfig, feedback_tree, problem_alone
from echelon.rollout.feedback_credit import (
    CreditConfig,
    Tree,
    credits,
    described,
    group_metrics,
    lay_tree,
    state_keys,
)
from echelon.rollout.levels import open_views
from echelon.rollout.rewards import open_tasks
from echelon.rollout.roles import Role, collect
from echelon.rollout.setup import Actor, describe, model_path, open_actor, set_threads, task_batch
from echelon.seeds import derive_seed
from echelon.train.checkpoint import Checkpoints, Saveable
from echelon.train.ema import Average
from echelon.train.learner import Learner, Weights
from echelon.train.log import Log, episode_rows
from echelon.train.policy import PolicyConfig, reference_logprobs, starting_policy, update_policy
from echelon.train.stages import Stages, parse_stages
from echelon.train.value import update_value
from echelon.types import Play, Task, Turn


@dataclass(frozen=True)
class LevelConfig:
    """One of the two levels: its model, how it speaks, how it learns."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Model folder, adapter's folder, run directory or hub id."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How its utterances are drawn."""
    train: bool = True
    """It learns; else it speaks and stays as it is."""
    baseline: Literal["group", "leave_one_out", "batch", "value", "none"] = "group"
    """What the credit of a turn is compared with: the mean of its siblings, of its other siblings (RLOO), of the step
    (REINFORCE++), what a value model expects of the state, or nothing (REINFORCE)."""
    compare: Literal["state", "question"] = "state"
    """Who its siblings are: turns that answered the same state, or the same question as deep in the tree."""
    scale: Literal["none", "std", "batch_std"] = "none"
    """Divide by the deviation of the siblings' credit (GRPO), or of that of the step, or by nothing (Dr. GRPO)."""
    whiten: bool = False
    """Give advantages mean 0 and deviation 1 over the tokens of a step, besides."""
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig(epochs=2, kl_loss="k3"))
    """How it learns from advantages."""
    value_optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of the value model (baseline = value)."""

    def __post_init__(self) -> None:
        because = "there is no comparison to take it from. Use scale = none, with whiten if it is to be scaled."
        demand(self, "scale", self.scale == "none" or self.baseline in ("group", "leave_one_out", "batch"), because)
        because = "only siblings are compared. Use baseline = group or leave_one_out, or leave it out."
        demand(self, "compare", self.compare == "state" or self.baseline in ("group", "leave_one_out"), because)
        because = "nothing is imitated here. Leave it out."
        demand(self, "policy.ptx_coef", not self.policy.ptx_coef, because)


@dataclass(frozen=True, kw_only=True)
class Config(TaskConfig):
    """Settings of feedback."""

    solver: LevelConfig = field(default_factory=LevelConfig)
    """Who answers, and answers again: the low level."""
    coach: LevelConfig = field(default_factory=LevelConfig)
    """Who says something about an answer: the high level. Without a model it starts as what the solver starts as."""
    weights: Literal["separate", "shared", "adapters"] = "separate"
    """Two models; one for both levels, which learns as solver.policy says; or one base with an adapter for each."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapter of each level."""
    templates: TemplateConfig = field(default_factory=TemplateConfig)
    """What the levels are shown."""
    context: Context = "coach"
    """What comes between two attempts: the coach's words on the last one (coach) or on another problem (stranger), the
    same words always (fixed), nothing (none: self-correction); or before the first attempt a worked example (example).
    """
    fixed: str = "There may be a mistake in it."
    """The words of context = fixed."""
    steps: int = 100
    """Training steps; each plays episodes and updates the levels whose turn it is."""
    tasks_per_step: int = 16
    """Problems per step."""
    attempts: int = 4
    """First attempts at each problem."""
    remarks: int = 2
    """Turns of feedback on each attempt."""
    refinements: int = 2
    """New attempts after each turn of feedback."""
    rounds: int = 1
    """How often feedback and new attempts follow; every round branches again."""
    error_budget: float = 0.1
    """Fraction of a step's episodes that may fail before the run stops."""
    credit: CreditConfig = field(default_factory=CreditConfig)
    """What a turn is credited with."""
    schedule: Literal["joint", "alternate"] = "joint"
    """Both levels learn at every step, or in turn: of every cycle the solver first, then the coach."""
    cycle: tuple[int, int] = (1, 1)
    """Steps in which the coach learns, and the solver (schedule = alternate): 1 15 is one of the coach after fifteen of
    the solver."""
    stages: tuple[str, ...] = ()
    """Settings that change on the way, such as "from 0: credit.first=0" "from 250: credit.first=1 credit.progress=10";
    "plateau 30: …" begins after 30 steps without a better last attempt."""
    best_response: Literal["lookahead", "average"] = "lookahead"
    """What stands in for the solver's best response (credit.gap): the solver after more updates on the step's attempts,
    or the average of its past weights."""
    lookahead: int = 1
    """How many updates more."""
    average_decay: float = 0.95
    """The part of the average that stays at every step."""
    prior: Literal["empty_context", "start", "none"] = "empty_context"
    """What the attempts after feedback are compared with to see whether it was used: the solver without it (and without
    the attempt), the same of the solver as it started, or nothing."""
    tokens_per_pass: int = 4096
    """Most tokens, padding included, in one forward and backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "solver.model.path")
        counts = ("steps", "tasks_per_step", "attempts", "remarks", "refinements", "rounds", "lookahead")
        for name in (*counts, "tokens_per_pass"):
            demand(self, name, getattr(self, name) >= 1, "it counts something there must be one of. Give 1 or more.")
        demand(self, "error_budget", 0 <= self.error_budget < 1, "it is a fraction of the episodes. Give 0 to 0.99.")
        demand(self, "average_decay", 0 < self.average_decay < 1, "an average moves, slowly. Give 0.95.")
        cycle = min(self.cycle) >= 0 and sum(self.cycle) > 0
        demand(self, "cycle", cycle, "somebody learns in every step. Give two counts, such as 1 15.")
        parse_stages(self.stages)
        _check_context(self)
        _check_comparisons(self)

    @property
    def shape(self) -> Shape:
        """How an episode branches."""
        return Shape(self.attempts, self.remarks, self.refinements, self.rounds)

    @property
    def coached(self) -> bool:
        """Whether there is a coach."""
        return self.context in ("coach", "stranger", "example")


def _check_context(cfg: Config) -> None:
    because = "a worked example comes before the one and only attempt. Give 1, or another context."
    demand(cfg, "rounds", cfg.rounds == 1 or cfg.context != "example", because)
    demand(
        cfg, "fixed", bool(cfg.fixed) or cfg.context != "fixed", "nothing would be said. Give words, or context = none."
    )
    because = "there is no coach to share weights with. Use weights = separate."
    demand(cfg, "weights", cfg.weights == "separate" or cfg.coached, because)
    because = "both levels are one model, the solver's. Leave it out, or use weights = separate."
    demand(cfg, "coach.model.path", cfg.weights != "shared" or not cfg.coach.model.path, because)
    because = "one model cannot learn and stay as it is. Use weights = adapters or separate."
    demand(cfg, "coach.train", cfg.weights != "shared" or cfg.coach.train == cfg.solver.train, because)
    hot = cfg.coach.sampling.temperature == cfg.solver.sampling.temperature
    because = "one model learns from one distribution. Give the solver's."
    demand(cfg, "coach.sampling.temperature", hot or cfg.weights != "shared", because)
    because = "one model with one optimizer learns from all turns at once. Use schedule = joint."
    demand(cfg, "schedule", cfg.schedule == "joint" or cfg.weights != "shared", because)
    learns = cfg.solver.train or (cfg.coached and cfg.coach.train) or any("train=true" in line for line in cfg.stages)
    demand(cfg, "solver.train", learns, "nobody would learn. Set it to true, or let a stage do so.")
    only = cfg.credit.gap == 0 or cfg.context == "coach"
    demand(cfg, "credit.gap", only, "a gap is between two answers to the coach. Use context = coach, or 0.")
    because = "nothing says what an attempt without feedback would have been. Give another prior."
    demand(cfg, "prior", cfg.prior != "none" or not cfg.credit.utilisation, because)


def _check_comparisons(cfg: Config) -> None:
    """Groups of one teach nothing: where siblings are compared there are at least two of them."""
    siblings = ("group", "leave_one_out")
    because = "they are compared with one another. Give 2 or more, or another baseline."
    if cfg.solver.train and cfg.solver.baseline in siblings:
        demand(cfg, "attempts", cfg.attempts > 1 or cfg.credit.first == 0 or cfg.context == "example", because)
        shared = cfg.solver.compare == "question" and cfg.shape.leaves(cfg.context) > 1
        demand(cfg, "refinements", cfg.refinements > 1 or shared, because)
    if cfg.coached and cfg.coach.train and cfg.coach.baseline in siblings:
        shared = cfg.coach.compare == "question" and cfg.attempts > 1
        demand(cfg, "remarks", cfg.remarks > 1 or shared, because)
        because = "one part of a step would have nobody to compare with. Give 1, or another baseline."
    parts = cfg.tasks_per_step * cfg.attempts
    because = f"some would have none of a step's {parts} attempts. Give that many, or fewer."
    demand(cfg, "solver.policy.minibatches", cfg.solver.policy.minibatches <= parts, because)


@dataclass(slots=True)
class Level:
    """One level as it runs."""

    actor: Actor
    policy: Learner
    reference: nn.Module | None
    value: Learner | None

    def parts(self, name: str) -> dict[str, Saveable]:
        """What a checkpoint holds of it. An adapter knows its own start, so it needs no copy of it."""
        parts: dict[str, Saveable] = {name: self.policy}
        if self.reference is not None and self.reference is not self.policy.module:
            parts[f"{name}_reference"] = Weights(self.reference)
        if self.value is not None:
            parts[f"{name}_value"] = self.value
        return parts


@dataclass(slots=True)
class Levels:
    """Both levels, the solver's average, and the stage they are in. With shared weights both are the solver."""

    solver: Level
    coach: Level | None
    average: Average | None
    stages: Stages
    shared: bool

    def parts(self) -> dict[str, Saveable]:
        """What a checkpoint holds."""
        parts = self.solver.parts(SOLVER)
        if self.coach is not None and not self.shared:
            parts |= self.coach.parts(COACH)
        if self.average is not None:
            parts["average"] = self.average
        if self.stages.table:
            parts["stages"] = self.stages
        return parts

    def publish(self) -> None:
        """Give the samplers the weights as they are: they forget what they have cached."""
        for level in {id(level.actor.sampler): level for level in (self.solver, self.coach) if level}.values():
            level.actor.sampler.load(level.policy.weights(), level.policy.version)


def main(cfg: Config) -> None:
    """Train; the run directory holds checkpoints, metrics.jsonl and episodes.jsonl."""
    levels = open_levels(cfg)
    env = open_tasks(cfg, levels.solver.actor.role.renderer)
    set_threads(cfg.threads, levels.solver.actor.module)
    if cfg.dry_run:
        return describe(modules(levels), tokens_per_step=tokens_per_step(cfg))

    tasks, parts, out = env.tasks("train"), levels.parts(), Path(cfg.out)
    with Checkpoints(out, config_yaml=to_yaml(cfg), keep_last=cfg.keep_last, resume=cfg.resume) as checkpoints:
        start = checkpoints.restore(parts)[0] if cfg.resume else 0
        levels.publish()
        if not cfg.resume:
            checkpoints.save(0, parts)
        with Log(out, total=cfg.steps, start=start, name="feedback", config=cfg.log, settings=cfg) as log:
            for step in range(start, cfg.steps):
                now = overridden(cfg, levels.stages.words(step))
                seed = derive_seed(cfg.seed, step)
                torch.manual_seed(seed)  # dropout, where an adapter has any
                chosen = task_batch(tasks, step, cfg.tasks_per_step, seed=cfg.seed)
                play = player(now, env, levels, tasks)
                episodes = asyncio.run(collect(chosen, play, seed=seed, error_budget=cfg.error_budget))
                pairs = [(e, task) for e, task in zip(episodes, chosen, strict=True) if e.ending != "failed"]
                tree = lay_tree([episode for episode, _ in pairs])

                judged = judge_tree(now, levels, tree, [task for _, task in pairs], env, seed=seed)
                learned = learn(now, step, levels, tree, judged, seed=seed)
                levels.publish()

                seen = described(tree)
                levels.stages.saw(seen[max(name for name in seen if name.startswith("accuracy/turn"))])
                metrics = {**rollout_metrics(episodes), **seen, **judged.metrics, **learned}
                log.metrics(step, metrics | ({"stage": float(levels.stages.current)} if cfg.stages else {}))
                columns = {"credit": zip(tree.turns, judged.value_N.tolist(), strict=True)}
                log.episodes(step, episode_rows(episodes[:8], per_turn=columns))
                if step + 1 == cfg.steps or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                    checkpoints.save(step + 1, parts)


def open_levels(cfg: Config) -> Levels:
    """Both levels as they start."""
    first = model_path(cfg.solver.model.path, SOLVER)
    models = {SOLVER: replace(cfg.solver.model, path=first)}
    if cfg.coached and cfg.weights != "shared":
        models[COACH] = replace(cfg.coach.model, path=model_path(cfg.coach.model.path, COACH) or first)
    sampling = {SOLVER: cfg.solver.sampling, COACH: cfg.coach.sampling}
    if cfg.weights == "adapters":
        actors = open_views(models, sampling, lora=cfg.lora, seed=cfg.seed)
    else:
        actors = {name: open_actor(m, sampling[name], lora=cfg.lora, name=name) for name, m in models.items()}
    if cfg.coached and cfg.weights == "shared":
        actors[COACH] = same_weights(actors[SOLVER], cfg.coach.sampling)
    solver = open_level(cfg, SOLVER, cfg.solver, actors[SOLVER])
    coach = None
    if cfg.coached:
        one = solver.policy if cfg.weights == "shared" else None
        coach = open_level(cfg, COACH, cfg.coach, actors[COACH], one)
        if one is not None:
            coach.reference = solver.reference
    average = None
    if cfg.best_response == "average" and asked_for(cfg, "credit.gap"):
        average = Average(solver.policy, cfg.average_decay)
    return Levels(solver, coach, average, Stages(cfg.stages), cfg.weights == "shared")


def open_level(cfg: Config, name: str, level: LevelConfig, actor: Actor, policy: Learner | None = None) -> Level:
    """One level, with what it is compared with. `policy` is given where it learns with the other one."""
    each = level.policy.epochs * level.policy.minibatches
    if policy is None:
        total = cfg.steps * each
        policy = Learner(actor.module, level.policy.optim, total_steps=total, name=name, tokenizer=actor.tokenizer)
    counts = ["credit.kl_feedback"] if name == COACH else ["credit.kl_first", "credit.kl_refine"]
    kept = level.policy.kl_coef or any(asked_for(cfg, setting) for setting in (*counts, f"{name}.policy.kl_coef"))
    kept = kept or (name == SOLVER and cfg.prior == "start")
    reference = starting_policy(actor.module, replace(level.policy, kl_coef=1.0)) if kept else None
    value = None
    if level.train and level.baseline == "value":
        value = Learner(
            TokenValue.from_lm(actor.module), level.value_optim, total_steps=cfg.steps, name=f"{name}_value"
        )
    return Level(actor, policy, reference, value)


def same_weights(actor: Actor, sampling: SamplingConfig) -> Actor:
    """The coach that is the solver in another role: the same weights, sampler and tokenizer."""
    params = replace(
        actor.role.params, max_tokens=sampling.max_tokens, temperature=sampling.temperature, stop=sampling.stop
    )
    return replace(actor, role=Role(COACH, actor.sampler, actor.role.renderer, params))


def asked_for(cfg: Config, setting: str) -> bool:
    """Whether a number counts at some time: it is not 0, or a stage sets it."""
    block, _, name = setting.rpartition(".")
    here: object = cfg
    for part in block.split("."):
        here = getattr(here, part)
    return bool(getattr(here, name)) or any(f" {setting}=" in line for line in cfg.stages)


def player(cfg: Config, env: EnvSpec, levels: Levels, tasks: Sequence[Task]) -> Play:
    """How an episode goes at this stage."""
    coach = levels.coach.actor.role if levels.coach else None
    return feedback_tree(
        env.make,
        levels.solver.actor.role,
        coach,
        shape=cfg.shape,
        templates=cfg.templates,
        context=cfg.context,
        fixed=cfg.fixed,
        others=tasks if cfg.context == "stranger" else (),
    )


@dataclass(slots=True)
class Rows:
    """The turns of one level, packed."""

    places: Tensor
    """Which turns of the tree these are, (n,)."""
    batch: Batch


@dataclass(slots=True)
class JudgedTree:
    """What every turn is worth, and compared with whom."""

    value_N: Float[Tensor, "N"]
    rows: dict[str, Rows]
    metrics: dict[str, float]


def judge_tree(
    cfg: Config, levels: Levels, tree: Tree, tasks: Sequence[Task], env: EnvSpec, *, seed: int
) -> JudgedTree:
    """Pack the turns of each level, ask references and the best response, and say what every turn is worth."""
    rows: dict[str, Rows] = {}
    metrics: dict[str, float] = {}
    kl_N = torch.full((len(tree.turns),), math.nan)
    for name, mine_N in ((SOLVER, tree.solver_N), (COACH, ~tree.solver_N)):
        if mine_N.any():
            metrics[f"{name}/length"] = sum(len(turn.action) for turn in tree.of(mine_N)) / int(mine_N.sum())
    for name, level, mine_N in speakers(levels, tree):
        places = mine_N.nonzero()[:, 0]
        batch = pack_siblings(tree.of(mine_N))
        rows[name] = Rows(places, batch)
        if level.reference is None:
            continue
        settings = cfg.solver if name == SOLVER else cfg.coach
        batch.ref_logprobs = reference_logprobs(
            level.reference, batch, temperature=settings.sampling.temperature, tokens_per_pass=cfg.tokens_per_pass
        )
        old = losses.require(batch.logprobs, "logprobs", "The sampler must return them.")
        kl_N[places] = batch.pool(losses.kl_k1(old, batch.ref_logprobs, batch.mask))
    for name, mine_N in ((SOLVER, tree.solver_N), (COACH, ~tree.solver_N)):
        if mine_N.any() and not kl_N[mine_N].isnan().any():
            metrics[f"{name}/kl_to_start"] = float(kl_N[mine_N].mean())
    gain_N = None
    if cfg.prior != "none" and tree.later_N.any():
        gain_N = gains(cfg, levels, tree, tasks, env)
        told_N = gain_N[tree.later_N]
        metrics |= {"context/gain": float(told_N.mean()), "context/used": float((told_N > 0).float().mean())}
    given: dict[str, Float[Tensor, "N"] | None] = {"gain_N": gain_N, "kl_N": kl_N}
    if cfg.credit.gap:
        plain = credits(replace(cfg.credit, gap=0.0), tree, **given)
        response_N = responses(cfg, levels, tree, rows[SOLVER], plain, tasks, env, seed=seed)
        given["response_N"] = response_N
        coach_N = ~tree.solver_N
        metrics["context/gap"] = float((child_mean(tree.score_N, tree.parent_N)[0] - response_N)[coach_N].mean())
    value_N = credits(cfg.credit, tree, **given)
    metrics |= group_metrics(tree, value_N, state_keys(tree, "state"))
    return JudgedTree(value_N, rows, metrics)


def speakers(levels: Levels, tree: Tree) -> list[tuple[str, Level, Bool[Tensor, "N"]]]:
    """Who learns from which turns: each level from its own; one model for both from all of them."""
    if levels.shared:
        return [(SOLVER, levels.solver, torch.ones_like(tree.solver_N))]
    found = [(SOLVER, levels.solver, tree.solver_N)]
    return found if levels.coach is None else [*found, (COACH, levels.coach, ~tree.solver_N)]


def gains(cfg: Config, levels: Levels, tree: Tree, tasks: Sequence[Task], env: EnvSpec) -> Float[Tensor, "N"]:
    """How much more likely, per token, each later attempt is for what its prompt tells than for the problem alone.

    Log-probabilities as sampled, less those of the prior; 0 for turns that are no later attempts.
    """
    solver, later = levels.solver, tree.later_N.nonzero()[:, 0]
    owners = tree.episode_N[later].tolist()
    alone = asyncio.run(problem_alone(env.make, [tasks[o] for o in set(owners)], solver.actor.role, cfg.templates))
    bare = dict(zip(set(owners), alone, strict=True))
    turns = [tree.turns[place] for place in later.tolist()]
    batch = pack_siblings([Sampled(bare[o], turn.action, turn.logprobs) for o, turn in zip(owners, turns, strict=True)])
    prior = solver.reference if cfg.prior == "start" else solver.policy.module
    assert prior is not None, "the start is kept where it is the prior"
    read, temperature = reference_logprobs, cfg.solver.sampling.temperature
    if cfg.prior == "start":
        without_BT = read(prior, batch, temperature=temperature, tokens_per_pass=cfg.tokens_per_pass)
    else:
        without_BT = solver.policy.evaluate(
            batch, partial(token_logprobs, temperature=temperature), cfg.tokens_per_pass
        )
    told = losses.require(batch.logprobs, "logprobs", "The sampler must return them.")
    gain_N = torch.zeros(len(tree.turns))
    gain_N[later] = batch.pool(told - without_BT) / batch.pool(batch.mask.float())
    return gain_N


def responses(
    cfg: Config,
    levels: Levels,
    tree: Tree,
    rows: Rows,
    plain_N: Float[Tensor, "N"],
    tasks: Sequence[Task],
    env: EnvSpec,
    *,
    seed: int,
) -> Float[Tensor, "N"]:
    """For each turn of feedback, what a best response of the solver earned after it. The solver is as before after it.

    `plain_N` is what turns are worth without the gap: what a solver that looks ahead learns from.
    """
    solver = levels.solver

    def ahead(learner: Learner) -> None:
        settings = replace(cfg.solver.policy, loss="clipped", epochs=cfg.lookahead, minibatches=1)
        update_policy(
            learner,
            replace(rows.batch, advantages=rows.batch.spread(compared(cfg, tree, plain_N, SOLVER)[rows.places])),
            settings=settings,
            reference=None,
            temperature=cfg.solver.sampling.temperature,
            tokens_per_pass=cfg.tokens_per_pass,
            seed=derive_seed(seed, "lookahead"),
        )

    stand_in = levels.average.in_place() if levels.average else looking_ahead(solver.policy, ahead)
    with stand_in:
        levels.publish()
        found = response_scores(tree, tasks, env.make, solver.actor.role, seed=seed)
    levels.publish()
    return found


def compared(cfg: Config, tree: Tree, value_N: Float[Tensor, "N"], name: str) -> Float[Tensor, "N"]:
    """The advantage of each turn of a level over those it is compared with, 0 for other turns."""
    level, mine_N = (cfg.solver, tree.solver_N) if name == SOLVER else (cfg.coach, ~tree.solver_N)
    advantages_N = torch.where(mine_N, value_N, 0.0)
    if level.baseline in ("none", "value"):  # a value model has its say when it has been asked
        return advantages_N
    keys = [0 if level.baseline == "batch" else key for key in state_keys(tree, level.compare)]
    mine = [keys[place] for place in mine_N.nonzero()[:, 0].tolist()]
    leave_one_out = level.baseline == "leave_one_out"
    advantages_N[mine_N] = credit.group_baseline(value_N[mine_N], mine, scale=level.scale, leave_one_out=leave_one_out)
    return advantages_N


def learn(cfg: Config, step: int, levels: Levels, tree: Tree, judged: JudgedTree, *, seed: int) -> dict[str, float]:
    """One step of the levels whose turn it is."""
    metrics: dict[str, float] = {}
    learning = turn_of(cfg, step)
    advantages_N = torch.zeros(len(tree.turns))
    for name in learning:
        level, mine_N = (levels.solver, tree.solver_N) if name == SOLVER else (levels.coach, ~tree.solver_N)
        if level is None or not mine_N.any():
            continue
        found_N = compared(cfg, tree, judged.value_N, name)
        if level.value is not None:
            found_N[mine_N], told = less_expected(cfg, level.value, tree.of(mine_N), found_N[mine_N], seed=seed)
            metrics |= {f"{name}/{key}": number for key, number in told.items()}
        metrics[f"{name}/advantage_std"] = float(found_N[mine_N].std(correction=0))
        advantages_N += found_N
    for name, level, _ in speakers(levels, tree):
        if name not in learning:
            continue
        rows, settings = judged.rows[name], cfg.solver if name == SOLVER else cfg.coach
        advantages_BT = rows.batch.spread(advantages_N[rows.places])
        rows.batch.advantages = masked_whiten(advantages_BT, rows.batch.mask) if settings.whiten else advantages_BT
        level.policy.optim = settings.policy.optim  # a stage may have another learning rate
        learned = update_policy(
            level.policy,
            rows.batch,
            settings=settings.policy,
            reference=None,  # it has been asked
            temperature=settings.sampling.temperature,
            tokens_per_pass=cfg.tokens_per_pass,
            seed=derive_seed(seed, name),
        )
        metrics |= {key.replace("policy/", f"{name}/", 1): number for key, number in learned.items()}
    if levels.average is not None:
        levels.average.update()
    return metrics


def turn_of(cfg: Config, step: int) -> list[str]:
    """The levels that learn at a step. A frozen one leaves its turns to the other: no rollout is wasted."""
    trained = [name for name, level in ((SOLVER, cfg.solver), (COACH, cfg.coach)) if level.train]
    if not cfg.coached:
        return [name for name in trained if name == SOLVER]
    if cfg.schedule == "joint" or len(trained) < 2:
        return trained
    coach, solver = cfg.cycle
    return [SOLVER] if step % (coach + solver) < solver else [COACH]


def less_expected(
    cfg: Config, value: Learner, turns: Sequence[Turn], credit_n: Float[Tensor, "n"], *, seed: int
) -> tuple[Float[Tensor, "n"], dict[str, float]]:
    """What turns are credited with less V of the state each answered; then V learns. V has seen the state alone."""
    if value.version == 0:
        value.module.start_at(float(credit_n.mean()))  # type: ignore[operator]
    batch = pack_siblings(turns)
    first_BT = torch.zeros_like(batch.mask)
    first_BT[batch.row_N, batch.first_N] = True
    batch.values = value.evaluate(batch, values_before, cfg.tokens_per_pass)
    expected_n = batch.values[batch.row_N, batch.first_N]
    batch.returns = torch.zeros(first_BT.shape)
    batch.returns[batch.row_N, batch.first_N] = credit_n
    told = update_value(
        value,
        batch,
        read_BT=first_BT,
        epochs=1,
        minibatches=1,
        clip=None,
        tokens_per_pass=cfg.tokens_per_pass,
        seed=seed,
    )
    everywhere_n = torch.ones(len(turns), dtype=torch.bool)
    told["value/explained_variance"] = float(explained_variance(expected_n, credit_n, everywhere_n))
    return credit_n - expected_n, told


def modules(levels: Levels) -> dict[str, nn.Module]:
    """What `--dry-run` describes."""
    found = {SOLVER: levels.solver.actor.module}
    return found if levels.coach is None or levels.shared else {**found, COACH: levels.coach.actor.module}


def tokens_per_step(cfg: Config) -> int:
    """The most tokens that a step can sample."""
    shape, told = cfg.shape, cfg.coached
    solver, coach = cfg.solver.sampling.max_tokens, cfg.coach.sampling.max_tokens
    if cfg.context == "example":
        return cfg.tasks_per_step * shape.feedback * (coach + shape.refine * solver)
    tokens, width = shape.solve * solver, shape.solve
    for _ in range(shape.rounds):
        remarks = width * shape.feedback if told else width
        width = remarks * shape.refine
        tokens += (remarks * coach if told else 0) + width * solver
    return cfg.tasks_per_step * tokens
