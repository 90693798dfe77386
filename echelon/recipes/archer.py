"""ArCHer: twin Q and V over whole utterances, learned off-policy, tell a token policy which utterances to prefer.

Zhou et al., "ArCHer: Training Language Model Agents via Hierarchical Multi-Turn RL", arXiv 2402.19446. Two levels learn
at their own pace. The high level sees a dialogue as a Markov decision process whose actions are utterances: from a
replay, Q(s, a) regresses on r + γ·V̄(s') and V(s) on Q̄(s, a′) with a′ freshly drawn from the current actor; the bars
are target networks. The low level writes tokens and is rewarded, once per utterance, with min Q − min V.

Deviations from the paper, each a setting or told in docs/algorithms/archer.md: the critic is a causal model that reads
a whole episode in one pass (not RoBERTa on state and action apart); episodes are replayed whole; the policy loss is a
mean over tokens, and may be PPO's; V may be learned at some states of an episode only; KL to the start is possible.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from echelon.config import (
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SamplingConfig,
    Settings,
    demand,
    require,
    to_yaml,
)
from echelon.data.packing import Batch, CriticBatch, Said, pack, pack_branches, pack_transitions
from echelon.data.replay import Replay, Transition, transitions
from echelon.errors import DataError
from echelon.models.heads import Places, Spans, UtteranceCritic
from echelon.models.lm import attention_inputs, check_masks, load_tokenizer
from echelon.ops import bellman, losses
from echelon.ops.masked import explained_variance, masked_whiten
from echelon.rollout.evaluate import rollout_metrics
from echelon.rollout.plays import env_loop
from echelon.rollout.roles import Role, answer_all, collect
from echelon.rollout.setup import Actor, describe, model_path, open_actor, open_env, set_threads, task_batch
from echelon.sampling.best_of import BestOf, critic_score
from echelon.seeds import derive_seed
from echelon.train.checkpoint import Checkpoints, Saveable
from echelon.train.learner import Learner, Weights, average
from echelon.train.log import Log, episode_rows
from echelon.train.policy import PolicyConfig, starting_policy, update_policy
from echelon.types import Turn


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of ArCHer."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The actor: a model folder, a run directory or a hub id."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapter of the actor. A critic with a body of its own then has its own adapter on its own copy."""
    env: str
    """The environment: a built-in name, path.py:Class or module:Class."""
    env_settings: Settings = field(default_factory=dict)
    """Settings of the environment."""
    trust_task_code: bool = False
    """Run Python that stands in a file of tasks (`--env tasks.yaml`), in the sandbox. Read it first."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How utterances are drawn."""
    steps: int = 100
    """Training steps; each plays episodes and updates critic and actor."""
    episodes_per_step: int = 64
    """Episodes played per step."""
    max_turns: int = 100
    """An episode is cut off (truncated, not terminated) after this many turns."""
    error_budget: float = 0.1
    """Fraction of a step's episodes that may fail before the run stops."""
    gamma: float = 0.95
    """Discount per turn."""
    n_step: int = 1
    """Turns of reward before the critic bootstraps."""
    replay_capacity: int = 10_000
    """Transitions kept."""
    critic_optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of the critic."""
    critic_body: Literal["own", "actor"] = "own"
    """What the critic reads with: a body of its own, or the actor's, of which only the heads are then learned."""
    critic_path: str = ""
    """Model that an own body starts as a copy of, with the actor's tokenizer; empty takes the actor itself."""
    critic_updates: int = 20
    """Critic updates per step."""
    critic_episodes: int = 16
    """Replayed episodes per critic update."""
    value_actions: Literal["fresh", "replayed"] = "fresh"
    """Whose Q is V's target: actions drawn now (the paper), or those in the replay (SARSA). The latter needs no
    sampling, and makes V the value of the policies that filled the replay: keep that short."""
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
    """Where the actor learns: replayed states with fresh actions (the paper), or the step's own episodes."""
    actor_episodes: int = 64
    """Replayed episodes per actor phase (actor_states = replay)."""
    advantages: Literal["raw", "centred", "whitened"] = "centred"
    """As the critic gives them, or less their mean over the actor's batch, or also with deviation 1."""
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig(loss="reinforce"))
    """How the actor learns from the advantages."""
    tokens_per_pass: int = 4096
    """Most tokens, padding included, in one forward and backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "env", "model.path")
        counts = ["steps", "episodes_per_step", "max_turns", "n_step", "replay_capacity", "candidates"]
        counts += ["critic_updates", "critic_episodes", "fresh_updates", "target_every", "actor_episodes"]
        for name in (*counts, "tokens_per_pass"):
            demand(self, name, getattr(self, name) >= 1, "it counts something there must be one of. Give 1 or more.")
        for name in ("fresh_states", "warmup_steps"):
            demand(self, name, getattr(self, name) >= 0, "it is a number of things. Give 0 or more.")
        demand(self, "error_budget", 0 <= self.error_budget < 1, "it is a fraction of the episodes. Give 0 to 0.99.")
        demand(self, "gamma", 0 <= self.gamma <= 1, "a discount lies between 0 and 1. Try 0.95.")
        proposed = self.candidates == 1 or self.actor_states == "replay" or self.freeze_actor
        because = "what the critic picked is not what the actor would draw. Set actor_states = replay, or freeze_actor."
        demand(self, "candidates", proposed, because)
        own = not (self.critic_path and self.critic_body == "actor")
        demand(self, "critic_path", own, "critic_body = actor reads with the actor's body. Set critic_body = own.")
        demand(self, "tau", 0 < self.tau <= 1, "the target would never move, or overshoot. Give a number in (0, 1].")


def main(cfg: Config) -> None:
    """Train; the run directory holds checkpoints, metrics.jsonl and episodes.jsonl."""
    env = open_env(cfg.env, cfg.env_settings, trust_code=cfg.trust_task_code)
    actor = open_actor(cfg.model, cfg.sampling, lora=cfg.lora)
    set_threads(cfg.threads, actor.module)
    check_masks(actor.module)
    updates = max(0, cfg.steps - cfg.warmup_steps) * cfg.policy.epochs * cfg.policy.minibatches
    policy = Learner(actor.module, cfg.policy.optim, total_steps=updates, name="actor", tokenizer=actor.tokenizer)
    online = open_critic(cfg, actor)
    critic = Learner(online, cfg.critic_optim, total_steps=cfg.steps * cfg.critic_updates, name="critic")
    target, replay = online.target(), Replay(cfg.replay_capacity)
    parts: dict[str, Saveable] = {"actor": policy, "critic": critic, "target": Weights(target), "replay": replay}
    reference = starting_policy(actor.module, cfg.policy)
    if reference is not None:
        parts["reference"] = Weights(reference)
    if cfg.dry_run:
        sampled = cfg.episodes_per_step * cfg.max_turns * cfg.sampling.max_tokens
        return describe({"actor": actor.module, "critic": online}, tokens_per_step=sampled)

    tasks = env.tasks("train")
    play = env_loop(env.make, actor.role, max_turns=cfg.max_turns)
    chooser = BestOf(actor.sampler, critic_score(online, tokens_per_pass=cfg.tokens_per_pass), cfg.candidates)
    choosing = Role("actor", chooser, actor.role.renderer, actor.role.params)
    play_choosing = env_loop(env.make, choosing, max_turns=cfg.max_turns)
    with Checkpoints(
        Path(cfg.out), config_yaml=to_yaml(cfg), keep_last=cfg.keep_last, resume=cfg.resume
    ) as checkpoints:
        start = checkpoints.restore(parts)[0] if cfg.resume else 0
        actor.sampler.load(policy.weights(), policy.version)
        if not cfg.resume:
            checkpoints.save(0, parts)
        with Log(Path(cfg.out), total=cfg.steps, start=start, name="archer") as log:
            for step in range(start, cfg.steps):
                chosen, seed = (
                    task_batch(tasks, step, cfg.episodes_per_step, seed=cfg.seed),
                    derive_seed(cfg.seed, step),
                )
                played_by = play_choosing if cfg.candidates > 1 and step >= cfg.warmup_steps else play
                episodes = asyncio.run(collect(chosen, played_by, seed=seed, error_budget=cfg.error_budget))
                played = [episode for episode in episodes if episode.ending != "failed"]
                found = [transitions(episode, "actor", gamma=cfg.gamma, n_step=cfg.n_step) for episode in played]
                replay.add(found)
                turns, returns_N = [turn for episode in played for turn in episode.turns], mc_returns(found)
                if step == 0:
                    online.start_at(float(returns_N.mean()))
                    bellman.hard_copy_(target, online)

                metrics = update_critic(cfg, step, critic, target, replay, actor.role)
                batch = pack(turns)
                q_2N, v_2N = judge(online, batch, cfg.tokens_per_pass)
                if step >= cfg.warmup_steps and not cfg.freeze_actor:
                    metrics |= update_actor(cfg, step, policy, reference, online, batch, replay, actor.role)
                actor.sampler.load(policy.weights(), policy.version)

                everywhere = torch.ones_like(returns_N, dtype=torch.bool)
                metrics["critic/explained_variance"] = float(explained_variance(v_2N.mean(0), returns_N, everywhere))
                log.metrics(step, {**rollout_metrics(episodes), **metrics})
                log.episodes(step, episode_rows(episodes[:8], per_turn=columns(turns, q_2N, v_2N)))
                if step + 1 == cfg.steps or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                    checkpoints.save(step + 1, parts)


def open_critic(cfg: Config, actor: Actor) -> UtteranceCritic:
    """A new critic, its heads drawn from the run's seed. Raises DataError for a body that reads other tokens."""
    base = actor.module
    if cfg.critic_path:
        if load_tokenizer(model_path(cfg.critic_path)).get_vocab() != actor.tokenizer.get_vocab():
            raise DataError(
                f"critic_path = {cfg.critic_path}: its tokenizer is not the actor's, so it would misread the actor's "
                "tokens. Use a model with the same tokenizer, or leave critic_path empty."
            )
        model = replace(cfg.model, path=cfg.critic_path)
        base = open_actor(model, cfg.sampling, lora=cfg.lora).module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(cfg.seed, "critic"))
        return UtteranceCritic.from_lm(base, shared_body=cfg.critic_body == "actor")


