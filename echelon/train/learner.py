"""One set of weights being trained. Blind to the algorithm: it gets micro-batches and a loss function.

It owns the optimizer and the schedule, checks that what it is given is finite, and saves all of it.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from echelon.config import OptimConfig
from echelon.errors import CheckpointError, ConfigError, EchelonError
from echelon.models import lora
from echelon.train import dist
from echelon.train.clock import phase
from echelon.train.optimizers import (
    LOW,
    LossScale,
    SavedOptimizer,
    learning_rate,
    make_optimizer,
    save_optimizer,
    save_part,
)

Found = TypeVar("Found")

LossFn = Callable[[nn.Module, Any], tuple[Tensor, dict[str, float]]]
"""(module, micro-batch) → the micro-batch's share of the loss, and numbers that add up over micro-batches. Names that
end in "/max" are maximised instead of added."""


class NonFiniteLoss(EchelonError, RuntimeError):
    """The loss or its gradient is NaN or infinite; the weights have not been changed."""


class Learner:
    """A module, its optimizer and its schedule. `update` is one optimizer step.

    What learns is what asks for a gradient: all weights, or those of an adapter. Weights of 16 bits follow float32
    masters, since most updates are smaller than the distance to the next number they could be. `tokenizer` makes `save`
    write a Hugging Face folder that loads without echelon. `total_steps` is what a decaying schedule decays over. Of a
    module with several adapters, `adapter` names the one that this learner trains and saves.

    Where there are several ranks (`train.dist`), each computes its share of the micro-batches and all take the same
    step. If every rank holds a part of each weight, `module` is a whole copy for all who read it, brought up to date
    after every step; one that nobody reads between steps but this learner (`resident` false) waits on the host until
    it is saved. Of such a one ranks other than 0 may have shapes alone (the meta device). `place` is where parts
    compute, if not where the module is.
    """

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig,
        *,
        total_steps: int = 0,
        name: str = "",
        tokenizer: Any = None,
        adapter: str = "",
        resident: bool = True,
        place: torch.device | None = None,
    ) -> None:
        self.module = module
        self.name = name
        self.version = 0
        self.tokenizer = tokenizer
        self.optim = optim
        self.total_steps = total_steps
        self.adapter = adapter
        if getattr(module, "is_quantized", False) and not lora.has_adapters(module):
            raise ConfigError(
                f"model.quantization: weights of few bits cannot be trained, and {name or 'this model'} has no "
                "adapter that could. Set lora.rank to 8 or more, or leave quantization out."
            )
        with self._speaking():
            self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            self._ranks, self.resident = dist.ranks(), resident
            self._sharded = self._cut(place)
        self._moved = self.trained if self._sharded is None else self._sharded.trained
        """What the optimizer's steps end in: the weights, or this rank's parts of them."""
        self._masters = [_master(parameter) for parameter in self._moved]
        low = any(parameter.dtype == torch.float16 for parameter in module.parameters())
        self.loss_scale = LossScale() if low else None
        self.optimizer = make_optimizer(self._masters, optim, self._masters[0].device if self._masters else self.device)

    @property
    def device(self) -> torch.device:
        """Where micro-batches are computed."""
        return next(self.module.parameters()).device if self._sharded is None else self._sharded.device

    @property
    def exact(self) -> bool:
        """Whether it learns from float32 numbers, as whoever reads the module computes them."""
        lower = self._sharded is not None and self._sharded.settings.compute_dtype != "same"
        return next(self.module.parameters()).dtype == torch.float32 and not lower

    @property
    def masters(self) -> list[Tensor]:
        """What learns in full precision, whole; where ranks hold parts they are gathered, so all must ask."""
        if self._sharded is None:
            return self._masters
        return [master.full_tensor() for master in self._masters]  # type: ignore[attr-defined]

    @phase("learning")
    def update(self, batches: Iterable[Any], loss_fn: LossFn) -> dict[str, float]:
        """One optimizer step on the sum of the micro-batches' losses, and what there is to log about it.

        Raises NonFiniteLoss, before anything is changed, when a loss or the gradient is not finite; what `loss_fn`
        raises passes through, and nothing is changed either. A gradient that overflows float16 is computed again with a
        smaller loss scale. The module is left in training mode.
        """
        self.module.train()  # layers are checkpointed in training mode only
        batches = list(batches)
        assert batches, "an update needs at least one micro-batch"
        if self._ranks is not None:
            dist.check_alike(self._ranks, self.name or "learner", batches)
            batches = dist.divided(batches, self._ranks.size)
        if self._sharded is not None:
            self._sharded.root.train()
            if self.resident:  # others may have changed it: a head that starts at the mean return, a shared trunk
                self._sharded.take()
        before = copy.copy(self.loss_scale)
        while True:
            with self._speaking():
                totals = self._gradient(batches, loss_fn)
            norm = self._clip()
            if math.isfinite(norm):
                break
            if self.loss_scale is None or not self.loss_scale.overflowed():
                self.loss_scale = before
                raise NonFiniteLoss(
                    f"{self.name or 'learner'}: the gradient is {norm} at update {self.version}, so no step was taken. "
                    "Lower optim.lr, or look for log-probabilities of impossible tokens."
                )
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._follow_masters()
        if self._sharded is not None and self.resident:
            self._sharded.put()
        self.version += 1
        if self.loss_scale is not None:
            self.loss_scale.worked()
            totals["loss_scale"] = self.loss_scale.scale
        return {**totals, "grad_norm": norm, "lr": rate}

    def learning_rate(self) -> float:
        """Of the next update: linear warm-up, then the schedule."""
        return learning_rate(self.optim, self.version, self.total_steps)

    @torch.no_grad()
    def evaluate(self, batch: Any, fn: Callable[[nn.Module, Any], Tensor], tokens_per_pass: int) -> Tensor:
        """`fn(module, micro-batch)` → (b, t) for a whole batch of rows, without gradient, as (B, T) on the CPU.

        In evaluation mode, so that an adapter drops nothing.
        """
        out = torch.zeros(batch.tokens.shape)
        for micro, counts in self._deal(dist.parts_of(batch, tokens_per_pass)):
            found = self.read(fn, micro.to(self.device)).float().cpu()
            if counts:
                out[micro.rows, : micro.tokens.shape[1]] = found
        return out if self._ranks is None else self._ranks.sum_(out)

    @torch.no_grad()
    def read(self, fn: Callable[..., Found], *args: Any) -> Found:
        """`fn(module, *args)` with the weights of now, in evaluation mode, without gradient. All ranks must call it."""
        if self._sharded is not None and not self.resident:
            return self._sharded.read(fn, *args)
        self.module.eval()
        with self._speaking():
            return fn(self.module, *args)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors, one at a time, for a sampler; those below an adapter with what it adds."""
        self.refresh()
        with self._speaking():
            yield from lora.merged_weights(self.module)

    def refresh(self) -> None:
        """Bring the whole module up to date where it is not already. All ranks must call it."""
        if self._sharded is not None and not self.resident:
            self._sharded.put()

    def save(self, folder: Path) -> None:
        """Weights (a Hugging Face folder if the module is one, peft's if it has adapters), optimizer and counters.

        Of several ranks one calls it; meanwhile all others must call `attend`.
        """
        self.refresh()
        save_module(self.module, folder, self.tokenizer, adapter=self.adapter)
        scale = self.loss_scale
        counters = {} if scale is None else {"loss_scale": scale.scale, "loss_scale_steps": scale.steps}
        save_optimizer(self.optimizer, folder, self._own_masters(), version=self.version, **counters)

    def attend(self, folder: Path) -> list[Path]:
        """Write what this rank holds into the folder that another one saves to; returns the files it wrote."""
        self.refresh()
        return save_part(self.optimizer, folder, self._own_masters())

    def load(self, folder: Path) -> None:
        """Continue exactly where `save` was called. Raises CheckpointError if something else was saved there."""
        try:
            saved = SavedOptimizer(folder)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{folder} holds no optimizer state, so training cannot continue from it. Give a checkpoint's folder, "
                "or start a new run from these weights with model.path."
            ) from error
        if not saved.fits(self.optimizer, len(self._own_masters())):
            raise CheckpointError(
                f"the optimizer state in {folder} belongs to other weights than the {len(self.trained)} that are "
                "trained here, or to another optimizer. Train the same parts of the same model, in the same way, as "
                "the run that saved it."
            )
        if not self._empty:
            load_module(self.module, folder, adapter=self.adapter)
        if self._sharded is not None:
            self._sharded.take()
        saved.load(self.optimizer, self._own_masters())
        self.version = int(saved.counters["version"])
        if self.loss_scale is not None:
            self.loss_scale = LossScale(saved.counters["loss_scale"], saved.counters["loss_scale_steps"])

    def _speaking(self) -> AbstractContextManager[None]:
        return lora.use(self.module, self.adapter) if self.adapter else nullcontext()

    def _gradient(self, batches: Sequence[Any], loss_fn: LossFn) -> dict[str, float]:
        """Put the gradient of the micro-batches' summed losses on the masters; returns what the losses logged."""
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self._moved:
            parameter.grad = None
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        totals: dict[str, float] = {}
        dealt = self._deal(batches)
        for number, (batch, counts) in enumerate(dealt):
            loss, stats = self._loss(loss_fn, batch, last=number + 1 == len(dealt))
            value = loss.item()
            if self._ranks is None:
                self._check_finite(value)
            factor = scale if counts else 0.0
            (loss if factor == 1 else loss * factor).backward()  # type: ignore[no-untyped-call]
            self._collect()
            if counts:
                _accumulate(totals, {"loss": value, **stats})
        if self._ranks is not None:
            totals = dist.total(self._ranks, totals)
            self._check_finite(totals["loss"])  # all ranks together, or those left would wait for one that has stopped
            if self._sharded is None:
                dist.sum_gradients(self._ranks, self._masters)
        if scale != 1:
            for master in self._masters:
                if master.grad is not None:
                    master.grad /= scale
        return totals

    def _loss(self, loss_fn: LossFn, batch: Any, *, last: bool) -> tuple[Tensor, dict[str, float]]:
        batch = batch.to(self.device)
        if self._sharded is None:
            return loss_fn(self.module, batch)
        self._sharded.before_pass(last=last)
        return self._sharded(loss_fn, batch)

    def _deal(self, batches: Sequence[Any]) -> list[tuple[Any, bool]]:
        """The micro-batches that this rank computes, and whether each counts; all of them where there are no others."""
        if self._ranks is None:
            return [(batch, True) for batch in batches]
        return self._ranks.deal(batches, alike=self._sharded is not None)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"{self.name or 'learner'}: the loss is {loss} at update {self.version}, so no step was taken. "
                "Look for non-finite rewards; otherwise lower optim.lr."
            )

    def _clip(self) -> float:
        """Scale the whole gradient down to `max_grad_norm` where it is longer; its length before that."""
        norm: Any = torch.nn.utils.clip_grad_norm_(self._masters, self.optim.max_grad_norm or math.inf)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _cut(self, place: torch.device | None) -> dist.Sharded | None:
        """The copy of the module of which this rank holds its part, where the settings want one."""
        if self._ranks is None or self._ranks.settings.strategy != "fsdp":
            return None
        dist.check_shardable(self.module, self.optim.name, self.name or "this model")
        place = place or next(self.module.parameters()).device
        assert place.type != "meta", "shapes alone do not say where their parts compute"
        if not self.resident and not self._empty:
            self.module.to("cpu")
        return dist.Sharded(self.module, self._ranks, place)

    @property
    def _empty(self) -> bool:
        """Whether the module has shapes alone, and another rank the weights."""
        return any(parameter.is_meta for parameter in self.module.parameters())

    def _collect(self) -> None:
        """Add the gradients of 16-bit weights to those of their masters, in float32."""
        for parameter, master in zip(self._moved, self._masters, strict=True):
            if master is not parameter and parameter.grad is not None:
                found = parameter.grad.float()
                master.grad = found if master.grad is None else master.grad.add_(found)
                parameter.grad = None

    @torch.no_grad()
    def _follow_masters(self) -> None:
        for parameter, master in zip(self._moved, self._masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    def _own_masters(self) -> list[Tensor]:
        pairs = zip(self._moved, self._masters, strict=True)
        return [master for parameter, master in pairs if master is not parameter]


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


def save_module(module: nn.Module, folder: Path, tokenizer: Any = None, *, adapter: str = "") -> None:
    """Weights as safetensors: a Hugging Face folder, tokenizer included, when the module is a Hugging Face model.

    Of a model with adapters only these are written, in peft's format: all of them, or one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    published: Any = module
    if lora.has_adapters(module):
        lora.save(module, folder, name=adapter)
    elif hasattr(module, "save_pretrained"):
        published.save_pretrained(folder)
    if hasattr(module, "save_pretrained"):
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    else:
        save_model(module, str(folder / "model.safetensors"))


def load_module(module: nn.Module, folder: Path, *, adapter: str = "") -> None:
    """Put saved weights into a module of the same shape; every one of them must be there, and no others."""
    if lora.has_adapters(module):
        return lora.restore(module, folder, name=adapter)
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


def _master(parameter: Tensor) -> Tensor:
    """What the optimizer moves: the weight itself, or a float32 copy that a weight of 16 bits is rounded from."""
    return parameter.detach().float().requires_grad_() if parameter.dtype in LOW else parameter


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
