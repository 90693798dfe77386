"""Control with perceptrons: behaviour cloning, PPO and GRPO on Gymnasium environments, without a language model.

The reference line of the recipes that control through text, and their smoke test. `bc` imitates recorded actions. `ppo`
is Schulman et al., arXiv 1707.06347, on many environments at once. `grpo` compares whole episodes that began from the
same seed, or their steps, and needs no value.

Deviations from what is usual: policy and value share nothing, not even an optimizer; an episode that was cut off
bootstraps from the value of the very observation it was cut off in, and no step of a batch is a reset; observations are
normalised with what was seen up to the step before, so that the ratio of the first optimizer step is 1; values learn on
a scale that follows the returns (PopArt) in place of scaled rewards; advantages are whitened over the batch of a step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from echelon.config import OptimConfig, Settings, TrainConfig, demand, require
from echelon.data.control import read_arrays
from echelon.envs.vector import Lanes
from echelon.errors import ConfigError, DataError
from echelon.models.lm import count_parameters
from echelon.models.mlp import MlpPolicy, ValueMlp, load_policy, make_policy
from echelon.ops import credit, losses
from echelon.ops.masked import explained_variance, masked_whiten
from echelon.rollout.control_critics import FORGET, fit_numbers
from echelon.rollout.lanes import Finished, Played, Steps, episode_returns, evaluate, play_episodes, play_steps
from echelon.rollout.memory import Plan, table
from echelon.rollout.setup import set_threads
from echelon.seeds import derive_seed
from echelon.train.checkpoint import Checkpoints, Saveable, find_checkpoint
from echelon.train.clock import phase
from echelon.train.fit import step_rows
from echelon.train.learner import Learner, Weights, average
from echelon.train.log import Log


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Settings of control by perceptrons."""

    env: str = ""
    """Gymnasium's name of the environment, such as CartPole-v1; the prefix gymnasium: may stand before it."""
    horizon: int = 0
    """An episode is cut off (truncated, not terminated) after this many steps; 0 leaves the environment's own limit."""
    flatten: bool = False
    """Make one vector of observations that consist of parts."""
    env_kwargs: Settings = field(default_factory=dict)
    """Settings of the environment itself."""
    method: Literal["bc", "ppo", "grpo"] = "ppo"
    """Imitate recorded actions; learn from the environment's return with a value of every state; or without one, from
    the comparison of episodes that began alike."""
    start: str = ""
    """A policy to start from: a run of this recipe or a folder of one. Empty: an untrained one."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers, of policy and value alike."""
    initial_std: float = 0.5
    """Deviation of an untrained policy over points, in halves of the width of the box of actions."""
    steps: int = 200
    """Training steps. For bc, optimizer steps."""
    envs: int = 16
    """Environments that advance together."""
    rollout: int = 128
    """ppo: steps of each environment per training step. Episodes go on from one training step to the next."""
    groups: int = 8
    """grpo: seeds per training step."""
    group_size: int = 8
    """grpo: episodes that begin from the same seed and are compared."""
    credit: Literal["episode", "step"] = "step"
    """grpo: what is compared: returns of episodes, or of the same step of all episodes of a group what was earned from
    there on, an episode that is over by then having earned nothing."""
    scale: Literal["none", "std", "batch_std"] = "none"
    """grpo: what advantages are divided by: nothing, the deviation of their group, or that of the step."""
    gamma: float = 0.99
    """Discount per step of the environment. grpo reads it with credit = step."""
    lam: float = 0.95
    """ppo: GAE's λ: 1 trusts what was earned, 0 the value of the next state."""
    whiten: bool = True
    """ppo, grpo: give advantages mean 0 (ppo) and deviation 1 (both) over a training step."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4, max_grad_norm=0.5))
    """Optimizer of the policy."""
    epochs: int = 4
    """ppo, grpo: passes over the steps of a training step."""
    minibatches: int = 4
    """ppo, grpo: optimizer steps per pass."""
    clip_low: float = 0.2
    """ppo, grpo: how far the ratio of new to old probability may fall below 1."""
    clip_high: float = 0.2
    """ppo, grpo: how far the ratio may rise above 1."""
    entropy_coef: float = 0.0
    """ppo, grpo: weight of the entropy bonus."""
    kl_coef: float = 0.0
    """ppo, grpo: weight of KL to the policy the run began with, in nats per step; 0 keeps no reference."""
    value_optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3, max_grad_norm=0.5))
    """ppo: optimizer of the value."""
    warmup_steps: int = 0
    """ppo: training steps in which only the value learns, for a policy that knows something already."""
    normalize: bool = True
    """Give observations mean 0 and deviation 1; `start` brings its own, which goes on following what is seen."""
    data: str = ""
    """bc: recorded steps: a folder that control-data wrote, or its arrays.npz."""
    rows_per_step: int = 256
    """bc: recorded steps per optimizer step."""
    eval_every: int = 0
    """Training steps between evaluations; 0 evaluates at the end only."""
    eval_episodes: int = 20
    """Episodes of an evaluation; 0 does not evaluate."""
    eval_greedy: bool = True
    """In evaluations do what the policy thinks best; or else draw actions as in training, which a policy over choices
    that is still unsure may live by."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "env")
        counts = ("steps", "envs", "rollout", "groups", "epochs", "minibatches", "rows_per_step")
        for name in counts:
            demand(self, name, getattr(self, name) >= 1, "it counts something there must be one of. Give 1 or more.")
        because = "GRPO compares siblings, so it needs at least 2. Raise group_size, or use method = ppo."
        demand(self, "group_size", self.group_size >= 2, because)
        for name in ("horizon", "warmup_steps", "eval_every", "eval_episodes"):
            demand(self, name, getattr(self, name) >= 0, "it is a count. Give 0 or more.")
        wide = bool(self.hidden) and all(width >= 1 for width in self.hidden)
        demand(self, "hidden", wide, "a hidden layer has a width. Give 64 64, or one number.")
        because = "a deviation is positive. Give 0.5 to try all of the box, 0.1 to stay near its middle."
        demand(self, "initial_std", 0 < self.initial_std < math.inf, because)
        for name in ("gamma", "lam"):
            demand(self, name, 0 <= getattr(self, name) <= 1, "a discount lies between 0 and 1.")
        demand(self, "clip_low", 0 < self.clip_low <= 1, "a ratio falls from 1 to 0 at most. Give 0.2, or up to 1.")
        demand(self, "clip_high", self.clip_high > 0, "no ratio could rise. Give 0.2, or more to clip less.")
        for name in ("entropy_coef", "kl_coef"):
            demand(self, name, getattr(self, name) >= 0, "a negative weight rewards the opposite. Give 0 or more.")
        if self.method == "bc":
            require(self, "data")
        because = f"method = {self.method} learns from what it does itself. Use method = bc, or leave data out."
        demand(self, "data", self.method == "bc" or self.data == "", because)
        because = "only a value model warms up, and only ppo has one. Set method = ppo, or warmup_steps to 0."
        demand(self, "warmup_steps", self.method == "ppo" or not self.warmup_steps, because)


