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

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from echelon.config import LoraConfig, TaskConfig, demand, require
from echelon.config.loading import overridden
from echelon.envs import EnvSpec
from echelon.errors import ConfigError
from echelon.rollout.ahead import Played as Found
from echelon.rollout.ahead import Player, Rollouts, Run, check_ahead
from echelon.rollout.evaluate import rollout_metrics
from echelon.rollout.feedback import COACH, SOLVER, Context, Shape, TemplateConfig, feedback_tree
from echelon.rollout.feedback_credit import (
    CreditConfig,
    Tree,
    described,
    lay_tree,
)
from echelon.rollout.feedback_judge import Judged, Played, judge_tree
from echelon.rollout.feedback_levels import (
    Level,
    LevelConfig,
    Levels,
    Sharing,
    compared,
    learn_policy,
    learn_value,
    new_value,
    open_actors,
    open_level,
)
from echelon.rollout.memory import Engine, Plan
from echelon.rollout.rewards import Rewards, open_rewards, open_tasks
from echelon.rollout.roles import Role, collect
from echelon.rollout.setup import Actor, describe, set_threads, task_batch
from echelon.seeds import derive_seed
from echelon.train.checkpoint import Checkpoints
from echelon.train.ema import Average
from echelon.train.log import Log, episode_rows
from echelon.train.stages import Stages, parse_stages, settings_so_far
from echelon.train.stale import AsyncConfig, Stale
from echelon.types import Play, Sampler, Task

FIXED = (
    *("out", "resume", "seed", "threads", "dry_run", "save_every", "keep_last", "log", "steps", "stages"),
    *("env", "env_settings", "trust_task_code", "data", "reward", "reward_weights", "judge"),
    *("weights", "lora", "best_response", "average_decay", "keep_start", "asynchronous"),
    *(f"{level}.{name}" for level in (SOLVER, COACH) for name in ("model", "sampling.max_prompt_tokens")),
    *(f"{level}.sampling.{name}" for level in (SOLVER, COACH) for name in ("cache_tokens", "sampler", "sleep")),
    *(f"{level}.sampling.{name}" for level in (SOLVER, COACH) for name in ("adapters", "ray", "server")),
)
"""What a run is built of, so that no stage can change it: these settings, and blocks of them."""
OPTIMIZER = ("lr", "max_grad_norm")
"""What of an optimizer a stage can change."""


@dataclass(frozen=True, kw_only=True)
class Config(TaskConfig):
    """Settings of feedback."""

    solver: LevelConfig = field(default_factory=LevelConfig)
    """Who answers, and answers again: the low level."""
    coach: LevelConfig = field(default_factory=LevelConfig)
    """Who says something about an answer: the high level. Without a model it starts as what the solver starts as."""
    weights: Sharing = "separate"
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
    keep_start: bool = False
    """Remember how each level started and log its KL to it even where that counts nothing; a model of its own each,
    unless levels are adapters."""
    asynchronous: AsyncConfig = field(default_factory=AsyncConfig)
    """Playing the coming steps while one trains."""
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
        _check_context(self)
        _check_weights(self)
        _check_learning(self)
        _check_comparisons(self)
        _check_asynchronous(self)
        assert self.plans, "every stage is a run that could be"

    @cached_property
    def plans(self) -> tuple[Config, ...]:
        """The settings that hold in each stage; without stages, these. Raises ConfigError for one that cannot be."""
        table = parse_stages(self.stages)
        if not table:
            return (self,)
        plain = replace(self, stages=())
        found = []
        for line, words in zip(self.stages, settings_so_far(table), strict=True):
            try:
                for word in words:
                    _check_change(word.partition("=")[0])
                found.append(overridden(plain, words))
            except ConfigError as error:
                raise ConfigError(f"stages: '{line}': {error}") from error
        return tuple(found)

    @property
    def shape(self) -> Shape:
        """How an episode branches."""
        return Shape(self.attempts, self.remarks, self.refinements, self.rounds)

    @property
    def coached(self) -> bool:
        """Whether there is a coach."""
        return self.context in ("coach", "stranger", "example")

    @property
    def trained(self) -> tuple[str, ...]:
        """The levels that learn."""
        levels = [(SOLVER, self.solver.train), (COACH, self.coach.train and self.coached)]
        return tuple(name for name, learns in levels if learns)

    def level(self, name: str) -> LevelConfig:
        """The settings of a level."""
        return self.solver if name == SOLVER else self.coach


def _check_change(name: str) -> None:
    """Raise ConfigError for a setting that no stage can change."""
    block, _, leaf = name.replace("-", "_").rpartition(".")
    fixed = any(f"{block}.{leaf}.".lstrip(".").startswith(f"{part}.") for part in FIXED)
    if fixed or (block.rpartition(".")[2] in ("optim", "value_optim") and leaf not in OPTIMIZER):
        raise ConfigError(
            f"{name} is what the run is built of, the same from its first step to its last. Leave it out."
        )


