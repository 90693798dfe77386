"""Language models as controllers: GRPO or PPO on the return of an environment that speaks in numbers.

Every step of an episode is a prompt of its own, the observation as text, and its answer an action (Gymnasium, or any
other environment of ours). Episodes are played by the policy that learns, over all their steps; those of a task start
from the same state. Credit is assigned to whole answers. GRPO compares what siblings earned, of an episode or from a
step on; PPO has a critic of states that reads the numbers (a small perceptron) or the words (a value model), and
generalised advantage estimation over the steps of the environment.

With `plan_every` n a second role, the planner, writes a goal every n steps, which stays in the controller's prompt
until the next one. It learns as the controller does, in a semi-Markov decision process (Sutton, Precup and Singh,
1999): what a goal earned is what the next n steps did, discounted, and what follows counts γ^n.

Imitating a data set's actions, which the source of this recipe called reinforcement learning, is `grpo` on its rows
with a reward; the off-policy critic of utterances is `archer --env gymnasium:…`. docs/algorithms/control.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from echelon.config import LoraConfig, ModelConfig, OptimConfig, SamplingConfig, TaskConfig, demand, require
from echelon.data.packing import pack
from echelon.envs import EnvSpec
from echelon.envs.gymnasium import PREFIX
from echelon.errors import ConfigError
from echelon.models.mlp import ValueMlp
from echelon.ops.masked import explained_variance
from echelon.rollout.ahead import Level, Played, Player, Rollouts, Run, check_ahead
from echelon.rollout.control import (
    CONTROLLER,
    GOAL_END,
    PLANNER,
    QUESTION,
    Controllers,
    Decisions,
    Seen,
    decisions,
    observed,
    returns_to_go,
    with_critic,
    with_siblings,
)
from echelon.rollout.control_critics import Critic, Fitting, TextCritic, VectorCritic
from echelon.rollout.control_prompts import prompt_settings
from echelon.rollout.evaluate import rollout_metrics
from echelon.rollout.learners import open_value
from echelon.rollout.memory import Engine, Plan
from echelon.rollout.rewards import Rewards, open_rewards, open_tasks
from echelon.rollout.roles import Role, collect, decoders
from echelon.rollout.setup import Actor, describe, model_path, open_actor, set_threads, task_batch
from echelon.rollout.untrained import untrained
from echelon.seeds import derive_seed
from echelon.train import dist
from echelon.train.checkpoint import Checkpoints, Saveable
from echelon.train.clock import phase
from echelon.train.learner import Learner, Weights
from echelon.train.log import Log, episode_rows
from echelon.train.policy import PolicyConfig, starting_policy, update_policy
from echelon.train.stale import AsyncConfig
from echelon.types import Episode, Turn


@dataclass(frozen=True, kw_only=True)
class Config(TaskConfig):
    """Settings of control."""

    method: Literal["ppo", "grpo"] = "ppo"
    """What an answer is compared with: what a critic expected (ppo), or what siblings earned (grpo)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The controller: a model folder, an adapter's folder, a run directory or a hub id."""
    untrained: bool = False
    """Begin with random weights: of model.path only config.json and the tokenizer are read."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """An adapter that learns in place of a model's weights; KL is then to the model without it."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_tokens=16))
    """How answers are drawn."""
    steps: int = 100
    """Training steps; each plays episodes, then updates who learns."""
    tasks_per_step: int = 8
    """Tasks per step: the states that episodes begin in."""
    group_size: int = 4
    """Episodes per task, all from the same state."""
    max_turns: int = 1000
    """An episode is cut off (truncated, not terminated) after this many answers."""
    error_budget: float = 0.1
    """Fraction of a step's episodes that may fail before the run stops."""
    gamma: float = 0.99
    """Discount per step of the environment."""
    lam: float = 0.95
    """GAE's λ, per decision: 1 trusts what was earned, 0 the value of the next state (ppo)."""
    whiten: bool = True
    """Give the advantages of each level mean 0 and deviation 1 over the decisions of a step (ppo)."""
    credit: Literal["turn", "episode"] = "turn"
    """What is compared with siblings: what was earned from the same step on, or in the whole episode (grpo)."""
    scale: Literal["none", "std", "batch_std"] = "std"
    """Divide by the deviation of what is compared, or of all returns of the step (batch_std), or do not (grpo)."""
    value: Literal["vector", "text"] = "vector"
    """What the critic reads: the numbers of the observation, or the words of the prompt (ppo)."""
    value_path: str = ""
    """What a critic of words starts as: a reward model or a language model. Empty: the controller."""
    value_hidden: tuple[int, ...] = (64, 64)
    """Widths of the layers of a critic of numbers."""
    value_optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of the critic."""
    value_epochs: int = 8
    """Passes of the critic over the decisions of a step."""
    value_minibatches: int = 8
    """Optimizer steps of the critic per pass."""
    warmup_steps: int = 0
    """Steps in which only the critic learns."""
    plan_every: int = 0
    """Steps of the environment for which a goal stays in force, said by the planner; 0 is no planner."""
    planner: ModelConfig = field(default_factory=ModelConfig)
    """Who says goals. Without a path: the controller, whose weights then learn from both levels."""
    plan_tokens: int = 16
    """Longest goal, in tokens."""
    plan_question: str = QUESTION
    """What the planner is asked, after the controller's prompt; {steps} is plan_every."""
    learns: Literal["both", "controller", "planner"] = "both"
    """Which level learns, where there are two. The other still acts."""
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig(epochs=2, minibatches=4))
    """How each level learns."""
    asynchronous: AsyncConfig = field(default_factory=AsyncConfig)
    """Playing the coming steps while one trains."""
    most_decisions: int = 0
    """Most decisions of a level that a step learns from, drawn at random; 0 takes all. Credit is assigned to all."""
    eval_every: int = 0
    """Steps between evaluations, the last step included: tasks of the test split, every level at temperature 0."""
    eval_episodes: int = 20
    """Episodes per evaluation."""
    tokens_per_pass: int = 8192
    """Most tokens, padding included, in one forward and backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "model.path")
        demand(self, "env", bool(self.env), "states follow from actions only there. Give --env gymnasium:CartPole-v1.")
        counts = ("steps", "tasks_per_step", "group_size", "max_turns", "value_epochs", "value_minibatches")
        for name in (*counts, "plan_tokens", "eval_episodes", "tokens_per_pass"):
            demand(self, name, getattr(self, name) >= 1, "it counts something there must be one of. Give 1 or more.")
        demand(self, "error_budget", 0 <= self.error_budget < 1, "it is a fraction of the episodes. Give 0 to 0.99.")
        for name in ("gamma", "lam"):
            demand(self, name, 0 <= getattr(self, name) <= 1, "a discount lies between 0 and 1.")
        wide = bool(self.value_hidden) and all(width >= 1 for width in self.value_hidden)
        demand(self, "value_hidden", wide, "a layer has a width. Give one or more, such as 64 64.")
        for name in ("warmup_steps", "plan_every", "most_decisions", "eval_every"):
            demand(self, name, getattr(self, name) >= 0, "it is a count. Give 0 for none.")
        self._check_method()
        self._check_levels()
        for model in (self.model, self.planner):
            now = "eval_every" if self.eval_every else ""
            check_ahead(self, self.asynchronous, model, self.lora, self.sampling, now=now)

    def _check_method(self) -> None:
        grouped = self.method != "grpo" or self.group_size >= 2
        because = "siblings are compared, so there must be at least 2. Raise it, or use method = ppo."
        demand(self, "group_size", grouped, because)
        because = "there is no critic that could learn meanwhile. Use method = ppo, or leave it out."
        demand(self, "warmup_steps", not self.warmup_steps or self.method == "ppo", because)
        because = "only a critic of words is a model. Use method = ppo and value = text, or leave it out."
        words = self.method == "ppo" and self.value == "text"
        demand(self, "value_path", not self.value_path or words, because)
        because = "there are no texts here to imitate. Leave it out, or use grpo or ppo."
        demand(self, "policy.ptx_coef", not self.policy.ptx_coef, because)

    def _check_levels(self) -> None:
        one = self.plan_every > 0 or self.learns != "planner"
        demand(self, "learns", one, "there is no planner. Give plan_every the steps for which a goal stays in force.")
        because = "nobody would ask it. Give plan_every the steps for which a goal stays in force, or leave it out."
        demand(self, "planner.path", self.plan_every > 0 or not self.planner.path, because)
        asked = self.plan_question.strip() != ""
        demand(self, "plan_question", asked, "the planner has to be asked. Leave it out for the usual question.")


def main(cfg: Config) -> None:
    """Train; the run directory holds checkpoints, metrics.jsonl and episodes.jsonl."""
    cfg = asked_as_learned(cfg)
    levels = open_both(cfg)
    env = open_tasks(cfg, levels.players.controller.renderer)
    rewards = open_rewards(cfg, device=cfg.model.device, tokens_per_pass=cfg.tokens_per_pass)
    set_threads(cfg.threads, levels.actors["actor"].module)
    first = env.tasks("train")[0]
    critic = open_critic(cfg, levels, len(observed(env.make(first)))) if cfg.method == "ppo" else None
    parts = levels.parts() if critic is None else {**levels.parts(), "value": critic.learner}
    if cfg.dry_run:
        modules = {name: actor.module for name, actor in levels.actors.items()}
        answers = cfg.tasks_per_step * cfg.group_size * cfg.max_turns
        ahead = cfg.asynchronous.max_staleness
        engines = {name: Engine(actor.sampler, cfg.sampling, ahead) for name, actor in levels.actors.items()}
        return describe(
            modules if critic is None else {**modules, "value": critic.learner.module},
            tokens_per_step=answers * cfg.sampling.max_tokens,
            plan=Plan({**parts, **rewards.modules()}, cfg.dist, cfg.tokens_per_pass, engines),
        )

    play = player(cfg, env, rewards, levels.players)
    rollouts = Rollouts(cfg.asynchronous, levels.acting(cfg), play, steps=cfg.steps, read=Found.from_json)
    out, parts = Path(cfg.out), parts | rollouts.parts()
    checkpoints = Checkpoints(out, config=cfg, keep_last=cfg.keep_last, resume=cfg.resume)
    with checkpoints, rollouts:
        start = checkpoints.restore(parts)[0] if cfg.resume else 0
        rollouts.publish()
        if not cfg.resume:
            checkpoints.save(0, parts)
        with Log(out, total=cfg.steps, start=start, name="control", config=cfg.log, settings=cfg) as log:
            for step in range(start, cfg.steps):
                seed = derive_seed(cfg.seed, step)
                torch.manual_seed(seed)  # dropout, where an adapter has any
                found = rollouts.take(step)
                episodes, given = found.episodes, found.metrics | rollouts.metrics()

                judged = judge(cfg, levels, critic, episodes, found.seen)
                learned = judged.metrics | fit(cfg, critic, judged, seed=seed)
                if step >= cfg.warmup_steps:
                    learned |= learn(cfg, levels, judged, rollouts, seed=seed)
                rollouts.publish()  # also while warming up: caches are forgotten, as a resumed run's would have been
                evaluated = evaluate(cfg, step, levels, env, rewards)

                log.metrics(step, {**rollout_metrics(episodes), **given, **learned, **evaluated})
                decode = decoders(*levels.players.roles())
                log.episodes(step, episode_rows(episodes[:4], decode=decode, per_turn=judged.columns()))
                if step + 1 == cfg.steps or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                    checkpoints.save(step + 1, parts)


def asked_as_learned(cfg: Config) -> Config:
    """The settings with how prompts are written: as the run that the model is of learned to read them, unless
    env_settings say it."""
    if not cfg.env.startswith(PREFIX) or cfg.untrained:
        return cfg
    written = prompt_settings(cfg.env, cfg.env_settings, folder=model_path(cfg.model.path))
    return replace(cfg, env_settings=written)


@dataclass(slots=True)
class Found(Played):
    """What a step has played, and what was seen in its episodes, by the seed of each."""

    seen: dict[int, Seen] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON types."""
        return {**Played.to_json(self), "seen": {seed: seen.to_json() for seed, seen in self.seen.items()}}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Found:
        """What `to_json` made this of."""
        played = Played.from_json(saved)
        seen = {int(seed): Seen.from_json(each) for seed, each in saved["seen"].items()}
        return cls(played.episodes, played.metrics, seen)