Learned = tuple[dict[str, float], list[Finished]]
"""What a training step logs, `samples` being the steps it took in environments, and the episodes that ended in it."""


def main(cfg: Config) -> None:
    """Train; the run directory holds checkpoints, metrics.jsonl and, of ppo and grpo, episodes.jsonl."""
    lanes = open_lanes(cfg, cfg.envs)
    module = open_policy(cfg, lanes)
    set_threads(cfg.threads, module)
    rows = recorded(cfg, module) if cfg.method == "bc" else None
    value = ValueMlp(lanes.width, hidden=cfg.hidden, seed=derive_seed(cfg.seed, "value"))
    if cfg.dry_run:
        return sizes(cfg, lanes, module, value)

    updates = cfg.steps * (1 if rows else cfg.epochs * cfg.minibatches)
    policy = Learner(module, cfg.optim, total_steps=updates, name="actor")
    fitted = Learner(value, cfg.value_optim, total_steps=updates, name="value")
    reference = copy.deepcopy(module).requires_grad_(False) if cfg.kl_coef else None
    parts: dict[str, Saveable] = {"actor": policy} | ({"reference": Weights(reference)} if reference else {})
    learn: Callable[[int], Learned] = partial(grpo, cfg, policy, lanes, reference)
    if rows:
        learn = partial(clone, cfg, policy, rows)
    elif cfg.method == "ppo":
        learn = partial(ppo, cfg, policy, fitted, lanes, reference)
        parts |= {"value": fitted, "envs": lanes}
    out = Path(cfg.out)
    with Checkpoints(out, config=cfg, keep_last=cfg.keep_last, resume=cfg.resume) as checkpoints:
        start, extra = checkpoints.restore(parts) if cfg.resume else (0, {"samples": 0.0})
        samples = extra["samples"]
        if not cfg.resume:
            checkpoints.save(0, parts, extra)
        with Log(out, total=cfg.steps, start=start, name=cfg.method, config=cfg.log, settings=cfg) as log:
            for step in range(start, cfg.steps):
                done = step + 1
                metrics, finished = learn(step)
                samples += metrics["samples"]
                log.metrics(step, {**metrics, "samples": samples, **judged(cfg, module, done)})
                log.episodes(step, [episode_row(cfg, episode) for episode in finished[:8]])
                if done == cfg.steps or due(done, cfg.save_every):
                    checkpoints.save(done, parts, {"samples": samples})
    lanes.close()