def update_critic(
    cfg: Config, step: int, critic: Learner, target: UtteranceCritic, replay: Replay, role: Role
) -> dict[str, float]:
    """The high level: twin Q towards r + γ·V̄(s'), twin V towards Q̄(s, a′), the target network following."""
    logged = []
    for done in range(0, cfg.critic_updates, cfg.fresh_updates):
        seed = derive_seed(cfg.seed, "critic", step, done)
        updates = min(cfg.fresh_updates, cfg.critic_updates - done)
        drawn = replay.sample_episodes(cfg.critic_episodes * updates, seed=seed)
        asked = [asked_states(cfg, episode, derive_seed(seed, number)) for number, episode in enumerate(drawn)]
        states = [drawn[number][turn].state for number, turns in enumerate(asked) for turn in turns]
        fresh: Iterator[Said] = iter(asyncio.run(answer_all(role, states, seed=seed)))
        for update in range(updates):
            some = slice(update * cfg.critic_episodes, (update + 1) * cfg.critic_episodes)
            batch = with_targets(cfg, target, drawn[some], asked[some], fresh)
            logged.append(critic.update(batch.split(cfg.tokens_per_pass), critic_loss))
            if cfg.target == "polyak":
                bellman.polyak_(target, critic.module, cfg.tau)
            elif critic.version % cfg.target_every == 0:
                bellman.hard_copy_(target, critic.module)
    return {f"critic/{name}": value for name, value in average(logged).items()}


