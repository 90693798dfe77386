"""How much memory a run will take on each of its ranks: arithmetic over the shapes of what there is.

Weights, gradients and the state of optimizers are counted, as `Learner` and `Sharded` hold them; what layers keep for
the gradient, and keys and values, are estimated. Knows no recipe, allocates nothing, and reads shapes alone, so modules
may be on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from echelon.config import DistConfig, SamplingConfig
from echelon.models.lora import AdapterView
from echelon.ops.vocabulary import LOGITS_KEPT, LOGITS_PER_BLOCK
from echelon.sampling.cache import bytes_per_key
from echelon.sampling.ray import RaySampler
from echelon.sampling.served import ServedSampler
from echelon.sampling.vllm import VllmSampler
from echelon.train import dist
from echelon.train.learner import Learner
from echelon.train.optimizers import LOW
from echelon.types import Sampler

WIDTHS_KEPT = 12
"""Numbers that a layer keeps of a token for the gradient, as multiples of the hidden width: inputs of norms, attention
and residual sums. Between 10 and 12 in Llama, Qwen and GPT-2."""
INNER_KEPT = 4
"""The same as multiples of the inner width of the feed-forward layer: gate, its activation, up, and their product."""
STATE = {"adamw": 8, "paged_adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Bytes of state that an optimizer keeps per weight; adafactor keeps sums of rows and columns."""
SIZES = (1, 8, 64)
"""Numbers of ranks that are planned for where none were started."""

Bytes = dict[str, int]


@dataclass(frozen=True, slots=True)
class Engine:
    """A sampler, and how long what it reads and writes may be."""

    sampler: Sampler
    sampling: SamplingConfig
    ahead: int = 0
    """Rollouts that are under way while a step trains, each with an engine and a copy of the weights of its own."""


@dataclass(frozen=True)
class Plan:
    """What a run will hold: its parts by name, the settings of its ranks, and how much it does at a time."""

    parts: Mapping[str, Any]
    """Learners, modules, and whatever has a `module` that does not learn or `tensors` that follow; others hold none."""
    dist: DistConfig
    tokens_per_pass: int
    """Tokens of a micro-batch; of a perceptron, its rows."""
    engines: Mapping[str, Engine] = field(default_factory=dict)
    copies: Mapping[str, tuple[nn.Module, int]] = field(default_factory=dict)
    """What is read in rollouts ahead, besides the engines, and how many of them there are."""


def table(plan: Plan, *, tokens_per_step: int) -> list[str]:
    """The plan in words: a row for everything that takes memory, a column for each number of ranks, in MiB.

    The ranks are those that were started, or else one process, 8 and 64 ranks.
    """
    joined = dist.ranks()
    sizes = (joined.size,) if joined else SIZES
    columns = [needs(plan, size, tokens_per_step=tokens_per_step) for size in sizes]
    names = [*dict.fromkeys(name for column in columns for name in column), "together"]
    columns = [{**column, "together": sum(column.values())} for column in columns]
    width = max(map(len, names))
    head = f"memory of each rank, MiB: {_under(plan.dist)}"
    lines = [head, f"  {'ranks':<{width}}" + "".join(f"{size:>12}" for size in sizes)]
    for name in names:
        lines.append(f"  {name:<{width}}" + "".join(_mebibytes(column.get(name, 0)) for column in columns))
    return lines


def needs(plan: Plan, ranks: int, *, tokens_per_step: int) -> Bytes:
    """Bytes on the device of each of so many ranks, by what takes them. One rank is a process without a launcher."""
    found: Bytes = {}
    seen: set[int] = set()
    passes: list[int] = []
    for name, part in plan.parts.items():
        if isinstance(part, Learner):
            held = _learner(part, plan.dist, ranks, seen)
            passes.append(activations(part.module, plan.tokens_per_pass, _computed_in(part, plan.dist, ranks)))
        else:
            held = {"weights": _size(_fresh(_tensors(part), seen))}
        found |= {f"{name}: {what}": size for what, size in held.items() if size}
    found["activations of a pass"] = max(passes, default=0)
    for name, engine in _own_engines(plan.engines).items():
        found |= {f"{name}: {what}": size for what, size in _engine(engine, tokens_per_step, ranks).items()}
    for name, (module, count) in plan.copies.items():
        if count:
            found[f"{name}: copies that play"] = count * _size(_whole(module).parameters())
    return found


