"""PPO over tokens: a value model of its own says, token by token, what went better than expected.

Schulman et al., "Proximal Policy Optimization", arXiv 1707.06347, over whole multi-turn episodes. The reward of a turn
arrives at its last token; generalised advantage estimation runs over the tokens the policy sampled, in all turns of an
episode, as if the words of the environment between them were not there. The flat baseline of the hierarchical recipes.

Deviations from what is usual for language models: KL to the starting policy is a loss, not part of the reward; a
truncated episode bootstraps from the value of the state it was cut off in; before its first update the value model
is shifted to the mean return of the first batch.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from echelon.config import ModelConfig, OptimConfig, RunConfig, SamplingConfig, Settings, demand, require, to_yaml
from echelon.data.packing import Batch, group_rows, pack, pad
from echelon.models.heads import TokenValue, token_values
from echelon.ops import credit, losses
from echelon.ops.masked import explained_variance, masked_mean, masked_var, masked_whiten
from echelon.rollout.evaluate import rollout_metrics
from echelon.rollout.plays import env_loop
from echelon.rollout.roles import collect
from echelon.rollout.setup import describe, open_actor, open_env, set_threads, task_batch
from echelon.seeds import derive_seed
from echelon.train.checkpoint import Checkpoints, Saveable
from echelon.train.learner import Learner, Weights, average
from echelon.train.log import Log, episode_rows
from echelon.train.policy import PolicyConfig, passes, starting_policy, update_policy
from echelon.types import Episode


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of PPO."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The policy: a model folder, a run directory or a hub id. The value model starts as a copy of its body."""
    env: str
    """The environment: a built-in name, path.py:Class or module:Class."""
    env_settings: Settings = field(default_factory=dict)
    """Settings of the environment."""
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
    gamma: float = 1.0
    """Discount per sampled token."""
    lam: float = 0.95
    """GAE's λ, per sampled token: 1 trusts what was earned, 0 the value of the next token."""
    whiten: bool = True
    """Give advantages mean 0 and deviation 1 over the sampled tokens of a step."""
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
    tokens_per_pass: int = 4096
    """Most tokens, padding included, in one forward and backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "env", "model.path")
        counts = ("steps", "episodes_per_step", "max_turns", "value_epochs", "value_minibatches", "tokens_per_pass")
        for name in counts:
            demand(self, name, getattr(self, name) >= 1, "it counts something there must be one of. Give 1 or more.")
        demand(self, "error_budget", 0 <= self.error_budget < 1, "it is a fraction of the episodes. Give 0 to 0.99.")
        for name in ("gamma", "lam"):
            demand(self, name, 0 <= getattr(self, name) <= 1, "a discount lies between 0 and 1.")
        clip = self.value_clip is None or self.value_clip > 0
        demand(self, "value_clip", clip, "no value could move. Give a few units of reward, or null for no bound.")
        demand(self, "warmup_steps", self.warmup_steps >= 0, "it counts steps. Give 0 to train the policy at once.")


def main(cfg: Config) -> None:
    """Train; the run directory holds checkpoints, metrics.jsonl and episodes.jsonl."""
    env = open_env(cfg.env, cfg.env_settings)
    actor = open_actor(cfg.model, cfg.sampling)
    set_threads(cfg.threads, actor.module)
    updates = max(0, cfg.steps - cfg.warmup_steps) * cfg.policy.epochs * cfg.policy.minibatches
    policy = Learner(actor.module, cfg.policy.optim, total_steps=updates, name="actor", tokenizer=actor.tokenizer)
    online = TokenValue.from_lm(actor.module)
    fits = cfg.steps * cfg.value_epochs * cfg.value_minibatches
    value = Learner(online, cfg.value_optim, total_steps=fits, name="value")
    reference = starting_policy(actor.module, cfg.policy)
    parts: dict[str, Saveable] = {"actor": policy, "value": value}
    if reference is not None:
        parts["reference"] = Weights(reference)
    if cfg.dry_run:
        sampled = cfg.episodes_per_step * cfg.max_turns * cfg.sampling.max_tokens
        return describe({"actor": actor.module, "value": online}, tokens_per_step=sampled)

    tasks = env.tasks("train")
    play = env_loop(env.make, actor.role, max_turns=cfg.max_turns)
    temperature, tokens = cfg.sampling.temperature, cfg.tokens_per_pass
    learn = partial(update_policy, policy, settings=cfg.policy, temperature=temperature, tokens_per_pass=tokens)
    out = Path(cfg.out)
    with Checkpoints(out, config_yaml=to_yaml(cfg), keep_last=cfg.keep_last, resume=cfg.resume) as checkpoints:
        start = checkpoints.restore(parts)[0] if cfg.resume else 0
        actor.sampler.load(policy.weights(), policy.version)
        if not cfg.resume:
            checkpoints.save(0, parts)
        with Log(out, total=cfg.steps, start=start, name="ppo") as log:
            for step in range(start, cfg.steps):
                seed = derive_seed(cfg.seed, step)
                chosen = task_batch(tasks, step, cfg.episodes_per_step, seed=cfg.seed)
                episodes = asyncio.run(collect(chosen, play, seed=seed, error_budget=cfg.error_budget))
                played = [episode for episode in episodes if episode.ending != "failed"]
                turns = [turn for episode in played for turn in episode.turns]
                batch = pack(turns)
                if step == 0:
                    online.start_at(mean_return(cfg, batch, played))
                columns, metrics = judge(cfg, value, batch, played)

                metrics |= update_value(cfg, value, batch, seed=seed)
                if step >= cfg.warmup_steps:
                    metrics |= learn(batch, reference=reference, seed=seed)
                # Also while warming up: it forgets what it has cached, as a resumed run would have.
                actor.sampler.load(policy.weights(), policy.version)

                log.metrics(step, {**rollout_metrics(episodes), **metrics})
                per_turn = {name: zip(turns, x_N.tolist(), strict=True) for name, x_N in columns.items()}
                log.episodes(step, episode_rows(episodes[:8], per_turn=per_turn))
                if step + 1 == cfg.steps or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                    checkpoints.save(step + 1, parts)


def judge(
    cfg: Config, value: Learner, batch: Batch, played: Sequence[Episode]
) -> tuple[dict[str, Float[Tensor, "N"]], dict[str, float]]:
    """Give the batch its values, returns and advantages; per turn the value before it and its mean advantage.

    A row of an episode whose next turn could not continue it (its prompt had been cut) is followed by the value of the
    state that turn begins in.
    """
    values_BT = value.evaluate(batch, lambda module, micro: token_values(module, micro)[0], cfg.tokens_per_pass)
    rewards_BT = batch.at_end(rewards_of(played))
    bootstrap_B = after_rows(batch, values_BT, played, final_values(value, played, cfg.tokens_per_pass))
    advantages_BT, returns_BT = credit.token_gae(
        rewards_BT, values_BT, batch.mask, gamma=cfg.gamma, lam=cfg.lam, bootstrap_B=bootstrap_B
    )
    tokens_N = batch.pool(torch.ones_like(values_BT))
    columns = {"value": before_turns(batch, values_BT), "advantage": batch.pool(advantages_BT) / tokens_N}
    earned_BT = to_go(cfg, batch, rewards_BT, bootstrap_B)
    metrics = {
        "value/explained_variance": explained_variance(values_BT, earned_BT, batch.mask),
        "policy/advantage_std": masked_var(advantages_BT, batch.mask).sqrt(),
    }
    batch.values, batch.returns = values_BT, returns_BT
    batch.advantages = masked_whiten(advantages_BT, batch.mask) if cfg.whiten else advantages_BT
    return columns, {name: float(number) for name, number in metrics.items()}


def update_value(cfg: Config, value: Learner, batch: Batch, *, seed: int) -> dict[str, float]:
    """Fit the value model to the returns."""
    epochs, minibatches, tokens = cfg.value_epochs, cfg.value_minibatches, cfg.tokens_per_pass
    loss_fn = partial(value_loss, clip=cfg.value_clip)
    logged = passes(
        value,
        batch,
        loss_fn,
        epochs=epochs,
        minibatches=minibatches,
        tokens_per_pass=tokens,
        seed=derive_seed(seed, "value"),
    )
    return {f"value/{name}": number for name, number in average(logged).items()}


def value_loss(module: nn.Module, batch: Batch, *, clip: float | None) -> tuple[Tensor, dict[str, float]]:
    """Half the mean squared error over sampled tokens; with `clip`, of the worse of the value and the clipped value."""
    values, _ = token_values(module, batch)
    old = losses.require(batch.values, "values", "Judge the batch first.")
    returns = losses.require(batch.returns, "returns", "Judge the batch first.")
    if clip is None:
        loss = 0.5 * losses.squared_error(values, returns, batch.mask)
    else:
        loss = losses.clipped_value(values, old, returns, batch.mask, clip=clip)
    stats = losses.reduce_stats({"mean": values.detach(), "return": returns}, batch.mask, batch.denom)
    return losses.token_sum(loss, batch.mask, batch.denom), stats


def after_rows(
    batch: Batch, values_BT: Float[Tensor, "B T"], played: Sequence[Episode], final_E: Float[Tensor, "E"]
) -> Float[Tensor, "B"]:
    """What follows the last sampled token of each row: the end of its episode, or the state its next row begins in."""
    next_N = before_turns(batch, values_BT).roll(-1)
    next_N[torch.tensor([len(episode.turns) for episode in played]).cumsum(0) - 1] = final_E
    return next_N[batch.row_N.bincount().cumsum(0) - 1]


@torch.no_grad()
def final_values(value: Learner, played: Sequence[Episode], tokens_per_pass: int) -> Float[Tensor, "E"]:
    """V of the state in which each truncated episode was cut off; 0 for those that terminated."""
    final_E = torch.zeros(len(played))
    cut_off = [number for number, episode in enumerate(played) if episode.ending == "truncated"]
    states = [played[number].final or [] for number in cut_off]
    assert all(states), "a truncated episode says in which state it was cut off"
    for group in group_rows([len(state) for state in states], tokens_per_pass):
        tokens, lengths = pad([states[place] for place in group])
        values = value.module(tokens.to(value.device)).cpu()
        final_E[[cut_off[place] for place in group]] = values[torch.arange(len(group)), lengths - 1]
    return final_E


def before_turns(batch: Batch, values_BT: Float[Tensor, "B T"]) -> Float[Tensor, "N"]:
    """V of the state each turn answered: the value before its first token."""
    return values_BT[batch.row_N, batch.state_N + 1]


def to_go(
    cfg: Config, batch: Batch, rewards_BT: Float[Tensor, "B T"], bootstrap_B: Float[Tensor, "B"]
) -> Float[Tensor, "B T"]:
    """What was really earned from each sampled token on, until its row ends."""
    nothing_BT = torch.zeros_like(rewards_BT)
    return credit.token_gae(rewards_BT, nothing_BT, batch.mask, gamma=cfg.gamma, lam=1.0, bootstrap_B=bootstrap_B)[1]


def mean_return(cfg: Config, batch: Batch, played: Sequence[Episode]) -> float:
    """Mean over sampled tokens of what was earned from there on: where the value model starts."""
    rewards_BT = batch.at_end(rewards_of(played))
    return float(masked_mean(to_go(cfg, batch, rewards_BT, torch.zeros(len(rewards_BT))), batch.mask))


def rewards_of(played: Sequence[Episode]) -> Float[Tensor, "N"]:
    """The reward of every turn, in order."""
    return torch.tensor([turn.reward for episode in played for turn in episode.turns])
