"""GRPO: several episodes of one task, each compared with its siblings; no critic, one number per episode.

Shao et al., "DeepSeekMath", arXiv 2402.03300, over whole multi-turn episodes: the advantage of an episode is its return
less the mean of its group, in units of the group's deviation, and every token the policy sampled in it gets that
number in a clipped surrogate. The flat baseline of the hierarchical recipes: which turn earned the return, it does
not ask. Settings make it Dr. GRPO (scale, weigh) or RLOO (leave_one_out).

Deviations from the paper, each a setting: several passes over the episodes of a step (policy.epochs), and no KL to the
starting policy (policy.kl_coef).
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from echelon.config import ModelConfig, RunConfig, SamplingConfig, Settings, demand, require, to_yaml
from echelon.data.packing import pack, pack_siblings
from echelon.models.lm import shares_prompts
from echelon.ops import credit
from echelon.rollout.evaluate import rollout_metrics
from echelon.rollout.plays import env_loop
from echelon.rollout.roles import collect
from echelon.rollout.setup import describe, open_actor, open_env, set_threads, task_batch
from echelon.seeds import derive_seed
from echelon.train.checkpoint import Checkpoints, Saveable
from echelon.train.learner import Learner, Weights
from echelon.train.log import Log, episode_rows
from echelon.train.policy import PolicyConfig, starting_policy, update_policy
from echelon.types import Episode


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of GRPO."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The policy: a model folder, a run directory or a hub id."""
    env: str
    """The environment: a built-in name, path.py:Class or module:Class."""
    env_settings: Settings = field(default_factory=dict)
    """Settings of the environment."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How utterances are drawn."""
    steps: int = 100
    """Training steps; each plays episodes and updates the policy."""
    tasks_per_step: int = 8
    """Tasks per step."""
    group_size: int = 8
    """Episodes per task, compared with each other."""
    max_turns: int = 100
    """An episode is cut off after this many turns; its return is then what it had earned."""
    error_budget: float = 0.1
    """Fraction of a step's episodes that may fail before the run stops."""
    scale: Literal["none", "std"] = "std"
    """Divide advantages by the deviation of their group (std), or leave them in the unit of the reward."""
    leave_one_out: bool = False
    """Compare an episode with the mean of the others in its group, not of all."""
    weigh: Literal["episodes", "tokens"] = "episodes"
    """What weighs the same in a step: every episode whatever its length, or every sampled token."""
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig(epochs=4, kl_loss="k3"))
    """How the policy learns."""
    tokens_per_pass: int = 4096
    """Most tokens, padding included, in one forward and backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "env", "model.path")
        for name in ("steps", "tasks_per_step", "max_turns", "tokens_per_pass"):
            demand(self, name, getattr(self, name) >= 1, "it counts something there must be one of. Give 1 or more.")
        because = "siblings are compared, so there must be at least 2. Raise it, or use ppo, which has a critic."
        demand(self, "group_size", self.group_size >= 2, because)
        demand(self, "error_budget", 0 <= self.error_budget < 1, "it is a fraction of the episodes. Give 0 to 0.99.")


def main(cfg: Config) -> None:
    """Train; the run directory holds checkpoints, metrics.jsonl and episodes.jsonl."""
    env = open_env(cfg.env, cfg.env_settings)
    actor = open_actor(cfg.model, cfg.sampling)
    set_threads(cfg.threads, actor.module)
    updates = cfg.steps * cfg.policy.epochs * cfg.policy.minibatches
    policy = Learner(actor.module, cfg.policy.optim, total_steps=updates, name="actor", tokenizer=actor.tokenizer)
    reference = starting_policy(actor.module, cfg.policy)
    share = cfg.policy.minibatches == 1 and shares_prompts(actor.module)  # answers to one prompt may share its row
    parts: dict[str, Saveable] = {"actor": policy}
    if reference is not None:
        parts["reference"] = Weights(reference)
    if cfg.dry_run:
        sampled = cfg.tasks_per_step * cfg.group_size * cfg.max_turns * cfg.sampling.max_tokens
        return describe({"actor": actor.module}, tokens_per_step=sampled)

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
        with Log(out, total=cfg.steps, start=start, name="grpo") as log:
            for step in range(start, cfg.steps):
                seed, siblings, budget = derive_seed(cfg.seed, step), cfg.group_size, cfg.error_budget
                chosen = task_batch(tasks, step, cfg.tasks_per_step, seed=cfg.seed)
                episodes = asyncio.run(collect(chosen, play, seed=seed, siblings=siblings, error_budget=budget))
                # By place, not by task: a task drawn twice in one step makes two groups.
                places = [place for place, episode in enumerate(episodes) if episode.ending != "failed"]
                played, groups = [episodes[place] for place in places], [place // siblings for place in places]
                turns = [turn for episode in played for turn in episode.turns]

                advantages_N, compared = compare(cfg, played, groups)
                batch = pack_siblings(turns) if share and len(turns) == len(played) else pack(turns)
                batch.advantages = batch.spread(advantages_N)

                learned = learn(batch, reference=reference, seed=seed)
                actor.sampler.load(policy.weights(), policy.version)

                log.metrics(step, {**rollout_metrics(episodes), **compared, **learned})
                columns = {"advantage": zip(turns, advantages_N.tolist(), strict=True)}
                log.episodes(step, episode_rows(episodes[:8], per_turn=columns))
                if step + 1 == cfg.steps or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                    checkpoints.save(step + 1, parts)


def compare(
    cfg: Config, played: Sequence[Episode], groups: Sequence[int]
) -> tuple[Float[Tensor, "N"], dict[str, float]]:
    """Return less the baseline of its group, given to every turn of the episode; and how many groups taught nothing."""
    returns_E = torch.tensor([episode.reward for episode in played])
    advantages_E = credit.group_baseline(returns_E, groups, scale=cfg.scale, leave_one_out=cfg.leave_one_out)
    same = credit.zero_variance_groups(returns_E, groups) / len(set(groups))
    metrics = {"group/zero_variance": same, "policy/advantage_std": float(advantages_E.std(correction=0))}
    if cfg.weigh == "episodes":  # the loss divides by all tokens of the step: undo that, divide by the episode's own
        tokens_E = torch.tensor([float(sum(len(turn.action) for turn in episode.turns)) for episode in played])
        advantages_E = advantages_E * tokens_E.mean() / tokens_E
    turns_E = torch.tensor([len(episode.turns) for episode in played])
    return advantages_E.repeat_interleave(turns_E), metrics
