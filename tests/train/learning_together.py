"""What one process and two ranks must agree on: the same scenarios, run alone or by torchrun, written as numbers.

`python -m torch.distributed.run --nproc-per-node 2 learning_together.py results.json` writes those of rank 0.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from echelon.config import DistConfig, LoraConfig, OptimConfig
from echelon.data.packing import Batch, copies, pack
from echelon.models import lora
from echelon.models.heads import TokenValue, token_values
from echelon.models.lm import tiny, token_logprobs, weights_without_numbers
from echelon.ops import bellman, losses
from echelon.train import dist
from echelon.train.ema import Average
from echelon.train.learner import Learner, NonFiniteLoss

OPTIM = OptimConfig(lr=3e-3, max_grad_norm=0.5, weight_decay=0.01)
STRATEGIES = {
    "ddp": DistConfig(),
    "zero3": DistConfig(strategy="fsdp"),
    "zero2": DistConfig(strategy="fsdp", reshard_after_forward=False),
    "every pass": DistConfig(strategy="fsdp", reduce_every_pass=True),
}


def model() -> nn.Module:
    """A language model of two layers, the same every time."""
    return tiny(["a b c"], vocab_size=270, hidden=32, layers=2, heads=2)[0]


def batch(step: int, rows: int = 7) -> Batch:
    """Rows of one step."""
    return pack(copies(rows, vocabulary=260, seed=step, length=24))


def nll(module: nn.Module, some: Batch) -> tuple[Tensor, dict[str, float]]:
    """Mean over the tokens of the step, how many those are, and something that is maximised."""
    nll_BT = losses.nll(token_logprobs(module, some))
    stats = {"tokens": float(some.mask.sum()), "worst/max": float(nll_BT.detach().max())}
    return losses.token_sum(nll_BT, some.mask, some.denom), stats


def square(module: nn.Module, some: Batch) -> tuple[Tensor, dict[str, float]]:
    """Values pulled towards 1."""
    error_BT = (token_values(module, some)[0] - 1).square()
    return losses.token_sum(error_BT, some.mask, some.denom), {}


def curve(learner: Learner, *, steps: int, tokens_per_pass: int, rows: int = 7, loss_fn: Any = nll) -> dict[str, Any]:
    """What an optimizer step logs, step by step, and the weights after all of them."""
    logged = [learner.update(batch(step, rows).split(tokens_per_pass), loss_fn) for step in range(steps)]
    found: dict[str, Any] = {name: [row[name] for row in logged] for name in logged[0]}
    learner.refresh()
    return found | {"weights": summary(learner.module)}


def summary(module: nn.Module) -> list[float]:
    """A few numbers that depend on all weights, and hardly on rounding; nothing of shapes alone."""
    with torch.no_grad():
        return [float(parameter.double().norm()) for parameter in module.parameters() if not parameter.is_meta]


def sft(**how: Any) -> dict[str, Any]:
    """Twenty steps, clipped, of passes that do not divide by two."""
    return curve(Learner(model(), OPTIM, name="lm", **how), steps=20, tokens_per_pass=72)


def one_row() -> dict[str, Any]:
    """A step that only one rank can have a share of."""
    return curve(Learner(model(), OPTIM, name="lm"), steps=2, tokens_per_pass=24, rows=1)


def half() -> dict[str, Any]:
    """Weights of 16 bits, which follow float32 masters, and their running average."""
    learner = Learner(model().to(torch.bfloat16), OPTIM, name="lm")
    mean = Average(learner, 0.5)
    found = curve(learner, steps=5, tokens_per_pass=72)
    mean.update()
    return found | {"mean": [float(tensor.double().norm()) for tensor in mean.tensors]}


def adapter() -> dict[str, Any]:
    """An adapter on frozen weights; it has learned before, and how it was is kept once the learner exists."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = lora.attach(model(), LoraConfig(rank=4))
        for name, weight in module.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.02)
    learner = Learner(module, replace(OPTIM, lr=1e-2), name="lm")
    lora.keep_start(module)
    return curve(learner, steps=5, tokens_per_pass=72)


