"""Optimizers by name, their state as numbers in files, and what 16-bit weights need: float32 masters and a loss scale.

Knows parameters and gradients; knows nothing of modules, losses or data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from echelon.config import OptimConfig
from echelon.errors import ConfigError, need
from echelon.train import parts

LOW = (torch.float16, torch.bfloat16)
"""Types whose neighbouring numbers lie further apart than most updates."""

BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit"}
"""optim.name → what bitsandbytes calls it."""

WHOLE = "optimizer.safetensors"
"""The file of tensors that one process has written."""
PARTS = "optimizer"
"""The folder of tensors of which each rank has written a part."""


def make_optimizer(parameters: Sequence[Tensor], optim: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of the settings, for these parameters in this order.

    Raises MissingExtra and ConfigError for one that needs bitsandbytes where that, or a GPU, is missing.
    """
    groups = _groups(parameters, optim)
    if optim.name == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=device.type in ("cpu", "cuda"),  # one pass over the weights instead of ten
        )
    if optim.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=optim.lr, weight_decay=optim.weight_decay)
    library: Any = need("bitsandbytes", "quantization")
    if device.type != "cuda":
        raise ConfigError(
            f"optim.name = {optim.name}: it needs a GPU, and what learns is on {device}. Use adamw, or adafactor, "
            "whose state is small too."
        )
    made: torch.optim.Optimizer = getattr(library.optim, BITSANDBYTES[optim.name])(
        groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    return made


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path, masters: Sequence[Tensor], **counters: Any) -> None:
    """All of its state as safetensors and JSON, the float32 masters of 16-bit weights, and what else counts.

    Where every rank holds a part of each tensor it writes its own, so meanwhile the others must call `save_part`.
    """
    tensors, numbers = _state(optimizer, masters)
    if parts.cut(tensors.values()):
        parts.write(tensors, folder / PARTS)
    else:
        save_file(dict(_apart(tensors)), folder / WHOLE)
    shapes = [list(parameter.shape) for parameter in _parameters(optimizer)]
    described = {**counters, "optimizer": type(optimizer).__name__, "shapes": shapes, "numbers": numbers}
    (folder / "optimizer.json").write_text(json.dumps(described), encoding="utf-8")


def save_part(optimizer: torch.optim.Optimizer, folder: Path, masters: Sequence[Tensor]) -> list[Path]:
    """Write what this rank holds of it into a folder where another one saves the rest; returns the files it wrote."""
    tensors, _ = _state(optimizer, masters)
    return parts.write(tensors, folder / PARTS) if parts.cut(tensors.values()) else []


class SavedOptimizer:
    """What `save_optimizer` wrote, whole or in parts, on however many ranks.

    Raises OSError and ValueError if it is not there or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.counters: dict[str, Any] = json.loads((folder / "optimizer.json").read_bytes())
        self._file = folder / WHOLE
        self._parts = folder / PARTS if (folder / PARTS).is_dir() else None
        if self._parts is not None:
            self._names = list(parts.shapes(self._parts))
        else:
            with safe_open(self._file, "pt") as file:
                self._names = list(file.keys())

    def fits(self, optimizer: torch.optim.Optimizer, masters: int) -> bool:
        """Whether it is the state of this kind of optimizer for parameters of these shapes."""
        shapes = [list(parameter.shape) for parameter in _parameters(optimizer)]
        same = self.counters.get("optimizer") == type(optimizer).__name__ and self.counters.get("shapes") == shapes
        return same and masters == sum(name.startswith("master/") for name in self._names)

    @torch.no_grad()
    def load(self, optimizer: torch.optim.Optimizer, masters: Sequence[Tensor]) -> None:
        """Make the optimizer and the masters what was saved; where ranks hold parts, each reads its own."""
        parameters = _parameters(optimizer)
        whole = self._parts is None and not parts.cut(parameters)
        tensors = load_file(self._file) if whole else self._own(parameters, masters)
        for index, master in enumerate(masters):
            master.copy_(tensors[f"master/{index}"])
        state: dict[int, dict[str, Any]] = {}
        for name, value in {**tensors, **self.counters["numbers"]}.items():
            index, *path = name.split("/")
            if index != "master":
                entry: Any = state.setdefault(int(index), {})
                for part in path[:-1]:
                    entry = entry.setdefault(part, {})
                entry[path[-1]] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

    def _own(self, parameters: Sequence[Tensor], masters: Sequence[Tensor]) -> dict[str, Tensor]:
        """What this rank holds of everything that was saved, by its names."""
        folder = self._parts or self._file.parent  # whole weights may lie beside the whole file
        found: dict[str, Tensor] = {f"master/{index}": master.detach() for index, master in enumerate(masters)}
        for name, (shape, dtype) in parts.shapes(folder).items():
            if name in self._names and name not in found:
                like = parameters[int(name.partition("/")[0])]
                alike = shape == like.shape
                found[name] = torch.empty_like(like, dtype=dtype) if alike else torch.empty(shape, dtype=dtype)
        parts.read(folder, found)
        return found


class LossScale:
    """What a loss is multiplied by so that the gradients of float16 do not vanish (arXiv 1710.03740).

    It halves when a gradient overflows, and doubles after `PATIENCE` steps in which none did.
    """

    PATIENCE = 2000
    SMALLEST = 2.0**-14

    def __init__(self, scale: float = 2.0**16, steps: int = 0) -> None:
        self.scale = scale
        self.steps = steps
        """Steps since it last changed."""

    def overflowed(self) -> bool:
        """Halve it; whether it is worth trying again."""
        self.scale, self.steps = self.scale / 2, 0
        return self.scale >= self.SMALLEST

    def worked(self) -> None:
        """A step was taken."""
        self.steps += 1
        if self.steps >= self.PATIENCE:
            self.scale, self.steps = self.scale * 2, 0


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Of update number `step`, from 0: linear warm-up, then the schedule."""
    warmup = optim.warmup_steps
    if optim.warmup_fraction:
        assert total_steps, "warmup_fraction needs total_steps: it is a part of them"
        warmup = math.ceil(optim.warmup_fraction * total_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    assert total_steps, f"schedule {optim.schedule} needs total_steps: it would end at once"
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    left = 1 - progress if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr * (optim.final_lr_fraction + (1 - optim.final_lr_fraction) * left)


def _groups(parameters: Sequence[Tensor], optim: OptimConfig) -> list[dict[str, Any]] | list[Tensor]:
    """All alike, or matrices apart from biases and the scales of norms, which then do not decay."""
    if optim.decay == "all":
        return list(parameters)
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _state(optimizer: torch.optim.Optimizer, masters: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors of its state and the masters, and the numbers of its state, by names with slashes."""
    tensors = {f"master/{index}": master.detach() for index, master in enumerate(masters)}
    numbers: dict[str, float] = {}
    for name, value in _flat(optimizer.state_dict()["state"]):
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            numbers[name] = value
    return tensors, numbers


def _apart(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The same with memory of their own each: bitsandbytes has one table of levels for all weights."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        shared = tensor.data_ptr() in seen
        seen.add(tensor.data_ptr())
        yield name, tensor.clone() if shared else tensor.contiguous()


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(path with slashes, leaf) of nested dicts."""
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    return [leaf for key, value in tree.items() for leaf in _flat(value, f"{prefix}/{key}" if prefix else str(key))]
