"""Tensors in files to which every rank writes the part it holds, and from which any number of ranks reads its own.

Safetensors that say where in the whole a part belongs (`torch.distributed.checkpoint`); files of whole tensors are read
in the same way. Knows neither optimizers nor modules.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor


def cut(tensors: Iterable[Tensor]) -> bool:
    """Whether ranks hold parts of any of these."""
    return any(hasattr(tensor, "full_tensor") for tensor in tensors)


def write(tensors: Mapping[str, Tensor], folder: Path) -> list[Path]:
    """Write what this rank holds of each tensor, and force it to the disk; returns the files it wrote, at most one.

    Of what all ranks hold one writes it. All must call it with the same names, and what is raised on one is raised on
    all.
    """
    from torch.distributed import get_rank
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with _as_raised():
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(dict(tensors), storage_writer=writer)
    return sorted(folder.glob(f"shard-{get_rank() + 1:05d}-*.safetensors"))


def shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape, of the whole, and type of every tensor in the files of a folder."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (saved.size, saved.properties.dtype) for name, saved in found.items()}  # type: ignore[union-attr]


def read(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill these tensors, or what this rank holds of them, from the files of a folder; nothing else is read."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _as_raised(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads for itself
        reader = HuggingFaceStorageReader(str(folder))
        load(dict(into), storage_reader=reader, no_dist=True)


@contextlib.contextmanager
def _as_raised() -> Iterator[None]:
    """What a rank raised within, in place of a report that all ranks raise and no `except Exception` catches."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
