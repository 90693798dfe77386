"""Low-rank adapters: small matrices that learn beside frozen weights (Hu et al., arXiv 2106.09685), made with peft.

Puts adapters on a model, several on one if need be, says which one speaks, saves them in the format of peft, and folds
them into the weights; `AdapterView` makes each of several a module of its own. Knows nothing of training, and nothing
of what a model is for.
"""

from __future__ import annotations

import copy
import json
import os
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from echelon.config import LoraConfig
from echelon.errors import CheckpointError, DataError, did_you_mean
from echelon.models.stacked import CONFIG, WEIGHTS, Lower, layer_of, upper_part
from echelon.seeds import derive_seed

DEFAULT = "default"
"""The adapter of a model that has one. Its files lie in the folder itself, those of others in folders below it."""
START = "start"
"""What an adapter was when a run began (`keep_start`)."""


def attach(
    module: nn.Module,
    config: LoraConfig,
    *,
    name: str = DEFAULT,
    task: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM",
    base: str = "",
    seed: int = 0,
) -> Any:
    """The model with a new adapter, which changes nothing yet and is all that learns: a peft model.

    On a model with adapters it is one more, silent until `use`. `base` says where the model itself is loaded from
    again; by default where it was loaded from. Where that is an adapter's folder, `save` writes both adapters as one.
    The adapter's first numbers derive from the seed and its name. Raises DataError for names of layers that the model
    does not have.
    """
    import peft

    assert config.rank > 0, "an adapter of rank 0 is none"
    _check_names(module, config)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules="all-linear" if config.target == ("all-linear",) else list(config.target),
        modules_to_save=list(config.modules_to_save) or None,
        ensure_weight_tying=_touches_tied_weights(module, config),
        task_type=task,
    )
    with _same_draws(derive_seed(seed, "lora", name)), _no_advice():
        if has_adapters(module):
            return _added(module, name, settings)
        adapted = peft.get_peft_model(module, settings, adapter_name=name)
    base = base or str(getattr(module, "name_or_path", "") or "")
    lower = Lower.read(base, _read_config(base)) if base and is_adapter(base) else None
    if lower is not None:
        base = base_path(base)
        lower.check_beside({layer_of(key) for key in _tensors(adapted, name) if ".lora_" in key})
    adapted.peft_config[name].base_model_name_or_path = _lasting(base)
    adapted.lower = lower  # type: ignore[assignment]
    return adapted


