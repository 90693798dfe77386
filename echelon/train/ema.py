"""A running average of the weights that are trained: smoother than the newest ones, and often better."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from echelon.train.learner import Learner, load_module, save_module


class Average:
    """average ← decay · average + (1 − decay) · weights, after every `update`; float32 whatever the weights are.

    Only what the learner trains is kept twice. `save` writes a folder like the learner's own, Hugging Face format and
    tokenizer included, with the averaged weights in it.
    """

    def __init__(self, learner: Learner, decay: float) -> None:
        self.learner = learner
        self.decay = decay
        self.tensors = [master.detach().clone() for master in learner.masters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        for mean, master in zip(self.tensors, self.learner.masters, strict=True):
            mean.lerp_(master, 1 - self.decay)

    def save(self, folder: Path) -> None:
        """The averaged weights as a model, and what continuing needs beyond its precision."""
        with self.in_place():
            save_module(self.learner.module, folder, self.learner.tokenizer, adapter=self.learner.adapter)
        if any(parameter.dtype != torch.float32 for parameter in self.learner.trained):
            save_file({str(index): mean for index, mean in enumerate(self.tensors)}, folder / "average.safetensors")

    def load(self, folder: Path) -> None:
        """Exactly the saved average."""
        with self.in_place():
            load_module(self.learner.module, folder, adapter=self.learner.adapter)
            self.tensors = [parameter.detach().float().clone() for parameter in self.learner.trained]
        if (folder / "average.safetensors").is_file():
            exact = load_file(folder / "average.safetensors", device=str(self.learner.device))
            self.tensors = [exact[str(index)] for index in range(len(self.tensors))]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module with the average in place of its weights, for as long as it takes."""
        kept = [parameter.detach().clone() for parameter in self.learner.trained]
        _put(self.learner.trained, self.tensors)
        try:
            yield
        finally:
            _put(self.learner.trained, kept)


@torch.no_grad()
def _put(parameters: list[torch.nn.Parameter], tensors: list[Tensor]) -> None:
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.copy_(tensor)