def open_lanes(cfg: Config, count: int) -> Lanes:
    """So many environments of the settings."""
    return Lanes(cfg.env, count, horizon=cfg.horizon, flatten=cfg.flatten, env_kwargs=cfg.env_kwargs)


def open_policy(cfg: Config, lanes: Lanes) -> MlpPolicy:
    """The policy to start from, which must be one for such observations and actions."""
    if not cfg.start:
        return make_policy(
            lanes.width,
            lanes.actions,
            initial_std=cfg.initial_std,
            hidden=cfg.hidden,
            seed=derive_seed(cfg.seed, "policy"),
            about={"env": lanes.name},
        )
    policy = load_policy(find_checkpoint(Path(cfg.start)))
    wanted, found = (lanes.width, lanes.actions), (policy.width, policy.actions)
    if wanted != found:
        raise ConfigError(
            f"start = {cfg.start}: that policy is for {policy.about.get('env', 'another environment')} and reads "
            f"{policy.width} numbers; {lanes.name} gives {lanes.width}, or takes other actions. Give a policy for "
            "this environment, or leave start out."
        )
    return policy


@dataclass(frozen=True, slots=True)
class Recorded:
    """What is imitated, and what is held out."""

    train: Steps
    held_out: Steps | None


def recorded(cfg: Config, policy: MlpPolicy) -> Recorded:
    """Recorded steps in the policy's units. Their observations set its scale, unless it started with one."""
    arrays = read_arrays(Path(cfg.data))
    observations, chosen = fitting(cfg, policy, arrays["observations"], arrays["actions"])
    aside = torch.from_numpy(arrays["held_out"].astype(bool))
    if aside.all():
        raise DataError(f"{cfg.data}: all of its steps are held out. Make it again with some to learn from.")
    everything = Steps(observations, chosen, denom=float(len(observations)))
    train = everything.only((~aside).nonzero()[:, 0])
    if cfg.normalize and not cfg.start:
        policy.norm.see(train.observations_ND)
    return Recorded(train, everything.only(aside.nonzero()[:, 0]) if aside.any() else None)


def fitting(
    cfg: Config, policy: MlpPolicy, observations: NDArray[Any], actions: NDArray[Any]
) -> tuple[Float[Tensor, "N D"], Tensor]:
    """The same as tensors, if they are of this environment. Raises DataError."""
    space = policy.actions
    counted = np.issubdtype(actions.dtype, np.integer) and actions.ndim == 1
    if observations.ndim != 2 or observations.shape[1] != policy.width:
        numbers = math.prod(observations.shape[1:])
        raise DataError(
            f"{cfg.data}: its observations have {numbers} numbers and those of {cfg.env} {policy.width}: it is of "
            "another environment. Give data of this one."
        )
    if counted != (space.kind == "discrete") or (not counted and actions[0].size != space.size):
        kind = "choices" if counted else f"vectors of {actions[0].size}"
        raise DataError(f"{cfg.data}: its actions are {kind}, and {cfg.env} takes others. Give data of this one.")
    chosen = policy.from_env(actions)
    if counted and not bool(((chosen >= 0) & (chosen < space.n)).all()):
        raise DataError(f"{cfg.data}: it holds an action that {cfg.env} does not have. Give data of this one.")
    found = torch.from_numpy(observations.astype(np.float32))
    if not (found.isfinite().all() and chosen.isfinite().all()):
        raise DataError(f"{cfg.data}: it holds a number that is not finite. Leave that episode out.")
    return found, chosen


