"""ArCHer: twin Q and V over whole utterances, learned off-policy, tell a token policy which utterances to prefer.

Zhou et al., "ArCHer: Training Language Model Agents via Hierarchical Multi-Turn RL", arXiv 2402.19446. Two levels learn
at their own pace. The high level sees a dialogue as a Markov decision process whose actions are utterances: from a
replay, Q(s, a) regresses on r + γ·V̄(s') and V(s) on Q̄(s, a′) with a′ freshly drawn from the current actor; the bars
are target networks. The low level writes tokens and is rewarded, once per utterance, with min Q − min V.

Deviations from the paper, each a setting or told in docs/algorithms/archer.md: the critic is a causal model that reads
a whole episode in one pass (or an encoder, as in the paper); episodes are replayed whole; the policy loss is a mean
over tokens, and may be PPO's; V may be learned at some states of an episode only; KL to the start is possible. Implicit
Q-learning, learning from a file of transitions, filtered cloning and CHAI are settings: the loop is the same.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from echelon.config import LoraConfig, ModelConfig, OptimConfig, SamplingConfig, Settings, TrainConfig, demand, require
from echelon.data.packing import Batch, Sampled, pack, pack_branches
from echelon.data.recorded import read_transitions
from echelon.data.replay import Replay, Transition, examples, mc_returns, transitions
from echelon.envs import EnvSpec
from echelon.models.heads import TokenValue, UtteranceCritic, values_before
from echelon.models.lm import check_masks, token_logprobs
from echelon.ops import bellman
from echelon.ops.masked import explained_variance, masked_whiten
from echelon.ops.scales import Scale
from echelon.rollout.ahead import Level, Played, Player, Rollouts, Run, check_ahead
from echelon.rollout.candidates import choosing
from echelon.rollout.critics import new_critic
from echelon.rollout.evaluate import rollout_metrics, summarise
from echelon.rollout.memory import Engine, Plan
from echelon.rollout.plays import env_loop
from echelon.rollout.roles import Role, answer_all, collect, decoders
from echelon.rollout.setup import Actor, describe, open_actor, open_env, set_threads, task_batch
from echelon.sampling.candidates import Chooser, critic_score
from echelon.seeds import derive_seed
from echelon.train.checkpoint import Checkpoints, Saveable
from echelon.train.critic import asked_states, baseline_loss, critic_loss, judge, with_targets
from echelon.train.learner import Learner, Weights, average
from echelon.train.log import Log, episode_rows
from echelon.train.policy import PolicyConfig, passes, starting_policy, update_policy
from echelon.train.stale import AsyncConfig, Stale
from echelon.types import Episode, Turn


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Settings of ArCHer."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The actor: a model folder, a run directory or a hub id."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapter of the actor. A critic with a body of its own then has its own adapter on its own copy."""
    env: str = ""
    """The environment: a built-in name, path.py:Class or module:Class. Off-line it is only for a test at the end."""
    env_settings: Settings = field(default_factory=dict)
    """Settings of the environment."""
    trust_task_code: bool = False
    """Run Python that stands in a file of tasks (`--env tasks.yaml`), in the sandbox. Read it first."""
    offline: tuple[str, ...] = ()
    """Files of recorded transitions to learn from in place of playing; `echelon evaluate --transitions` writes one."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How utterances are drawn."""
    steps: int = 100
    """Training steps; each plays episodes and updates critic and actor."""
    episodes_per_step: int = 64
    """Episodes played per step; off-line, in the test at the end."""
    max_turns: int = 100
    """An episode is cut off (truncated, not terminated) after this many turns."""
    error_budget: float = 0.1
    """Fraction of a step's episodes that may fail before the run stops."""
    gamma: float = 0.95
    """Discount per turn."""
    n_step: int = 1
    """Turns of reward before the critic bootstraps."""
    replay_capacity: int = 10_000
    """Transitions kept; off-line, all of the files are."""
    critic_optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of the critic."""
    critic_body: Literal["own", "actor", "encoder"] = "own"
    """What the critic reads with: a decoder of its own; the actor's, of which only the heads are then learned; or an
    encoder, which reads states and actions apart, as text."""
    critic_path: str = ""
    """Model that an own body starts as a copy of, with the actor's tokenizer; empty takes the actor itself. Or the
    encoder: any model folder or hub id, with its own tokenizer."""
    critic_updates: int = 20
    """Critic updates per step; 0 is for cloning, which needs no critic."""
    critic_episodes: int = 16
    """Replayed episodes per critic update."""
    value_actions: Literal["fresh", "replayed"] = "fresh"
    """Whose Q is V's target: actions drawn now (the paper), or those in the replay (SARSA). The latter needs no
    sampling, and makes V the value of the policies that filled the replay: keep that short."""
    expectile: float = 0.5
    """Which expectile of that Q V is: 0.5 is the mean; with replayed actions, 0.9 is near the best of them (IQL)."""
    value_scale: Literal["linear", "range", "symlog"] = "linear"
    """How outputs of the critic mean values: as they are, through a sigmoid into value_range, or as their symlog."""
    value_range: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest value there can be (value_scale = range)."""
    fresh_updates: int = 10
    """Critic updates whose episodes and fresh actions are drawn together, in one batch of the sampler."""
    fresh_states: int = 0
    """States per replayed episode at which V is learned, with one fresh action each; 0 takes all of them."""
    target: Literal["polyak", "hard"] = "polyak"
    """How target networks follow."""
    tau: float = 0.1
    """Polyak: the fraction of the way the target moves per critic update."""
    target_every: int = 100
    """Hard: critic updates between copies."""
    warmup_steps: int = 5
    """Steps in which only the critic learns."""
    candidates: int = 1
    """After the warm-up, the critic picks every utterance among this many; 1 plays what the actor draws."""
    freeze_actor: bool = False
    """Only the critic learns; with candidates, that is CHAI."""
    actor_states: Literal["replay", "rollout"] = "replay"
    """Where the actor learns: replayed states (the paper), or the step's own episodes."""
    actor_actions: Literal["fresh", "replayed"] = "fresh"
    """What it learns of in replayed states: actions drawn now (the paper), or those in the replay."""
    actor_episodes: int = 64
    """Replayed episodes per actor update (actor_states = replay), and of those it imitates (policy.ptx_coef)."""
    actor_updates: int = 1
    """Actor updates per step, each on replayed states drawn anew."""
    actor_top: float = 1.0
    """Only this fraction of the replayed episodes, those with the highest returns, is imitated (filtered cloning)."""
    credit: Literal["advantage", "q", "none"] = "advantage"
    """What an utterance is credited with: min Q - min V, or min Q alone, or nothing: with awr, plain cloning."""
    advantages: Literal["raw", "centred", "whitened"] = "centred"
    """That credit as it is, or less its mean over the actor's batch, or also with deviation 1."""
    token_baseline: bool = False
    """Subtract from every token's credit what is expected of the utterance before that token: for long utterances."""
    baseline_optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of that baseline, a decoder that starts as a copy of the actor."""
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig(loss="reinforce"))
    """How the actor learns from the advantages."""
    asynchronous: AsyncConfig = field(default_factory=AsyncConfig)
    """Playing the coming steps while one trains."""
    tokens_per_pass: int = 4096
    """Most tokens, padding included, in one forward and backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, *([] if self.offline else ["env"]), "model.path")
        counts = ["steps", "episodes_per_step", "max_turns", "n_step", "replay_capacity", "candidates"]
        counts += ["critic_episodes", "fresh_updates", "target_every", "actor_episodes", "actor_updates"]
        for name in (*counts, "tokens_per_pass"):
            demand(self, name, getattr(self, name) >= 1, "it counts something there must be one of. Give 1 or more.")
        for name in ("fresh_states", "warmup_steps", "critic_updates"):
            demand(self, name, getattr(self, name) >= 0, "it is a number of things. Give 0 or more.")
        demand(self, "error_budget", 0 <= self.error_budget < 1, "it is a fraction of the episodes. Give 0 to 0.99.")
        demand(self, "gamma", 0 <= self.gamma <= 1, "a discount lies between 0 and 1. Try 0.95.")
        demand(self, "tau", 0 < self.tau <= 1, "the target would never move, or overshoot. Give a number in (0, 1].")
        demand(self, "offline", "" not in self.offline, "a file has a name. Give the transitions to learn from.")
        check_ahead(self, self.asynchronous, self.model, self.lora, self.sampling, now=draws_anew(self))
        _check_critic(self)
        _check_actor(self)