def load(module: nn.Module, folder: str, *, name: str = DEFAULT, trains: bool = True) -> Any:
    """The model with the adapter of a folder or hub id, written by peft or by anything that uses it.

    The model must be the one that the adapter was made for. Raises DataError where it does not fit, and for adapters
    of another kind than LoRA.
    """
    import peft

    kind = _read_config(folder).get("peft_type")
    if kind != "LORA":
        raise DataError(f"'{folder}' is an adapter of kind {kind}: only LoRA adapters are read. Give one of those.")
    if Path(folder).is_dir() and not any((Path(folder) / file).is_file() for file in (WEIGHTS, "adapter_model.bin")):
        raise DataError(f"'{folder}' has {CONFIG} and no {WEIGHTS}: half an adapter. Copy that file there too.")
    try:
        with _no_advice(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            if has_adapters(module):
                adapted: Any = module
                adapted.load_adapter(folder, name, is_trainable=trains)
            else:
                adapted = peft.PeftModel.from_pretrained(module, folder, name, is_trainable=trains)
        missing = [str(warning.message) for warning in told if "missing adapter keys" in str(warning.message)]
        if missing:
            raise ValueError(missing[0])
    except (ValueError, KeyError, RuntimeError, OSError, SafetensorError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" …").rstrip(".")
        raise DataError(
            f"'{folder}': the adapter does not fit {type(module).__name__} ({reason}). Load it on the model it was "
            "trained on."
        ) from error
    return adapted.train(module.training)


def is_adapter(path: str) -> bool:
    """Whether a folder or hub id holds an adapter rather than a model of its own."""
    if Path(path).is_dir():
        return (Path(path) / CONFIG).is_file() and not (Path(path) / "config.json").is_file()
    return _published_config(path) is not None


def task_of(path: str) -> str:
    """What an adapter was made for: CAUSAL_LM, SEQ_CLS (a reward model), or nothing if its file does not say."""
    return str(_read_config(path).get("task_type") or "")


def base_path(path: str) -> str:
    """Where the model lies that an adapter was made for. Raises DataError, naming it, if it is not there.

    A relative folder is looked for from here, and then from where the adapter lies.
    """
    name = _read_config(path).get("base_model_name_or_path")
    if not name:
        raise DataError(
            f"'{path}' is an adapter that does not say of which model: base_model_name_or_path in its {CONFIG} is "
            "empty. Write the model's folder or hub id there."
        )
    for found in (Path(name).expanduser(), Path(path) / name):
        if found.is_dir():
            return str(found)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise DataError(
            f"'{path}' is an adapter of the model '{name}', which is not there. Put it back, or write where it is "
            f"into base_model_name_or_path of {CONFIG} there."
        )
    return str(name)


def has_adapters(module: nn.Module) -> bool:
    """Whether it is a model with adapters on it."""
    return hasattr(module, "peft_config") and hasattr(module, "disable_adapter")


def names(module: nn.Module) -> list[str]:
    """The adapters on a model, in the order they came; a view has one, its own."""
    return list(module.peft_config) if has_adapters(module) else []  # type: ignore[arg-type]


def speaking(module: nn.Module) -> str:
    """Which adapter takes part in what the model computes; empty when none does."""
    if isinstance(module, AdapterView):
        return module.voice
    adapted: Any = module
    return "" if not has_adapters(module) or adapted._adapters_disabled else str(adapted.active_adapter)


@contextmanager
def use(module: nn.Module, name: str) -> Iterator[None]:
    """Within, this adapter speaks and learns, and the model's other ones do neither; the empty name is `off`."""
    if name == speaking(module):
        yield
        return
    if isinstance(module, AdapterView):
        with module.as_(name):
            yield
        return
    if not name:
        with off(module):
            yield
        return
    adapted: Any = module
    if name not in names(module):
        raise DataError(f"there is no adapter '{name}' on the model, but {names(module)}. Attach or load it first.")
    before = adapted.active_adapter
    with _flags_kept(module):
        adapted.set_adapter(name, inference_mode=adapted.peft_config[name].inference_mode)
        try:
            yield
        finally:
            adapted.set_adapter(before)


@contextmanager
def off(module: nn.Module) -> Iterator[None]:
    """Within, the model is what it was without adapters; a model that has none stays as it is."""
    adapted: Any = module
    if not speaking(module):
        yield
        return
    if isinstance(module, AdapterView):
        with module.as_(""):
            yield
        return
    with _flags_kept(module), adapted.disable_adapter():
        yield


def has_learned(module: nn.Module, name: str) -> bool:
    """Whether this adapter changes what the model says."""
    adapted: Any = module.model if isinstance(module, AdapterView) else module
    own = _tensors(adapted, name)
    if any(bool(tensor.any()) for key, tensor in own.items() if "lora_B" in key or "lora_embedding_B" in key):
        return True
    parts: list[Any] = list(adapted.modules())
    return any(
        not one.equal(other)
        for part in parts
        if hasattr(part, "modules_to_save") and hasattr(part, "original_module")
        for one, other in zip(
            part.modules_to_save[name].state_dict().values(),
            part.original_module.state_dict().values(),
            strict=True,
        )
    )


def keep_start(module: nn.Module) -> None:
    """Remember what a model with an adapter says now, for `as_it_began`.

    Nothing is copied of an adapter that changes nothing yet: the model without it says the same. Of one that has
    learned already, a frozen copy stays on the model.
    """
    if isinstance(module, AdapterView):
        module.keep_start()
    elif has_learned(module, speaking(module)) and START not in names(module):
        _twin(module, speaking(module), START, learns=False)


@contextmanager
def as_it_began(module: nn.Module) -> Iterator[None]:
    """Within, a model with an adapter says what it said when `keep_start` was called; others stay as they are."""
    if isinstance(module, AdapterView):
        with module.as_(module.start):
            yield
        return
    with use(module, START) if START in names(module) else off(module):
        yield


def merge(module: nn.Module) -> nn.Module:
    """The model itself with the adapter that speaks folded into its weights; there are no adapters any more.

    Weights that an adapter trained apart although they were tied stay apart.
    """
    adapted: Any = module
    tied = bool(getattr(adapted.config.get_text_config(), "tie_word_embeddings", False))
    with _no_advice():
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    if tied and head is not None and not head.weight.equal(embedding.weight):
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = False
    return merged.requires_grad_(True)  # type: ignore[no-any-return]


def merged_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model by the name it has in its files, what the adapter that speaks adds to it included.

    One at a time, and nothing is changed: what an adapter does not touch is the weight itself, not a copy.
    """
    adapted: Any = module.model if isinstance(module, AdapterView) else module
    if not has_adapters(adapted):
        yield from module.state_dict().items()
        return
    voice, base = speaking(module), adapted.get_base_model()
    for name, tensor in base.state_dict().items():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        if ".base_layer." in name:
            yield name.replace(".base_layer.", "."), _with_adapter(base, name, tensor, voice)
        elif ".original_module." in name:
            owner, _, leaf = name.partition(".original_module.")
            trained = base.get_submodule(owner).modules_to_save
            yield f"{owner}.{leaf}", trained[voice].state_dict()[leaf] if voice in trained else tensor
        else:
            yield name, tensor


def without_adapters(module: nn.Module) -> Any:
    """A copy of the model, as it is below its adapters, that goes its own way: what `merged_weights` can be put into.

    Unlike a copy of a view, it shares no base with it.
    """
    twin: Any = copy.deepcopy(module.model if isinstance(module, AdapterView) else module)
    return (twin.unload() if has_adapters(twin) else twin).requires_grad_(False)


@torch.no_grad()
def _with_adapter(base: Any, name: str, tensor: Tensor, voice: str) -> Tensor:
    """One weight below an adapter, plus what that adapter adds."""
    owner, _, leaf = name.partition(".base_layer.")
    layer = base.get_submodule(owner)
    if leaf != "weight" or voice not in layer.scaling:
        return tensor
    merged: Tensor = tensor + layer.get_delta_weight(voice).to(tensor.dtype)
    return merged


def fold(module: nn.Module, path: str) -> nn.Module:
    """A model without adapters, for another one on top: one that was loaded from an adapter's folder is merged.

    Raises DataError for quantised weights, into which nothing can be folded without loss.
    """
    if not has_adapters(module):
        return module
    if getattr(module, "is_quantized", False):
        raise DataError(
            f"'{path}' is an adapter, and quantised weights cannot take it in without loss. Merge it first: "
            f"echelon merge --adapter {path} --out …"
        )
    merged: Any = merge(module).requires_grad_(False)
    merged.name_or_path = _lasting(path)
    return merged  # type: ignore[no-any-return]


def spoken_through(part: nn.Module) -> nn.Module:
    """The layer that computes, of one that is trained in full beside the frozen original; others as they are."""
    wrapper: Any = part
    if not hasattr(part, "original_module") or not hasattr(part, "modules_to_save"):
        return part
    chosen = wrapper.active_adapters
    found: nn.Module = (
        wrapper.original_module if wrapper.disable_adapters or not chosen else wrapper.modules_to_save[chosen[0]]
    )
    return found


def save(module: nn.Module, folder: Path, *, name: str = "") -> None:
    """One adapter, or all of them, in the format of peft: matrices, and settings that name the model below.

    On an adapter that was folded into the weights both are written as one, of the sum of their ranks.
    """
    if isinstance(module, AdapterView):
        return module.save_pretrained(folder)
    adapted: Any = module
    with _no_advice():
        adapted.save_pretrained(str(folder), selected_adapters=[name] if name else None, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a form of which nothing is filled in
    lower: Lower | None = getattr(module, "lower", None)
    if lower is not None:
        layers = {layer for layer, _ in adapted.get_base_model().named_modules()}
        layers |= {layer.removesuffix(".original_module") for layer in layers}
        for adapter in [name] if name else names(module):
            lower.add_to(folder if adapter == DEFAULT else folder / adapter, layers)


def write(module: nn.Module, name: str, folder: Path) -> None:
    """One adapter alone, in the format of peft, for whoever holds the weights that are in memory below it here.

    What was folded into those is not written again. The empty name is an adapter that changes nothing.
    """
    adapted: Any = module.model if isinstance(module, AdapterView) else module
    own = name or next(iter(adapted.peft_config))
    numbers = {key: tensor.detach().cpu().contiguous() for key, tensor in _tensors(adapted, own).items()}
    if not name:
        numbers = {key: torch.zeros_like(tensor) for key, tensor in numbers.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(numbers, folder / WEIGHTS)
    adapted.peft_config[own].save_pretrained(str(folder))


def widths(module: nn.Module) -> dict[str, int]:
    """The rank of each adapter on a model, the largest where layers differ."""
    adapted: Any = module.model if isinstance(module, AdapterView) else module
    return {name: max([own.r, *(own.rank_pattern or {}).values()]) for name, own in adapted.peft_config.items()}


def same_base(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models with adapters are the same below them, to the last bit."""
    bases: list[Any] = [part.model if isinstance(part, AdapterView) else part for part in (one, other)]
    if bases[0] is bases[1]:
        return True
    shapes = [{**base.config.to_dict(), "_name_or_path": ""} for base in bases]
    if type(bases[0].get_base_model()) is not type(bases[1].get_base_model()) or shapes[0] != shapes[1]:
        return False
    with off(one), off(other):
        mine, theirs = dict(merged_weights(one)), dict(merged_weights(other))
    return mine.keys() == theirs.keys() and all(
        weight.dtype == theirs[name].dtype and weight.device == theirs[name].device and weight.equal(theirs[name])
        for name, weight in mine.items()
    )


def restore(module: nn.Module, folder: Path, *, name: str = "") -> None:
    """Put one saved adapter, or all of them, back into the model that has such adapters, every number as it was.

    Raises CheckpointError if what was saved is another adapter, or one of another model.
    """
    if isinstance(module, AdapterView):
        return _restore(module.model, module.adapter, folder)
    for adapter in [name] if name else names(module):
        _restore(module, adapter, folder if adapter == DEFAULT else folder / adapter)


class AdapterView(nn.Module):
    """One of several adapters of a model, as a model of its own: it learns, speaks, is saved and copied alone.

    Whenever it computes, its adapter is the one that speaks, and stays so until another view computes, so that a
    gradient that computes layers again finds the adapter it began with. Views of one model share its weights: there is
    one base in memory. Its parameters are those of its adapter, behind one frozen one of the base, which says where the
    model is and of what type. A copy (`copy.deepcopy`) is a view of one more adapter with the same numbers.

    Raises DataError for an adapter that trains layers in full: those it would not have to itself.
    """

    def __init__(self, model: nn.Module, adapter: str, *, decoder: bool = False) -> None:
        super().__init__()
        assert adapter in names(model), f"there is no adapter '{adapter}', but {names(model)}"
        _check_small(model, adapter)
        self._held: tuple[Any, ...] = (model,)  # in a tuple, so that it is no submodule
        self._decoder = decoder
        self._start: tuple[AdapterView, ...] = ()
        self._above: tuple[AdapterView, ...] = ()
        self._below: tuple[AdapterView, ...] = ()
        self.adapter = self.voice = adapter
        self.base = next(model.parameters())
        for path, part in model.named_modules():
            if isinstance(part, nn.ModuleDict | nn.ParameterDict) and adapter in part:
                setattr(self, path.replace(".", "/"), part[adapter])
        for parameter in self.parameters():
            parameter.requires_grad_(parameter is not self.base and not model.peft_config[adapter].inference_mode)  # type: ignore[index, union-attr]

    @property
    def model(self) -> Any:
        """The model that carries all the adapters."""
        return self._held[0]

    @property
    def start(self) -> str:
        """The adapter that says what this one said when `keep_start` was called; empty is the model without any."""
        return self._start[0].adapter if self._start else ""

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    @property
    def peft_config(self) -> dict[str, Any]:
        """Its own settings alone."""
        return {self.adapter: self.model.peft_config[self.adapter]}

    @property
    def is_quantized(self) -> bool:
        """Whether the base is held in few bits."""
        return bool(getattr(self.model, "is_quantized", False))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the model computes with this adapter."""
        self._speak()
        return (self.model.get_decoder() if self._decoder else self.model)(*inputs, **named)

    def get_decoder(self) -> nn.Module:
        """The model without its head, with this adapter, in the mode of this view."""
        if not self._below:
            self._below = (AdapterView(self.model, self.adapter, decoder=True),)
            self._below[0]._above = (self,)
        return self._below[0]

    def get_output_embeddings(self) -> Any:
        """The model's head. What it computes is this adapter's after this view has computed."""
        return self.model.get_output_embeddings()

    def get_input_embeddings(self) -> Any:
        """The model's embeddings."""
        return self.model.get_input_embeddings()

    def disable_adapter(self) -> Any:
        """`off`."""
        return self.as_("")

    @contextmanager
    def as_(self, adapter: str) -> Iterator[None]:
        """Within, another adapter speaks here, or none (the empty name)."""
        before, self.voice = self.voice, adapter
        try:
            with use(self.model, adapter):
                yield
        finally:
            self.voice = before

    def keep_start(self) -> None:
        """Remember what it says now, unless it is what the base says or is remembered already."""
        if not self._start and has_learned(self.model, self.adapter):
            self._start = (copy.deepcopy(self).requires_grad_(False).eval(),)

    def save_pretrained(self, folder: Path | str) -> None:
        """The adapter's files, in the folder itself: it is loaded like that of a model that has one."""
        save(self.model, Path(folder), name=self.adapter)
        home = Path(folder) / self.adapter
        if self.adapter != DEFAULT:
            for file in home.iterdir():
                file.rename(Path(folder) / file.name)
            home.rmdir()

    def _speak(self) -> None:
        """Make this adapter the one that takes part, and the model's mode (training or not) this view's."""
        whole = self._above[0] if self._above else self
        if speaking(self.model) != whole.voice:
            assert whole.voice, "only within `as_` does no adapter speak, and there it is so already"
            with _flags_kept(self.model):
                self.model.set_adapter(whole.voice)
        if self.model.training != whole.training:
            self.model.train(whole.training)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}base"]

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterView:
        count = sum(name.startswith(f"{self.adapter}_") for name in names(self.model))
        _twin(self.model, self.adapter, f"{self.adapter}_{count + 1}", learns=True)
        twin = AdapterView(self.model, f"{self.adapter}_{count + 1}", decoder=self._decoder)
        for own, copied in zip(self.parameters(), twin.parameters(), strict=True):
            copied.requires_grad_(own.requires_grad)
        memo[id(self)] = twin
        return twin.train(self.training)


