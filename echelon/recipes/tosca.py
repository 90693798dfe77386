"""ToSCA: a strategist chooses how to reply, a responder writes the reply, and both learn from the same dialogues.

The coupled loop of ToSCA (arXiv 2608.21969). The high level is a language model read as Q over strategies; it learns by
double DQN towards a target network that lags. The low level writes the reply that the strategy in its prompt asks for,
and learns by PPO from the satisfaction with that reply. A step plays dialogues, strategies chosen ε-greedily or by
softmax of Q; the decisions go into a replay from which the strategist learns, the replies teach the responder.

`mode` says who learns: both in every step (joint), one in each, in turns (alternate), one only (upper, lower), or one
after the other without any exchange, as the published code did (sequential). The level that does not learn still acts.
`reward_share_weight` w lets each level's reward count for the other: r_L + w·A_H, and r_H + w·mean r_L.

Deviations from the paper, told in docs/algorithms/tosca.md: everything is on-line unless `offline` mixes recorded
decisions in; Q explores; double DQN; a dialogue that is cut off bootstraps; satisfaction is paid at a reply's last
token; the two perplexity terms are off; before its first update the value model is shifted to the mean return.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from echelon.config import DataConfig, LoraConfig, ModelConfig, SamplingConfig, TaskConfig, demand, require
from echelon.data.candidates import CandidateReplay, Choice
from echelon.data.strategies import TransitionConfig, file_rewards, load_transitions, transitions_to_choices
from echelon.envs import EnvSpec
from echelon.errors import ConfigError
from echelon.models.options import Reading
from echelon.ops import bellman
from echelon.ops.options import going_on
from echelon.rollout.ahead import HasWeights, Level, Player, Rollouts, Run, check_ahead
from echelon.rollout.candidates import Offered
from echelon.rollout.dialogue import (
    RESPONDER,
    STRATEGIST,
    Dialogists,
    advantages,
    dialogue_metrics,
    env_inventory,
    spelled,
    strategy_choices,
    strategy_rows,
)
from echelon.rollout.learners import open_value, ptx_batches
from echelon.rollout.levels import Kept, chooser, chooser_copy, learned_reading, open_levels, strategist_path
from echelon.rollout.memory import Engine, Plan
from echelon.rollout.rewards import Rewards, open_rewards, open_tasks
from echelon.rollout.roles import Role, collect, decoders
from echelon.rollout.setup import Actor, describe, set_threads, task_batch
from echelon.sampling.candidates import Offer
from echelon.seeds import derive_seed
from echelon.text.dialogue import Inventory
from echelon.train import dist
from echelon.train.checkpoint import Checkpoints, Saveable
from echelon.train.clock import phase
from echelon.train.learner import average
from echelon.train.log import Log, episode_rows
from echelon.train.responder import Judged, Lower, ResponderConfig
from echelon.train.stale import AsyncConfig, Stale
from echelon.train.strategy import StrategyConfig, Upper
from echelon.types import Episode, Turn


@dataclass(frozen=True, kw_only=True)
class Config(TaskConfig):
    """Settings of ToSCA."""

    mode: Literal["joint", "alternate", "upper", "lower", "sequential"] = "joint"
    """Who learns: both at every step, one of them in turns, one only, or first the responder and then the strategist,
    without any exchange: strategies are then drawn at random throughout, as if they came from a data set."""
    cycle: str = "1:1"
    """Steps of the strategist : steps of the responder. Alternate: of each cycle, in this order. Sequential: of the
    run, the responder's first."""
    choose: Literal["learned", "random", "none"] = "learned"
    """Who chooses: a strategist that learns, chance, or nobody, so that the responder is told no strategy."""
    strategist: ModelConfig = field(default_factory=ModelConfig)
    """What Q is read from: a model, or a run of echelon strategist or tosca. Without a path, what the responder is."""
    responder: ModelConfig = field(default_factory=ModelConfig)
    """Who writes: a model, or a run of echelon sft, responder or tosca."""
    shared: bool = False
    """The levels are two adapters on one base, the responder's: new ones (lora.rank), or those that the paths name."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters, one for each level, that learn in place of the models' weights."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How replies are drawn."""
    strategies: tuple[str, ...] = ()
    """What the strategist chooses from: esconv, daily_dialog, or two or more names; empty takes the environment's."""
    options: tuple[str, ...] = ()
    """What each strategy is chosen by; empty for (1), (2), and so on."""
    steps: int = 100
    """Training steps; each plays dialogues and updates who learns in it."""
    episodes_per_step: int = 16
    """Dialogues played per step."""
    max_turns: int = 20
    """A dialogue is cut off (truncated, not terminated) after this many replies."""
    error_budget: float = 0.1
    """Fraction of a step's dialogues that may fail, such as by a judge that does not answer, before the run stops."""
    pick: Literal["epsilon", "softmax"] = "epsilon"
    """How strategies are chosen while learning: the best, but any with probability epsilon; or by softmax of Q."""
    epsilon: float = 0.2
    """Probability of a random strategy at the first step; it falls linearly (pick = epsilon)."""
    epsilon_final: float = 0.05
    """Probability of a random strategy at the last step."""
    temperature: float = 0.5
    """Q is divided by it (pick = softmax)."""
    reward_share_weight: float = 0.0
    """How much each level's reward counts for the other: r_L + w·A_H at a reply's last token, and r_H + w·mean r_L."""
    high: StrategyConfig = field(default_factory=StrategyConfig)
    """How the strategist learns."""
    high_updates: int = 8
    """Optimizer steps of the strategist per step."""
    high_batch: int = 64
    """Decisions per optimizer step of the strategist."""
    replay_capacity: int = 10_000
    """Decisions kept."""
    offline: DataConfig = field(default_factory=DataConfig)
    """Recorded decisions (transitions, as echelon strategist reads them) that the strategist goes on learning from."""
    columns: TransitionConfig = field(default_factory=TransitionConfig)
    """How their columns are called."""
    offline_fraction: float = 0.5
    """Part of the strategist's decisions that are recorded ones (offline.path)."""
    low: ResponderConfig = field(default_factory=ResponderConfig)
    """How the responder learns."""
    value_path: str = ""
    """What the value model starts as: a reward model or a language model. Empty: the responder."""
    ptx: DataConfig = field(default_factory=DataConfig)
    """Conversations whose answers the responder goes on learning to say, weighted by low.policy.ptx_coef."""
    ptx_rows: int = 8
    """Conversations that join each optimizer step of the responder."""
    eval_every: int = 0
    """Steps between evaluations, the last step included: tasks of the test split, strategies as Q likes them best."""
    eval_episodes: int = 60
    """Dialogues per evaluation."""
    asynchronous: AsyncConfig = field(default_factory=AsyncConfig)
    """Playing the coming steps while one trains."""
    tokens_per_pass: int = 4096
    """Most tokens, padding included, in one forward and backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "responder.path")
        demand(self, "env", bool(self.env), "a dialogue needs a user who answers. Give --env dialogue, or your own.")
        counts = ("steps", "episodes_per_step", "max_turns", "high_updates", "high_batch", "replay_capacity")
        for name in (*counts, "ptx_rows", "eval_episodes", "tokens_per_pass"):
            demand(self, name, getattr(self, name) >= 1, "it counts something there must be one of. Give 1 or more.")
        demand(self, "error_budget", 0 <= self.error_budget < 1, "it is a fraction of the dialogues. Give 0 to 0.99.")
        for name in ("epsilon", "epsilon_final"):
            demand(self, name, 0 <= getattr(self, name) <= 1, "it is a probability. Give 0.2, or 0 never to explore.")
        demand(self, "temperature", self.temperature > 0, "Q is divided by it. Give 0.5, or pick = epsilon.")
        demand(self, "eval_every", self.eval_every >= 0, "it counts steps. Give 0 not to evaluate.")
        demand(self, "offline_fraction", 0 <= self.offline_fraction < 1, "it is a part of a batch. Give 0 to 0.9.")
        shares = 0 <= self.reward_share_weight < float("inf")
        demand(self, "reward_share_weight", shares, "levels would work against each other. Give 0 or more.")
        self._check_mode()
        self._check_blocks()
        for model in (self.strategist, self.responder):
            now = "eval_every" if self.eval_every else ""
            check_ahead(self, self.asynchronous, model, self.lora, self.sampling, now=now)

    def _check_mode(self) -> None:
        parse_cycle(self.cycle)
        chooses = self.choose == "learned" or self.mode == "lower"
        because = f"choose = {self.choose}, so there is no strategist that could learn. Use --mode lower."
        demand(self, "mode", chooses, because)
        both = not self.reward_share_weight or self.choose == "learned"
        because = f"choose = {self.choose}, so there is no Q to share. Give 0."
        demand(self, "reward_share_weight", both, because)
        exchange = not (self.reward_share_weight and self.mode == "sequential")
        demand(self, "reward_share_weight", exchange, "mode = sequential exchanges nothing. Give 0, or another mode.")
        kept = not (self.reward_share_weight and self.low.shaping.whiten)
        because = "low.shaping.whiten would take out again what is shared. Leave one of the two out."
        demand(self, "reward_share_weight", kept, because)
        two = not self.shared or self.choose == "learned"
        demand(self, "shared", two, f"choose = {self.choose}, so there is one level only. Leave shared out.")

    def _check_blocks(self) -> None:
        many = self.low.policy.minibatches <= self.episodes_per_step
        because = f"some would have none of a step's {self.episodes_per_step} dialogues. Give that many, or fewer."
        demand(self, "low.policy.minibatches", many, because)
        used = not self.ptx.path or self.low.policy.ptx_coef > 0
        demand(self, "ptx.path", used, "these rows would count nothing. Give low.policy.ptx_coef a weight.")
        there = not self.low.policy.ptx_coef or bool(self.ptx.path)
        demand(self, "low.policy.ptx_coef", there, "there is nothing to weigh. Give ptx.path the conversations.")
        plain = not (self.shared and self.lora.modules_to_save)
        because = "with shared = true there is one of each layer, so no level can train it in full. Leave it out."
        demand(self, "lora.modules_to_save", plain, because)


def parse_cycle(cycle: str) -> tuple[int, int]:
    """Steps of the strategist, steps of the responder. Raises ConfigError unless both are 1 or more."""
    upper, colon, lower = cycle.partition(":")
    if not (colon and upper.isdigit() and lower.isdigit() and int(upper) and int(lower)):
        raise ConfigError(f"cycle = {cycle}: expected steps of the strategist : steps of the responder, such as 3:1.")
    return int(upper), int(lower)


def learns(cfg: Config, step: int) -> tuple[bool, bool]:
    """Whether the strategist, and whether the responder, learns in this step."""
    upper, lower = parse_cycle(cfg.cycle)
    if cfg.mode == "alternate":
        above = step % (upper + lower) < upper
    elif cfg.mode == "sequential":
        above = step * (upper + lower) >= cfg.steps * lower
    else:
        return cfg.mode in ("joint", "upper"), cfg.mode in ("joint", "lower")
    return above, not above


def main(cfg: Config) -> None:
    """Train; the run directory holds checkpoints, metrics.jsonl and episodes.jsonl."""
    env, rewards = open_tasks(cfg), open_rewards(cfg, device=cfg.responder.device, tokens_per_pass=cfg.tokens_per_pass)
    levels = open_both(cfg, env)
    players = levels.players
    set_threads(cfg.threads, levels.responder.module)
    if cfg.dry_run:
        sampled = cfg.episodes_per_step * cfg.max_turns * cfg.sampling.max_tokens
        ahead = cfg.asynchronous.max_staleness
        engines = {RESPONDER: Engine(levels.responder.sampler, cfg.sampling, ahead)}
        copies = {} if levels.upper is None else {STRATEGIST: (levels.upper.online.lm, ahead)}
        plan = Plan({**levels.parts(), **rewards.modules()}, cfg.dist, cfg.tokens_per_pass, engines, copies)
        return describe(levels.modules(), tokens_per_step=sampled, plan=plan)

    play, out = player(cfg, env, rewards, players), Path(cfg.out)
    rollouts = Rollouts(cfg.asynchronous, levels.acting(cfg), play, steps=cfg.steps, read=Offered.from_json)
    parts = levels.parts() | rollouts.parts()
    checkpoints = Checkpoints(out, config=cfg, keep_last=cfg.keep_last, resume=cfg.resume)
    with checkpoints, rollouts:
        start = checkpoints.restore(parts)[0] if cfg.resume else 0
        rollouts.publish()
        if not cfg.resume:
            checkpoints.save(0, parts)
        with Log(out, total=cfg.steps, start=start, name="tosca", config=cfg.log, settings=cfg) as log:
            for step in range(start, cfg.steps):
                seed = derive_seed(cfg.seed, step)
                torch.manual_seed(seed)  # dropout, where an adapter has any
                found = rollouts.take(step)
                episodes, offers, given = found.episodes, found.offers, found.metrics | rollouts.metrics()
                told = dialogue_metrics(episodes, offers, players.inventory if players.strategist else None)

                learned, columns = learn(cfg, step, levels, episodes, offers, rollouts.stale(RESPONDER))
                rollouts.publish()  # also a level that rests forgets what it has cached, as a resumed run would have
                evaluated = evaluate(cfg, step, levels, env, rewards)

                log.metrics(step, {**told, **given, **learned, **evaluated})
                decode = decoders(players.strategist, players.responder)
                rows = episode_rows(episodes[:8], decode=decode, per_turn=columns)
                log.episodes(step, strategy_rows(rows, episodes[:8], offers, players.inventory))
                if step + 1 == cfg.steps or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                    checkpoints.save(step + 1, parts)


def player(cfg: Config, env: EnvSpec, rewards: Rewards, players: Dialogists) -> Player[Offered]:
    """Plays the dialogues of a step, strategies chosen as that step explores, and has them judged."""
    tasks = env.tasks("train")

    def play(roles: Mapping[str, Role], step: int, run: Run) -> Offered:
        acting = players.through(roles)
        exploring = explore(cfg, step, acting)
        chosen = task_batch(tasks, step, cfg.episodes_per_step, seed=cfg.seed)
        loop, seed = acting.play(env.make, max_turns=cfg.max_turns), derive_seed(cfg.seed, step)
        episodes = run(collect(chosen, loop, seed=seed, error_budget=cfg.error_budget))
        return Offered(episodes, rewards.add(episodes) | exploring, dist.union(acting.take()))

    return play


@dataclass(slots=True)
class Levels:
    """Who plays, what learns of it, and what each level remembers."""

    players: Dialogists
    strategist: Actor | None
    responder: Actor
    upper: Upper | None
    lower: Lower | None
    """None where that level never learns, and nothing of it is shared."""
    replay: CandidateReplay
    recorded: list[Choice]
    fresh: bool
    """Whether what the strategist's values mean has not been learned yet."""

    def modules(self) -> dict[str, nn.Module]:
        """What there is in memory, for a person."""
        found = {} if self.strategist is None else {STRATEGIST: self.strategist.module}
        if self.upper is not None:
            found["target"] = self.upper.target
        found[RESPONDER] = self.responder.module
        return found if self.lower is None else {**found, "value": self.lower.online}

    def parts(self) -> dict[str, Saveable]:
        """What a checkpoint holds: both levels, also one that does not learn, and what later steps depend on."""
        parts: dict[str, Saveable] = {} if self.upper is None else {**self.upper.parts(), "replay": self.replay}
        if self.lower is None:
            return parts | {RESPONDER: Kept(self.responder.module, self.responder.tokenizer)}
        return parts | self.lower.parts()

    def acting(self, cfg: Config) -> dict[str, Level]:
        """Who plays with which weights. Who chooses by chance has none."""
        kept = Kept(self.responder.module, self.responder.tokenizer)
        below: HasWeights = kept if self.lower is None else self.lower.policy
        found, role = {RESPONDER: Level(self.responder, below, cfg.sampling)}, self.players.strategist
        if self.strategist is not None and self.upper is not None and role is not None:
            chooses = replace(self.strategist, sampler=role.sampler, role=role)
            copied = partial(chooser_copy, role, self.upper.online)
            found[STRATEGIST] = Level(chooses, self.upper.learner, cfg.sampling, copied)
        return found

    def publish(self, cfg: Config) -> None:
        """Give the engine the responder's weights of now. What chooses reads its own as they are."""
        for level in self.acting(cfg).values():
            level.actor.sampler.load(level.learner.weights(), level.learner.version)


