"""PPO over tokens, or turns: a value model of its own says, step by step, what went better than expected.

Schulman et al., "Proximal Policy Optimization", arXiv 1707.06347, over whole multi-turn episodes. The reward of a turn
arrives at its last token; generalised advantage estimation runs over the tokens the policy sampled, in all turns of an
episode, as if the words of the environment between them were not there. The flat baseline of the hierarchical recipes.
With `credit: turn` a step is a turn instead: values are of the states that turns answer, and all tokens of a turn get
its advantage. docs/credit.md compares the two with what needs no value model.

What one-turn RLHF expects is a matter of settings: prompts and reward models in place of an environment, KL to the
starting policy in the reward (shaping.kl_coef, adapted to shaping.kl_target), rewards normalised, bounded and whitened,
a value model that starts as a reward model (value_path), a pretraining loss (ptx), an average of the weights.

Deviations from what is usual for language models: unless settings say so, no KL; a truncated episode bootstraps from
the value of the state it was cut off in; before its first update a value model that knows nothing yet is shifted to
the mean return of the first batch; value model and policy are two models with an optimizer each.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from echelon.config import DataConfig, LoraConfig, ModelConfig, OptimConfig, SamplingConfig, TaskConfig, demand, require
from echelon.data.packing import Batch, pack
from echelon.envs import EnvSpec
from echelon.ops import credit
from echelon.ops.masked import explained_variance, masked_mean, masked_var, masked_whiten
from echelon.rollout.ahead import Level, Played, Player, Rollouts, Run, check_ahead
from echelon.rollout.evaluate import rollout_metrics
from echelon.rollout.learners import open_value, ptx_batches
from echelon.rollout.memory import Engine, Plan
from echelon.rollout.plays import env_loop
from echelon.rollout.rewards import Rewards, open_rewards, open_tasks
from echelon.rollout.roles import Role, collect, decoders
from echelon.rollout.setup import Actor, describe, open_actor, set_threads, task_batch
from echelon.seeds import derive_seed
from echelon.train.aliases import trl_names
from echelon.train.checkpoint import Checkpoints, Saveable
from echelon.train.ema import Average
from echelon.train.learner import Learner, Weights
from echelon.train.log import Log, episode_rows
from echelon.train.policy import PolicyConfig, reference_logprobs, starting_policy, update_policy
from echelon.train.shaping import Shaper, ShapingConfig
from echelon.train.stale import AsyncConfig
from echelon.train.value import before_turns, gae_of_chains, state_values, update_value, values_of
from echelon.types import Episode, Turn


@dataclass(frozen=True, kw_only=True)
class Config(TaskConfig):
    """Settings of PPO."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The policy: a model folder, an adapter's folder, a run directory or a hub id."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """An adapter that learns in place of the policy's weights; KL is then to the model without it."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How utterances are drawn."""
    steps: int = 100
    """Training steps; each plays episodes and updates value model and policy."""
    episodes_per_step: int = 64
    """Episodes played per step."""
    max_turns: int = 100
    """An episode is cut off (truncated, not terminated) after this many turns."""
    error_budget: float = 0.1
    """Fraction of a step's episodes that may fail before the run stops."""
    credit: Literal["token", "turn"] = "token"
    """What a step of generalised advantage estimation is: a sampled token, or a turn, whose tokens all get its
    advantage."""
    gamma: float = 1.0
    """Discount per step of credit."""
    lam: float = 0.95
    """GAE's λ, per step of credit: 1 trusts what was earned, 0 the value of the next state."""
    whiten: bool = True
    """Give advantages mean 0 and deviation 1 over the sampled tokens of a step."""
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    """What rewards are made into before credit is assigned."""
    value_path: str = ""
    """What the value model starts as: a reward model, whose head it keeps, or a language model. Empty: the policy."""
    value_optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of the value model."""
    value_epochs: int = 4
    """Passes of the value model over the batch of a step."""
    value_minibatches: int = 1
    """Optimizer steps of the value model per pass."""
    value_clip: float | None = None
    """How far a value may move from its old one within a step, in the unit of the reward; null does not bound it."""
    warmup_steps: int = 5
    """Steps in which only the value model learns."""
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig(epochs=4))
    """How the policy learns."""
    ptx: DataConfig = field(default_factory=DataConfig)
    """Conversations whose answers the policy goes on learning to say, weighted by policy.ptx_coef."""
    ptx_rows: int = 8
    """Conversations that join each optimizer step of the policy."""
    ema_decay: float = 0.0
    """Keep an average of the policy's weights, of which this part stays at every step, as part "ema"; 0 keeps none."""
    asynchronous: AsyncConfig = field(default_factory=AsyncConfig)
    """Playing the coming steps while one trains."""
    tokens_per_pass: int = 4096
    """Most tokens, padding included, in one forward and backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "model.path")
        counts = ("steps", "episodes_per_step", "max_turns", "value_epochs", "value_minibatches", "tokens_per_pass")
        for name in (*counts, "ptx_rows"):
            demand(self, name, getattr(self, name) >= 1, "it counts something there must be one of. Give 1 or more.")
        because = f"some would have none of a step's {self.episodes_per_step} episodes. Give that many, or fewer."
        demand(self, "value_minibatches", self.value_minibatches <= self.episodes_per_step, because)
        demand(self, "policy.minibatches", self.policy.minibatches <= self.episodes_per_step, because)
        demand(self, "error_budget", 0 <= self.error_budget < 1, "it is a fraction of the episodes. Give 0 to 0.99.")
        check_ahead(self, self.asynchronous, self.model, self.lora, self.sampling)
        for name in ("gamma", "lam"):
            demand(self, name, 0 <= getattr(self, name) <= 1, "a discount lies between 0 and 1.")
        because = (
            "it whitens the rewards of tokens, and credit = turn sums them up. Use shaping.normalize, or leave it out."
        )
        demand(self, "shaping.whiten", not self.shaping.whiten or self.credit == "token", because)
        clip = self.value_clip is None or self.value_clip > 0
        demand(self, "value_clip", clip, "no value could move. Give a few units of reward, or null for no bound.")
        demand(self, "warmup_steps", self.warmup_steps >= 0, "it counts steps. Give 0 to train the policy at once.")
        demand(self, "ema_decay", 0 <= self.ema_decay < 1, "an average moves. Give 0.99, or 0 to keep none.")
        used = not self.ptx.path or self.policy.ptx_coef > 0
        demand(self, "ptx.path", used, "these rows would count nothing. Give policy.ptx_coef a weight, such as 0.05.")
        there = not self.policy.ptx_coef or bool(self.ptx.path)
        demand(self, "policy.ptx_coef", there, "there is nothing to weigh. Give ptx.path the conversations.")


def main(cfg: Config) -> None:
    """Train; the run directory holds checkpoints, metrics.jsonl and episodes.jsonl."""
    actor = open_actor(cfg.model, cfg.sampling, lora=cfg.lora)
    env = open_tasks(cfg, actor.role.renderer)
    rewards = open_rewards(cfg, device=cfg.model.device, tokens_per_pass=cfg.tokens_per_pass)
    set_threads(cfg.threads, actor.module)
    updates = max(0, cfg.steps - cfg.warmup_steps) * cfg.policy.epochs * cfg.policy.minibatches
    policy = Learner(actor.module, cfg.policy.optim, total_steps=updates, name="actor", tokenizer=actor.tokenizer)
    online = open_value(actor, cfg.value_path, model=cfg.model, lora=cfg.lora, seed=cfg.seed)
    fits = cfg.steps * cfg.value_epochs * cfg.value_minibatches
    value = Learner(online, cfg.value_optim, total_steps=fits, name="value")
    reference = starting_policy(actor.module, replace(cfg.policy, kl_coef=cfg.policy.kl_coef or cfg.shaping.kl_coef))
    shaper, mean = Shaper(cfg.shaping), Average(policy, cfg.ema_decay) if cfg.ema_decay else None
    parts = saved_parts(policy, value, reference, shaper, mean)
    if cfg.dry_run:
        return sizes(cfg, actor, online, {**parts, **rewards.modules()})

    temperature, tokens = cfg.sampling.temperature, cfg.tokens_per_pass
    learn = partial(update_policy, policy, settings=cfg.policy, temperature=temperature, tokens_per_pass=tokens)
    ptx = ptx_batches(cfg.ptx, actor, rows=cfg.ptx_rows, seed=cfg.seed)
    learn = partial(learn, reference=None, ptx=ptx)  # `compare` has asked the reference
    levels, play = {"actor": Level(actor, policy, cfg.sampling)}, player(cfg, env, rewards)
    rollouts = Rollouts(cfg.asynchronous, levels, play, steps=cfg.steps, read=Played.from_json)
    out, parts = Path(cfg.out), parts | rollouts.parts()
    checkpoints = Checkpoints(out, config=cfg, keep_last=cfg.keep_last, resume=cfg.resume)
    with checkpoints, rollouts:
        start = checkpoints.restore(parts)[0] if cfg.resume else 0
        rollouts.publish()
        if not cfg.resume:
            checkpoints.save(0, parts)
        with Log(out, total=cfg.steps, start=start, name="ppo", config=cfg.log, settings=cfg) as log:
            for step in range(start, cfg.steps):
                seed = derive_seed(cfg.seed, step)
                torch.manual_seed(seed)  # dropout, where an adapter has any
                found = rollouts.take(step)
                episodes, given = found.episodes, found.metrics | rollouts.metrics()
                played = [episode for episode in episodes if episode.ending != "failed"]
                turns = [turn for episode in played for turn in episode.turns]
                batch = compare(cfg, pack(turns), reference)
                rewards_BT, shaped = shaper.rewards(batch, played)
                if step == 0 and not online.head.weight.any():  # it knows nothing yet
                    online.start_at(mean_return(cfg, batch, played, rewards_BT))
                columns, judged = judge(cfg, value, batch, played, rewards_BT)

                learned = fit_value(cfg, value, batch, seed=seed)
                if step >= cfg.warmup_steps:
                    learned |= learn(batch, seed=seed, stale=rollouts.stale("actor"))
                    shaper.adapt(shaped, episodes=len(played))
                    if mean:
                        mean.update()
                # Also while warming up: it forgets what it has cached, as a resumed run would have.
                rollouts.publish()

                metrics = {**rollout_metrics(episodes), **given, **shaped, **judged, **learned}
                log.metrics(step, metrics | trl_names(metrics, played, (step + 1) * cfg.episodes_per_step))
                log.episodes(step, rows(actor, episodes[:8], batch, turns, columns))
                if step + 1 == cfg.steps or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                    checkpoints.save(step + 1, parts)


def sizes(cfg: Config, actor: Actor, value: nn.Module, held: Mapping[str, Any]) -> None:
    """What `--dry-run` prints of a run that holds these parts."""
    sampled = cfg.episodes_per_step * (cfg.max_turns if cfg.env else 1) * cfg.sampling.max_tokens
    plan = Plan(
        held,
        cfg.dist,
        cfg.tokens_per_pass,
        {"actor": Engine(actor.sampler, cfg.sampling, cfg.asynchronous.max_staleness)},
    )
    describe({"actor": actor.module, "value": value}, tokens_per_step=sampled, plan=plan)


def player(cfg: Config, env: EnvSpec, rewards: Rewards) -> Player[Played]:
    """Plays the episodes of a step, and has them judged."""
    tasks = env.tasks("train")

    def play(roles: Mapping[str, Role], step: int, run: Run) -> Played:
        loop = env_loop(env.make, roles["actor"], max_turns=cfg.max_turns)
        chosen = task_batch(tasks, step, cfg.episodes_per_step, seed=cfg.seed)
        seed = derive_seed(cfg.seed, step)
        episodes = run(collect(chosen, loop, seed=seed, error_budget=cfg.error_budget))
        return Played(episodes, rewards.add(episodes))

    return play


def saved_parts(
    policy: Learner, value: Learner, reference: nn.Module | None, shaper: Shaper, mean: Average | None
) -> dict[str, Saveable]:
    """What a checkpoint holds: what learns, and what else later steps depend on. An adapter knows its own start."""
    parts: dict[str, Saveable] = {"actor": policy, "value": value}
    if reference is not None and reference is not policy.module:
        parts["reference"] = Weights(reference)
    if shaper.settings.remembers:
        parts["shaping"] = shaper
    if mean is not None:
        parts["ema"] = mean
    return parts


def compare(cfg: Config, batch: Batch, reference: nn.Module | None) -> Batch:
    """The batch with the log-probs of the starting policy, if KL to it counts."""
    if reference is not None:
        temperature, tokens = cfg.sampling.temperature, cfg.tokens_per_pass
        batch.ref_logprobs = reference_logprobs(reference, batch, temperature=temperature, tokens_per_pass=tokens)
    return batch


def judge(
    cfg: Config, value: Learner, batch: Batch, played: Sequence[Episode], rewards_BT: Float[Tensor, "B T"]
) -> tuple[dict[str, Float[Tensor, "N"]], dict[str, float]]:
    """Give the batch its values, returns and advantages; per turn the value before it and its mean advantage."""
    values_BT = values_of(value, batch, cfg.tokens_per_pass)
    final_E = final_values(value, played, cfg.tokens_per_pass)
    advantages_BT, returns_BT, earned_BT = SCHEMES[cfg.credit](cfg, batch, played, rewards_BT, values_BT, final_E)
    tokens_N = batch.pool(torch.ones_like(values_BT))
    columns = {"value": before_turns(batch, values_BT), "advantage": batch.pool(advantages_BT) / tokens_N}
    metrics = {
        "value/explained_variance": explained_variance(values_BT, earned_BT, valued(cfg, batch)),
        "policy/advantage_std": masked_var(advantages_BT, batch.mask).sqrt(),
    }
    batch.values, batch.returns = values_BT, returns_BT
    batch.advantages = masked_whiten(advantages_BT, batch.mask) if cfg.whiten else advantages_BT
    return columns, {name: float(number) for name, number in metrics.items()}


def rows(
    actor: Actor, episodes: Sequence[Episode], batch: Batch, turns: Sequence[Turn], columns: Mapping[str, Tensor]
) -> Iterator[dict[str, Any]]:
    """What episodes.jsonl says of these episodes: of each turn the columns, of each token its advantage."""
    assert batch.advantages is not None
    per_turn = {name: zip(turns, x_N.tolist(), strict=True) for name, x_N in columns.items()}
    per_token = {"advantages": zip(turns, batch.by_turn(batch.advantages), strict=True)}
    return episode_rows(episodes, decode=decoders(actor.role), per_turn=per_turn, per_token=per_token)


Credit = tuple[Float[Tensor, "B T"], Float[Tensor, "B T"], Float[Tensor, "B T"]]
"""Advantages, what values are to learn, and what was really earned from each step on."""


def over_tokens(
    cfg: Config,
    batch: Batch,
    played: Sequence[Episode],
    rewards_BT: Float[Tensor, "B T"],
    values_BT: Float[Tensor, "B T"],
    final_E: Float[Tensor, "E"],
) -> Credit:
    """GAE in which a step is a sampled token. In which rows the turns of an episode lie changes nothing."""
    gae = partial(gae_of_chains, batch, owners(played), rewards_BT, gamma=cfg.gamma, after_C=final_E)
    advantages_BT, returns_BT = gae(values_BT, lam=cfg.lam)
    return advantages_BT, returns_BT, gae(torch.zeros_like(values_BT), lam=1.0)[1]


def over_turns(
    cfg: Config,
    batch: Batch,
    played: Sequence[Episode],
    rewards_BT: Float[Tensor, "B T"],
    values_BT: Float[Tensor, "B T"],
    final_E: Float[Tensor, "E"],
) -> Credit:
    """GAE in which a step is a turn: what its tokens earned, and the value of the state it answered.

    Every token of a turn gets its advantage; what values learn stands at the turn's first token, where they are read.
    In which rows the turns lie changes nothing.
    """
    owner_N = owners(played)
    rewards_N, values_N = batch.pool(rewards_BT), before_turns(batch, values_BT)
    gae = partial(credit.turn_gae, rewards_N, episode_N=owner_N, bootstrap_N=final_E[owner_N], gamma=cfg.gamma)
    advantages_N, returns_N = gae(values_N, lam=cfg.lam)
    earned_N = gae(torch.zeros_like(values_N), lam=1.0)[1]
    first_BT = valued(cfg, batch)
    return batch.spread(advantages_N), batch.spread(returns_N) * first_BT, batch.spread(earned_N) * first_BT


SCHEMES = {"token": over_tokens, "turn": over_turns}


def valued(cfg: Config, batch: Batch) -> Bool[Tensor, "B T"]:
    """The tokens before which a value is read and learned: all that were sampled, or the first of each turn."""
    if cfg.credit == "token":
        return batch.mask
    first_BT = torch.zeros_like(batch.mask)
    first_BT[batch.row_N, batch.first_N] = True
    return first_BT


def fit_value(cfg: Config, value: Learner, batch: Batch, *, seed: int) -> dict[str, float]:
    """Fit the value model to the returns, where it is read."""
    return update_value(
        value,
        batch,
        read_BT=valued(cfg, batch),
        epochs=cfg.value_epochs,
        minibatches=cfg.value_minibatches,
        clip=cfg.value_clip,
        tokens_per_pass=cfg.tokens_per_pass,
        seed=seed,
    )


def owners(played: Sequence[Episode]) -> Int[Tensor, "N"]:
    """The number of the episode that each turn belongs to."""
    return torch.arange(len(played)).repeat_interleave(torch.tensor([len(episode.turns) for episode in played]))


def final_values(value: Learner, played: Sequence[Episode], tokens_per_pass: int) -> Float[Tensor, "E"]:
    """V of the state in which each truncated episode was cut off; 0 for those that terminated."""
    states = [episode.final if episode.ending == "truncated" else None for episode in played]
    cut_off = [state for state, episode in zip(states, played, strict=True) if episode.ending == "truncated"]
    assert all(cut_off), "a truncated episode says in which state it was cut off"
    return state_values(value, states, tokens_per_pass)


def mean_return(cfg: Config, batch: Batch, played: Sequence[Episode], rewards_BT: Float[Tensor, "B T"]) -> float:
    """Mean over steps of what was earned from there on: where the value model starts."""
    nothing_BT, nothing_E = torch.zeros_like(rewards_BT), torch.zeros(len(played))
    earned_BT = SCHEMES[cfg.credit](cfg, batch, played, rewards_BT, nothing_BT, nothing_E)[2]
    return float(masked_mean(earned_BT, valued(cfg, batch)))