@torch.no_grad()
def _twin(module: nn.Module, name: str, twin: str, *, learns: bool) -> None:
    """One more adapter with the numbers of another; one that does not learn drops nothing."""
    adapted: Any = module
    settings = copy.deepcopy(adapted.peft_config[name])
    settings.inference_mode = not learns
    settings.lora_dropout = settings.lora_dropout if learns else 0.0
    with _no_advice(), _same_draws(0):
        _added(module, twin, settings)
    for own, copied in zip(_tensors(module, name).values(), _tensors(module, twin).values(), strict=True):
        copied.copy_(own)


def _restore(module: nn.Module, adapter: str, home: Path) -> None:
    """Put the adapter that is saved in a folder back."""
    adapted: Any = module
    try:
        saved = load_file(home / WEIGHTS)
        settings = _read_config(str(home))
    except (OSError, SafetensorError, DataError) as error:
        raise CheckpointError(
            f"{home} holds no adapter that can be read, but '{adapter}' is to be continued from there. Resume with "
            "the settings of the run that saved it."
        ) from error
    _check_same_base(module, adapter, settings.get("base_model_name_or_path"), home)
    own = _tensors(module, adapter)
    lower: Lower | None = getattr(module, "lower", None)
    if lower is not None and settings["r"] == adapted.peft_config[adapter].r + lower.settings["r"]:
        saved = upper_part(saved, own)
    if {key: tensor.shape for key, tensor in own.items()} != {key: tensor.shape for key, tensor in saved.items()}:
        raise CheckpointError(
            f"the adapter in {home} does not fit the one on {type(module).__name__}: it has other layers or "
            "another rank. Resume with the settings of the run that saved it."
        )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(saved[key])


