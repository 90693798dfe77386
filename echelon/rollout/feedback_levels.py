"""The two levels of solving with feedback: what each is, what its turns are compared with, and how it learns from that.

Credit in, updated weights out. What a turn is worth, and which level learns when, is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from echelon.config import LoraConfig, ModelConfig, OptimConfig, SamplingConfig, demand
from echelon.data.packing import Batch, pack_siblings
from echelon.errors import DataError
from echelon.models import lora as adapters
from echelon.models.heads import TokenValue, values_before
from echelon.ops.credit import group_baseline
from echelon.ops.masked import explained_variance, masked_whiten
from echelon.rollout.ahead import Level as Acting
from echelon.rollout.feedback import COACH, SOLVER
from echelon.rollout.feedback_credit import Tree, state_keys
from echelon.rollout.levels import Kept, level_path, open_views
from echelon.rollout.roles import Role
from echelon.rollout.setup import Actor, open_actor
from echelon.seeds import derive_seed
from echelon.text.chat import Renderer
from echelon.train.checkpoint import Saveable
from echelon.train.ema import Average
from echelon.train.learner import Learner, Weights
from echelon.train.policy import PolicyConfig, starting_policy, update_policy
from echelon.train.stages import Stages
from echelon.train.stale import Stale
from echelon.train.value import update_value
from echelon.types import Sampler, SamplingParams, Turn

Sharing = Literal["separate", "shared", "adapters"]


@dataclass(frozen=True)
class LevelConfig:
    """One of the two levels: its model, how it speaks, how it learns."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Model folder, adapter's folder, run directory or hub id."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How its utterances are drawn."""
    train: bool = True
    """It learns; else it speaks and stays as it is."""
    baseline: Literal["group", "leave_one_out", "batch", "value", "none"] = "group"
    """What the credit of a turn is compared with: the mean of its siblings, of its other siblings (RLOO), of the step
    (REINFORCE++), what a value model expects of the state, or nothing (REINFORCE)."""
    compare: Literal["state", "question"] = "state"
    """Who its siblings are: turns that answered the same state, or the same question as deep in the tree."""
    scale: Literal["none", "std", "batch_std"] = "none"
    """Divide by the deviation of the siblings' credit (GRPO), or of that of the step, or by nothing (Dr. GRPO)."""
    whiten: bool = False
    """Give advantages mean 0 and deviation 1 over the tokens of a step, besides."""
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig(epochs=2, kl_loss="k3"))
    """How it learns from advantages."""
    value_optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of the value model (baseline = value)."""

    def __post_init__(self) -> None:
        because = "there is no comparison to take it from. Use scale = none, with whiten if it is to be scaled."
        demand(self, "scale", self.scale == "none" or self.baseline in ("group", "leave_one_out", "batch"), because)
        because = "only siblings are compared. Use baseline = group or leave_one_out, or leave it out."
        demand(self, "compare", self.compare == "state" or self.baseline in ("group", "leave_one_out"), because)
        because = "nothing is imitated here. Leave it out."
        demand(self, "policy.ptx_coef", not self.policy.ptx_coef, because)

    @property
    def siblings(self) -> bool:
        """Whether its turns are compared with one another, so that there must be at least two."""
        return self.baseline in ("group", "leave_one_out")


@dataclass(slots=True)
class Level:
    """One level as it runs."""

    name: str
    actor: Actor
    policy: Learner | None
    """None where it never learns, or learns in the other level's weights."""
    reference: nn.Module | None
    """How it began, where that is asked about. Of a level that never learns, itself."""
    value: Learner | None

    def role(self, sampling: SamplingConfig, sampler: Sampler | None = None) -> Role:
        """Who it is in a play, sampling as these settings say, from its live weights or from another sampler."""
        return Role(self.name, sampler or self.actor.sampler, self.actor.role.renderer, drawn(sampling))

    @property
    def speaks(self) -> Learner | Kept:
        """The weights it speaks with, where they are its own: those that learn, or stay as they are."""
        return Kept(self.actor.module, self.actor.tokenizer) if self.policy is None else self.policy

    def parts(self) -> dict[str, Saveable]:
        """What a checkpoint holds of it. An adapter knows its own start, so it needs no copy of it."""
        parts: dict[str, Saveable] = {self.name: self.speaks}
        if self.reference is not None and self.reference is not self.actor.module:
            parts[f"{self.name}_reference"] = Weights(self.reference)
        if self.value is not None:
            parts[f"{self.name}_value"] = self.value
        return parts

    def modules(self) -> dict[str, nn.Module]:
        """What it takes memory for."""
        found = {self.name: self.actor.module}
        if self.reference is not None and self.reference is not self.actor.module:
            found[f"{self.name}_reference"] = self.reference
        return found if self.value is None else {**found, f"{self.name}_value": self.value.module}

    def publish(self) -> None:
        """Give its sampler the weights as they are. Also where it rests: it forgets what it has cached."""
        self.actor.sampler.load(self.speaks.weights(), self.speaks.version)