def activations(module: nn.Module, tokens: int, size: int) -> int:
    """About how many bytes a pass over so many tokens keeps for the gradient, each number taking `size`.

    Layers of a language model keep 12 hidden and 4 inner widths per token; with checkpointing each keeps its input,
    and one keeps all of that while it is computed again. Its head keeps float32 logits, up to a bound, and blocks of
    them. Other modules keep the inputs and outputs of their linear layers. Scores of eager attention come on top.
    """
    body = _transformer(module)
    if body is None:
        linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
        return tokens * size * sum(part.in_features + part.out_features for part in linear)
    config: Any = body.config.get_text_config()
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    layer = WIDTHS_KEPT * hidden + INNER_KEPT * _inner_width(config)
    per_token = layers * hidden + layer if body.is_gradient_checkpointing else layers * layer
    return tokens * size * per_token + _logits(module, tokens)


def shard(module: nn.Module, settings: DistConfig, ranks: int, size: int) -> tuple[int, int]:
    """Bytes of a rank's part of all weights, and of the layers that are whole while they compute (FSDP2): two of them
    and what lies outside of layers, or all of it where nothing is given back in between (ZeRO-2)."""
    whole = {id(weight): weight for weight in module.parameters()}
    layers = dist.layers_of(module)
    inside = [sum(weight.numel() for weight in layer.parameters()) for layer in layers]
    outside = sum(weight.numel() for weight in whole.values()) - sum(inside)
    gathered = outside + (sum(sorted(inside)[-2:]) if settings.reshard_after_forward else sum(inside))
    return -(-_size(whole.values()) // ranks), gathered * size


def _learner(learner: Learner, settings: DistConfig, ranks: int, seen: set[int]) -> Bytes:
    """What one set of weights takes that learns."""
    count = sum(weight.numel() for weight in learner.trained)
    low = sum(weight.numel() for weight in learner.trained if weight.dtype in LOW)
    state = optimizer_state(learner.trained, learner.optim.name) + 4 * low
    own = _size(_fresh(learner.module.parameters(), seen))
    if ranks == 1 or settings.strategy == "ddp":
        summed = min(4 * count, 4 * dist.BUCKET) if ranks > 1 else 0
        return {"weights": own, "gradients": 4 * count + 2 * low + summed, "optimizer": state}
    part, gathered = shard(learner.module, settings, ranks, _computed_in(learner, settings, ranks))
    wide = 4 if settings.reduce_dtype == "float32" else _computed_in(learner, settings, ranks)
    waiting = 0 if settings.reduce_every_pass else wide * count
    kept = {"part of the weights": part, "part of the gradients": -(-(4 * count + 2 * low) // ranks)}
    kept["part of the optimizer"] = -(-state // ranks)
    on_device = {} if settings.cpu_offload else kept
    weights = own if learner.resident else 0
    return {"weights": weights, **on_device, "layers that compute": gathered, "gradients not yet summed": waiting}


def optimizer_state(weights: Iterable[Tensor], name: str) -> int:
    """Bytes that an optimizer keeps of these weights, besides float32 copies of those of 16 bits."""
    if name != "adafactor":
        return STATE[name] * sum(weight.numel() for weight in weights)
    sums = (_row_and_column_sums(weight.shape) for weight in weights)
    return 4 * sum(sums)


def _row_and_column_sums(shape: Sequence[int]) -> int:
    if len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1]


def _engine(engine: Engine, tokens_per_step: int, ranks: int) -> Bytes:
    """What a sampler takes: keys and values of all that is read and said in a step, at most its budget; and the copies
    of the weights that vLLM and rollouts ahead hold. What Ray's workers and servers take lies with them."""
    if isinstance(engine.sampler, RaySampler | ServedSampler):
        return {}
    module: Any = engine.sampler.module  # type: ignore[attr-defined]
    budget: int = engine.sampler.cache_tokens  # type: ignore[attr-defined]
    own = isinstance(engine.sampler, VllmSampler)
    whole = _whole(module)
    answers = -(-tokens_per_step // engine.sampling.max_tokens // ranks)
    longest = engine.sampling.max_prompt_tokens + engine.sampling.max_tokens
    tokens = budget if own else min(budget, 2 * answers * longest)  # a place has up to twice the room it needs
    weight = next(module.parameters())
    config = module.config.get_text_config()
    per_token = config.num_hidden_layers * bytes_per_key(config, weight.element_size())
    copies = max(engine.ahead, own)
    held = {"keys and values, at most": max(1, engine.ahead) * tokens * per_token}
    return {**held, "copies that play": copies * _size(whole.parameters())} if copies else held


def _whole(module: nn.Module) -> nn.Module:
    """The model that a view is of, with the base and all adapters; any other as it is."""
    return module.model if isinstance(module, AdapterView) else module


def _own_engines(engines: Mapping[str, Engine]) -> dict[str, Engine]:
    """Those that take memory of their own: levels may ask one vLLM."""
    seen: set[int] = set()
    found: dict[str, Engine] = {}
    for name, engine in engines.items():
        shared = id(engine.sampler.engine) if isinstance(engine.sampler, VllmSampler) else 0
        if shared not in seen or not shared:
            found[name] = engine
        seen.add(shared)
    return found


def _transformer(module: nn.Module) -> Any:
    """The Hugging Face model that a module is or contains; None where there is none."""
    found = (part for part in module.modules() if hasattr(getattr(part, "config", None), "get_text_config"))
    whole = (part for part in found if hasattr(part, "is_gradient_checkpointing"))
    return next(whole, None)


def _inner_width(config: Any) -> int:
    """Of the feed-forward layer; of a mixture, those of the experts that a token goes to."""
    chosen = getattr(config, "num_experts_per_tok", None)
    if chosen and getattr(config, "moe_intermediate_size", None):
        return int(chosen * config.moe_intermediate_size)
    return int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size)


def _logits(module: nn.Module, tokens: int) -> int:
    """What a language model's head keeps, and works on; nothing of a module with another head."""
    find: Any = getattr(module, "get_output_embeddings", None)
    head = find() if find else None
    if head is None:
        return 0
    weight = head.weight
    blocks = 2 * LOGITS_PER_BLOCK * (1 if weight.device.type == "cpu" else 32)
    count = tokens * len(weight)
    return 4 * (min(count, LOGITS_KEPT) + min(count, blocks))


def _computed_in(learner: Learner, settings: DistConfig, ranks: int) -> int:
    """Bytes of a number in the layers of what learns."""
    lower = ranks > 1 and settings.compute_dtype == "bfloat16"
    return 2 if lower else max(weight.element_size() for weight in learner.trained)


def _tensors(part: Any) -> Iterator[Tensor]:
    """The weights of something that does not learn."""
    module = part if isinstance(part, nn.Module) else getattr(part, "module", None)
    yield from module.parameters() if isinstance(module, nn.Module) else ()
    yield from getattr(part, "tensors", ())


def _fresh(tensors: Iterable[Tensor], seen: set[int]) -> list[Tensor]:
    """Those that have not been seen yet: levels may share weights."""
    found = [tensor for tensor in tensors if id(tensor) not in seen]
    seen.update(map(id, found))
    return found


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:>12,.1f}" if size else f"{'-':>12}"


def _under(settings: DistConfig) -> str:
    """The strategy in a word."""
    if settings.strategy == "ddp":
        return "ddp"
    stage = "ZeRO-3" if settings.reshard_after_forward else "ZeRO-2"
    return f"fsdp, {stage}" + (", parts on the host" if settings.cpu_offload else "")