def asked_states(cfg: Config, episode: Sequence[Transition], seed: int) -> list[int]:
    """Which states of an episode V is learned at with a fresh action, in order."""
    if cfg.value_actions == "replayed":
        return []
    if not cfg.fresh_states or cfg.fresh_states >= len(episode):
        return list(range(len(episode)))
    return sorted(np.random.default_rng(seed).choice(len(episode), cfg.fresh_states, replace=False).tolist())


def with_targets(
    cfg: Config,
    target: UtteranceCritic,
    episodes: Sequence[Sequence[Transition]],
    asked: Sequence[Sequence[int]],
    fresh: Iterator[Said],
) -> CriticBatch:
    """Rows of transitions, with what Q shall be at all of them and V where a fresh action was asked for."""
    batch = pack_transitions([transition for episode in episodes for transition in episode])
    batch = batch.to(next(target.parameters()).device)
    with torch.no_grad():
        q_2N, next_v_2N = target(batch.tokens, said_in(batch), Places(batch.next_row_N, batch.next_N), batch.lengths)
    gamma_N = cfg.gamma**batch.steps_N
    batch.q_target = bellman.td_target(batch.reward_N, next_v_2N, gamma=gamma_N, terminated=batch.terminated_N)
    if cfg.value_actions == "replayed":
        batch.v_target = q_2N
        return batch
    begin_E = np.cumsum([0, *map(len, episodes)])
    at = [int(begin) + turn for begin, turns in zip(begin_E[:-1], asked, strict=True) for turn in turns]
    answers = pack_branches([next(fresh) for _ in at])
    batch.v_target = torch.full_like(batch.q_target, math.nan)
    batch.v_denom = float(len(at))
    batch.v_target[:, at] = judge(target, answers, cfg.tokens_per_pass)[0].to(batch.v_target)
    return batch