def draws_anew(cfg: Config) -> str:
    """The setting, if any, that has the actor of now sampled from besides what is played."""
    if cfg.critic_updates and cfg.value_actions == "fresh":
        return "value_actions = fresh"
    fresh = cfg.actor_states == "replay" and cfg.actor_actions == "fresh" and not cfg.freeze_actor
    return "actor_actions = fresh" if fresh else ""


def _check_critic(cfg: Config) -> None:
    own = not (cfg.critic_path and cfg.critic_body == "actor")
    demand(cfg, "critic_path", own, "critic_body = actor reads with the actor's body. Set critic_body = own.")
    given = cfg.critic_path or cfg.critic_body != "encoder"
    demand(cfg, "critic_body", bool(given), "nothing says which encoder. Give critic_path, such as roberta-base.")
    demand(cfg, "expectile", 0 < cfg.expectile < 1, "it lies between the least and the best. Give 0.5 to 0.95.")
    because = "above the mean of fresh actions V would be of a policy that nobody plays. Set value_actions = replayed."
    demand(cfg, "expectile", cfg.expectile == 0.5 or cfg.value_actions == "replayed", because)
    low, high = cfg.value_range
    demand(cfg, "value_range", -math.inf < low < high < math.inf, "it begins below its end. Give the two, as in -20 0.")
    needless = cfg.critic_updates > 0 or (cfg.credit == "none" and cfg.candidates == 1)
    because = "a critic that never learns is asked. Give 1 or more, or set credit = none and candidates = 1."
    demand(cfg, "critic_updates", needless, because)


