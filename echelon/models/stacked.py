"""One adapter on top of another that was folded into the weights, written as one adapter of the model below both.

The sum of two low-rank products is one of the sum of their ranks. So what is saved says all of it, and loads wherever
adapters load, while only the upper part learns. Knows names, shapes and files of adapters, and no models.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from echelon.errors import DataError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_FRONT = "base_model.model."
_PART = re.compile(r"(?P<layer>.+)\.(?:lora|lora_embedding)_(?P<part>[AB])(?:\.weight)?")
_UNUSUAL = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "target_parameters", "trainable_token_indices")


@dataclass(frozen=True, slots=True)
class Lower:
    """An adapter that is part of the weights another one lies on, by the names in its files."""

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, path: str, settings: Mapping[str, Any]) -> Lower:
        """From a folder or hub id. Raises DataError for an adapter that is more than two matrices per layer."""
        from peft import load_peft_weights

        unusual = [name for name in _UNUSUAL if settings.get(name)]
        unusual += ["bias"] if settings.get("bias", "none") != "none" else []
        if unusual:
            raise DataError(
                f"'{path}' is an adapter with {', '.join(unusual)}, so no other one can be put on top of it. Merge it "
                f"first: echelon merge --adapter {path} --out …"
            )
        tensors = load_peft_weights(path, device="cpu")
        return cls({name: tensor.float() for name, tensor in tensors.items()}, settings)

    def check_beside(self, layers: Collection[str]) -> None:
        """Raise DataError if one of these layers, which get matrices, is one that this adapter trained in full."""
        if both := sorted({layer_of(name) for name in self.tensors if not _PART.fullmatch(name)} & set(layers)):
            raise DataError(
                f"the adapter below trained {both[0]} in full, so there can be no matrices beside it. Leave it out of "
                "lora.target, or merge the adapter first: echelon merge."
            )

    def add_to(self, folder: Path, layers: Collection[str]) -> None:
        """Make the files of an upper adapter those of both. `layers`: what the model has, under the adapters."""
        settings, upper = json.loads((folder / CONFIG).read_bytes()), load_file(folder / WEIGHTS)
        scale, rank = _scale(settings), settings["r"] + self.settings["r"]
        whole = {name: tensor for name, tensor in self.tensors.items() if not _PART.fullmatch(name)}
        whole = {name: tensor for name, tensor in whole.items() if layer_of(name) in layers and name not in upper}
        both = {**_side_by_side(upper, self.tensors, _scale(self.settings) / scale), **whole}
        targets = {match["layer"].removeprefix(_FRONT) for name in both if (match := _PART.fullmatch(name))}
        settings |= {"r": rank, "lora_alpha": scale * rank, "use_rslora": False, "target_modules": sorted(targets)}
        if whole:
            together = [*(settings["modules_to_save"] or ()), *(self.settings["modules_to_save"] or ())]
            tied = settings["ensure_weight_tying"] or self.settings.get("ensure_weight_tying", False)
            settings |= {"modules_to_save": list(dict.fromkeys(together)), "ensure_weight_tying": tied}
        save_file(both, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def upper_part(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the matrices of two adapters side by side those of the upper one, which has these names and shapes.

    Other shapes come back as they are: the caller sees that they do not fit.
    """
    found = {}
    for name in own.keys() & saved.keys():
        match, tensor = _PART.fullmatch(name), saved[name]
        if match is not None and match["part"] == "A":
            tensor = tensor[: own[name].shape[0]]
        elif match is not None:
            tensor = tensor[:, : own[name].shape[1]]
        found[name] = tensor
    return found


def _side_by_side(upper: Mapping[str, Tensor], lower: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Upper matrices first, so that they are found again. A layer that only one adapter is on gets zeros for the other;
    what the upper one trains in full has the lower one's part in it. `ratio`: lower scale to upper scale."""
    both = {name: tensor for name, tensor in upper.items() if not _PART.fullmatch(name)}
    in_full = {layer_of(name) for name in both}
    matrices = {name for name in (*upper, *lower) if _PART.fullmatch(name) and layer_of(name) not in in_full}
    ranks = [next(tensor.shape[0] for name, tensor in one.items() if _is_a(name)) for one in (upper, lower)]
    for name in sorted(matrices):
        dim, factor = (0, 1.0) if _is_a(name) else (1, ratio)
        like = upper[name] if name in upper else lower[name]
        above = upper[name] if name in upper else _blank(like, dim, ranks[0])
        below = lower[name] * factor if name in lower else _blank(like, dim, ranks[1])
        both[name] = torch.cat([above.float(), below], dim).contiguous()
    return both


def _blank(like: Tensor, dim: int, rank: int) -> Tensor:
    return torch.zeros([rank if axis == dim else size for axis, size in enumerate(like.shape)])


def _is_a(name: str) -> bool:
    match = _PART.fullmatch(name)
    return match is not None and match["part"] == "A"


def layer_of(name: str) -> str:
    """The layer that a tensor of an adapter's file belongs to."""
    match = _PART.fullmatch(name)
    return (match["layer"] if match else name.removesuffix(".weight").removesuffix(".bias")).removeprefix(_FRONT)


def _scale(settings: Mapping[str, Any]) -> float:
    """What the product of an adapter's matrices is multiplied by."""
    rank: int = settings["r"]
    return float(settings["lora_alpha"]) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
