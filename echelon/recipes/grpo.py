"""GRPO and its family: several episodes of one task, each compared with its siblings; no critic.

Shao et al., "DeepSeekMath", arXiv 2402.03300, over whole multi-turn episodes: the advantage of an episode is its return
less the mean of its group, in units of the group's deviation, and every token the policy sampled in it gets that
number in a clipped surrogate. The flat baseline of the hierarchical recipes: which turn earned the return, it asks only
if `credit` tells it to. What later papers changed are settings: whose reward is whose (credit), what it is compared
with (baseline, scale, whiten), what weighs the same (weigh), what has a ratio and what bounds it (policy.loss), where
KL counts (kl_in), which episodes are learned from (replacements, mask_cut_off) and what length costs (overlong_cache).
docs/algorithms/grpo.md has a row per method, docs/credit.md a row per scheme of credit.

Deviations from the paper, each a setting: several passes over the episodes of a step (policy.epochs), and no KL to the
starting policy (policy.kl_coef).
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from echelon.config import LoraConfig, ModelConfig, SamplingConfig, TaskConfig, demand, require
from echelon.data.packing import Batch, pack, pack_siblings
from echelon.envs import EnvSpec
from echelon.models.lm import shares_prompts
from echelon.ops import credit, losses
from echelon.ops.masked import masked_whiten
from echelon.rollout.ahead import Level, Played, Player, Rollouts, Run, check_ahead
from echelon.rollout.evaluate import rollout_metrics
from echelon.rollout.memory import Engine, Plan
from echelon.rollout.plays import env_loop
from echelon.rollout.rewards import Rewards, open_rewards, open_tasks
from echelon.rollout.roles import Role, collect, decoders
from echelon.rollout.setup import describe, open_actor, set_threads, task_batch
from echelon.seeds import derive_seed
from echelon.train.checkpoint import Checkpoints, Saveable
from echelon.train.learner import Learner, Weights
from echelon.train.log import Log, episode_rows
from echelon.train.policy import PolicyConfig, reference_logprobs, starting_policy, update_policy
from echelon.train.stale import AsyncConfig
from echelon.types import Episode, Play, Task


@dataclass(frozen=True, kw_only=True)
class Config(TaskConfig):
    """Settings of GRPO."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The policy: a model folder, an adapter's folder, a run directory or a hub id."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """An adapter that learns in place of the policy's weights; KL is then to the model without it."""
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
    replacements: int = 0
    """Most further tasks a step may draw in place of those whose episodes all earned the same, which teach nothing
    (DAPO's dynamic sampling); 0 replaces none."""
    credit: Literal["episode", "turn", "state"] = "episode"
    """Whose a reward is: that of every turn of its episode; of its own turn and those before it (turn), each compared
    with the same turn of its siblings; or both, of the episode and of the turns before it, compared with what siblings
    did in the same state (state, GiGPO)."""
    gamma: float = 1.0
    """Discount per turn of what a turn is credited with (credit: turn, state)."""
    compare_with: Literal["all", "reached"] = "all"
    """The siblings a turn is compared with (credit: turn): all, of which those whose episode is over by then have
    nothing to go, or only those that reached that turn."""
    state_weight: float = 1.0
    """What the comparison within a state counts next to that of episodes (credit: state); ω in GiGPO."""
    baseline: Literal["group", "leave_one_out", "batch", "none"] = "group"
    """What is subtracted from the return of an episode, or from what a turn is credited with: the mean of its group,
    the mean of the others in its group, the mean of the step, or nothing."""
    scale: Literal["none", "std", "batch_std"] = "std"
    """Divide by the deviation of what an episode or a turn is compared with (std) or of all returns of the step
    (batch_std), or leave advantages in the unit of the reward."""
    whiten: bool = False
    """Give advantages mean 0 and deviation 1 over the sampled tokens of a step, besides."""
    weigh: Literal["episodes", "turns", "tokens", "constant"] = "episodes"
    """What weighs the same in a step: every episode or every turn, whatever its length, every sampled token, or
    (constant) every token in all steps: the sum over an episode's tokens is divided by loss_length."""
    loss_length: int = 0
    """The divisor of weigh: constant; 0 takes sampling.max_tokens, 1 leaves the sum."""
    mask_cut_off: bool = False
    """Leave turns that were cut off at sampling.max_tokens out of the loss (DAPO's overlong filtering). Their episodes
    still count in the comparison."""
    overlong_cache: int = 0
    """The last tokens before sampling.max_tokens, in which length costs more and more (DAPO's soft punishment)."""
    overlong_penalty: float = 1.0
    """What a turn costs that takes all of sampling.max_tokens, where there is an overlong_cache."""
    kl_in: Literal["loss", "episodes", "tokens"] = "loss"
    """Where KL to the start counts, policy.kl_coef times: in the loss (policy.kl_loss), or as log-ratio in the return
    of an episode (RLOO) or in what follows each token (REINFORCE++)."""
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig(epochs=4, kl_loss="k3"))
    """How the policy learns."""
    asynchronous: AsyncConfig = field(default_factory=AsyncConfig)
    """Playing the coming steps while one trains."""
    tokens_per_pass: int = 4096
    """Most tokens, padding included, in one forward and backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "model.path")
        for name in ("steps", "tasks_per_step", "group_size", "max_turns", "tokens_per_pass"):
            least = 2 if name == "group_size" and self.baseline in ("group", "leave_one_out") else 1
            because = "it counts something there must be one of. Give 1 or more."
            if name == "group_size" and least == 2:
                because = (
                    "siblings are compared, so there must be at least 2. Raise it, or use ppo, which has a critic."
                )
            demand(self, name, getattr(self, name) >= least, because)
        episodes = self.tasks_per_step * self.group_size
        because = f"some would have none of a step's {episodes} episodes. Give that many, or fewer."
        demand(self, "policy.minibatches", self.policy.minibatches <= episodes, because)
        demand(self, "error_budget", 0 <= self.error_budget < 1, "it is a fraction of the episodes. Give 0 to 0.99.")
        check_ahead(self, self.asynchronous, self.model, self.lora, self.sampling)
        self._check_credit()
        self._check_comparison()
        self._check_lengths()

    def _check_credit(self) -> None:
        flat = self.credit == "episode"
        because = "every episode has one turn, so its reward has one owner. Use credit = episode."
        demand(self, "credit", flat or (bool(self.env) and self.max_turns > 1), because)
        because = "episodes and states are compared, and there is nothing to compare with. Give baseline = group."
        demand(self, "credit", self.credit != "state" or self.baseline != "none", because)
        demand(self, "gamma", 0 <= self.gamma <= 1, "a discount lies between 0 and 1.")
        because = "an episode's return is not discounted. Use credit = turn or state, or leave it out."
        demand(self, "gamma", self.gamma == 1 or not flat, because)
        because = "only turns are compared with siblings that got that far. Use credit = turn, or leave it out."
        demand(self, "compare_with", self.compare_with == "all" or self.credit == "turn", because)
        because = "nothing is compared there. Give another baseline, or leave it out."
        demand(self, "compare_with", self.compare_with == "all" or self.baseline != "none", because)
        because = "it weighs what is added to the credit of the episode. Give a positive number, or credit = episode."
        demand(self, "state_weight", 0 < self.state_weight < math.inf, because)
        because = "no states are compared. Use credit = state, or leave it out."
        demand(self, "state_weight", self.state_weight == 1 or self.credit == "state", because)

    def _check_comparison(self) -> None:
        demand(self, "replacements", self.replacements >= 0, "it counts tasks. Give 0 to replace none.")
        because = "what is replaced are groups without a difference, and a group of one has none. Raise group_size."
        demand(self, "replacements", not self.replacements or self.group_size > 1, because)
        because = "a step of one episode has nothing to compare with. Raise tasks_per_step or group_size."
        alone = self.baseline == "batch" and self.tasks_per_step * self.group_size == 1
        demand(self, "baseline", not alone, because)
        because = "there is no comparison to take it from. Use scale = none, with whiten if it is to be scaled."
        demand(self, "scale", self.scale == "none" or self.baseline != "none", because)
        there = self.kl_in == "loss" or self.policy.kl_coef > 0
        demand(self, "kl_in", there, "there is no KL to count. Give policy.kl_coef a weight, such as 0.05.")
        because = "there are no texts here to imitate. Leave it out, or use ppo."
        demand(self, "policy.ptx_coef", not self.policy.ptx_coef, because)

    def _check_lengths(self) -> None:
        longest = self.sampling.max_tokens
        because = "it divides the sum over tokens. Give 0 for sampling.max_tokens, or 1 or more."
        demand(self, "loss_length", self.loss_length >= 0, because)
        because = "nothing is divided by it. Use weigh = constant, or leave it out."
        demand(self, "loss_length", not self.loss_length or self.weigh == "constant", because)
        because = f"it lies within sampling.max_tokens = {longest}. Give a part of that, or 0 for no penalty."
        demand(self, "overlong_cache", 0 <= self.overlong_cache <= longest, because)
        finite = 0 <= self.overlong_penalty < math.inf
        demand(self, "overlong_penalty", finite, "a negative one rewards length. Give about the size of a reward.")


def main(cfg: Config) -> None:
    """Train; the run directory holds checkpoints, metrics.jsonl and episodes.jsonl."""
    actor = open_actor(cfg.model, cfg.sampling, lora=cfg.lora)
    env = open_tasks(cfg, actor.role.renderer)
    rewards = open_rewards(cfg, device=cfg.model.device, tokens_per_pass=cfg.tokens_per_pass)
    set_threads(cfg.threads, actor.module)
    updates = cfg.steps * cfg.policy.epochs * cfg.policy.minibatches
    policy = Learner(actor.module, cfg.policy.optim, total_steps=updates, name="actor", tokenizer=actor.tokenizer)
    reference = starting_policy(actor.module, cfg.policy)
    share = cfg.policy.minibatches == 1 and shares_prompts(actor.module)  # answers to one prompt may share its row
    if cfg.dry_run:
        sampled = (cfg.tasks_per_step + cfg.replacements) * cfg.group_size * cfg.max_turns * cfg.sampling.max_tokens
        engines = {"actor": Engine(actor.sampler, cfg.sampling, cfg.asynchronous.max_staleness)}
        plan = Plan({**saved_parts(policy, reference), **rewards.modules()}, cfg.dist, cfg.tokens_per_pass, engines)
        return describe({"actor": actor.module}, tokens_per_step=sampled, plan=plan)

    temperature, tokens = cfg.sampling.temperature, cfg.tokens_per_pass
    read = partial(reference_logprobs, temperature=temperature, tokens_per_pass=tokens)
    settings = cfg.policy if cfg.kl_in == "loss" else replace(cfg.policy, kl_coef=0.0)
    learn = partial(update_policy, policy, settings=settings, temperature=temperature, tokens_per_pass=tokens)
    learn = partial(learn, reference=None)  # it has been asked, before `compare`
    out, drawn = Path(cfg.out), 0

    def first(step: int) -> int:  # ahead nobody knows how many replacements were drawn: each step has places of its own
        return step * (cfg.tasks_per_step + cfg.replacements) if cfg.asynchronous.max_staleness else drawn

    levels, play = {"actor": Level(actor, policy, cfg.sampling)}, player(cfg, env, rewards, first)
    rollouts = Rollouts(cfg.asynchronous, levels, play, steps=cfg.steps, read=Found.from_json)
    parts = saved_parts(policy, reference) | rollouts.parts()
    checkpoints = Checkpoints(out, config=cfg, keep_last=cfg.keep_last, resume=cfg.resume)
    with checkpoints, rollouts:
        start, extra = checkpoints.restore(parts) if cfg.resume else (0, {})
        drawn = extra.get("tasks", start * cfg.tasks_per_step)
        rollouts.publish()
        if not cfg.resume:
            checkpoints.save(0, parts, {"tasks": 0})
        with Log(out, total=cfg.steps, start=start, name="grpo", config=cfg.log, settings=cfg) as log:
            for step in range(start, cfg.steps):
                seed = derive_seed(cfg.seed, step)
                torch.manual_seed(seed)  # dropout, where an adapter has any
                found = rollouts.take(step)
                episodes, drawn = found.episodes, drawn + found.tasks
                played = [episode for group in found.groups for episode in group]
                turns = [turn for episode in played for turn in episode.turns]

                batch = pack_siblings(turns) if share and len(turns) == len(played) else pack(turns)
                if reference is not None:
                    batch.ref_logprobs = read(reference, batch)
                compared = compare(cfg, batch, found.groups)

                learned = learn(batch, seed=seed, stale=rollouts.stale("actor")) | rollouts.metrics()
                rollouts.publish()

                log.metrics(step, {**rollout_metrics(episodes), **found.metrics, **compared, **learned})
                columns = {"advantage": zip(turns, at_first(batch).tolist(), strict=True)}
                log.episodes(step, episode_rows(episodes[:8], decode=decoders(actor.role), per_turn=columns))
                if step + 1 == cfg.steps or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                    checkpoints.save(step + 1, parts, {"tasks": drawn})


def saved_parts(policy: Learner, reference: nn.Module | None) -> dict[str, Saveable]:
    """What a checkpoint holds of who learns, and of where it began. An adapter knows its own start."""
    parts: dict[str, Saveable] = {"actor": policy}
    if reference is not None and reference is not policy.module:
        parts["reference"] = Weights(reference)
    return parts


@dataclass(slots=True)
class Found:
    """What a step has played."""

    episodes: list[Episode]
    """All of them, in order, those that failed and those that are not learned from included."""
    groups: list[list[Episode]]
    """To learn from: the episodes of one task that did not fail."""
    tasks: int
    """How many tasks were drawn."""
    metrics: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON types; of the groups, the numbers of their episodes."""
        number = {id(episode): place for place, episode in enumerate(self.episodes)}
        groups = [[number[id(episode)] for episode in group] for group in self.groups]
        return {**Played(self.episodes, self.metrics).to_json(), "groups": groups, "tasks": self.tasks}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """What `to_json` made this of."""
        episodes = Played.from_json(saved).episodes
        groups = [[episodes[place] for place in group] for group in saved["groups"]]
        return cls(episodes, groups, saved["tasks"], saved["metrics"])