def _check_actor(cfg: Config) -> None:
    in_turn = not cfg.asynchronous.max_staleness
    because = "off-line there is nothing to play ahead. Leave it out."
    demand(cfg, "asynchronous.max_staleness", in_turn or not cfg.offline, because)
    apart = cfg.candidates == 1 or cfg.critic_body != "actor"
    because = "the critic that picks reads with the actor's body, which learns meanwhile. Set critic_body = own."
    demand(cfg, "asynchronous.max_staleness", in_turn or apart, because)
    replayed, frozen = cfg.actor_states == "replay", cfg.freeze_actor
    because = "what the critic picked is not what the actor would draw. Set actor_states = replay, or freeze_actor."
    demand(cfg, "candidates", cfg.candidates == 1 or replayed or frozen, because)
    played = bool(cfg.env) or not cfg.offline
    demand(cfg, "candidates", cfg.candidates == 1 or played, "off-line nothing is played without env. Give it, or 1.")
    demand(cfg, "actor_states", replayed or not cfg.offline, "off-line nothing is played. Set actor_states = replay.")
    because = "a batch that was played teaches once. Set actor_states = replay."
    demand(cfg, "actor_updates", replayed or cfg.actor_updates == 1, because)
    old = cfg.actor_actions == "replayed"
    because = "the step's own episodes have actions already. Set actor_states = replay."
    demand(cfg, "actor_actions", replayed or not old, because)
    because = "only regression learns from what others said. Set policy.loss = awr, or actor_actions = fresh."
    demand(cfg, "actor_actions", not old or cfg.policy.loss == "awr", because)
    because = "without it only what was recorded can be cloned. Set actor_actions = replayed and policy.loss = awr."
    demand(cfg, "credit", cfg.credit != "none" or old or frozen, because)
    demand(cfg, "actor_top", 0 < cfg.actor_top <= 1, "it is a part of the episodes. Give 0.1, or 1 for all.")
    because = "nothing of the replay is imitated. Set actor_actions = replayed or policy.ptx_coef."
    demand(cfg, "actor_top", cfg.actor_top == 1 or old or cfg.policy.ptx_coef > 0, because)
    demand(cfg, "token_baseline", not (cfg.token_baseline and cfg.credit == "none"), "there is no credit to reduce.")


