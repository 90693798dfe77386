"""Optimizers by name, their state as numbers in files, and what 16-bit weights need: float32 masters and a loss scale.

Knows parameters and gradients; knows nothing of modules, losses or data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from echelon.config import OptimConfig
from echelon.errors import ConfigError, need

LOW = (torch.float16, torch.bfloat16)
"""Types whose neighbouring numbers lie further apart than most updates."""

BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit"}
"""optim.name → what bitsandbytes calls it."""


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


def save_optimizer(
    optimizer: torch.optim.Optimizer, folder: Path | None, masters: Sequence[Tensor], **counters: Any
) -> None:
    """All of its state as safetensors and JSON, the float32 masters of 16-bit weights, and what else counts.

    Of tensors of which every rank holds a part, the parts are gathered, so all ranks must call it; those that write
    nothing give no folder.
    """
    tensors = {f"master/{index}": _whole(master, folder) for index, master in enumerate(masters)}
    numbers: dict[str, float] = {}
    for name, value in _flat(optimizer.state_dict()["state"]):
        if isinstance(value, Tensor):
            tensors[name] = _whole(value, folder)
        else:
            numbers[name] = value
    if folder is None:
        return
    save_file(dict(_apart(tensors)), folder / "optimizer.safetensors")
    shapes = [list(parameter.shape) for parameter in _parameters(optimizer)]
    described = {**counters, "optimizer": type(optimizer).__name__, "shapes": shapes, "numbers": numbers}
    (folder / "optimizer.json").write_text(json.dumps(described), encoding="utf-8")


class SavedOptimizer:
    """What `save_optimizer` wrote. Raises OSError and ValueError if it is not there or cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.counters: dict[str, Any] = json.loads((folder / "optimizer.json").read_bytes())
        self._tensors = load_file(folder / "optimizer.safetensors")

    def fits(self, optimizer: torch.optim.Optimizer, masters: int) -> bool:
        """Whether it is the state of this kind of optimizer for parameters of these shapes."""
        shapes = [list(parameter.shape) for parameter in _parameters(optimizer)]
        same = self.counters.get("optimizer") == type(optimizer).__name__ and self.counters.get("shapes") == shapes
        return same and masters == sum(name.startswith("master/") for name in self._tensors)

    def load(
        self,
        optimizer: torch.optim.Optimizer,
        masters: Sequence[Tensor],
        *,
        like: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        """Make the optimizer and the masters what was saved. `like` cuts a tensor as a parameter is cut."""
        parameters = _parameters(optimizer)
        state: dict[int, dict[str, Any]] = {}
        for name, value in {**self._tensors, **self.counters["numbers"]}.items():
            index, *path = name.split("/")
            if index != "master":
                parameter = parameters[int(index)]
                if like is not None and isinstance(value, Tensor) and value.shape == parameter.shape:
                    value = like(parameter, value)
                entry: Any = state.setdefault(int(index), {})
                for part in path[:-1]:
                    entry = entry.setdefault(part, {})
                entry[path[-1]] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        with torch.no_grad():
            for index, master in enumerate(masters):
                saved = self._tensors[f"master/{index}"]
                master.copy_(saved if like is None else like(master, saved))


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


def _whole(tensor: Tensor, folder: Path | None) -> Tensor:
    """The tensor, its parts gathered where ranks hold one each; kept, on the host, only where it will be written."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    whole: Tensor = tensor.full_tensor()
    return whole[:0] if folder is None else whole.cpu()


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