def _check_context(cfg: Config) -> None:
    because = "a worked example comes before the one and only attempt. Give 1, or another context."
    demand(cfg, "rounds", cfg.rounds == 1 or cfg.context != "example", because)
    because = "nothing would be said. Give words, or context = none."
    demand(cfg, "fixed", bool(cfg.fixed) or cfg.context != "fixed", because)
    because = "a gap is between two answers to the coach. Use context = coach, or 0."
    demand(cfg, "credit.gap", cfg.credit.gap == 0 or cfg.context == "coach", because)
    because = "a solver that never learns is its own best response. Set solver.train, or give 0."
    demand(cfg, "credit.gap", cfg.credit.gap == 0 or cfg.solver.train, because)
    because = "nothing says what an attempt without feedback would have been. Give another prior."
    demand(cfg, "prior", cfg.prior != "none" or not cfg.credit.utilisation, because)


def _check_weights(cfg: Config) -> None:
    because = "there is no coach to share weights with. Use weights = separate."
    demand(cfg, "weights", cfg.weights == "separate" or cfg.coached, because)
    if cfg.weights != "shared":
        return
    because = "both levels are one model with one tokenizer, the solver's. Leave it out, or use weights = separate."
    demand(cfg, "coach.model.path", not cfg.coach.model.path, because)
    because = "one model cannot learn and stay as it is. Use weights = adapters or separate."
    demand(cfg, "coach.train", cfg.coach.train == cfg.solver.train, because)
    same = cfg.coach.sampling.temperature == cfg.solver.sampling.temperature
    because = "one model learns from one distribution. Give the solver's."
    demand(cfg, "coach.sampling.temperature", same, because)
    because = "one model with one optimizer learns from all turns at once. Use schedule = joint."
    demand(cfg, "schedule", cfg.schedule == "joint", because)
    unread = cfg.coach.policy == LevelConfig().policy or cfg.coach.policy == cfg.solver.policy
    because = "one model learns as solver.policy says, so coach.policy is not read. Leave that out."
    demand(cfg, "weights", unread, because)


def _check_learning(cfg: Config) -> None:
    demand(cfg, "solver.train", bool(cfg.trained), "nobody would learn. Set it to true, here or for the coach.")
    cycled = cfg.schedule == "alternate" and len(cfg.trained) == 2
    both = not cycled or min(cfg.cycle) > 0
    because = "one of the levels would never have its turn. Give both 1 or more, or set its train to false."
    demand(cfg, "cycle", both, because)


def _check_comparisons(cfg: Config) -> None:
    """Groups of one teach nothing: where siblings are compared there are at least two of them."""
    because = "they are compared with one another, and one alone teaches nothing. Give 2 or more, or another baseline."
    if SOLVER in cfg.trained and cfg.solver.siblings:
        counts = cfg.credit.first or cfg.credit.kl_first or cfg.credit.to == "return_to_go"
        demand(cfg, "attempts", cfg.attempts > 1 or not counts or cfg.context == "example", because)
        cousins = cfg.solver.compare == "question" and cfg.shape.leaves(cfg.context) > 1
        demand(cfg, "refinements", cfg.refinements > 1 or cousins, because)
    if COACH in cfg.trained and cfg.coach.siblings:
        cousins = cfg.coach.compare == "question" and cfg.attempts > 1 and cfg.context != "example"
        demand(cfg, "remarks", cfg.remarks > 1 or cousins, because)
    for name in cfg.trained:
        count = cfg.level(name).policy.minibatches
        because = (
            f"a step has {cfg.tasks_per_step} problems, and some would have none of them. Give that many, or fewer."
        )
        demand(cfg, f"{name}.policy.minibatches", count <= cfg.tasks_per_step, because)


def _check_asynchronous(cfg: Config) -> None:
    for name in (SOLVER, COACH) if cfg.coached else (SOLVER,):
        level, now = cfg.level(name), "credit.gap" if name == SOLVER and cfg.credit.gap else ""
        check_ahead(cfg, cfg.asynchronous, level.model, cfg.lora, level.sampling, now=now)
    known = all(stage.step is not None for stage in parse_stages(cfg.stages))
    because = "nobody knows at which step a plateau will be reached. Give its stages a step (from …), or leave it out."
    demand(cfg, "asynchronous.max_staleness", not cfg.asynchronous.max_staleness or known, because)