def main(cfg: Config) -> None:
    """Train; the run directory holds checkpoints, metrics.jsonl and episodes.jsonl."""
    env = open_env(cfg.env, cfg.env_settings, trust_code=cfg.trust_task_code) if cfg.env else None
    actor = open_actor(cfg.model, cfg.sampling, lora=cfg.lora)
    set_threads(cfg.threads, actor.module)
    check_masks(actor.module)
    levels = open_levels(cfg, actor)
    if cfg.offline and not cfg.resume:
        levels.replay.add(read_transitions(cfg.offline, actor.role.renderer, gamma=cfg.gamma, n_step=cfg.n_step))
    if cfg.dry_run:
        sampled = 0 if cfg.offline else cfg.episodes_per_step * cfg.max_turns * cfg.sampling.max_tokens
        ahead = cfg.asynchronous.max_staleness
        engines = {"actor": Engine(actor.sampler, cfg.sampling, ahead)}
        copies = {"critic": (levels.online, ahead)} if cfg.candidates > 1 else {}
        plan = Plan(levels.parts(), cfg.dist, cfg.tokens_per_pass, engines, copies)
        return describe({"actor": actor.module, "critic": levels.online}, tokens_per_step=sampled, plan=plan)

    play, level = player(cfg, env), Level(actor, levels.policy, cfg.sampling)
    if cfg.candidates > 1:
        score = partial(critic_score, tokens_per_pass=cfg.tokens_per_pass)
        level = choosing(actor, levels.policy, cfg.sampling, levels.online, score, cfg.candidates)
    rollouts = Rollouts(cfg.asynchronous, {"actor": level}, play, steps=cfg.steps, read=Played.from_json)
    publish = levels.publish if draws_anew(cfg) else rollouts.publish
    parts = levels.parts() | rollouts.parts()
    checkpoints = Checkpoints(Path(cfg.out), config=cfg, keep_last=cfg.keep_last, resume=cfg.resume)
    with checkpoints, rollouts:
        start = checkpoints.restore(parts)[0] if cfg.resume else 0
        publish()
        if not cfg.resume:
            checkpoints.save(0, parts)
        with Log(Path(cfg.out), total=cfg.steps, start=start, name="archer", config=cfg.log, settings=cfg) as log:
            for step in range(start, cfg.steps):
                torch.manual_seed(derive_seed(cfg.seed, step))  # dropout, where an adapter has any
                episodes = [] if cfg.offline else rollouts.take(step).episodes
                found = remember(cfg, step, episodes, levels.replay)
                if step == 0:
                    levels.online.start_at(float(mc_returns(levels.replay.episodes()).mean()))
                    bellman.hard_copy_(levels.target, levels.online)

                metrics = update_critic(cfg, step, levels) | rollouts.metrics()
                turns = [turn for episode in episodes if episode.ending != "failed" for turn in episode.turns]
                batch = pack(turns or examples(found))
                judged, columns = judgement(cfg, levels, batch, turns, mc_returns(found))
                if step >= cfg.warmup_steps and not cfg.freeze_actor:
                    metrics |= update_actor(cfg, step, levels, batch, rollouts.stale("actor"))
                publish()

                played = rollout_metrics(episodes) if episodes else {}
                if cfg.offline and cfg.env and step + 1 == cfg.steps:
                    played = tested(play({"actor": level.actor.role}, step, asyncio.run).episodes)
                log.metrics(step, {**played, **metrics, **judged})
                log.episodes(step, episode_rows(episodes[:8], decode=decoders(actor.role), per_turn=columns))
                if step + 1 == cfg.steps or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                    checkpoints.save(step + 1, parts)