def clone(cfg: Config, policy: Learner, rows: Recorded, step: int) -> Learned:
    """One step of behaviour cloning: epoch after epoch, each in an order of its own."""
    numbers = step_rows(range(len(rows.train.observations_ND)), step, cfg.rows_per_step, seed=cfg.seed)
    metrics = policy.update([rows.train.only(torch.tensor(numbers))], imitation)
    if rows.held_out and (step + 1 == cfg.steps or due(step + 1, cfg.eval_every)):
        with torch.no_grad():
            loss, stats = imitation(policy.module, rows.held_out)
        metrics |= {f"eval/{name}": number for name, number in {"loss": loss.item(), **stats}.items()}
    return {**metrics, "samples": 0.0}, []


def imitation(module: nn.Module, steps: Steps) -> tuple[Tensor, dict[str, float]]:
    """The mean of what the policy minimises to imitate; of choices also how many it would make the same."""
    assert isinstance(module, MlpPolicy)
    loss = module.imitation_loss(steps.observations_ND, steps.chosen).sum() / steps.denom
    if module.actions.kind == "box":
        return loss, {}
    same = module.best(steps.observations_ND) == steps.chosen
    return loss, {"accuracy": same.sum().item() / steps.denom}


def ppo(cfg: Config, policy: Learner, value: Learner, lanes: Lanes, reference: nn.Module | None, step: int) -> Learned:
    """One training step of PPO: play on, judge what was done, fit the value, improve the policy."""
    actor, critic = modules(policy, value)
    seed = derive_seed(cfg.seed, step)
    played = play_steps(
        lanes,
        actor,
        cfg.rollout,
        seed_of=lambda lane, number: derive_seed(cfg.seed, "episode", lane, number),
        generator=torch.Generator().manual_seed(derive_seed(seed, "actions")),
    )
    if cfg.normalize:
        critic.norm.see(played.observations_ND)
    steps, metrics = judge(cfg, critic, played)
    metrics |= fit(cfg, value, steps, seed=seed)
    if step >= cfg.warmup_steps:
        metrics |= improve(cfg, policy, steps, reference, seed=seed)
    if cfg.normalize:
        actor.norm.see(played.observations_ND)  # after it has learned: until then log-probs are those it acted with
    return {**outcome(played), **metrics}, played.finished


def judge(cfg: Config, critic: ValueMlp, played: Played) -> tuple[Steps, dict[str, float]]:
    """Advantages and returns by GAE. What is still to come after the last step is nothing where the episode
    terminated, and else the value of the observation it led to: cut off, or simply not played on yet."""
    with torch.no_grad():
        values_N = critic.values(played.observations_ND)
        goes_on_N = played.last_N & ~played.terminated_N
        bootstrap_N = torch.zeros_like(values_N)
        bootstrap_N[goes_on_N] = critic.values(played.next_ND[goes_on_N])
    advantages_N, returns_N = credit.turn_gae(
        played.rewards_N, values_N, played.episode_N, bootstrap_N, gamma=cfg.gamma, lam=cfg.lam
    )
    everywhere_N = torch.ones_like(played.terminated_N)
    metrics = {
        "value/mean": values_N.mean().item(),
        "value/return": returns_N.mean().item(),
        "value/explained_variance": explained_variance(values_N, returns_N, everywhere_N).item(),
        "policy/advantage_std": advantages_N.std(correction=0).item(),
    }
    if cfg.whiten:
        advantages_N = masked_whiten(advantages_N, everywhere_N)
    return ready(played, advantages_N, returns_N), metrics


def fit(cfg: Config, value: Learner, steps: Steps, *, seed: int) -> dict[str, float]:
    """Move the value's scale to the returns, the first ones at once, and the value towards them."""
    critic = value.module
    assert isinstance(critic, ValueMlp)
    returns_N = losses.require(steps.returns_N, "returns", "Judge the steps first.")
    critic.rescale_(returns_N, forget=FORGET if value.version else 1.0)
    how = {"epochs": cfg.epochs, "minibatches": cfg.minibatches, "seed": seed}
    return fit_numbers(value, steps.observations_ND, returns_N, **how)