def critic() -> dict[str, Any]:
    """A value model whose head is set after the learner exists, and a network that lags behind it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        value = TokenValue.from_lm(model())
    target, learner = copy.deepcopy(value), Learner(value, OPTIM, name="value")
    value.start_at(0.25)
    found: dict[str, Any] = {}
    for _ in range(3):
        found = curve(learner, steps=2, tokens_per_pass=72, loss_fn=square)
        bellman.polyak_(target, value, 0.1)
    return found | {"target": summary(target)}


def read() -> dict[str, Any]:
    """What is computed without learning: by rows, of a model that waits on the host and of one that does not."""
    found = {}
    for resident in (True, False):
        learner = Learner(model(), OPTIM, name="lm", resident=resident)
        learner.update([batch(0)], nll)
        rows = learner.evaluate(batch(1), token_logprobs, 4096)
        learner.refresh()
        found[str(resident)] = rows.sum(1).tolist() + summary(learner.module)
    return found


def refused() -> dict[str, Any]:
    """A loss that is not finite in one micro-batch stops all ranks, and changes nothing."""
    learner = Learner(model(), OPTIM, name="lm")

    def spoiled(module: nn.Module, some: Batch) -> tuple[Tensor, dict[str, float]]:
        loss, stats = nll(module, some)
        return (loss * torch.nan if 6 in some.rows else loss), stats

    try:
        learner.update(batch(0).split(72), spoiled)
    except NonFiniteLoss:
        return {"raised": [1.0], "weights": summary(learner.module)}
    return {"raised": [0.0]}


def saved(folder: Path) -> dict[str, Any]:
    """Learning that goes on in a new learner, from what another one saved."""
    first = Learner(model().to(torch.bfloat16), OPTIM, name="lm")
    curve(first, steps=2, tokens_per_pass=72)
    keep(first, folder)
    again = Learner(model().to(torch.bfloat16), OPTIM, name="lm")
    again.load(folder)
    dist.wait()
    return {"first": curve(first, steps=2, tokens_per_pass=72), "again": curve(again, steps=2, tokens_per_pass=72)}


def keep(learner: Learner, folder: Path) -> None:
    """Save as a checkpoint does: one rank into the folder, the others what they hold."""
    if dist.writes():
        folder.mkdir(parents=True, exist_ok=True)
    dist.wait()
    if dist.writes():
        learner.save(folder)
    else:
        learner.attend(folder)
    dist.wait()


def moved(folder: Path) -> dict[str, Any]:
    """Four steps, of which the last two are taken by a learner under the other strategy, from what the first saved.

    Both leave what they saved: `first`, and `last` after all four.
    """
    first = Learner(model(), OPTIM, name="lm", resident=False)
    curve(first, steps=2, tokens_per_pass=72)
    keep(first, folder / "first")
    ranks = dist.ranks()
    other = "zero3" if ranks is not None and ranks.settings.strategy == "ddp" else "ddp"
    with contextlib.nullcontext() if ranks is None else under(replace(ranks, settings=STRATEGIES[other])):
        last = Learner(model(), OPTIM, name="lm")
        last.load(folder / "first")
        found = curve(last, steps=2, tokens_per_pass=72)
        keep(last, folder / "last")
    return found


def given(folder: Path) -> dict[str, Any]:
    """Four steps of a model that of ranks with parts only the first has, the last two after it was saved."""
    how: dict[str, Any] = {"name": "lm", "resident": False, "place": torch.device("cpu")}
    first = Learner(shapes_or_model(), OPTIM, **how)
    curve(first, steps=2, tokens_per_pass=72)
    keep(first, folder)
    again = Learner(shapes_or_model(), OPTIM, **how)
    again.load(folder)
    found = curve(again, steps=2, tokens_per_pass=72)
    return found | {"rows": again.evaluate(batch(5), token_logprobs, 72).sum(1).tolist()}


def shapes_or_model() -> nn.Module:
    """The model; where ranks will hold parts of it, its shapes alone on all but the first."""
    ranks = dist.ranks()
    if ranks is None or ranks.settings.strategy == "ddp" or ranks.rank == 0:
        return model()
    with weights_without_numbers():
        return model()


class Messages(TorchDispatchMode):
    """Counts what ranks exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def messages(rows: int) -> dict[str, int]:
    """How often ranks exchange tensors in a step of so many micro-batches, after the first step."""
    learner = Learner(model(), OPTIM, name="lm", resident=False)
    learner.update(batch(0, rows).split(24), nll)
    with Messages() as seen:
        learner.update(batch(1, rows).split(24), nll)
    return dict(seen.counts)


def held() -> dict[str, int]:
    """Bytes of what this rank holds of a model that learns, after a step."""
    learner = Learner(model(), OPTIM, name="lm")
    learner.update(batch(0).split(24), nll)
    parts = learner.trained if learner._sharded is None else learner._sharded.trained
    state = [value for entry in learner.optimizer.state.values() for value in entry.values() if value.ndim]
    tensors = {"weights": parts, "gradients": [part.grad for part in parts], "optimizer": state}
    return {
        name: sum(own.numel() * own.element_size() for own in map(_local, several)) for name, several in tensors.items()
    }


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def scenarios(folder: Path) -> dict[str, Any]:
    """All of them under one strategy."""
    found = {"sft": sft(), "on the host": sft(resident=False), "one row": one_row(), "half": half()}
    found |= {"adapter": adapter(), "critic": critic(), "read": read(), "refused": refused()}
    return found | {"saved": saved(folder), "moved": moved(folder / "moved"), "given": given(folder / "given")}


def main(out: Path) -> None:
    """Every strategy in turn; rank 0 writes."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with dist.joined(DistConfig(timeout=60)) as ranks:
        for name, settings in STRATEGIES.items():
            with under(replace(ranks, settings=settings)):
                print(name, file=sys.stderr, flush=True)
                whole = name in ("ddp", "zero3")
                found[name] = scenarios(out.with_name(f"{name}-saved")) if whole else {"sft": sft()}
                found[name]["messages"] = {str(rows): messages(rows) for rows in (2, 8)}
                found[name]["held"] = held()
        if dist.writes():
            out.write_text(json.dumps(found))


@contextmanager
def under(ranks: dist.Ranks) -> Iterator[None]:
    """Within, the same ranks work together in another way."""
    before, dist._ranks = dist._ranks, ranks
    try:
        yield
    finally:
        dist._ranks = before


if __name__ == "__main__":
    main(Path(sys.argv[1]))