def _added(module: nn.Module, name: str, settings: Any) -> Any:
    """The model with one more adapter, which is silent."""
    adapted: Any = module
    with _flags_kept(module):
        adapted.add_adapter(name, settings)
    first = next(iter(adapted.peft_config.values()))
    settings.base_model_name_or_path = first.base_model_name_or_path
    return adapted.train(module.training)


def _tensors(module: nn.Module, name: str) -> dict[str, Tensor]:
    """The numbers of one adapter, by the names they have in its file."""
    from peft import get_peft_model_state_dict

    found: dict[str, Tensor] = get_peft_model_state_dict(module, adapter_name=name, save_embedding_layers=False)
    return found


@contextmanager
def _flags_kept(module: nn.Module) -> Iterator[None]:
    """What learned before learns after, whatever peft does to the flags in between."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, learns in before:
            parameter.requires_grad_(learns)


@contextmanager
def _same_draws(seed: int) -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _no_advice() -> Iterator[None]:
    """Without what peft tells those who call it by hand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_names(module: nn.Module, config: LoraConfig) -> None:
    """Raise DataError for a name that no layer has: peft passes over it in silence if another one fits."""
    layers = [name for name, _ in module.named_modules() if name and ".lora_" not in name]
    short = dict.fromkeys(name.rpartition(".")[2] for name in layers if not name.rpartition(".")[2].isdigit())
    for setting, wanted in (("target", config.target), ("modules_to_save", config.modules_to_save)):
        for name in wanted if wanted != ("all-linear",) else ():
            if not any(_means(name, layer) for layer in layers):
                raise DataError(
                    f"lora.{setting} = {name}: {type(module).__name__} has no such layer.{did_you_mean(name, short)} "
                    f"Its layers are called {_listed(module)}."
                )