def open_both(cfg: Config, env: EnvSpec) -> Levels:
    """Both levels as they start."""
    above, below = open_levels(
        cfg.strategist if cfg.choose == "learned" else None,
        cfg.responder,
        shared=cfg.shared,
        lora=cfg.lora,
        sampling=cfg.sampling,
        seed=cfg.seed,
    )
    strategies = env_inventory(env, cfg.strategies, cfg.options)
    path = cfg.strategist.path
    reading = learned_reading(strategist_path(path), strategies) if above is not None and path else None
    upper = None if above is None else open_upper(cfg, above, strategies, reading)
    role = None
    if cfg.choose != "none":
        by, scorer = (below, None) if above is None or upper is None else (above, upper.online)
        role = chooser(by.role, scorer, strategies, pick=cfg.pick, temperature=cfg.temperature)
    return Levels(
        players=Dialogists(role, below.role, strategies),
        strategist=above,
        responder=below,
        upper=upper,
        lower=open_lower(cfg, below) if cfg.mode != "upper" or cfg.reward_share_weight else None,
        replay=CandidateReplay(cfg.replay_capacity),
        recorded=[] if above is None else open_recorded(cfg, above, strategies),
        fresh=reading is None,
    )


def open_upper(cfg: Config, actor: Actor, strategies: Inventory, reading: Reading | None) -> Upper:
    """The strategist's learner; one that another run taught is read as it was there."""
    updates = cfg.high_updates * sum(learns(cfg, step)[0] for step in range(cfg.steps))
    return Upper(
        actor.module,
        cfg.high,
        strategies,
        spelled(actor.role, strategies),
        reading=reading,
        tokenizer=actor.tokenizer,
        total_steps=updates,
        tokens_per_pass=cfg.tokens_per_pass,
    )


