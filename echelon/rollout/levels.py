"""Opens the two levels of a dialogue: two models, or one base that carries an adapter for each; new or from a run.

Knows folders, models and roles; knows nothing of how the levels learn, or of what they will say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from echelon.config import LoraConfig, ModelConfig, SamplingConfig
from echelon.envs import EnvSpec, load_env
from echelon.envs.registry import BUILT_IN
from echelon.errors import CheckpointError, ConfigError, DataError
from echelon.models import lora as adapters
from echelon.models.lm import load_lm, load_tokenizer
from echelon.models.lora import AdapterView
from echelon.models.options import FILE, OptionScorer, Reading, read_description
from echelon.rollout.candidates import run_settings
from echelon.rollout.dialogue import RESPONDER, STRATEGIST, Dialogists, env_inventory, spelled
from echelon.rollout.roles import Role
from echelon.rollout.setup import Actor, model_path, open_actor, open_sampler
from echelon.rollout.told import open_strategist
from echelon.sampling.choices import Pick, RandomStrategist, Strategist, option_score
from echelon.sampling.local import copy_weights
from echelon.text.chat import Renderer
from echelon.text.dialogue import INVENTORIES, Inventory
from echelon.train.learner import load_module, save_module
from echelon.types import Sampler, SamplingParams


@dataclass(slots=True)
class Kept:
    """A level that does not learn: its weights are in every checkpoint all the same, so that both levels can play."""

    module: nn.Module
    beside: Any
    """What is saved beside them: the tokenizer, or what has a `save_pretrained` like one."""

    @property
    def version(self) -> int:
        """That of what it began as: it never changes."""
        return 0

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors, one at a time, for a sampler; those below an adapter with what it adds."""
        return adapters.merged_weights(self.module)

    def save(self, folder: Path) -> None:
        """The model's folder."""
        save_module(self.module, folder, self.beside)

    def load(self, folder: Path) -> None:
        """Exactly the saved weights."""
        load_module(self.module, folder)


def level_path(path: str, *parts: str) -> str:
    """The model meant by a folder, hub id, run or checkpoint; of a run it is the first of these parts that it has.

    Raises CheckpointError for a run that has none of them.
    """
    refusal: CheckpointError | None = None
    for part in parts:
        try:
            return model_path(path, part)
        except CheckpointError as error:
            refusal = refusal or error
    assert refusal is not None, "there is a part to look for"
    raise refusal


def strategist_path(path: str) -> str:
    """Where a strategist is loaded from: what a run of strategist or tosca saved, or any language model."""
    return level_path(path, STRATEGIST, "actor")


def responder_path(path: str) -> str:
    """Where a responder is loaded from: what a run of responder, tosca, sft or any other policy saved."""
    return level_path(path, RESPONDER, "actor")


def open_levels(
    strategist: ModelConfig | None,
    responder: ModelConfig,
    *,
    shared: bool,
    lora: LoraConfig,
    sampling: SamplingConfig,
    seed: int = 0,
) -> tuple[Actor | None, Actor]:
    """Both levels as they start; without a strategist's settings there is none.

    A strategist without a path starts as what the responder starts as. With `shared` both are views of one base, the
    responder's, each with an adapter of its own: a new one, or the one that its path names.
    """
    responder = replace(responder, path=responder_path(responder.path))
    if strategist is None:
        return None, open_actor(responder, sampling, lora=lora, name=RESPONDER)
    path = strategist_path(strategist.path) if strategist.path else responder.path
    strategist = replace(strategist, path=path)
    if shared:
        return _open_shared(strategist, responder, lora, sampling, seed)
    return (
        open_actor(strategist, sampling, lora=lora, name=STRATEGIST),
        open_actor(responder, sampling, lora=lora, name=RESPONDER),
    )


def _open_shared(
    strategist: ModelConfig, responder: ModelConfig, lora: LoraConfig, sampling: SamplingConfig, seed: int
) -> tuple[Actor, Actor]:
    models, same = {STRATEGIST: strategist, RESPONDER: responder}, {STRATEGIST: sampling, RESPONDER: sampling}
    views = open_views(models, same, lora=lora, seed=seed)
    return views[STRATEGIST], views[RESPONDER]


def open_views(
    models: Mapping[str, ModelConfig], sampling: Mapping[str, SamplingConfig], *, lora: LoraConfig, seed: int
) -> dict[str, Actor]:
    """Roles that share one base, each with an adapter of its own: a new one, or the one that its path names.

    The base is held as the settings of the last role say. Raises DataError for models on different bases, ConfigError
    where there is neither an adapter nor a rank for a new one.
    """
    below = {role: _base_of(model.path) for role, model in models.items()}
    (one, first), *_, (other, second) = below.items()
    if first != second:
        raise DataError(
            f"the {one} stands on '{first}' and the {other} on '{second}', and they shall share one model. Give both "
            "the same base, an adapter of it or the base itself, or let each have its own."
        )
    base = adapters.fold(load_lm(first, **_loading(models[other])), first)
    for role, model in models.items():
        if adapters.is_adapter(model.path):
            base = adapters.load(base, model.path, name=role)
        elif lora.rank:
            base = adapters.attach(base, lora, name=role, base=first, seed=seed)
        else:
            raise ConfigError(
                f"lora.rank = 0: {role}.path = {model.path} is no adapter, and where levels share a model each learns "
                "in one. Give lora.rank, such as 16."
            )
    actors: dict[str, Actor] = {}
    for role, model in models.items():
        beside = next((actor.sampler for actor in actors.values()), None)
        actors[role] = _actor(AdapterView(base, role), model.path, role, sampling[role], beside)
    return actors