def main(cfg: Config) -> None:
    """Train; the run directory holds checkpoints, metrics.jsonl and episodes.jsonl."""
    levels = open_levels(cfg)
    env = open_tasks(cfg, levels.solver.actor.role.renderer)
    rewards = open_rewards(cfg, device=cfg.solver.model.device, tokens_per_pass=cfg.tokens_per_pass)
    set_threads(cfg.threads, levels.solver.actor.module)
    if cfg.dry_run:
        plan = Plan({**levels.parts(), **rewards.modules()}, cfg.dist, cfg.tokens_per_pass, engines(cfg, levels))
        return describe(levels.modules(), tokens_per_step=max(map(tokens_per_step, cfg.plans)), plan=plan)

    tasks, play, out = env.tasks("train"), player(cfg, env, levels, rewards), Path(cfg.out)
    rollouts = Rollouts(cfg.asynchronous, levels.acting(cfg.level), play, steps=cfg.steps, read=Found.from_json)
    parts = levels.parts() | rollouts.parts()
    checkpoints = Checkpoints(out, config=cfg, keep_last=cfg.keep_last, resume=cfg.resume)
    with checkpoints, rollouts:
        start = checkpoints.restore(parts)[0] if cfg.resume else 0
        rollouts.publish()
        if not cfg.resume:
            checkpoints.save(0, parts)
        with Log(out, total=cfg.steps, start=start, name="feedback", config=cfg.log, settings=cfg) as log:
            for step in range(start, cfg.steps):
                now = cfg.plans[levels.stages.reached(step)]
                seed = derive_seed(cfg.seed, step)
                torch.manual_seed(seed)  # dropout, where an adapter has any
                found = rollouts.take(step)
                episodes, given = found.episodes, found.metrics | rollouts.metrics()
                chosen = task_batch(tasks, step, now.tasks_per_step, seed=cfg.seed)
                played = [pair for pair in zip(episodes, chosen, strict=True) if pair[0].ending != "failed"]
                tree = lay_tree([episode for episode, _ in played])

                asked = Played(tree, [task for _, task in played], env, rewards)
                judged = judge_tree(now, levels, asked, seed=seed, stale=rollouts.stale(SOLVER))
                learned = learn(now, step, levels, tree, judged, seed=seed, stale=rollouts.stale)
                rollouts.publish()  # also a level that rests forgets what it has cached, as a resumed run would have

                seen = described(tree)
                levels.stages.saw(seen["reward/mean"])
                stage = {"stage": float(levels.stages.current)} if cfg.stages else {}
                log.metrics(step, {**rollout_metrics(episodes), **given, **seen, **judged.metrics, **learned, **stage})
                columns = {"credit": zip(tree.turns, judged.value_N.tolist(), strict=True)}
                log.episodes(step, episode_rows(episodes[:8], decode=levels.decoders(), per_turn=columns))
                if step + 1 == cfg.steps or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                    checkpoints.save(step + 1, parts)


def open_levels(cfg: Config) -> Levels:
    """Both levels as they start, with all that any stage needs of them."""
    coached = any(plan.coached for plan in cfg.plans)
    names = (SOLVER, COACH) if coached else (SOLVER,)
    actors = open_actors({n: cfg.level(n) for n in names}, weights=cfg.weights, lora=cfg.lora, seed=cfg.seed)
    solver = open_one(cfg, SOLVER, actors[SOLVER])
    coach = open_one(cfg, COACH, actors[COACH]) if coached and cfg.weights != "shared" else None
    if coached and coach is None:  # the solver in another role: only what values its states is its own
        updates = lessons(cfg, COACH)[0]
        value = new_value(COACH, cfg.coach, actors[COACH], updates) if _valued(cfg, COACH) else None
        coach = Level(COACH, actors[COACH], None, None, value)
    average = None
    if cfg.best_response == "average" and any(plan.credit.gap for plan in cfg.plans):
        assert solver.policy is not None, "where there is a gap the solver learns"
        average = Average(solver.policy, cfg.average_decay)
    return Levels(solver, coach, average, Stages(cfg.stages), cfg.weights == "shared")


def open_one(cfg: Config, name: str, actor: Actor) -> Level:
    """A level with weights of its own."""
    steps, updates = lessons(cfg, name)
    mine = (name, COACH) if cfg.weights == "shared" else (name,)
    start = cfg.keep_start or any(_needs_start(plan, name) for name in mine for plan in cfg.plans)
    return open_level(
        name,
        cfg.level(name),
        actor,
        learns=any(name in plan.trained for plan in cfg.plans),
        start=start,
        value=_valued(cfg, name),
        updates=(updates, steps),
    )


def _needs_start(plan: Config, name: str) -> bool:
    """Whether a level must know how it began: its KL to that counts, or it is what a gain is measured against."""
    if name == COACH:
        return bool(plan.credit.kl_feedback or plan.coach.policy.kl_coef)
    return bool(plan.credit.kl_first or plan.credit.kl_refine or plan.solver.policy.kl_coef) or plan.prior == "start"


def _valued(cfg: Config, name: str) -> bool:
    return any(name in plan.trained and plan.level(name).baseline == "value" for plan in cfg.plans)