def player(cfg: Config, env: EnvSpec, rewards: Rewards, players: Controllers) -> Player[Found]:
    """Plays the episodes of a step, and has them judged."""
    tasks = env.tasks("train")

    def play(roles: Mapping[str, Role], step: int, run: Run) -> Found:
        acting = players.through({name: role.sampler for name, role in roles.items()})
        loop, seed = acting.play(env.make, max_turns=cfg.max_turns), derive_seed(cfg.seed, step)
        chosen = task_batch(tasks, step, cfg.tasks_per_step, seed=cfg.seed)
        siblings, budget = cfg.group_size, cfg.error_budget
        episodes = run(collect(chosen, loop, seed=seed, siblings=siblings, error_budget=budget))
        return Found(episodes, rewards.add(episodes), dist.union(acting.take()))

    return play


@dataclass(slots=True)
class Levels:
    """Who acts, and the weights that learn: those of the controller, and of the planner where it has its own."""

    players: Controllers
    actors: dict[str, Actor]
    """By the part of a checkpoint that holds them: actor, planner."""
    learners: dict[str, Learner]
    references: dict[str, nn.Module | None]
    """What KL is to."""

    def parts(self) -> dict[str, Saveable]:
        """What a checkpoint holds, also of a level that does not learn."""
        parts: dict[str, Saveable] = {**self.learners}
        for name, reference in self.references.items():
            if reference is not None and reference is not self.actors[name].module:
                parts[f"{name}_reference" if len(self.actors) > 1 else "reference"] = Weights(reference)
        return parts

    def acting(self, cfg: Config) -> dict[str, Level]:
        """Which role acts with which weights: a planner without its own with the controller's."""
        roles = {"actor": CONTROLLER, "planner": PLANNER}
        own = {roles[part]: Level(actor, self.learners[part], cfg.sampling) for part, actor in self.actors.items()}
        return {role.name: own.get(role.name, own[CONTROLLER]) for role in self.players.roles()}

    def publish(self) -> None:
        """Give the engines the weights of now."""
        for name, learner in self.learners.items():
            self.actors[name].sampler.load(learner.weights(), learner.version)

    def speakers(self, cfg: Config) -> dict[str, list[str]]:
        """For each set of weights that learns, the roles that it learns from."""
        learning = {CONTROLLER, PLANNER} if cfg.learns == "both" else {cfg.learns}
        roles = [role.name for role in self.players.roles()]
        owner = {role: "planner" if role == PLANNER and "planner" in self.actors else "actor" for role in roles}
        return {
            part: found
            for part in self.actors
            if (found := [role for role in roles if owner[role] == part and role in learning])
        }