@dataclass(slots=True)
class Levels:
    """Both levels, the solver's average, and the stage they are in."""

    solver: Level
    coach: Level | None
    average: Average | None
    stages: Stages
    shared: bool
    """One set of weights speaks for both: the solver's."""

    def parts(self) -> dict[str, Saveable]:
        """What a checkpoint holds."""
        parts = self.solver.parts()
        if self.coach is not None:
            own = self.coach.parts()
            parts |= {name: part for name, part in own.items() if not self.shared or name == f"{COACH}_value"}
        if self.average is not None:
            parts["average"] = self.average
        if self.stages.table:
            parts["stages"] = self.stages
        return parts

    def modules(self) -> dict[str, nn.Module]:
        """What there is in memory, for a person."""
        own = {} if self.coach is None else self.coach.modules()
        return self.solver.modules() | {n: m for n, m in own.items() if not self.shared or n == f"{COACH}_value"}

    def acting(self, settings: Callable[[str], LevelConfig]) -> dict[str, Acting]:
        """Who plays with which weights: a coach without its own with the solver's."""
        solver = Acting(self.solver.actor, self.solver.speaks, settings(SOLVER).sampling)
        if self.coach is None:
            return {SOLVER: solver}
        own = Acting(self.coach.actor, self.coach.speaks, settings(COACH).sampling)
        return {SOLVER: solver, COACH: solver if self.shared else own}

    def publish(self) -> None:
        """Give the samplers the weights as they are."""
        self.solver.publish()
        if self.coach is not None and not self.shared:
            self.coach.publish()

    def decoders(self) -> dict[str, Callable[[Sequence[int]], str]]:
        """How the text of each level's tokens is read, by its name."""
        levels = [self.solver, *([] if self.coach is None else [self.coach])]
        return {level.name: level.actor.role.renderer.decode for level in levels}

    def turns(self, tree: Tree) -> list[tuple[Level, Bool[Tensor, "N"]]]:
        """Each level with its turns."""
        found = [(self.solver, tree.solver_N)]
        return found if self.coach is None else [*found, (self.coach, ~tree.solver_N)]

    def learners(self, tree: Tree) -> list[tuple[Level, Bool[Tensor, "N"]]]:
        """Whose weights learn from which turns: each level's from its own, those of both from all of them."""
        return [(self.solver, torch.ones_like(tree.solver_N))] if self.shared else self.turns(tree)


def open_actors(
    levels: Mapping[str, LevelConfig], *, weights: Sharing, lora: LoraConfig, seed: int
) -> dict[str, Actor]:
    """The models of the levels, each ready to act. A coach without a model starts as what the solver starts as.

    Raises ConfigError and DataError for models that cannot be shared: on different bases, or with other tokenizers.
    """
    solver = replace(levels[SOLVER].model, path=level_path(levels[SOLVER].model.path, SOLVER, "actor"))
    models = {SOLVER: solver}
    if COACH in levels and weights != "shared":
        own = levels[COACH].model
        path = level_path(own.path, COACH, SOLVER, "actor") if own.path else solver.path
        models[COACH] = replace(own, path=path)
    sampling = {name: level.sampling for name, level in levels.items()}
    if weights == "adapters":
        actors = open_views(models, sampling, lora=lora, seed=seed)
        check_tokenizers(actors[SOLVER], actors[COACH])
    else:
        actors = {name: open_actor(model, sampling[name], lora=lora, name=name) for name, model in models.items()}
    if COACH in levels and weights == "shared":
        one = actors[SOLVER]
        renderer = Renderer(one.tokenizer, max_tokens=sampling[COACH].max_prompt_tokens)
        actors[COACH] = replace(one, role=Role(COACH, one.sampler, renderer, drawn(sampling[COACH])))
    return actors


def drawn(sampling: SamplingConfig) -> SamplingParams:
    """How utterances are drawn, by these settings."""
    return SamplingParams(max_tokens=sampling.max_tokens, temperature=sampling.temperature, stop=sampling.stop)


def check_tokenizers(one: Actor, other: Actor) -> None:
    """Raise DataError unless two levels that share a model read and write the same tokens."""
    words, others = one.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if words != others:
        word = next(word for word in [*words, *others] if words.get(word) != others.get(word))
        raise DataError(
            f"the {one.role.name} and the {other.role.name} share one model, and their tokenizers differ: '{word}' is "
            f"{words.get(word, 'no token')} to one and {others.get(word, 'no token')} to the other. Give both the same "
            "tokenizer, or use weights = separate."
        )


