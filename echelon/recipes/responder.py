"""Responder: PPO on replies that follow a given strategy. The lower level of ToSCA, learned alone.

ToSCA (arXiv 2608.21969) has one model choose how to reply and another write the reply. Here the second learns: it reads
the conversation and a strategy that a data set, chance or a trained strategist gives, writes one reply, and is rewarded
for that reply: by a reward model, a function, a judge, or the environment's satisfaction. Every reply is an episode of
its own to PPO, its tokens the steps; nothing is worth anything after its last token. Warm start: `echelon sft`.

Deviations from the paper and its code, each a setting: satisfaction is paid at the last token, not at every one
(`low.dense`); the reward for surprisal is off, and centred where it is on (`low.surprisal`); so is the loss that raises
the likelihood of the responder's own replies (`low.self_likelihood_coef`), which does the opposite; the mean of a loss
is over tokens; before its first update the value model is shifted to the mean return. docs/algorithms/responder.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from echelon.config import DataConfig, LoraConfig, ModelConfig, SamplingConfig, TaskConfig, demand, require
from echelon.data.strategies import TransitionConfig
from echelon.envs import EnvSpec
from echelon.errors import ConfigError
from echelon.rollout.ahead import Level, Played, Player, Rollouts, Run, check_ahead
from echelon.rollout.dialogue import RESPONDER, STRATEGIST, env_inventory, named, strategy_loop
from echelon.rollout.evaluate import rollout_metrics
from echelon.rollout.learners import open_value, ptx_batches
from echelon.rollout.levels import responder_path
from echelon.rollout.memory import Engine, Plan
from echelon.rollout.rewards import Rewards, open_rewards
from echelon.rollout.roles import Role, collect, decoders
from echelon.rollout.setup import Actor, describe, open_actor, open_env, set_threads, task_batch
from echelon.rollout.told import (
    is_strategist,
    open_states,
    open_strategist,
    strategist_beside,
    teller,
    told_loop,
)
from echelon.seeds import derive_seed
from echelon.text.dialogue import Inventory
from echelon.text.dialogue import inventory as inventory_of
from echelon.text.endpoint import shared_endpoint
from echelon.train.checkpoint import Checkpoints
from echelon.train.clock import phase
from echelon.train.log import Log, episode_rows
from echelon.train.responder import Judged, Lower, ResponderConfig
from echelon.train.stale import AsyncConfig
from echelon.types import Episode, Play, Task, Turn

JUDGE = "judge"
"""What `reward` calls the endpoint of the setting of that name."""


@dataclass(frozen=True, kw_only=True)
class Config(TaskConfig):
    """Settings of the responder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The responder: a model folder, an adapter's folder, a run directory or a hub id."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """An adapter that learns in place of the responder's weights; KL is then to the model without it."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How replies are drawn."""
    columns: TransitionConfig = field(default_factory=TransitionConfig)
    """How the columns of data.path are called."""
    strategies: tuple[str, ...] = ()
    """The strategies: the name of an inventory (esconv, daily_dialog), or two or more names. Empty: those of the
    environment, or of the strategist's folder."""
    options: tuple[str, ...] = ()
    """What stands for each strategy; empty is (1), (2), and so on."""
    strategist: str = ""
    """Who gives the strategy: data (that of the row), random, none, the name of one, or the folder of a strategist.
    Empty: data where there is data.path, else random."""
    strategist_epsilon: float = 0.0
    """Probability with which a strategist's choice is replaced by a random one."""
    steps: int = 100
    """Training steps; each plays episodes and updates value model and responder."""
    episodes_per_step: int = 64
    """States, or dialogues, played per step."""
    replies_per_state: int = 1
    """How often each of them is played."""
    max_turns: int = 100
    """A dialogue is cut off (truncated, not terminated) after this many replies."""
    error_budget: float = 0.1
    """Fraction of a step's episodes that may fail before the run stops."""
    value_path: str = ""
    """What the value model starts as: a reward model, whose head it keeps, or a language model. Empty: responder."""
    low: ResponderConfig = field(default_factory=ResponderConfig)
    """How the responder learns."""
    ptx: DataConfig = field(default_factory=DataConfig)
    """Conversations whose answers the responder goes on learning to say, weighted by low.policy.ptx_coef."""
    ptx_rows: int = 8
    """Conversations that join each optimizer step of the responder."""
    asynchronous: AsyncConfig = field(default_factory=AsyncConfig)
    """Playing the coming steps while one trains."""
    eval_every: int = 0
    """Steps between evaluations on what is held out; 0 evaluates nothing."""
    eval_episodes: int = 64
    """Episodes of an evaluation."""
    tokens_per_pass: int = 4096
    """Most tokens, padding included, in one forward and backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "model.path")
        counts = ("steps", "episodes_per_step", "replies_per_state", "max_turns", "ptx_rows", "eval_episodes")
        for name in (*counts, "tokens_per_pass"):
            demand(self, name, getattr(self, name) >= 1, "it counts something there must be one of. Give 1 or more.")
        demand(self, "error_budget", 0 <= self.error_budget < 1, "it is a fraction of the episodes. Give 0 to 0.99.")
        demand(self, "strategist_epsilon", 0 <= self.strategist_epsilon <= 1, "it is a probability. Give 0 to 1.")
        demand(self, "eval_every", self.eval_every >= 0, "it counts steps. Give 0 to evaluate nothing.")
        now = "eval_every" if self.eval_every else ""
        check_ahead(self, self.asynchronous, self.model, self.lora, self.sampling, now=now)
        told = self.strategist != "data" or bool(self.data.path)
        demand(self, "strategist", told, "an environment has no rows that name one. Give random, or data.path.")
        known = not self.data.path or bool(self.strategies) or is_strategist(self.strategist)
        demand(self, "strategies", known, "nothing says what the rows choose from. Give esconv, or list their names.")
        fits = JUDGE not in self.reward or bool(self.data.path)
        demand(self, "judge", fits, "an environment has a judge of its own. Set env_settings, or give data.path.")
        weight = self.low.policy.ptx_coef
        because = "these rows would count nothing. Give low.policy.ptx_coef a weight, such as 0.05."
        demand(self, "ptx.path", not self.ptx.path or weight > 0, because)
        because = "there is nothing to weigh. Give ptx.path the conversations."
        demand(self, "low.policy.ptx_coef", not weight or bool(self.ptx.path), because)


@dataclass(slots=True)
class World:
    """What is played, and how."""

    env: EnvSpec
    play: Callable[[Role], Play]
    """How the responder plays, here or beside the others."""
    rewards: Rewards
    inventory: Inventory


def main(cfg: Config) -> None:
    """Train; the run directory holds checkpoints, metrics.jsonl and episodes.jsonl."""
    model = replace(cfg.model, path=responder_path(cfg.model.path))
    actor = open_actor(model, cfg.sampling, lora=cfg.lora, name=RESPONDER)
    world = open_world(cfg, actor.role)
    set_threads(cfg.threads, actor.module)
    lower = open_lower(cfg, actor)
    if cfg.dry_run:
        most = cfg.max_turns if cfg.env else 1
        sampled = cfg.episodes_per_step * cfg.replies_per_state * most * cfg.sampling.max_tokens
        engines = {RESPONDER: Engine(actor.sampler, cfg.sampling, cfg.asynchronous.max_staleness)}
        plan = Plan({**lower.parts(), **world.rewards.modules()}, cfg.dist, cfg.tokens_per_pass, engines)
        return describe({RESPONDER: actor.module, "value": lower.online}, tokens_per_step=sampled, plan=plan)

    levels, play = {RESPONDER: Level(actor, lower.policy, cfg.sampling)}, player(cfg, world)
    rollouts = Rollouts(cfg.asynchronous, levels, play, steps=cfg.steps, read=Played.from_json)
    parts, out = lower.parts() | rollouts.parts(), Path(cfg.out)
    held_out = world.env.tasks("test") if cfg.eval_every else []
    checkpoints = Checkpoints(out, config=cfg, keep_last=cfg.keep_last, resume=cfg.resume)
    with checkpoints, rollouts:
        start = checkpoints.restore(parts)[0] if cfg.resume else 0
        rollouts.publish()
        if not cfg.resume:
            checkpoints.save(0, parts)
        with Log(out, total=cfg.steps, start=start, name="responder", config=cfg.log, settings=cfg) as log:
            for step in range(start, cfg.steps):
                seed = derive_seed(cfg.seed, step)
                torch.manual_seed(seed)  # dropout, where an adapter has any
                found = rollouts.take(step)
                episodes, given = found.episodes, found.metrics | rollouts.metrics()
                judged, turns = judge(lower, episodes)
                learned = lower.learn(judged, seed=seed, stale=rollouts.stale(RESPONDER))
                rollouts.publish()  # also while warming up: caches are forgotten, as a resumed run's would have been

                metrics = {**rollout_metrics(of_replies(episodes)), **given, **judged.metrics, **learned}
                if cfg.eval_every and (step + 1) % cfg.eval_every == 0:
                    if cfg.asynchronous.max_staleness:  # who plays ahead are others
                        actor.sampler.load(lower.policy.weights(), lower.policy.version)
                    metrics |= evaluate(cfg, world, actor.role, held_out)
                log.metrics(step, metrics)
                told = {name: zip(turns, x_N.tolist(), strict=True) for name, x_N in judged.columns.items()}
                log.episodes(step, episode_rows(episodes[:8], decode=decoders(actor.role), per_turn=told))
                if step + 1 == cfg.steps or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                    checkpoints.save(step + 1, parts)


def open_world(cfg: Config, responder: Role) -> World:
    """States or an environment, who gives the strategies, and what replies earn besides."""
    source = cfg.strategist or ("data" if cfg.data.path else "random")
    env = open_env(cfg.env, cfg.env_settings, trust_code=cfg.trust_task_code) if cfg.env else None
    strategist = None
    if is_strategist(source):
        epsilon = cfg.strategist_epsilon
        strategist, found = open_strategist(source, cfg.model, cfg.sampling, epsilon=epsilon)
        inventory = same_strategies(cfg, found)
    elif env is not None:
        inventory = env_inventory(env, cfg.strategies, cfg.options)
    else:
        inventory = inventory_of(cfg.strategies, cfg.options)
    if env is None:
        asked = shared_endpoint(cfg.judge) if cfg.judge else None
        weight = dict(zip(cfg.reward, cfg.reward_weights, strict=False)).get(JUDGE, 1.0)
        read = partial(open_states, cfg.data, inventory, cfg.columns, responder, seed=cfg.seed)
        env = read(judge=asked, weight=weight)
    make, tell = env.make, None if strategist is not None else teller(source, inventory)

    def how(responder: Role) -> Play:
        if tell is not None:
            return told_loop(make, responder, tell, max_turns=cfg.max_turns)
        assert strategist is not None, "somebody tells"
        beside = strategist_beside(strategist)
        return strategy_loop(make, beside, responder, inventory=inventory, max_turns=cfg.max_turns)

    return World(env, how, open_others(cfg), inventory)


def same_strategies(cfg: Config, own: Inventory) -> Inventory:
    """The strategist's own, unless settings name others: raises ConfigError where they are not the same."""
    if cfg.strategies and inventory_of(cfg.strategies, cfg.options) != own:
        raise ConfigError(
            f"strategies: the strategist in {cfg.strategist} chooses from {', '.join(own.strategies)}, as "
            f"{', '.join(own.options)}. Name the same ones, or leave strategies out."
        )
    return own