def player(cfg: Config, env: EnvSpec, rewards: Rewards, first: Callable[[int], int]) -> Player[Found]:
    """Plays the groups of a step, from the place that is its `first` one on."""
    tasks = env.tasks("train")

    def play(roles: Mapping[str, Role], step: int, run: Run) -> Found:
        loop, seed = env_loop(env.make, roles["actor"], max_turns=cfg.max_turns), derive_seed(cfg.seed, step)
        return play_groups(cfg, tasks, loop, rewards, drawn=first(step), seed=seed, run=run)

    return play


def play_groups(
    cfg: Config,
    tasks: Sequence[Task],
    play: Play,
    rewards: Rewards,
    *,
    drawn: int,
    seed: int,
    run: Run = asyncio.run,
) -> Found:
    """Play the next tasks, `drawn` having been drawn, until enough groups teach something or no more may be drawn.

    Without replacements all groups of one round are learned from. With them, those in which somebody earned more than
    somebody else; if there is none, all, so that the step is taken all the same. What is judged is what episodes
    earned, before length and KL are charged.
    """
    found = Found([], [], 0, {})
    taught: list[list[Episode]] = []
    given: list[tuple[int, dict[str, float]]] = []
    while wanted := min(cfg.tasks_per_step - len(taught), cfg.tasks_per_step + cfg.replacements - found.tasks):
        places = range(drawn + found.tasks, drawn + found.tasks + wanted)
        chosen = [task for place in places for task in task_batch(tasks, place, 1, seed=cfg.seed)]
        round_seed = derive_seed(seed, "replacements", found.tasks) if found.tasks else seed
        siblings, budget = cfg.group_size, left_of_budget(cfg, found.episodes, wanted * cfg.group_size)
        episodes = run(collect(chosen, play, seed=round_seed, siblings=siblings, error_budget=budget))
        given.append((len(episodes), rewards.add(episodes)))
        found.episodes += episodes
        found.groups += (groups := by_place(episodes, siblings))
        found.tasks += wanted
        taught += [group for group in groups if differs(group, by_turn=cfg.credit != "episode")]
    found.metrics = average_of(given) | {"group/zero_variance": (len(found.groups) - len(taught)) / len(found.groups)}
    if cfg.replacements:
        replaced, missing = found.tasks - cfg.tasks_per_step, cfg.tasks_per_step - len(taught)
        found.metrics |= {"group/replaced": float(replaced), "group/missing": float(missing)}
        found.groups = taught or found.groups
    return found


