"""Rank: at every step several utterances are drawn from one state, and a learned ranker picks the one that is said.

The two levels of recurve, after ArCHer (Zhou et al., arXiv 2402.19446). The high level is a ranker, a decoder that
reads Q(s, c) where candidate c ends; it chooses ε-greedily among the candidates and learns by double DQN from a replay
that keeps every state with all its candidates, so that the best next one is known and nothing is sampled to learn. The
low level, the generator, is left as it is (`generator: frozen`, which is CHAI, arXiv 2204.08426) or learns by PPO: all
candidates of every fresh state are training rows, each scored by Q, and compared with the others of its state.

Deviations from recurve, each a setting or told in docs/algorithms/rank.md: whole episodes are played, many at a time;
the ranker learns from the first step on; a truncated episode bootstraps; candidates are compared with one another
instead of with a value model, unless `baseline: value`; KL to the start is estimated from the sampled tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from echelon.config import LoraConfig, ModelConfig, OptimConfig, SamplingConfig, TaskConfig, demand, require
from echelon.data.candidates import CandidateReplay, Choice, Options
from echelon.data.packing import Batch, Sampled, pack
from echelon.envs import EnvSpec
from echelon.errors import DataError
from echelon.models.heads import TokenValue
from echelon.models.lm import attention_inputs, hidden_states
from echelon.models.ranker import Ranker
from echelon.ops import bellman, credit, losses, ranking
from echelon.ops.masked import explained_variance, masked_var
from echelon.rollout.ahead import Player, Rollouts, Run, check_ahead
from echelon.rollout.candidates import Offered, candidate_loop, choices, choosing, new_ranker, offer_rows
from echelon.rollout.evaluate import rollout_metrics
from echelon.rollout.memory import Engine, Plan
from echelon.rollout.rewards import Rewards, open_rewards, open_tasks
from echelon.rollout.roles import Role, collect, decoders
from echelon.rollout.setup import Actor, describe, open_actor, set_threads, task_batch
from echelon.sampling.candidates import Chooser, Offer, lay_candidates, q_of, q_values, ranker_score
from echelon.seeds import derive_seed
from echelon.text.chat import Example
from echelon.train import dist
from echelon.train.checkpoint import Checkpoints, Saveable
from echelon.train.learner import Learner, Weights, average
from echelon.train.log import Log, episode_rows
from echelon.train.policy import PolicyConfig, passes, starting_policy, update_policy
from echelon.train.stale import AsyncConfig, Stale


@dataclass(frozen=True, kw_only=True)
class Config(TaskConfig):
    """Settings of ranking."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The generator: a model folder, an adapter's folder, a run directory or a hub id."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapter of the generator. The ranker has one of its own, on its own copy."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How candidates are drawn."""
    steps: int = 100
    """Training steps; each plays episodes and updates ranker and generator."""
    episodes_per_step: int = 16
    """Episodes played per step."""
    max_turns: int = 100
    """An episode is cut off (truncated, not terminated) after this many turns."""
    error_budget: float = 0.1
    """Fraction of a step's episodes that may fail before the run stops."""
    candidates: int = 8
    """Utterances drawn in every state, of which one is said."""
    epsilon: float = 1.0
    """Probability of a random choice at the first step; it falls linearly with the steps."""
    epsilon_floor: float = 0.05
    """The part of epsilon that always stays."""
    gamma: float = 1.0
    """Discount per turn."""
    replay_capacity: int = 10_000
    """Decisions kept, each with all its candidates."""
    ranker_path: str = ""
    """Model that the ranker's body starts as a copy of, with the generator's tokenizer; empty takes the generator."""
    ranker_sigmoid: bool = False
    """Squash Q into (0, 1), where all returns lie: it cannot be over-estimated beyond that."""
    ranker_optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of the ranker."""
    ranker_updates: int = 4
    """Optimizer steps of the ranker per step."""
    ranker_batch: int = 64
    """Replayed decisions per optimizer step of the ranker."""
    target: Literal["hard", "polyak"] = "hard"
    """How the target network follows."""
    target_every: int = 100
    """Hard: optimizer steps of the ranker between copies."""
    tau: float = 0.1
    """Polyak: the fraction of the way the target moves per optimizer step."""
    generator: Literal["ppo", "frozen"] = "ppo"
    """The generator learns from the ranker, or stays as it is and is only re-ranked (CHAI)."""
    warmup_steps: int = 5
    """Steps in which only the ranker learns."""
    baseline: Literal["leave_one_out", "mean", "none", "value"] = "leave_one_out"
    """What a candidate is compared with: the mean of the others of its state, of all of them, nothing, or what a value
    model expected before each of its tokens."""
    lam: float = 0.95
    """GAE's λ, per token of a candidate (baseline = value)."""
    value_optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of the value model (baseline = value)."""
    min_spread: float = 0.0
    """States whose candidates' scores deviate less than this from one another teach the generator nothing."""
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig(epochs=2))
    """How the generator learns."""
    asynchronous: AsyncConfig = field(default_factory=AsyncConfig)
    """Playing the coming steps while one trains."""
    tokens_per_pass: int = 4096
    """Most tokens, padding included, in one forward and backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "model.path")
        demand(self, "candidates", self.candidates >= 2, "there would be no choice. Give 2 or more, such as 8.")
        counts = ("steps", "episodes_per_step", "max_turns", "replay_capacity", "ranker_updates", "ranker_batch")
        for name in (*counts, "target_every", "tokens_per_pass"):
            demand(self, name, getattr(self, name) >= 1, "it counts something there must be one of. Give 1 or more.")
        demand(self, "error_budget", 0 <= self.error_budget < 1, "it is a fraction of the episodes. Give 0 to 0.99.")
        demand(self, "warmup_steps", self.warmup_steps >= 0, "it counts steps. Give 0 to train the generator at once.")
        demand(self, "epsilon", 0 <= self.epsilon <= 1, "it is a probability. Give 1 to begin with random choices.")
        demand(self, "epsilon_floor", 0 <= self.epsilon_floor <= 1, "it is a part of epsilon. Give 0.05.")
        for name in ("gamma", "lam"):
            demand(self, name, 0 <= getattr(self, name) <= 1, "a discount lies between 0 and 1.")
        demand(self, "tau", 0 < self.tau <= 1, "the target would never move, or overshoot. Give a number in (0, 1].")
        demand(self, "min_spread", self.min_spread >= 0, "a deviation is not negative. Give 0 to use every state.")
        check_ahead(self, self.asynchronous, self.model, self.lora, self.sampling)


@dataclass(slots=True)
class Levels:
    """What learns, and what it is compared with."""

    policy: Learner
    ranker: Learner
    online: Ranker
    """What `ranker` trains."""
    target: Ranker
    replay: CandidateReplay
    reference: nn.Module | None
    value: Learner | None

    def parts(self) -> dict[str, Saveable]:
        """What a checkpoint holds. An adapter knows its own start, so it needs no copy of it."""
        parts: dict[str, Saveable] = {"actor": self.policy, "ranker": self.ranker, "replay": self.replay}
        parts["target"] = Weights(self.target)
        if self.reference is not None and self.reference is not self.policy.module:
            parts["reference"] = Weights(self.reference)
        if self.value is not None:
            parts["value"] = self.value
        return parts


def main(cfg: Config) -> None:
    """Train; the run directory holds checkpoints, metrics.jsonl and episodes.jsonl."""
    actor = open_actor(cfg.model, cfg.sampling, lora=cfg.lora)
    env = open_tasks(cfg, actor.role.renderer)
    rewards = open_rewards(cfg, device=cfg.model.device, tokens_per_pass=cfg.tokens_per_pass)
    set_threads(cfg.threads, actor.module)
    levels = open_levels(cfg, actor)
    if cfg.dry_run:
        sampled = cfg.episodes_per_step * (cfg.max_turns if cfg.env else 1) * cfg.candidates * cfg.sampling.max_tokens
        ahead = cfg.asynchronous.max_staleness
        engines = {"actor": Engine(actor.sampler, cfg.sampling, ahead)}
        copies = {"ranker": (levels.online, ahead)}
        plan = Plan({**levels.parts(), **rewards.modules()}, cfg.dist, cfg.tokens_per_pass, engines, copies)
        return describe({"actor": actor.module, "ranker": levels.online}, tokens_per_step=sampled, plan=plan)

    play, out = player(cfg, env, rewards), Path(cfg.out)
    score = partial(ranker_score, tokens_per_pass=cfg.tokens_per_pass)
    level = choosing(actor, levels.policy, cfg.sampling, levels.online, score, cfg.candidates)
    rollouts = Rollouts(cfg.asynchronous, {"actor": level}, play, steps=cfg.steps, read=Offered.from_json)
    parts = levels.parts() | rollouts.parts()
    checkpoints = Checkpoints(out, config=cfg, keep_last=cfg.keep_last, resume=cfg.resume)
    with checkpoints, rollouts:
        start = checkpoints.restore(parts)[0] if cfg.resume else 0
        rollouts.publish()
        if not cfg.resume:
            checkpoints.save(0, parts)
        with Log(out, total=cfg.steps, start=start, name="rank", config=cfg.log, settings=cfg) as log:
            for step in range(start, cfg.steps):
                seed = derive_seed(cfg.seed, step)
                torch.manual_seed(seed)  # dropout, where an adapter has any
                done = rollouts.take(step)
                episodes, offers, given = done.episodes, done.offers, done.metrics | rollouts.metrics()
                played = [episode for episode in episodes if episode.ending != "failed"]
                found = [choices(episode, offers) for episode in played]
                levels.replay.add(found)

                offered = [offers[turn.seed] for episode in played for turn in episode.turns]
                learned = learn(cfg, step, levels, found, offered, rollouts.stale("actor"))
                # Also where the generator rests: it forgets what it has cached, as a resumed run would have.
                rollouts.publish()

                log.metrics(step, {**rollout_metrics(episodes), **given, **learned})
                rows = episode_rows(episodes[:8], decode=decoders(actor.role))
                log.episodes(step, offer_rows(rows, episodes[:8], offers))
                if step + 1 == cfg.steps or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                    checkpoints.save(step + 1, parts)


def player(cfg: Config, env: EnvSpec, rewards: Rewards) -> Player[Offered]:
    """Plays the episodes of a step, choosing as that step explores, and has them judged."""
    tasks = env.tasks("train")

    def play(roles: Mapping[str, Role], step: int, run: Run) -> Offered:
        role, seed = roles["actor"], derive_seed(cfg.seed, step)
        chooser = role.sampler
        assert isinstance(chooser, Chooser), "one of several candidates is said"
        chooser.epsilon = ranking.exploration_rate(step, cfg.steps, epsilon=cfg.epsilon, floor=cfg.epsilon_floor)
        loop = candidate_loop(env.make, role, chooser, max_turns=cfg.max_turns)
        tried = task_batch(tasks, step, cfg.episodes_per_step, seed=cfg.seed)
        episodes = run(collect(tried, loop, seed=seed, error_budget=cfg.error_budget))
        given = rewards.add(episodes) | {"candidates/epsilon": chooser.epsilon}
        return Offered(episodes, given, dist.union(chooser.take()))

    return play


def open_levels(cfg: Config, actor: Actor) -> Levels:
    """Both levels as they start."""
    learns = cfg.generator == "ppo"
    updates = max(0, cfg.steps - cfg.warmup_steps) * cfg.policy.epochs * cfg.policy.minibatches
    policy = Learner(actor.module, cfg.policy.optim, total_steps=updates, name="actor", tokenizer=actor.tokenizer)
    online = new_ranker(
        actor,
        path=cfg.ranker_path,
        model=cfg.model,
        lora=cfg.lora,
        bounded=cfg.ranker_sigmoid,
        seed=derive_seed(cfg.seed, "ranker"),
    )
    ranker = Learner(online, cfg.ranker_optim, total_steps=cfg.steps * cfg.ranker_updates, name="ranker")
    value = None
    if learns and cfg.baseline == "value":
        value = Learner(TokenValue.from_lm(actor.module), cfg.value_optim, total_steps=updates, name="value")
    reference = starting_policy(actor.module, cfg.policy) if learns else None
    return Levels(policy, ranker, online, online.target(), CandidateReplay(cfg.replay_capacity), reference, value)


def learn(
    cfg: Config,
    step: int,
    levels: Levels,
    found: Sequence[Sequence[Choice]],
    offers: Sequence[Offer],
    stale: Stale | None = None,
) -> dict[str, float]:
    """One step of both levels: the ranker from the replay, then the generator from the fresh states as it ranks them.

    `offers` are those of the decisions in `found`, one after the other. `stale` corrects candidates that older weights
    have drawn; choices need no correction: Q learns from anybody's.
    """
    returns_N, fresh = returns(cfg, found), [choice for episode in found for choice in episode]
    if step == 0:
        levels.online.start_at(float(returns_N.mean()))
        bellman.hard_copy_(levels.target, levels.online)
    learned = update_ranker(cfg, step, levels)
    q_NK, _ = table(levels.online, [choice.options for choice in fresh], cfg.tokens_per_pass)
    chosen_N = torch.tensor([choice.chosen for choice in fresh])
    q_N, everywhere = q_NK.gather(1, chosen_N[:, None])[:, 0], torch.ones(len(fresh), dtype=torch.bool)
    learned["ranker/explained_variance"] = float(explained_variance(q_N, returns_N, everywhere))
    learned |= {
        "candidates/spread": float(ranking.spread(q_NK).mean()),
        "candidates/distinct": sum(len({tuple(c.tokens) for c in o.candidates}) for o in offers) / q_NK.numel(),
        "candidates/explored": sum(offer.explored for offer in offers) / len(offers),
    }
    if cfg.generator == "ppo" and step >= cfg.warmup_steps:
        rewards_N = torch.tensor([choice.reward for choice in fresh])
        terminated_N = torch.tensor([choice.terminated for choice in fresh])
        scores_NK = ranking.candidate_scores(q_NK, chosen_N, rewards_N, terminated_N)
        learned |= update_generator(cfg, step, levels, offers, scores_NK, stale)
    return learned


def update_ranker(cfg: Config, step: int, levels: Levels) -> dict[str, float]:
    """The high level: Q of what was chosen towards r + γ·Q̄ of the next candidate that Q likes best; Q̄ follows."""
    logged = []
    for update in range(cfg.ranker_updates):
        drawn = levels.replay.sample(cfg.ranker_batch, seed=derive_seed(cfg.seed, "ranker", step, update))
        batch = with_targets(cfg, drawn, levels.online, levels.target)
        logged.append(levels.ranker.update(batch.split(cfg.tokens_per_pass), ranker_loss))
        how, version = cfg.target, levels.ranker.version
        bellman.follow_(levels.target, levels.online, how=how, tau=cfg.tau, every=cfg.target_every, version=version)
    return {f"ranker/{name}": value for name, value in average(logged).items()}


def with_targets(cfg: Config, drawn: Sequence[Choice], online: Ranker, target: Ranker) -> Batch:
    """Rows of what was chosen; what Q shall be stands in `returns`, where each utterance ends.

    With γ = 0 nothing is asked of the states that follow, whose candidates are most of the work.
    """
    said = [Example(choice.options.state, choice.options.candidates[choice.chosen]) for choice in drawn]
    wanted_N = torch.tensor([choice.reward for choice in drawn])
    if cfg.gamma > 0:
        ahead = [choice.after for choice in drawn]
        online_NK, legal_NK = table(online, ahead, cfg.tokens_per_pass)
        target_NK, _ = table(target, ahead, cfg.tokens_per_pass)
        over_N = torch.tensor([choice.terminated for choice in drawn])
        wanted_N = bellman.double_q_target(
            wanted_N, online_NK, target_NK, gamma=cfg.gamma, terminated=over_N, legal_NK=legal_NK
        )
    batch = pack(said)
    return replace(batch, returns=batch.at_end(wanted_N), denom=float(len(drawn)))


def table(
    ranker: Ranker, options: Sequence[Options | None], tokens_per_pass: int
) -> tuple[Float[Tensor, "N K"], Bool[Tensor, "N K"]]:
    """Q of all candidates of each state, and where there is one: nowhere for no state. Without gradient."""
    counts = [0 if here is None else len(here.candidates) for here in options]
    there = torch.arange(max(1, *counts)) < torch.tensor(counts)[:, None]
    said = [Example(here.state, action) for here in options if here for action in here.candidates]
    return torch.zeros(there.shape).masked_scatter(there, q_values(ranker, said, tokens_per_pass)), there


def ranker_loss(module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Mean squared error of Q over the decisions."""
    wanted = losses.require(batch.returns, "returns", "Call with_targets first.")[batch.row_N, batch.last_N]
    q_N = q_of(module, batch)  # type: ignore[arg-type]
    loss = losses.squared_error(q_N, wanted).sum() / batch.denom
    return loss, {"q_mean": float(q_N.detach().sum()) / batch.denom, "q_target": float(wanted.sum()) / batch.denom}