def _check_small(model: Any, adapter: str) -> None:
    full = model.peft_config[adapter].modules_to_save
    if full:
        raise DataError(
            f"lora.modules_to_save = {', '.join(sorted(full))}: a base that carries several adapters holds one of each "
            "layer, so none of them can train it in full. Leave it out, or give each level a model of its own."
        )


def _listed(module: nn.Module) -> str:
    """Names of the layers that hold weights, each once, without numbers."""
    holding = (name for name, part in module.named_modules() if any(True for _ in part.parameters(recurse=False)))
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in holding if "lora_" not in name))


def _touches_tied_weights(module: nn.Module, config: LoraConfig) -> bool:
    """Whether embeddings that are the head's weights too are trained: then one matrix stands for both.

    Raises DataError for small matrices beside them: there can be no two that mean the same.
    """
    own: Any = module
    if not getattr(own.config.get_text_config(), "tie_word_embeddings", False):
        return False
    both = {id(own.get_input_embeddings()), id(own.get_output_embeddings())}
    tied = [name for name, part in module.named_modules() if id(part) in both]
    for name in config.target:
        if any(_means(name, layer) for layer in tied):
            raise DataError(
                f"lora.target = {name}: embeddings and head of {type(module).__name__} are one matrix, which cannot "
                f"have an adapter. Leave it out, or train the matrix in full: lora.modules_to_save = {name}."
            )
    return any(_means(name, layer) for name in config.modules_to_save for layer in tied)


def _means(name: str, layer: str) -> bool:
    """Whether a name of the settings stands for this layer: all of its dotted name, or the end of it."""
    return layer == name or layer.endswith(f".{name}")


def _lasting(name: str) -> str | None:
    """A name that means the same from every directory: a folder's whole path, or a hub id as it is."""
    return (os.path.abspath(name) if Path(name).is_dir() else name) or None


def _check_same_base(module: nn.Module, adapter: str, below: str | None, home: Path) -> None:
    own = module.peft_config[adapter].base_model_name_or_path  # type: ignore[index, union-attr]
    if below != own:
        raise CheckpointError(
            f"the adapter in {home} belongs to the model '{below}', and this run has it on '{own}'. Resume with the "
            "settings of the run that saved it."
        )


def _read_config(path: str) -> dict[str, Any]:
    file = Path(path) / CONFIG if Path(path).is_dir() else _published_config(path)
    try:
        found = json.loads(Path(file or path).read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' has no {CONFIG} that can be read, so it is not an adapter's folder.") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} does not hold the settings of an adapter.")
    return found


def _published_config(path: str) -> Path | None:
    """The settings of an adapter on the hub, if that is what this id is."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        return None
    try:
        found = find_adapter_config_file(path)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)