def left_of_budget(cfg: Config, episodes: Sequence[Episode], more: int) -> float:
    """The part of so many more episodes that may fail, for `error_budget` to hold in the step as a whole."""
    failed = sum(episode.ending == "failed" for episode in episodes)
    return (cfg.error_budget * (len(episodes) + more) - failed) / more if episodes else cfg.error_budget


def by_place(episodes: Sequence[Episode], siblings: int) -> list[list[Episode]]:
    """The groups of a round, without those that failed: by place, so a task drawn twice in a step makes two groups."""
    rows = [episodes[first : first + siblings] for first in range(0, len(episodes), siblings)]
    groups = [[episode for episode in row if episode.ending != "failed"] for row in rows]
    return [group for group in groups if group]


def differs(group: Sequence[Episode], *, by_turn: bool = False) -> bool:
    """Whether somebody in the group earned more than somebody else or, by turn, at another turn."""
    earned = torch.tensor([episode.reward for episode in group])
    if by_turn:
        longest = max(len(episode.turns) for episode in group)
        earned = torch.zeros(len(group), longest)
        for row, episode in zip(earned, group, strict=True):
            row[: len(episode.turns)] = torch.tensor([turn.reward for turn in episode.turns])
        return bool((earned != earned[0]).any())
    return not credit.zero_variance_groups(earned, [0] * len(group))