def critic_loss(module: nn.Module, batch: CriticBatch) -> tuple[Tensor, dict[str, float]]:
    """Mean squared error of both Q and both V, each against its own target; V counts where it has one."""
    q_target = losses.require(batch.q_target, "q_target", "Call with_targets first.")
    v_target = losses.require(batch.v_target, "v_target", "Call with_targets first.")
    q_2N, v_2N = module(batch.tokens, said_in(batch), Places(batch.row_N, batch.state_N), batch.lengths)
    q_loss = losses.squared_error(q_2N, q_target).sum() / batch.denom
    asked = ~v_target.isnan()
    v_loss = losses.squared_error(v_2N, v_target.nan_to_num(), asked).sum() / batch.v_denom
    means = {"q_mean": q_2N.mean(0).sum() / batch.denom, "q_target": q_target.mean(0).sum() / batch.denom}
    stats = {"q_loss": q_loss, "v_loss": v_loss, "v_mean": v_2N.mean(0).sum() / batch.denom, **means}
    return q_loss + v_loss, {name: value.item() for name, value in stats.items()}


def said_in(batch: CriticBatch) -> Spans:
    """Where the actions of a batch of transitions lie."""
    return Spans(batch.row_N, batch.state_N, batch.state_N + 1, batch.action_N)


@torch.no_grad()
def judge(critic: UtteranceCritic, batch: Batch, tokens_per_pass: int) -> tuple[Tensor, Tensor]:
    """Twin Q of every packed action and twin V of the state it answered, (2, N) each, on the CPU."""
    q_2N, v_2N = torch.zeros(2, batch.turns), torch.zeros(2, batch.turns)
    for micro in batch.split(tokens_per_pass):
        micro = micro.to(next(critic.parameters()).device)
        said = Spans(micro.row_N, micro.state_N, micro.first_N, micro.last_N)
        seen = Places(micro.row_N, micro.state_N)
        q, v = critic(micro.tokens, said, seen, micro.lengths, **attention_inputs(critic, micro))
        index_N = micro.index_N.cpu()
        q_2N[:, index_N], v_2N[:, index_N] = q.cpu(), v.cpu()
    return q_2N, v_2N


def update_actor(
    cfg: Config,
    step: int,
    policy: Learner,
    reference: nn.Module | None,
    critic: UtteranceCritic,
    batch: Batch,
    replay: Replay,
    role: Role,
) -> dict[str, float]:
    """The low level: every token of an utterance gets min Q − min V of that utterance."""
    if cfg.actor_states == "replay":
        seed = derive_seed(cfg.seed, "actor", step)
        drawn = replay.sample_episodes(cfg.actor_episodes, seed=seed)
        states = [transition.state for episode in drawn for transition in episode]
        batch = pack_branches(asyncio.run(answer_all(role, states, seed=seed)))
    q_2N, v_2N = judge(critic, batch, cfg.tokens_per_pass)
    advantages_N = q_2N.amin(0) - v_2N.amin(0)
    spread = float(advantages_N.std(correction=0))
    if cfg.advantages == "centred":
        advantages_N = advantages_N - advantages_N.mean()
    elif cfg.advantages == "whitened":
        advantages_N = masked_whiten(advantages_N, torch.ones_like(advantages_N, dtype=torch.bool))
    batch.advantages = batch.spread(advantages_N)
    logged = update_policy(
        policy,
        batch,
        settings=cfg.policy,
        reference=reference,
        temperature=cfg.sampling.temperature,
        tokens_per_pass=cfg.tokens_per_pass,
        seed=derive_seed(cfg.seed, "minibatches", step),
    )
    return {**logged, "policy/advantage_std": spread}


def columns(turns: Sequence[Turn], q_2N: Tensor, v_2N: Tensor) -> dict[str, list[tuple[Turn, float]]]:
    """What episodes.jsonl says of each turn besides its words: value and advantage."""
    found = {"value": v_2N.amin(0), "advantage": q_2N.amin(0) - v_2N.amin(0)}
    return {name: list(zip(turns, x_N.tolist(), strict=True)) for name, x_N in found.items()}


def mc_returns(found: Sequence[Sequence[Transition]]) -> Tensor:
    """Discounted return to go of every turn, in order."""
    return torch.tensor([transition.mc_return for episode in found for transition in episode])