def grpo(cfg: Config, policy: Learner, lanes: Lanes, reference: nn.Module | None, step: int) -> Learned:
    """One training step of GRPO: of episodes that begin alike, what did better is made likelier."""
    actor = policy.module
    assert isinstance(actor, MlpPolicy)
    seed = derive_seed(cfg.seed, step)
    groups = [group for group in range(cfg.groups) for _ in range(cfg.group_size)]
    seeds = [derive_seed(seed, "group", group) for group in groups]
    generator = torch.Generator().manual_seed(derive_seed(seed, "actions"))
    played = play_episodes(lanes, actor, seeds, generator=generator)
    steps, metrics = compare(cfg, played, groups)
    metrics |= improve(cfg, policy, steps, reference, seed=seed)
    if cfg.normalize:
        actor.norm.see(played.observations_ND)
    return {**outcome(played), **metrics}, played.finished


def compare(cfg: Config, played: Played, groups: Sequence[int]) -> tuple[Steps, dict[str, float]]:
    """What each step is worth beside those of the episodes that began like its own."""
    returns_E = episode_returns(played, len(groups))
    if cfg.credit == "episode":
        advantages_N = credit.group_baseline(returns_E, groups, scale=cfg.scale)[played.episode_N]
    else:
        to_go_N = credit.turn_returns(played.rewards_N, played.episode_N, gamma=cfg.gamma)
        advantages_N = credit.same_turn_baseline(to_go_N, played.episode_N, groups, scale=cfg.scale)
    metrics = {
        "group/zero_variance": credit.zero_variance_groups(returns_E, groups) / len(set(groups)),
        "policy/advantage_std": advantages_N.std(correction=0).item(),
    }
    if cfg.whiten:  # the mean stays: it is 0 over a group already, if episodes count alike
        advantages_N = masked_whiten(advantages_N, torch.ones_like(played.terminated_N), shift_mean=False)
    return ready(played, advantages_N), metrics


def improve(cfg: Config, policy: Learner, steps: Steps, reference: nn.Module | None, *, seed: int) -> dict[str, float]:
    """All optimizer steps of the policy on the steps of one training step; what they logged, averaged.

    `first_mismatch` is the largest |log π - log π_played| of the first of them: rounding, or something is wrong.
    """
    if reference is not None:
        assert isinstance(reference, MlpPolicy)
        with torch.no_grad():
            steps = replace(steps, ref_logprobs_N=reference.logprobs(steps.observations_ND, steps.chosen)[0])
    parts = [part for epoch in range(cfg.epochs) for part in shuffled(cfg, steps, seed, "policy", epoch)]
    logged = [policy.update([part], partial(policy_loss, cfg)) for part in parts]
    numbers = average(logged) | {"first_mismatch": logged[0]["mismatch/max"]}
    return {f"policy/{name}": number for name, number in numbers.items()}


def policy_loss(cfg: Config, module: nn.Module, steps: Steps) -> tuple[Tensor, dict[str, float]]:
    """The clipped surrogate, less the entropy bonus, plus KL to the start; a mean over steps."""
    assert isinstance(module, MlpPolicy)
    old_N = losses.require(steps.logprobs_N, "logprobs", "Play with a generator.")
    advantages_N = losses.require(steps.advantages_N, "advantages", "Judge or compare the steps first.")
    logprobs_N, entropy_N = module.logprobs(steps.observations_ND, steps.chosen)
    loss_N, stats = losses.clipped_surrogate(logprobs_N, old_N, advantages_N, low=cfg.clip_low, high=cfg.clip_high)
    stats |= {"entropy": entropy_N.detach(), "mismatch/max": (logprobs_N - old_N).abs().detach()}
    if cfg.entropy_coef:
        loss_N = loss_N - cfg.entropy_coef * entropy_N
    if cfg.kl_coef:
        ref_N = losses.require(steps.ref_logprobs_N, "ref_logprobs", "kl_coef needs the policy the run began with.")
        kl_N = losses.kl_k2(logprobs_N, ref_N)
        loss_N, stats = loss_N + cfg.kl_coef * kl_N, {**stats, "kl_to_start": losses.kl_k3(logprobs_N, ref_N).detach()}
    rows = {name: numbers_N[None] for name, numbers_N in stats.items()}
    everywhere = torch.ones(1, len(old_N), dtype=torch.bool)
    return loss_N.sum() / steps.denom, losses.reduce_stats(rows, everywhere, steps.denom)