@dataclass(slots=True)
class Levels:
    """What learns, what it learns from, and who acts."""

    role: Role
    policy: Learner
    critic: Learner
    online: UtteranceCritic
    target: UtteranceCritic
    replay: Replay
    reference: nn.Module | None
    baseline: Learner | None

    def parts(self) -> dict[str, Saveable]:
        """Everything that must survive a kill. An adapter knows its own start, so it needs no copy of it."""
        found: dict[str, Saveable] = {"actor": self.policy, "critic": self.critic}
        found |= {"target": Weights(self.target), "replay": self.replay}
        if self.reference is not None and self.reference is not self.policy.module:
            found["reference"] = Weights(self.reference)
        if self.baseline is not None:
            found["baseline"] = self.baseline
        return found

    def publish(self) -> None:
        """Let the actor speak with the weights as they are now."""
        self.role.sampler.load(self.policy.weights(), self.policy.version)


def open_levels(cfg: Config, actor: Actor) -> Levels:
    """Both levels before they learn, around an actor that is open already."""
    steps = max(0, cfg.steps - cfg.warmup_steps) * cfg.actor_updates
    updates = steps * cfg.policy.epochs * cfg.policy.minibatches
    policy = Learner(actor.module, cfg.policy.optim, total_steps=updates, name="actor", tokenizer=actor.tokenizer)
    online = open_critic(cfg, actor)
    critic = Learner(online, cfg.critic_optim, total_steps=cfg.steps * cfg.critic_updates, name="critic")
    baseline = None
    if cfg.token_baseline:
        value = TokenValue.from_lm(actor.module)
        baseline = Learner(value, cfg.baseline_optim, total_steps=updates, name="baseline")
    replay = Replay(sys.maxsize if cfg.offline else cfg.replay_capacity)
    reference = starting_policy(actor.module, cfg.policy)
    return Levels(actor.role, policy, critic, online, online.target(), replay, reference, baseline)


def open_critic(cfg: Config, actor: Actor) -> UtteranceCritic:
    """A new critic beside the actor."""
    body, path, scale = cfg.critic_body, cfg.critic_path, Scale(cfg.value_scale, *cfg.value_range)
    return new_critic(actor, cfg.model, cfg.sampling, body=body, path=path, lora=cfg.lora, scale=scale, seed=cfg.seed)


def tested(episodes: Sequence[Episode]) -> dict[str, float]:
    """What episodes that were played to test, at the end, amount to."""
    return {f"eval/{name}": found.mean for name, found in summarise(episodes).items()}


def player(cfg: Config, env: EnvSpec | None) -> Player[Played]:
    """Plays the episodes of a step: the actor, and after the warm-up the critic's choice among what it proposes.

    On-line those are games to train on, off-line the first ones to be tested on.
    """
    if env is None:
        return lambda roles, step, run: Played([])
    tasks = env.tasks("test" if cfg.offline else "train")

    def play(roles: Mapping[str, Role], step: int, run: Run) -> Played:
        if cfg.offline:
            chosen = [tasks[place % len(tasks)] for place in range(cfg.episodes_per_step)]
        else:
            chosen = task_batch(tasks, step, cfg.episodes_per_step, seed=cfg.seed)
        role = roles["actor"]
        chooser = role.sampler if isinstance(role.sampler, Chooser) else None
        if chooser is not None and step < cfg.warmup_steps:
            role = Role(role.name, chooser.sampler, role.renderer, role.params)
        loop, seed = env_loop(env.make, role, max_turns=cfg.max_turns), derive_seed(cfg.seed, step)
        episodes = run(collect(chosen, loop, seed=seed, error_budget=cfg.error_budget))
        if chooser is not None:
            chooser.take()  # what was not said is not learned from
        return Played(episodes)

    return play