@phase("evaluation")
def evaluate(cfg: Config, step: int, levels: Levels, env: EnvSpec, rewards: Rewards) -> dict[str, float]:
    """What episodes of the test split earn when every level says what it likes best, as "eval/…"; the same tasks every
    time."""
    if not cfg.eval_every or not (step + 1 == cfg.steps or (step + 1) % cfg.eval_every == 0):
        return {}
    players, tasks = levels.players.greedy(), env.tasks("test")
    if cfg.asynchronous.max_staleness:
        levels.publish()  # what plays ahead are others
    chosen = [tasks[place % len(tasks)] for place in range(cfg.eval_episodes)]
    play, seed = players.play(env.make, max_turns=cfg.max_turns), derive_seed(cfg.seed, "evaluation")
    episodes = asyncio.run(collect(chosen, play, seed=seed, error_budget=cfg.error_budget))
    told = rewards.add(episodes) | rollout_metrics(episodes)
    levels.publish()
    return {f"eval/{name}": number for name, number in told.items()}


def open_both(cfg: Config) -> Levels:
    """The controller, and the planner if there is one, as they start."""
    if cfg.untrained:
        with untrained(cfg.model, seed=cfg.seed) as model:
            controller = open_actor(model, cfg.sampling, lora=cfg.lora, name=CONTROLLER)
    else:
        controller = open_actor(cfg.model, cfg.sampling, lora=cfg.lora, name=CONTROLLER)
    actors, planner = {"actor": controller}, None
    if cfg.plan_every:
        above = controller
        if cfg.planner.path:
            beside = controller.sampler
            above = open_actor(cfg.planner, cfg.sampling, lora=cfg.lora, name=PLANNER, beside=beside)
            actors["planner"] = above
        params = replace(above.role.params, max_tokens=cfg.plan_tokens, stop=(GOAL_END,))
        planner = Role(PLANNER, above.sampler, above.role.renderer, params)
    updates = max(0, cfg.steps - cfg.warmup_steps) * cfg.policy.epochs * cfg.policy.minibatches
    learners = {
        name: Learner(actor.module, cfg.policy.optim, total_steps=updates, name=name, tokenizer=actor.tokenizer)
        for name, actor in actors.items()
    }
    references = {name: starting_policy(actor.module, cfg.policy) for name, actor in actors.items()}
    players = Controllers(controller.role, planner, plan_every=cfg.plan_every, question=cfg.plan_question)
    return Levels(players, actors, learners, references)