def open_others(cfg: Config) -> Rewards:
    """What replies earn besides what the judge, or the environment, gives."""
    others = tuple(spec for spec in cfg.reward if spec != JUDGE)
    if not others:
        return Rewards()
    weights = tuple(weight for spec, weight in zip(cfg.reward, cfg.reward_weights, strict=False) if spec != JUDGE)
    listed = replace(cfg, reward=others, reward_weights=weights, judge={})
    return open_rewards(listed, device=cfg.model.device, tokens_per_pass=cfg.tokens_per_pass)


def open_lower(cfg: Config, actor: Actor) -> Lower:
    """What learns."""
    return Lower(
        cfg.low,
        actor.module,
        open_value(actor, cfg.value_path, model=cfg.model, lora=cfg.lora, seed=cfg.seed),
        tokenizer=actor.tokenizer,
        temperature=cfg.sampling.temperature,
        tokens_per_pass=cfg.tokens_per_pass,
        steps=cfg.steps,
        ptx=ptx_batches(cfg.ptx, actor, rows=cfg.ptx_rows, seed=cfg.seed),
    )


def player(cfg: Config, world: World) -> Player[Played]:
    """Plays the episodes of a step, and has them judged."""
    tasks = world.env.tasks("train")

    def play(roles: Mapping[str, Role], step: int, run: Run) -> Played:
        chosen = task_batch(tasks, step, cfg.episodes_per_step, seed=cfg.seed)
        seed, siblings = derive_seed(cfg.seed, step), cfg.replies_per_state
        return replied(cfg, world, roles[RESPONDER], chosen, seed=seed, siblings=siblings, run=run)

    return play