def remember(cfg: Config, step: int, episodes: Sequence[Episode], replay: Replay) -> list[list[Transition]]:
    """The transitions of a step's episodes, which enter the replay; off-line, of some that are in it."""
    if cfg.offline:
        return replay.sample_episodes(cfg.actor_episodes, seed=derive_seed(cfg.seed, "looked at", step))
    played = [episode for episode in episodes if episode.ending != "failed"]
    found = [transitions(episode, "actor", gamma=cfg.gamma, n_step=cfg.n_step) for episode in played]
    replay.add(found)
    return found


def update_critic(cfg: Config, step: int, levels: Levels) -> dict[str, float]:
    """The high level: twin Q towards r + γ·V̄(s'), twin V towards Q̄(s, a′), the target network following."""
    logged, loss_fn = [], partial(critic_loss, expectile=cfg.expectile)
    for done in range(0, cfg.critic_updates, cfg.fresh_updates):
        seed = derive_seed(cfg.seed, "critic", step, done)
        updates = min(cfg.fresh_updates, cfg.critic_updates - done)
        drawn = levels.replay.sample_episodes(cfg.critic_episodes * updates, seed=seed)
        fresh = fresh_answers(cfg, levels.role, drawn, seed) if cfg.value_actions == "fresh" else None
        for first in range(0, len(drawn), cfg.critic_episodes):
            some = slice(first, first + cfg.critic_episodes)
            batch = with_targets(
                levels.target,
                drawn[some],
                None if fresh is None else fresh[some],
                gamma=cfg.gamma,
                tokens_per_pass=cfg.tokens_per_pass,
            )
            logged.append(levels.critic.update(batch.split(cfg.tokens_per_pass), loss_fn))
            how, version = cfg.target, levels.critic.version
            bellman.follow_(levels.target, levels.online, how=how, tau=cfg.tau, every=cfg.target_every, version=version)
    return {f"critic/{name}": value for name, value in average(logged).items()} if logged else {}


def fresh_answers(
    cfg: Config, role: Role, episodes: Sequence[Sequence[Transition]], seed: int
) -> list[dict[int, Sampled]]:
    """What the actor says now in the states of each episode that V is learned at, by the number of the turn."""
    asked = [asked_states(len(found), cfg.fresh_states, derive_seed(seed, e)) for e, found in enumerate(episodes)]
    states = [found[turn].state for found, turns in zip(episodes, asked, strict=True) for turn in turns]
    said = iter(asyncio.run(answer_all(role, states, seed=seed)))
    return [{turn: next(said) for turn in turns} for turns in asked]


def update_actor(cfg: Config, step: int, levels: Levels, played: Batch, stale: Stale | None = None) -> dict[str, float]:
    """The low level: every token of an utterance gets what that utterance is credited with.

    `stale` corrects what was played, where older weights did; what is drawn anew needs no correction.
    """
    logged = []
    stale = stale if cfg.actor_states == "rollout" else None
    for number in range(cfg.actor_updates):
        if number and draws_anew(cfg):
            levels.publish()
        again = (number,) if number else ()
        batch = actor_batch(cfg, levels, played, seed=derive_seed(cfg.seed, "actor", step, *again))
        credits_N = credit(cfg, levels.online, batch)
        spread = float(credits_N.std(correction=0))
        if cfg.advantages == "centred":
            credits_N = credits_N - credits_N.mean()
        elif cfg.advantages == "whitened":
            credits_N = masked_whiten(credits_N, torch.ones_like(credits_N, dtype=torch.bool))
        batch.advantages = batch.spread(credits_N)
        seed = derive_seed(cfg.seed, "minibatches", step, *again)
        logged.append({**learn(cfg, levels, batch, stale, seed=seed), "policy/advantage_std": spread})
    return average(logged)