def ready(played: Played, advantages_N: Float[Tensor, "N"], returns_N: Float[Tensor, "N"] | None = None) -> Steps:
    """What was played, to learn from."""
    return Steps(
        played.observations_ND,
        played.chosen,
        denom=float(len(played.rewards_N)),
        logprobs_N=played.logprobs_N,
        advantages_N=advantages_N,
        returns_N=returns_N,
    )


def shuffled(cfg: Config, steps: Steps, *names: int | str) -> list[Steps]:
    """The mini-batches of one pass."""
    return steps.shuffle_split(cfg.minibatches, seed=derive_seed(*names))


def modules(policy: Learner, value: Learner) -> tuple[MlpPolicy, ValueMlp]:
    """What two learners train."""
    actor, critic = policy.module, value.module
    assert isinstance(actor, MlpPolicy)
    assert isinstance(critic, ValueMlp)
    return actor, critic


def outcome(played: Played) -> dict[str, float]:
    """What came of playing. Without an episode that ended there is no return to speak of."""
    finished = played.finished
    metrics = {"samples": float(len(played.rewards_N)), "episode/finished": float(len(finished))}
    if not finished:
        return metrics
    rewards = [episode.reward for episode in finished]
    return metrics | {
        "reward/mean": float(np.mean(rewards)),
        "reward/std": float(np.std(rewards)),
        "episode/length": float(np.mean([episode.length for episode in finished])),
        "episode/truncated": float(np.mean([not episode.terminated for episode in finished])),
    }


@phase("evaluation")
def judged(cfg: Config, policy: MlpPolicy, done: int) -> dict[str, float]:
    """What the policy earns in an evaluation, if it is time for one."""
    if not cfg.eval_episodes or not (done == cfg.steps or due(done, cfg.eval_every)):
        return {}
    lanes = open_lanes(cfg, min(cfg.eval_episodes, cfg.envs))
    found = evaluate(lanes, policy, cfg.eval_episodes, seed=cfg.seed, greedy=cfg.eval_greedy)
    lanes.close()
    return found


def due(done: int, every: int) -> bool:
    """Whether something that happens every so often happens after this many steps."""
    return every > 0 and done % every == 0


def episode_row(cfg: Config, episode: Finished) -> dict[str, Any]:
    """An episode as a row of episodes.jsonl; nobody said anything in it, so there are no turns."""
    return {
        "task": cfg.env,
        "seed": episode.seed,
        "ending": "terminated" if episode.terminated else "truncated",
        "reward": episode.reward,
        "error": None,
        "metrics": {"length": episode.length},
        "turns": [],
    }


def sizes(cfg: Config, lanes: Lanes, policy: MlpPolicy, value: ValueMlp) -> None:
    """What `--dry-run` prints: parameters, and how much a training step learns from."""
    parts: dict[str, nn.Module] = {"actor": policy, **({"value": value} if cfg.method == "ppo" else {})}
    for name, module in parts.items():
        print(f"{name}: {type(module).__name__}, {count_parameters(module):,} parameters")
    episodes = cfg.groups * cfg.group_size
    rows = {"bc": cfg.rows_per_step, "ppo": cfg.envs * cfg.rollout, "grpo": episodes * lanes.longest}
    print(f"{lanes.name}: {lanes.width} numbers seen; steps per training step: at most {rows[cfg.method]:,}")
    optim = {"actor": cfg.optim, "value": cfg.value_optim}
    learners = {name: Learner(module, optim[name]) for name, module in parts.items()}
    passed = rows[cfg.method] if cfg.method == "bc" else -(-rows[cfg.method] // cfg.minibatches)
    print(*table(Plan(learners, cfg.dist, passed), tokens_per_step=0), sep="\n")