def update_generator(
    cfg: Config,
    step: int,
    levels: Levels,
    offers: Sequence[Offer],
    scores_NK: Float[Tensor, "N K"],
    stale: Stale | None = None,
) -> dict[str, float]:
    """The low level: PPO on all candidates of the fresh states whose scores differ enough."""
    used_N = ranking.spread(scores_NK) >= cfg.min_spread
    counted = {"policy/states": float(used_N.sum())}
    if not used_N.any():
        return counted
    taught = [offer for offer, used in zip(offers, used_N.tolist(), strict=True) if used]
    said = [Sampled(offer.prompt, c.tokens, c.logprobs) for offer in taught for c in offer.candidates]
    batch = lay_candidates(said, branches=levels.online.shares_prompts)
    scores_M, seed = scores_NK[used_N].flatten(), derive_seed(cfg.seed, "generator", step)
    if levels.value is not None:
        counted |= judge_by_value(cfg, levels.value, batch, scores_M, seed=derive_seed(seed, "value"))
    else:
        batch.advantages = batch.spread(compare(cfg, scores_M))
    advantages = losses.require(batch.advantages, "advantages", "Judge the candidates first.")
    counted["policy/advantage_std"] = float(masked_var(advantages, batch.mask).sqrt())
    return counted | update_policy(
        levels.policy,
        batch,
        settings=cfg.policy,
        reference=levels.reference,
        temperature=cfg.sampling.temperature,
        tokens_per_pass=cfg.tokens_per_pass,
        seed=seed,
        stale=stale,
    )