def open_critic(cfg: Config, levels: Levels, numbers: int) -> Critic:
    """The critic as it starts; `numbers` is how many an observation has. Raises ConfigError where it cannot read."""
    fitting = Fitting(
        optim=cfg.value_optim,
        epochs=cfg.value_epochs,
        minibatches=cfg.value_minibatches,
        tokens_per_pass=cfg.tokens_per_pass,
        total_steps=cfg.steps * cfg.value_epochs * cfg.value_minibatches,
    )
    if cfg.value == "vector":
        if not numbers:
            raise ConfigError(f"value = vector: {cfg.env} shows words and no numbers. Use value = text.")
        seed = derive_seed(cfg.seed, "critic")
        return VectorCritic(ValueMlp(numbers, hidden=cfg.value_hidden, seed=seed), fitting)
    known = [actor.tokenizer.get_vocab() for actor in levels.actors.values()]
    if any(words != known[0] for words in known):
        raise ConfigError(
            f"value = text: it reads the tokens of both levels, and the planner ({cfg.planner.path}) has others than "
            "the controller. Use value = vector, or a planner with the same tokenizer."
        )
    controller = levels.actors["actor"]
    module = open_value(controller, cfg.value_path, model=cfg.model, lora=cfg.lora, seed=cfg.seed)
    return TextCritic(module, fitting)