def open_lower(cfg: Config, actor: Actor) -> Lower:
    """The responder's learner, its value model, and the policy it began as."""
    return Lower(
        cfg.low,
        actor.module,
        open_value(actor, cfg.value_path, model=cfg.responder, lora=cfg.lora, seed=cfg.seed),
        tokenizer=actor.tokenizer,
        temperature=cfg.sampling.temperature,
        tokens_per_pass=cfg.tokens_per_pass,
        steps=sum(learns(cfg, step)[1] for step in range(cfg.steps)),
        ptx=ptx_batches(cfg.ptx, actor, rows=cfg.ptx_rows, seed=cfg.seed),
    )


def open_recorded(cfg: Config, actor: Actor, strategies: Inventory) -> list[Choice]:
    """The recorded decisions, as the strategist reads them."""
    if not cfg.offline.path:
        return []
    rows = file_rewards(load_transitions(cfg.offline, strategies, cfg.columns, seed=cfg.seed, name="offline").train)
    chains = transitions_to_choices(rows, actor.role.renderer, strategies, actor.role.renderer.max_tokens)
    return [choice for chain in chains for choice in chain]


def explore(cfg: Config, step: int, players: Dialogists) -> dict[str, float]:
    """Set how strategies are chosen in this step; what there is to log about it."""
    sampler = players.chooser
    if sampler is None or cfg.choose != "learned":
        return {}
    if cfg.mode == "sequential":
        sampler.pick, sampler.epsilon = "epsilon", 1.0
    else:
        last = max(1, cfg.steps - 1)
        sampler.pick, sampler.epsilon = cfg.pick, bellman.linear_schedule(step, cfg.epsilon, cfg.epsilon_final, last)
    return {"strategy/epsilon": sampler.epsilon} if sampler.pick == "epsilon" else {}