def actor_batch(cfg: Config, levels: Levels, played: Batch, *, seed: int) -> Batch:
    """What the actor learns from: what was played, or replayed states with actions, fresh ones or those said there."""
    if cfg.actor_states == "rollout":
        return played
    if cfg.actor_actions == "fresh":
        drawn = levels.replay.sample_episodes(cfg.actor_episodes, seed=seed)
        states = [transition.state for episode in drawn for transition in episode]
        return pack_branches(asyncio.run(answer_all(levels.role, states, seed=seed)))
    batch = pack(examples(levels.replay.sample_episodes(cfg.actor_episodes, seed=seed, top=cfg.actor_top)))
    now = partial(token_logprobs, temperature=cfg.sampling.temperature)
    batch.logprobs = levels.policy.evaluate(batch, now, cfg.tokens_per_pass)  # whoever said them, from here it goes on
    return batch


def credit(cfg: Config, critic: UtteranceCritic, batch: Batch) -> Tensor:
    """What each utterance of a batch is credited with."""
    if cfg.credit == "none":
        return torch.zeros(batch.turns)
    q_2N, v_2N = judge(critic, batch, cfg.tokens_per_pass)
    return q_2N.amin(0) - v_2N.amin(0) if cfg.credit == "advantage" else q_2N.amin(0)


def learn(cfg: Config, levels: Levels, batch: Batch, stale: Stale | None, *, seed: int) -> dict[str, float]:
    """The optimizer steps on one batch with advantages: of the actor, and of what is subtracted from them if asked."""
    assert batch.advantages is not None
    if levels.baseline is not None:
        batch.returns = batch.advantages
        expected_BT = levels.baseline.evaluate(batch, values_before, cfg.tokens_per_pass)
        batch.advantages = batch.returns - expected_BT  # both are 0 between utterances

    def imitated(version: int) -> Batch:
        seed = derive_seed(cfg.seed, "imitated", version)
        return pack(examples(levels.replay.sample_episodes(cfg.actor_episodes, seed=seed, top=cfg.actor_top)))

    logged = update_policy(
        levels.policy,
        batch,
        settings=cfg.policy,
        reference=levels.reference,
        temperature=cfg.sampling.temperature,
        tokens_per_pass=cfg.tokens_per_pass,
        seed=seed,
        ptx=imitated,
        stale=stale,
    )
    if levels.baseline is not None:
        steps = passes(
            levels.baseline,
            batch,
            baseline_loss,
            epochs=cfg.policy.epochs,
            minibatches=cfg.policy.minibatches,
            tokens_per_pass=cfg.tokens_per_pass,
            seed=seed,
        )
        logged |= {f"baseline/{name}": value for name, value in average(steps).items()}
    return logged


def judgement(
    cfg: Config, levels: Levels, batch: Batch, turns: Sequence[Turn], returns_N: Tensor
) -> tuple[dict[str, float], dict[str, list[tuple[Turn, float]]]]:
    """What the critic says of a step's utterances: how well it explains returns, and columns of episodes.jsonl."""
    if not cfg.critic_updates:
        return {}, {}
    q_2N, v_2N = judge(levels.online, batch, cfg.tokens_per_pass)
    everywhere = torch.ones_like(returns_N, dtype=torch.bool)
    metrics = {"critic/explained_variance": float(explained_variance(v_2N.mean(0), returns_N, everywhere))}
    found = {"value": v_2N.amin(0), "advantage": q_2N.amin(0) - v_2N.amin(0)} if turns else {}
    return metrics, {name: list(zip(turns, x_N.tolist(), strict=True)) for name, x_N in found.items()}