def compare(cfg: Config, scores_M: Float[Tensor, "M"]) -> Float[Tensor, "M"]:
    """The advantage of every candidate over the others of its state, which stand next to it."""
    if cfg.baseline == "none":
        return scores_M
    state_M = [place // cfg.candidates for place in range(len(scores_M))]
    return credit.group_baseline(scores_M, state_M, leave_one_out=cfg.baseline == "leave_one_out")


def judge_by_value(
    cfg: Config, value: Learner, batch: Batch, scores_M: Float[Tensor, "M"], *, seed: int
) -> dict[str, float]:
    """Advantages of every token by GAE over its candidate, which ends with its score; then the value model learns."""
    if value.version == 0:
        value.module.start_at(float(scores_M.mean()))  # type: ignore[operator]
    batch.values = value.evaluate(batch, values_before, cfg.tokens_per_pass)
    places = batch.row_N, batch.first_N, batch.last_N
    batch.advantages, batch.returns = ranking.utterance_gae(scores_M, batch.values, *places, lam=cfg.lam)
    epochs, minibatches, tokens = cfg.policy.epochs, cfg.policy.minibatches, cfg.tokens_per_pass
    logged = passes(value, batch, value_loss, epochs=epochs, minibatches=minibatches, tokens_per_pass=tokens, seed=seed)
    return {f"value/{name}": number for name, number in average(logged).items()}


def values_before(module: nn.Module, batch: Batch) -> Float[Tensor, "B T"]:
    """V before each token, which has not seen the token; of a candidate's first one, V of its state."""
    body, attention = module.body, attention_inputs(module.body, batch)  # type: ignore[arg-type]
    hidden = hidden_states(body, batch.tokens, batch.lengths, **attention)  # type: ignore[arg-type]
    after_BT: Tensor = module.head(hidden.float())[..., 0]  # type: ignore[operator]
    return after_BT.gather(1, batch.before)


def value_loss(module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Half the mean squared error of V over the candidates' tokens."""
    wanted = losses.require(batch.returns, "returns", "Judge the batch first.")
    loss = 0.5 * losses.squared_error(values_before(module, batch), wanted, batch.mask)
    return losses.token_sum(loss, batch.mask, batch.denom), {}


def returns(cfg: Config, found: Sequence[Sequence[Choice]]) -> Float[Tensor, "N"]:
    """What was earned from each decision on, discounted, nothing bootstrapped.

    Raises DataError for a return that a squashed Q can never say.
    """
    episode_N = torch.tensor([number for number, episode in enumerate(found) for _ in episode])
    rewards_N = torch.tensor([choice.reward for episode in found for choice in episode])
    returns_N = credit.turn_returns(rewards_N, episode_N, gamma=cfg.gamma)
    outside = returns_N[(returns_N < 0) | (returns_N > 1)]
    if cfg.ranker_sigmoid and len(outside):
        raise DataError(
            f"ranker_sigmoid = true: an episode returned {float(outside[0]):g}, and Q would stay between 0 and 1. "
            "Set ranker_sigmoid = false, or rewards between 0 and 1."
        )
    return returns_N