def learn(
    cfg: Config,
    step: int,
    levels: Levels,
    episodes: Sequence[Episode],
    offers: Mapping[int, Offer],
    stale: Stale | None = None,
) -> tuple[dict[str, float], dict[str, list[tuple[Turn, float]]]]:
    """One step of who learns in it, both from the same dialogues; what to log, and columns of numbers per turn.

    `stale` corrects replies that older weights have written. Decisions need no correction: Q learns from anybody's.
    """
    above, below = learns(cfg, step)
    played = [episode for episode in episodes if episode.ending != "failed"]
    replies = [turn for episode in played for turn in episode.of(RESPONDER)]
    decided = [turn for episode in played for turn in episode.of(STRATEGIST)]
    advantages_N = advantages(decided, offers) if decided else torch.zeros(len(replies))
    weight = cfg.reward_share_weight
    logged: dict[str, float] = {}
    columns = {"advantage": [*zip(decided, advantages_N.tolist(), strict=True)]} if decided else {}
    judged = None
    if levels.lower is not None and (below or weight):
        judged = judge(levels.lower, played, replies, weight * advantages_N if weight else None)
        logged |= judged.metrics
        for name, values_N in judged.columns.items():
            columns[name] = [*columns.get(name, []), *zip(replies, values_N.tolist(), strict=True)]
    if levels.upper is not None and cfg.mode != "lower":
        own_N = weight * own_rewards(judged, weight * advantages_N) if judged and weight else None
        found = remember(levels, played, replies, offers, own_N)
        if step == 0 and levels.fresh:
            centre(cfg, levels.upper, found)
        if above:
            logged |= update_upper(cfg, step, levels)
    if below and levels.lower is not None and judged is not None:
        logged |= levels.lower.learn(judged, seed=derive_seed(cfg.seed, "responder", step), stale=stale)
    return logged, columns