def replied(
    cfg: Config,
    world: World,
    responder: Role,
    tasks: Sequence[Task],
    *,
    seed: int,
    siblings: int,
    run: Run = asyncio.run,
) -> Played:
    """Episodes of these tasks with all they earned, and what each source of reward gave."""
    loop, budget = world.play(responder), cfg.error_budget
    episodes = run(collect(tasks, loop, seed=seed, siblings=siblings, error_budget=budget))
    for episode in episodes:
        if chosen := episode.of(STRATEGIST):
            episode.data = {**episode.data, "strategy": named(world.inventory, chosen[-1].text)}
    return Played(episodes, world.rewards.add(episodes))


def judge(lower: Lower, episodes: Sequence[Episode]) -> tuple[Judged, list[Turn]]:
    """The replies of the episodes that did not fail, judged, and the replies themselves."""
    played = [episode for episode in episodes if episode.ending != "failed"]
    replies = [(number, turn) for number, episode in enumerate(played) for turn in episode.of(RESPONDER)]
    owner, turns = [number for number, _ in replies], [turn for _, turn in replies]
    final = [episode.final if episode.ending == "truncated" else None for episode in played]
    rewards_N = torch.tensor([turn.reward for turn in turns])
    return lower.judge(turns, rewards_N, episode_N=owner, final=final), turns


def of_replies(episodes: Sequence[Episode]) -> list[Episode]:
    """The episodes without the turns of whoever chose the strategies: what is logged of turns is of replies."""
    return [replace(episode, turns=episode.of(RESPONDER)) for episode in episodes]


@phase("evaluation")
def evaluate(cfg: Config, world: World, responder: Role, tasks: Sequence[Task]) -> dict[str, float]:
    """What replies to held-out states earn, under "eval/"; the same ones every time, drawn as in training."""
    chosen = task_batch(tasks, 0, min(cfg.eval_episodes, len(tasks)), seed=cfg.seed)
    found = replied(cfg, world, responder, chosen, seed=derive_seed(cfg.seed, "eval"), siblings=1)
    told = {**rollout_metrics(of_replies(found.episodes)), **found.metrics}
    return {f"eval/{name}": number for name, number in told.items()}