@dataclass(slots=True)
class Judged:
    """The decisions of a step, level by level, and what came of them."""

    levels: list[Decisions]
    advantages: list[Float[Tensor, "S"]]
    returns: list[Float[Tensor, "S"]]
    """What a critic is to learn; without one, what was earned from there on."""
    values: list[Float[Tensor, "S"]]
    """What the critic had expected; 0 without one."""
    metrics: dict[str, float]

    def columns(self) -> dict[str, list[tuple[Turn, float]]]:
        """Numbers per turn, for the transcript."""
        found = {"advantage": self.advantages, "return": self.returns, "value": self.values}
        turns = [turn for level in self.levels for turn in level.turns]
        return {name: [*zip(turns, torch.cat(each).tolist(), strict=True)] for name, each in found.items()}


def judge(
    cfg: Config, levels: Levels, critic: Critic | None, episodes: Sequence[Episode], seen: Mapping[int, Seen]
) -> Judged:
    """What every decision of both levels was worth. Failed episodes are left out."""
    keys = [number // cfg.group_size for number, episode in enumerate(episodes) if episode.ending != "failed"]
    played = [episode for episode in episodes if episode.ending != "failed"]
    found = [decisions(played, seen, role.name, gamma=cfg.gamma) for role in levels.players.roles()]
    earned = [returns_to_go(level, gamma=cfg.gamma) for level in found]
    if critic is None:
        compared = partial(with_siblings, keys_E=keys, whose=cfg.credit, scale=cfg.scale)
        advantages = [compared(level, earned_S) for level, earned_S in zip(found, earned, strict=True)]
        returns, values = earned, [torch.zeros_like(level.rewards_S) for level in found]
    else:
        critic.look(found, earned)
        values, final_E = [critic.values(level) for level in found], critic.finals(played, seen)
        pairs = [
            with_critic(level, values_S, final_E, gamma=cfg.gamma, lam=cfg.lam)
            for level, values_S in zip(found, values, strict=True)
        ]
        advantages, returns = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    metrics: dict[str, float] = {}
    for level, advantages_S, values_S, earned_S in zip(found, advantages, values, earned, strict=True):
        metrics |= {f"{level.role}/decisions": float(len(level.turns))}
        metrics |= {f"{level.role}/advantage_std": float(advantages_S.std(correction=0))}
        if critic is not None:
            everywhere_S = torch.ones_like(values_S, dtype=torch.bool)
            metrics[f"{level.role}/explained_variance"] = float(explained_variance(values_S, earned_S, everywhere_S))
    return Judged(found, advantages, returns, values, metrics)


def fit(cfg: Config, critic: Critic | None, judged: Judged, *, seed: int) -> dict[str, float]:
    """The critic's optimizer steps."""
    if critic is None:
        return {}
    places = [drawn(cfg, level, seed=seed) for level in judged.levels]
    chosen = [level.only(places_K) for level, places_K in zip(judged.levels, places, strict=True)]
    returns = [returns_S[places_K] for returns_S, places_K in zip(judged.returns, places, strict=True)]
    return critic.fit(chosen, returns, seed=seed)


def learn(cfg: Config, levels: Levels, judged: Judged, rollouts: Rollouts[Found], *, seed: int) -> dict[str, float]:
    """The optimizer steps of every set of weights that learns, on the decisions of the roles that speak with it."""
    logged: dict[str, float] = {}
    for part, roles in levels.speakers(cfg).items():
        turns: list[Turn] = []
        weights: list[Tensor] = []
        for level, advantages_S in zip(judged.levels, judged.advantages, strict=True):
            if level.role in roles:
                places_K = drawn(cfg, level, seed=seed)
                turns += level.only(places_K).turns
                weights.append(scaled(cfg, advantages_S)[places_K])
        batch = pack(turns)
        batch.advantages = batch.spread(torch.cat(weights))
        learned = update_policy(
            levels.learners[part],
            batch,
            settings=cfg.policy,
            reference=levels.references[part],
            temperature=cfg.sampling.temperature,
            tokens_per_pass=cfg.tokens_per_pass,
            seed=derive_seed(seed, part),
            stale=rollouts.stale(CONTROLLER if part == "actor" else PLANNER),
        )
        logged |= learned if part == "actor" else {f"{part}/{name[7:]}": number for name, number in learned.items()}
    return logged


def drawn(cfg: Config, level: Decisions, *, seed: int) -> Tensor:
    """The places of the decisions of a level that this step learns from, in order."""
    count = len(level.turns)
    if not cfg.most_decisions or count <= cfg.most_decisions:
        return torch.arange(count)
    draw = torch.Generator().manual_seed(derive_seed(seed, "decisions", level.role))
    return torch.randperm(count, generator=draw)[: cfg.most_decisions].sort().values


def scaled(cfg: Config, advantages_S: Float[Tensor, "S"]) -> Float[Tensor, "S"]:
    """Advantages as the policy learns from them."""
    if cfg.method == "grpo" or not cfg.whiten:
        return advantages_S
    return (advantages_S - advantages_S.mean()) / (advantages_S.std(correction=0) + 1e-8)