def judge(
    lower: Lower, played: Sequence[Episode], replies: Sequence[Turn], shared_N: Float[Tensor, "N"] | None
) -> Judged:
    """The replies with what they earned, as the responder reads it; `shared_N` comes from the strategist."""
    owner = [number for number, episode in enumerate(played) for _ in episode.of(RESPONDER)]
    final = [episode.final if episode.ending == "truncated" else None for episode in played]
    rewards_N = torch.tensor([turn.reward for turn in replies])
    return lower.judge(replies, rewards_N, shared_N=shared_N, episode_N=owner, final=final)


def own_rewards(judged: Judged, shared_N: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Mean r_L of each reply: the mean reward of its tokens, without what the strategist shared."""
    tokens_N = judged.batch.pool(torch.ones(judged.batch.mask.shape))
    return (judged.columns["return"] - shared_N) / tokens_N


def remember(
    levels: Levels,
    played: Sequence[Episode],
    replies: Sequence[Turn],
    offers: Mapping[int, Offer],
    own_N: Float[Tensor, "N"] | None,
) -> list[Choice]:
    """Put the decisions into the replay, and return them; `own_N` adds to what each reply earned."""
    added = {} if own_N is None else {id(turn): float(own) for turn, own in zip(replies, own_N, strict=True)}
    found = [
        strategy_choices(episode, offers, {turn.index: added.get(id(turn), 0.0) for turn in episode.of(RESPONDER)})
        for episode in played
    ]
    levels.replay.add(found)
    return [choice for episode in found for choice in episode]


def centre(cfg: Config, upper: Upper, found: Sequence[Choice]) -> None:
    """Have Q start around what these decisions return if it goes on like this, not around what logits happen to be."""
    if cfg.high.centre and cfg.high.score == "logit":
        follows = sum(not choice.terminated for choice in found) / len(found)
        mean = sum(choice.reward for choice in found) / len(found)
        upper.start_at(going_on(mean, follows, gamma=cfg.high.gamma), [choice.options for choice in found[:64]])


def update_upper(cfg: Config, step: int, levels: Levels) -> dict[str, float]:
    """The optimizer steps of the strategist, on decisions from the replay and, if there are any, recorded ones."""
    assert levels.upper is not None, "somebody chooses"
    logged = []
    for update in range(cfg.high_updates):
        seed = derive_seed(cfg.seed, STRATEGIST, step, update)
        recorded = round(cfg.offline_fraction * cfg.high_batch) if levels.recorded else 0
        drawn = levels.replay.sample(cfg.high_batch - recorded, seed=seed)
        picks = np.random.Generator(np.random.Philox(derive_seed(seed, "recorded")))
        drawn += [levels.recorded[place] for place in picks.integers(max(1, len(levels.recorded)), size=recorded)]
        logged.append(levels.upper.update(drawn))
    return average(logged)


@phase("evaluation")
def evaluate(cfg: Config, step: int, levels: Levels, env: EnvSpec, rewards: Rewards) -> dict[str, float]:
    """What dialogues of the test split are worth with the strategies Q likes best, as "eval/…"; the same every time."""
    last = step + 1 == cfg.steps
    if not cfg.eval_every or not (last or (step + 1) % cfg.eval_every == 0):
        return {}
    players, tasks = levels.players, env.tasks("test")
    if cfg.asynchronous.max_staleness:
        levels.publish(cfg)  # who plays ahead are others
    if players.chooser is not None and cfg.choose == "learned":
        players.chooser.pick = "greedy"
    chosen = [tasks[place % len(tasks)] for place in range(cfg.eval_episodes)]
    play = players.play(env.make, max_turns=cfg.max_turns)
    seed = derive_seed(cfg.seed, "evaluation")
    episodes = asyncio.run(collect(chosen, play, seed=seed, error_budget=cfg.error_budget))
    given = rewards.add(episodes)
    offered = dist.union(players.take())
    told = given | dialogue_metrics(episodes, offered, players.inventory if players.strategist else None)
    levels.publish(cfg)
    return {f"eval/{name}": number for name, number in told.items()}
