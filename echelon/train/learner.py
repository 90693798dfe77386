"""One set of weights being trained. Blind to the algorithm: it gets micro-batches and a loss function.

It owns the optimizer and the schedule, checks that what it is given is finite, and saves all of it.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from echelon.config import OptimConfig
from echelon.errors import CheckpointError, EchelonError

LossFn = Callable[[nn.Module, Any], tuple[Tensor, dict[str, float]]]
"""(module, micro-batch) → the micro-batch's share of the loss, and numbers that add up over micro-batches. Names that
end in "/max" are maximised instead of added."""


class NonFiniteLoss(EchelonError, RuntimeError):
    """The loss or its gradient is NaN or infinite; the weights have not been changed."""


class Learner:
    """A module, its optimizer and its schedule. `update` is one optimizer step.

    `tokenizer` makes `save` write a Hugging Face folder that loads without echelon. `total_steps` is what a decaying
    schedule decays over.
    """

    def __init__(
        self, module: nn.Module, optim: OptimConfig, *, total_steps: int = 0, name: str = "", tokenizer: Any = None
    ) -> None:
        self.module = module
        self.name = name
        self.version = 0
        self.tokenizer = tokenizer
        self.optim = optim
        self.total_steps = total_steps
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),  # one pass over the weights instead of ten
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    def update(self, batches: Iterable[Any], loss_fn: LossFn) -> dict[str, float]:
        """One optimizer step on the sum of the micro-batches' losses, and what there is to log about it.

        Raises NonFiniteLoss, before anything is changed, when a loss or the gradient is not finite; what `loss_fn`
        raises passes through, and nothing is changed either. The module is left in training mode.
        """
        self.module.train()  # layers are checkpointed in training mode only
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, float] = {}
        for batch in batches:
            loss, stats = loss_fn(self.module, batch.to(self.device))
            value = loss.item()
            if not math.isfinite(value):
                raise NonFiniteLoss(
                    f"{self.name or 'learner'}: the loss is {value} at update {self.version}, so no step was taken. "
                    "Look for non-finite rewards; otherwise lower optim.lr."
                )
            loss.backward()  # type: ignore[no-untyped-call]
            _accumulate(totals, {"loss": value, **stats})
        assert totals, "an update needs at least one micro-batch"
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, self.optim.max_grad_norm or math.inf))
        if not math.isfinite(norm):
            raise NonFiniteLoss(
                f"{self.name or 'learner'}: the gradient is {norm} at update {self.version}, so no step was taken. "
                "Lower optim.lr, or look for log-probabilities of impossible tokens."
            )
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.version += 1
        return {**totals, "grad_norm": norm, "lr": rate}

    def learning_rate(self) -> float:
        """Of the next update: linear warm-up, then the schedule."""
        optim, step = self.optim, self.version
        if step < optim.warmup_steps:
            return optim.lr * (step + 1) / optim.warmup_steps
        if optim.schedule == "constant":
            return optim.lr
        assert self.total_steps, f"schedule {optim.schedule} needs total_steps: it would end at once"
        progress = min(1.0, (step - optim.warmup_steps) / max(1, self.total_steps - optim.warmup_steps))
        left = 1 - progress if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return optim.lr * (optim.final_lr_fraction + (1 - optim.final_lr_fraction) * left)

    @torch.no_grad()
    def evaluate(self, batch: Any, fn: Callable[[nn.Module, Any], Tensor], tokens_per_pass: int) -> Tensor:
        """`fn(module, micro-batch)` → (b, t) for a whole batch of rows, without gradient, as (B, T) on the CPU."""
        out = torch.zeros(batch.tokens.shape)
        for micro in batch.split(tokens_per_pass):
            out[micro.rows, : micro.tokens.shape[1]] = fn(self.module, micro.to(self.device)).float().cpu()
        return out

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors, one at a time, for a sampler."""
        yield from self.module.state_dict().items()

    def save(self, folder: Path) -> None:
        """Weights (a Hugging Face folder if the module is one), optimizer state and counters."""
        save_module(self.module, folder, self.tokenizer)
        state = self.optimizer.state_dict()["state"]
        tensors = {f"{index}/{name}": value for index, entry in state.items() for name, value in entry.items()}
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "optimizer.safetensors")
        (folder / "optimizer.json").write_text(json.dumps({"version": self.version}))

    def load(self, folder: Path) -> None:
        """Continue exactly where `save` was called. Raises CheckpointError if something else was saved there."""
        state: dict[int, dict[str, Tensor]] = {}
        try:
            counters = json.loads((folder / "optimizer.json").read_text())
            for key, value in load_file(folder / "optimizer.safetensors").items():
                index, name = key.split("/")
                state.setdefault(int(index), {})[name] = value
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{folder} holds no optimizer state, so training cannot continue from it. Give a checkpoint's folder, "
                "or start a new run from these weights with model.path."
            ) from error
        shapes = {index: parameter.shape for index, parameter in enumerate(self.trained)}
        if any(entry["exp_avg"].shape != shapes.get(index) for index, entry in state.items()):
            raise CheckpointError(
                f"the optimizer state in {folder} belongs to other weights than the {len(shapes)} that are trained "
                "here. Train the same parts of the same model as the run that saved it."
            )
        load_module(self.module, folder)
        self.version = int(counters["version"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


class Weights:
    """A module without an optimizer that must survive a kill all the same: a target network, a reference."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def save(self, folder: Path) -> None:
        """Its weights, as safetensors."""
        save_module(self.module, folder)

    def load(self, folder: Path) -> None:
        """Exactly the saved weights."""
        load_module(self.module, folder)


def save_module(module: nn.Module, folder: Path, tokenizer: Any = None) -> None:
    """Weights as safetensors: a Hugging Face folder, tokenizer included, when the module is a Hugging Face model."""
    folder.mkdir(parents=True, exist_ok=True)
    published: Any = module
    if hasattr(module, "save_pretrained"):
        published.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    else:
        save_model(module, str(folder / "model.safetensors"))


def load_module(module: nn.Module, folder: Path) -> None:
    """Put saved weights into a module of the same shape; every one of them must be there, and no others."""
    tensors = {
        name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()
    }
    if hasattr(module, "from_pretrained") and tensors and not _fits(module, tensors):
        tensors = _renamed(module, folder)
    if not _fits(module, tensors):
        raise CheckpointError(
            f"the weights in {folder} do not fit {type(module).__name__}: another model was saved there. "
            "Resume with the settings of the run that saved it."
        )
    module.load_state_dict(tensors, strict=False)


def _fits(module: nn.Module, tensors: dict[str, Tensor]) -> bool:
    """Whether these are all weights of the module; of weights that are one tensor, one name is enough."""
    own = module.state_dict(keep_vars=True)
    if any(name not in own or tensor.shape != own[name].shape for name, tensor in tensors.items()):
        return False
    given = {id(own[name]) for name in tensors}
    return all(id(tensor) in given for tensor in own.values())


def _renamed(module: Any, folder: Path) -> dict[str, Tensor]:
    """Weights of an architecture whose published names are not those of its modules (mixtures of experts, GPT-NeoX)."""
    described = folder / "config.json"
    if not described.is_file() or json.loads(described.read_text()).get("model_type") != module.config.model_type:
        return {}
    try:
        loaded, report = type(module).from_pretrained(
            folder, config=copy.deepcopy(module.config), dtype="auto", output_loading_info=True
        )
    except (RuntimeError, ValueError, OSError):
        return {}
    return {} if any(report.values()) else dict(loaded.state_dict())


def _accumulate(totals: dict[str, float], stats: dict[str, float]) -> None:
    for name, value in stats.items():
        if name not in totals:
            totals[name] = value
        else:
            totals[name] = max(totals[name], value) if name.endswith("/max") else totals[name] + value


def average(logged: Sequence[dict[str, float]]) -> dict[str, float]:
    """What several updates logged, as one: means, and the largest of what ends in "/max"."""
    return {
        name: max(row[name] for row in logged)
        if name.endswith("/max")
        else sum(row[name] for row in logged) / len(logged)
        for name in logged[0]
    }