def average_of(rounds: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """The metrics of several rounds as one, each counting as often as it had episodes."""
    names = {name: None for _, metrics in rounds for name in metrics}  # a dictionary keeps their order
    counts = {name: sum(count for count, metrics in rounds if name in metrics) for name in names}
    return {
        name: sum(count * metrics[name] for count, metrics in rounds if name in metrics) / counts[name]
        for name in names
    }


def compare(cfg: Config, batch: Batch, groups: Sequence[Sequence[Episode]]) -> dict[str, float]:
    """Give the batch of all their turns, group by group, its advantages and weights; returns what there is to log.

    The advantage of a token is that of its turn (`assign`), times its weight: what the loss would have to be multiplied
    by so that what `cfg.weigh` names weighs the same.
    """
    played = [episode for group in groups for episode in group]
    keys = [0 if cfg.baseline == "batch" else number for number, group in enumerate(groups) for _ in group]
    owner_N = torch.tensor([place for place, episode in enumerate(played) for _ in episode.turns])
    rewards_N, metrics = charged(cfg, batch, played, owner_N)
    advantages_N, told = assign(cfg, played, rewards_N, owner_N, keys)
    metrics |= told

    advantages_BT = batch.spread(advantages_N)
    if cfg.kl_in == "tokens":
        advantages_BT = advantages_BT - cfg.policy.kl_coef * to_go(batch, log_ratio_to_start(batch), owner_N)
    factor, share_N = shares(cfg, played, owner_N)
    share_BT = torch.where(batch.mask, batch.spread(share_N), math.inf)
    if cfg.whiten:
        advantages_BT = masked_whiten(advantages_BT, share_BT < math.inf)
    batch.weights = factor / share_BT
    # What is imitated (awr) is weighed apart from its advantage, which stands in an exponent.
    batch.advantages = advantages_BT if cfg.policy.loss == "awr" else advantages_BT * factor / share_BT
    return metrics


def assign(
    cfg: Config,
    played: Sequence[Episode],
    rewards_N: Float[Tensor, "N"],
    owner_N: Int[Tensor, "N"],
    keys: Sequence[Hashable],
) -> tuple[Float[Tensor, "N"], dict[str, float]]:
    """The advantage of every turn, by the scheme that `cfg.credit` names, and what there is to log about it.

    `keys` says which episodes are siblings. Two turns are in the same state if their prompts are the same ids.
    """
    how: dict[str, Any] = {"scale": cfg.scale, "leave_one_out": cfg.baseline == "leave_one_out"}
    compared = cfg.baseline != "none"
    to_go_N = credit.turn_returns(rewards_N, owner_N, gamma=cfg.gamma).float()
    if cfg.credit == "turn":
        advantages_N, everybody = to_go_N, cfg.compare_with == "all"
        if compared:
            advantages_N = credit.same_turn_baseline(to_go_N, owner_N, keys, ended=everybody, **how)
        return advantages_N, described(advantages_N, owner_N, keys, [n for e in played for n in range(len(e.turns))])

    advantages_E = torch.zeros(len(played), dtype=rewards_N.dtype).index_add(0, owner_N, rewards_N).float()
    if compared:
        advantages_E = credit.group_baseline(advantages_E, keys, **how)
    if cfg.credit == "episode":
        return advantages_E[owner_N], {"policy/advantage_std": float(advantages_E.std(correction=0))}

    states = [tuple(turn.prompt) for episode in played for turn in episode.turns]
    within_N = credit.same_state_baseline(to_go_N, owner_N, keys, states, **how)
    advantages_N = advantages_E[owner_N] + cfg.state_weight * within_N
    return advantages_N, described(advantages_N, owner_N, keys, states)


def described(
    advantages_N: Float[Tensor, "N"], owner_N: Int[Tensor, "N"], keys: Sequence[Hashable], places: Sequence[Hashable]
) -> dict[str, float]:
    """How much advantages vary, which part of that within episodes, and how many turns shared a place with another:
    were taken by siblings at the same index, or in the same state."""
    groups = [(keys[owner], place) for owner, place in zip(owner_N.tolist(), places, strict=True)]
    size = Counter(groups)
    return {
        "policy/advantage_std": float(advantages_N.std(correction=0)),
        "credit/within_episodes": credit.share_within(advantages_N, owner_N),
        "credit/shared": sum(size[group] > 1 for group in groups) / len(groups),
    }


def charged(
    cfg: Config, batch: Batch, played: Sequence[Episode], owner_N: Int[Tensor, "N"]
) -> tuple[Float[Tensor, "N"], dict[str, float]]:
    """What every turn earned, less what its length and its distance from the start cost, in float64; and these costs
    per episode."""
    rewards_N = torch.tensor([turn.reward for episode in played for turn in episode.turns], dtype=torch.float64)
    metrics: dict[str, float] = {}
    if cfg.overlong_cache:
        tokens_N = torch.tensor([len(turn.action) for episode in played for turn in episode.turns])
        over_N = credit.overlong_penalty(tokens_N, longest=cfg.sampling.max_tokens, cache=cfg.overlong_cache)
        cost_N = cfg.overlong_penalty * over_N
        rewards_N, metrics["reward/overlong"] = rewards_N - cost_N, -float(cost_N.sum() / len(played))
    if cfg.kl_in != "loss":
        kl_N = batch.pool(log_ratio_to_start(batch))
        metrics |= {"group/kl_to_start": float(kl_N.sum() / len(played))}
        if cfg.kl_in == "episodes":
            rewards_N = rewards_N - cfg.policy.kl_coef * kl_N
    return rewards_N, metrics


def log_ratio_to_start(batch: Batch) -> Float[Tensor, "B T"]:
    """log π − log π_start of every sampled token, as it was sampled: the k1 estimate of KL."""
    old = losses.require(batch.logprobs, "logprobs", "The sampler must return them.")
    ref = losses.require(batch.ref_logprobs, "ref_logprobs", "kl_in needs the starting policy's log-probs.")
    return losses.kl_k1(old, ref, batch.mask)


def to_go(batch: Batch, x_BT: Float[Tensor, "B T"], owner_N: Int[Tensor, "N"]) -> Float[Tensor, "B T"]:
    """For every sampled token, the sum of x over it and all that its episode sampled after it, in later turns too."""
    following_BT = torch.where(batch.mask, x_BT, 0.0).flip(1).cumsum(1).flip(1)
    beyond_N = F.pad(following_BT, (0, 1))[batch.row_N, batch.last_N + 1]  # what a row goes on with after a turn
    own_N = batch.pool(x_BT)
    later_N = credit.turn_returns(own_N, owner_N, gamma=1.0) - own_N
    return torch.where(batch.mask, following_BT + batch.spread(later_N - beyond_N), 0.0)


def shares(
    cfg: Config, played: Sequence[Episode], owner_N: Int[Tensor, "N"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "N"]]:
    """A factor, and what the loss of each turn's tokens is divided by: together, what they weigh.

    The learner takes the mean over the sampled tokens of the step. The factor undoes that, and takes the mean over what
    is to weigh the same. Turns left out have an infinite share.
    """
    turns = [turn for episode in played for turn in episode.turns]
    tokens_N = torch.tensor([float(len(turn.action)) for turn in turns])
    kept_N = torch.tensor([not (cfg.mask_cut_off and turn.stop == "length") for turn in turns])
    kept_tokens_N = torch.where(kept_N, tokens_N, 0.0)
    kept_tokens_E = torch.zeros(len(played)).index_add(0, owner_N, kept_tokens_N)
    longest = float(cfg.loss_length or cfg.sampling.max_tokens)
    count, share_N = {
        "episodes": ((kept_tokens_E > 0).sum(), kept_tokens_E[owner_N]),
        "turns": (kept_N.sum(), tokens_N),
        "tokens": (kept_tokens_N.sum(), torch.ones_like(tokens_N)),
        "constant": (torch.tensor(len(played)), torch.full_like(tokens_N, longest)),
    }[cfg.weigh]
    return tokens_N.sum() / count.clamp(min=1), torch.where(kept_N, share_N, math.inf)


def at_first(batch: Batch) -> Float[Tensor, "N"]:
    """The advantage of every turn's first token, its weight included."""
    advantages = losses.require(batch.advantages, "advantages", "`compare` sets them.")
    return advantages[batch.row_N, batch.first_N]