def open_level(
    name: str, settings: LevelConfig, actor: Actor, *, learns: bool, start: bool, value: bool, updates: tuple[int, int]
) -> Level:
    """A level as it begins: whether it ever learns, whether it must know how it began, whether a value model reads it,
    and how many optimizer steps it and that model take."""
    policy, reference, module = None, None, actor.module
    if learns:
        policy = Learner(module, settings.policy.optim, total_steps=updates[0], name=name, tokenizer=actor.tokenizer)
    elif not adapters.has_adapters(module):
        reference = module.requires_grad_(False)
    if reference is None and (start or not learns):
        reference = starting_policy(module, replace(settings.policy, kl_coef=1.0))
    return Level(name, actor, policy, reference, new_value(name, settings, actor, updates[1]) if value else None)


def new_value(name: str, settings: LevelConfig, actor: Actor, updates: int) -> Learner:
    """A value model of the states that a level answers, its body a copy of the level's."""
    return Learner(TokenValue.from_lm(actor.module), settings.value_optim, total_steps=updates, name=f"{name}_value")


@dataclass(slots=True)
class Rows:
    """The turns that one set of weights learns from, packed."""

    places_n: Int[Tensor, "n"]
    """Which turns of the tree these are."""
    batch: Batch


def compared(
    settings: LevelConfig,
    tree: Tree,
    value_N: Float[Tensor, "N"],
    mine_N: Bool[Tensor, "N"],
    expected_N: Float[Tensor, "N"],
) -> Float[Tensor, "N"]:
    """The advantage of each turn of a level over what it is compared with, 0 for other turns.

    `expected_N` is what a value model expects of the states they answered; it counts for `baseline = value`.
    """
    advantages_N = torch.where(mine_N, value_N, 0.0)
    if settings.baseline == "none":
        return advantages_N
    if settings.baseline == "value":
        return torch.where(mine_N, value_N - expected_N, 0.0)
    keys: list[Hashable] = [0] * len(value_N) if settings.baseline == "batch" else state_keys(tree, settings.compare)
    mine = [keys[place] for place in mine_N.nonzero()[:, 0].tolist()]
    leave_one_out = settings.baseline == "leave_one_out"
    advantages_N[mine_N] = group_baseline(value_N[mine_N], mine, scale=settings.scale, leave_one_out=leave_one_out)
    return advantages_N


def expect(value: Learner, turns: Sequence[Turn], credit_n: Float[Tensor, "n"], tokens_per_pass: int) -> Tensor:
    """V of the state each turn answered, (n,). Before it has learned anything it expects the mean of these credits."""
    if value.version == 0:
        value.module.start_at(float(credit_n.mean()))  # type: ignore[operator]
    batch = pack_siblings(turns)
    values_BT = value.evaluate(batch, values_before, tokens_per_pass)
    return values_BT[batch.row_N, batch.first_N]


def learn_value(
    value: Learner,
    settings: LevelConfig,
    turns: Sequence[Turn],
    credit_n: Float[Tensor, "n"],
    expected_n: Float[Tensor, "n"],
    *,
    tokens_per_pass: int,
    seed: int,
) -> dict[str, float]:
    """One step of V towards what the turns were credited with; it reads the state alone."""
    batch = pack_siblings(turns)
    first_BT = torch.zeros_like(batch.mask)
    first_BT[batch.row_N, batch.first_N] = True
    batch.values, batch.returns = torch.zeros(first_BT.shape), torch.zeros(first_BT.shape)
    batch.values[batch.row_N, batch.first_N] = expected_n
    batch.returns[batch.row_N, batch.first_N] = credit_n
    value.optim = settings.value_optim
    told = update_value(
        value, batch, read_BT=first_BT, epochs=1, minibatches=1, clip=None, tokens_per_pass=tokens_per_pass, seed=seed
    )
    everywhere_n = torch.ones(len(turns), dtype=torch.bool)
    return told | {"value/explained_variance": float(explained_variance(expected_n, credit_n, everywhere_n))}


def learn_policy(
    policy: Learner,
    settings: LevelConfig,
    rows: Rows,
    advantages_N: Float[Tensor, "N"],
    *,
    tokens_per_pass: int,
    seed: int,
    stale: Stale | None = None,
) -> dict[str, float]:
    """All optimizer steps of one set of weights on its rows; what they logged, under "policy/". `stale` corrects rows
    that older weights have said."""
    advantages_BT = rows.batch.spread(advantages_N[rows.places_n])
    if settings.whiten:
        advantages_BT = masked_whiten(advantages_BT, rows.batch.mask)
    policy.optim = settings.policy.optim  # a stage may have another learning rate
    return update_policy(
        policy,
        replace(rows.batch, advantages=advantages_BT),
        settings=settings.policy,
        reference=None,  # it has been asked
        temperature=settings.sampling.temperature,
        tokens_per_pass=tokens_per_pass,
        seed=derive_seed(seed, policy.name),
        stale=stale,
    )