def _base_of(path: str) -> str:
    """The model that carries the adapter of a path, or the path itself."""
    return adapters.base_path(path) if adapters.is_adapter(path) else path


def _loading(model: ModelConfig) -> dict[str, Any]:
    names = ("dtype", "attention", "device", "trust_remote_code", "gradient_checkpointing", "quantization")
    return {name: getattr(model, name) for name in names}


def _actor(view: AdapterView, path: str, name: str, sampling: SamplingConfig, beside: Sampler | None) -> Actor:
    tokenizer = load_tokenizer(path)
    renderer = Renderer(tokenizer, max_tokens=sampling.max_prompt_tokens)
    sampler = open_sampler(view, tokenizer, sampling, beside=beside)
    params = SamplingParams(max_tokens=sampling.max_tokens, temperature=sampling.temperature, stop=sampling.stop)
    return Actor(view, tokenizer, sampler, Role(name, sampler, renderer, params))


def learned_reading(path: str, inventory: Inventory) -> Reading | None:
    """How values are read from a strategist that was saved there; None of other models, which may be read in any way.

    Raises ConfigError for one that chooses from other strategies.
    """
    if not (Path(path) / FILE).is_file():
        return None
    reading, learned = read_description(Path(path))
    if learned != inventory:
        raise ConfigError(
            f"strategies = {list(inventory.strategies)}: the strategist in {path} chooses from "
            f"{list(learned.strategies)}, written {', '.join(learned.options)}. Give the same strategies and options, "
            "or another strategist."
        )
    return reading


def chooser(
    role: Role,
    scorer: OptionScorer | None,
    inventory: Inventory,
    *,
    pick: Pick = "greedy",
    temperature: float = 0.5,
    tokens_per_pass: int = 16384,
) -> Role:
    """The strategist's role: its tokens come from the values of the scorer, or from chance where there is none."""
    options = spelled(role, inventory)
    if scorer is None:
        sampler: Strategist = RandomStrategist(options, inventory.options)
    else:
        score = option_score(scorer, tokens_per_pass=tokens_per_pass)
        sampler = Strategist(score, options, inventory.options, pick=pick, temperature=temperature)
    return Role(STRATEGIST, sampler, role.renderer, role.params)


def chooser_copy(role: Role, scorer: OptionScorer) -> Role:
    """The strategist's role by values of its own: those of the weights that `load` was last given, read as the scorer
    is read at that moment."""
    assert isinstance(role.sampler, Strategist), "it chooses"
    twin = OptionScorer(adapters.without_adapters(scorer.lm), scorer.reading, shares=scorer.shares_prompts).eval()

    def take_in(weights: Iterable[tuple[str, Tensor]]) -> None:
        copy_weights(twin.lm, weights)
        twin.reading = scorer.reading

    return Role(role.name, role.sampler.beside(option_score(twin), take_in), role.renderer, role.params)


def has_levels(checkpoint: Path) -> bool:
    """Whether a folder is a checkpoint of a run whose dialogues have a responder."""
    return (checkpoint / "manifest.json").is_file() and (checkpoint / RESPONDER).is_dir()


def open_dialogists(
    path: str,
    *,
    model: ModelConfig,
    sampling: SamplingConfig,
    params: SamplingParams,
    env: EnvSpec | None = None,
    strategist: str = "",
    pick: Pick = "greedy",
    temperature: float = 0.5,
) -> Dialogists:
    """Who plays the dialogues of a run of tosca, or of a responder beside a `strategist` of another run.

    The strategist chooses as `pick` says, by default what it values most; of a run that drew strategies at random it
    goes on doing so, and of one that had none there is none. `params` are how replies are drawn. Strategies are those
    the strategist learned; without one, those of the settings of the run, of `env`, or of the environment of the run.
    """
    place = responder_path(path)
    checkpoint = Path(place).parent
    settings: Mapping[str, Any] = run_settings(checkpoint) if has_levels(checkpoint) else {}
    actor = open_actor(replace(model, path=place), sampling, name=RESPONDER, params=params)
    at = strategist_path(strategist) if strategist else str(checkpoint / STRATEGIST)
    if strategist or (Path(at) / FILE).is_file():
        role, inventory = open_strategist(at, model, sampling)
        assert isinstance(role.sampler, Strategist)
        role.sampler.pick, role.sampler.temperature = pick, temperature
        return Dialogists(role, actor.role, inventory)
    if settings.get("choose") != "random":
        return Dialogists(None, actor.role, _strategies(settings, env) or INVENTORIES["esconv"])
    found = _strategies(settings, env)
    if found is None:
        raise ConfigError(
            f"{path}: strategies were drawn at random there, and they were those of an environment that does not come "
            "with echelon. Play it there: give --env."
        )
    return Dialogists(chooser(actor.role, None, found), actor.role, found)


def _strategies(settings: Mapping[str, Any], env: EnvSpec | None) -> Inventory | None:
    """The strategies of a run; None where only code that was not asked for could say."""
    named, options = tuple(settings.get("strategies") or ()), tuple(settings.get("options") or ())
    if env is None and settings.get("env") in BUILT_IN:
        env = load_env(settings["env"], settings.get("env_settings"))
    if env is None and not named:
        return None
    return env_inventory(env or EnvSpec("this run", object), named, options)