def lessons(cfg: Config, name: str) -> tuple[int, int]:
    """Steps in which a level learns, and its optimizer steps in all of them. Stages that wait for a plateau are not
    counted on."""
    begins = [stage.step for stage in parse_stages(cfg.stages) if stage.step is not None]
    plans = [cfg.plans[max(0, bisect_right(begins, step) - 1)] for step in range(cfg.steps)]
    mine = [plan.level(name).policy for step, plan in enumerate(plans) if name in turn_of(plan, step)]
    return len(mine), sum(policy.epochs * policy.minibatches for policy in mine)


def turn_of(cfg: Config, step: int) -> tuple[str, ...]:
    """The levels that learn at a step. A frozen one leaves its turns to the other: no rollout is wasted."""
    if cfg.schedule == "joint" or len(cfg.trained) < 2:
        return cfg.trained
    coach, solver = cfg.cycle
    return (SOLVER,) if step % (coach + solver) < solver else (COACH,)


def player(cfg: Config, env: EnvSpec, levels: Levels, rewards: Rewards) -> Player[Found]:
    """Plays the episodes of a step as its stage says, and has every attempt judged."""
    tasks = env.tasks("train")

    def play(roles: Mapping[str, Role], step: int, run: Run) -> Found:
        now = cfg.plans[levels.stages.at(step)]
        chosen = task_batch(tasks, step, now.tasks_per_step, seed=cfg.seed)
        how = branching(now, env, levels, tasks, {name: role.sampler for name, role in roles.items()})
        episodes = run(collect(chosen, how, seed=derive_seed(cfg.seed, step), error_budget=now.error_budget))
        return Found(episodes, rewards.add(episodes, role=SOLVER))

    return play


def branching(
    cfg: Config, env: EnvSpec, levels: Levels, tasks: Sequence[Task], samplers: Mapping[str, Sampler]
) -> Play:
    """How an episode goes at this stage, the levels speaking through these samplers."""
    coach = levels.coach if cfg.coached else None
    return feedback_tree(
        env.make,
        levels.solver.role(cfg.solver.sampling, samplers[SOLVER]),
        None if coach is None else coach.role(cfg.coach.sampling, samplers[COACH]),
        shape=cfg.shape,
        templates=cfg.templates,
        context=cfg.context,
        fixed=cfg.fixed,
        others=tasks if cfg.context == "stranger" else (),
    )


def learn(
    cfg: Config,
    step: int,
    levels: Levels,
    tree: Tree,
    judged: Judged,
    *,
    seed: int,
    stale: Callable[[str], Stale | None] = lambda name: None,
) -> dict[str, float]:
    """One step of the levels whose turn it is. `stale` says of each what corrects turns that older weights have said,
    if they have."""
    metrics: dict[str, float] = {}
    learning = turn_of(cfg, step)
    advantages_N = torch.zeros(len(tree.turns))
    for level, mine_N in levels.turns(tree):
        name, settings = level.name, cfg.level(level.name)
        if name not in learning or not mine_N.any():
            continue
        found_N = compared(settings, tree, judged.value_N, mine_N, judged.expected_N)
        advantages_N += found_N
        metrics[f"{name}/advantage_std"] = float(found_N[mine_N].std(correction=0))
        if level.value is not None and settings.baseline == "value":
            given = (judged.value_N[mine_N], judged.expected_N[mine_N])
            told = learn_value(
                level.value, settings, tree.of(mine_N), *given, tokens_per_pass=cfg.tokens_per_pass, seed=seed
            )
            metrics |= {f"{name}/{key}": number for key, number in told.items()}
    for name in learning:
        level = levels.solver if name == SOLVER or levels.coach is None else levels.coach
        if level.policy is None or name not in judged.rows:
            continue
        learned = learn_policy(
            level.policy,
            cfg.level(name),
            judged.rows[name],
            advantages_N,
            tokens_per_pass=cfg.tokens_per_pass,
            seed=seed,
            stale=stale(name),
        )
        metrics |= {key.replace("policy/", f"{name}/", 1): number for key, number in learned.items()}
    if levels.average is not None:
        levels.average.update()
    return metrics


def engines(cfg: Config, levels: Levels) -> dict[str, Engine]:
    """Who speaks, and how long; one engine where both levels are the same weights."""
    ahead = cfg.asynchronous.max_staleness
    found = {SOLVER: Engine(levels.solver.actor.sampler, cfg.solver.sampling, ahead)}
    if levels.coach is not None and levels.coach.actor.sampler is not levels.solver.actor.sampler:
        found[COACH] = Engine(levels.coach.actor.sampler, cfg.coach.sampling, ahead)
    return found


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
        tokens += (remarks * coach if told else 0) + width * solver * (2 if cfg.credit.gap else 1)
    return cfg.tasks_per_step * tokens
