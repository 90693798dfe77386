"""Learning from rows that are there before training begins: the loop of `sft`, `reward` and `dpo`.

Order, updates, evaluations, the best weights so far, early stopping, checkpoints. Knows neither what a row is nor what
is learned from it: a recipe packs rows and gives the loss.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError

from echelon.config import DataConfig, LoraConfig, ModelConfig, OptimConfig, TrainConfig, demand, require
from echelon.errors import CheckpointError
from echelon.seeds import derive_seed
from echelon.train import dist
from echelon.train.checkpoint import Checkpoints, Saveable
from echelon.train.clock import phase
from echelon.train.learner import Learner, LossFn, NonFiniteLoss, save_module
from echelon.train.log import Log

Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class StageConfig(TrainConfig):
    """What the stages that learn from rows have in common. Their `__post_init__` calls `super().__post_init__()`."""

    model: ModelConfig = ModelConfig()
    """What to start from: a model folder, an adapter folder, a run directory or a hub id."""
    lora: LoraConfig = LoraConfig()
    """Adapter; without one all weights are trained."""
    data: DataConfig = DataConfig()
    """Rows to learn from, and rows held out."""
    optim: OptimConfig = OptimConfig()
    """Optimizer."""
    epochs: int = 1
    """Passes over the data."""
    max_steps: int = 0
    """Optimizer steps, in place of epochs; 0 leaves it to epochs."""
    rows_per_step: int = 32
    """Rows of the data per optimizer step; the last step of an epoch may have fewer."""
    max_tokens: int = 1024
    """Most tokens of a row."""
    tokens_per_pass: int = 4096
    """Most tokens, padding included, in one forward and backward pass."""
    eval_every: int = 50
    """Steps between evaluations on the rows held out, if there are any; 0 evaluates at the end only."""
    eval_first: bool = False
    """Evaluate before the first step too."""
    patience: int = 0
    """Stop after this many evaluations in a row without improvement; 0 never stops early."""
    min_improvement: float = 0.0
    """How far below the lowest so far the loss on held-out rows must be to count as improved."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "data.path", "model.path")
        for name in ("epochs", "rows_per_step", "max_tokens", "tokens_per_pass"):
            demand(self, name, getattr(self, name) >= 1, "it counts something there must be one of. Give 1 or more.")
        demand(self, "max_steps", self.max_steps >= 0, "it counts steps. Give 0 to have epochs decide.")
        demand(self, "eval_every", self.eval_every >= 0, "it counts steps. Give 0 to evaluate at the end only.")
        demand(self, "patience", self.patience >= 0, "it counts evaluations. Give 0 to train to the end.")
        less = 0 <= self.min_improvement < math.inf
        demand(self, "min_improvement", less, "it is how much a loss falls. Give 0 or a little more.")
        held_out = self.data.eval_path or self.data.eval_split or self.data.eval_fraction
        because = "no rows are held out to judge by. Give data.eval_path, data.eval_split or data.eval_fraction."
        demand(self, "patience", not self.patience or bool(held_out), because)
        demand(self, "eval_first", not self.eval_first or bool(held_out), because)
        because = "eval_every is 0, so there is one evaluation, at the end. Set eval_every."
        demand(self, "patience", not self.patience or self.eval_every > 0, because)


class Packed(Protocol):
    """Rows as tensors, such as a `Batch`: all micro-batches of a step together."""

    def split(self, tokens_per_pass: int) -> Iterable[Any]:
        """Micro-batches within the budget, whose losses add up to that of the step."""
        ...


@dataclass(slots=True)
class Best:
    """The lowest held-out loss so far, and how many evaluations have passed since it last fell far enough."""

    loss: float | None = None
    step: int = 0
    """How many steps had been taken when it was measured."""
    waited: int = 0

    def see(self, step: int, loss: float, *, min_improvement: float = 0.0) -> bool:
        """Take note of an evaluation; whether it is the lowest so far, by however little."""
        lowest, self.waited = self.loss, self.waited + 1
        if lowest is None or loss < lowest - min_improvement:
            self.waited = 0
        if lowest is not None and loss >= lowest:
            return False
        self.loss, self.step = loss, step
        return True


def total_steps(cfg: StageConfig, rows: int) -> int:
    """Optimizer steps of a stage with this many rows: what its learner's schedule decays over."""
    return cfg.max_steps or cfg.epochs * math.ceil(rows / cfg.rows_per_step)


def fit(
    cfg: StageConfig,
    *,
    learner: Learner,
    rows: Sequence[Row],
    pack: Callable[[list[Row]], Packed],
    loss_fn: LossFn,
    evaluate: Callable[[], dict[str, float]] | None = None,
    parts: Mapping[str, Saveable] | None = None,
    more: Callable[[Mapping[str, float]], dict[str, float]] | None = None,
    notes: Sequence[str] = (),
    name: str,
) -> None:
    """Train on `rows` for `total_steps(cfg, len(rows))` steps, or until the held-out loss stops falling.

    The learner, under its own name, and `parts` make up the checkpoints. `evaluate` returns "eval/loss" and whatever
    else is measured on held-out rows: the weights with the lowest are kept in `<out>/best`, a Hugging Face folder.
    `more` adds numbers that do not add up over micro-batches to what is logged of a step; `notes` are shown once.

    A resumed run equals an uninterrupted one: order and dropout derive from the seed and the step, and a new best is in
    a checkpoint before it is in `<out>/best`. Raises NonFiniteLoss when a loss, in training or held out, is not finite.
    """
    out, steps = Path(cfg.out), total_steps(cfg, len(rows))
    saved = {learner.name: learner, **(parts or {})}
    with Checkpoints(out, config=cfg, keep_last=cfg.keep_last, resume=cfg.resume) as checkpoints:
        start, extra = checkpoints.restore(saved) if cfg.resume else (0, {})
        judge = _Judge(cfg, evaluate, Best(**extra["best"]) if start else Best())
        if cfg.resume:
            _mend(out / "best", judge.best, learner, start)
        else:
            checkpoints.save(0, saved)

        def keep(done: int, better: bool) -> None:
            checkpoints.save(done, saved, {"best": asdict(judge.best)})
            if better:
                publish(out / "best", learner)

        shown = ("accuracy", "loss", "eval/loss", "grad_norm")
        with Log(out, total=steps, start=start, name=name, headline=shown, config=cfg.log, settings=cfg) as log:
            for note in notes:
                log.note(note)
            if cfg.eval_first and not start:
                measured, better = judge(0)
                log.metrics(0, measured)
                keep(0, better)
            done = start
            for step in range(start, 0 if judge.exhausted else steps):
                torch.manual_seed(derive_seed(cfg.seed, "update", step))  # dropout, where there is any
                batch = pack(step_rows(rows, step, cfg.rows_per_step, seed=cfg.seed))
                metrics = learner.update(batch.split(cfg.tokens_per_pass), loss_fn)
                done, epochs = step + 1, (step + 1) / math.ceil(len(rows) / cfg.rows_per_step)
                measured, better = judge(done) if done == steps or _due(done, cfg.eval_every) else ({}, False)
                log.metrics(step, {**metrics, **(more(metrics) if more else {}), "epoch": epochs, **measured})
                if better or judge.exhausted or done == steps or _due(done, cfg.save_every):
                    keep(done, better)
                if judge.exhausted:
                    break
            if judge.exhausted and done < steps:
                log.note(judge.reason(out / "best"))


def step_rows(rows: Sequence[Row], step: int, count: int, *, seed: int) -> list[Row]:
    """The rows of one step: each epoch takes all of them once, in an order of its own; its last step has the rest."""
    epoch, place = divmod(step, math.ceil(len(rows) / count))
    order = np.random.default_rng(derive_seed(seed, "epoch", epoch)).permutation(len(rows))
    return [rows[number] for number in order[place * count : (place + 1) * count]]


@phase("saving")
def publish(folder: Path, learner: Learner) -> None:
    """Put the learner's weights in place of what is in `folder`: all of them or none, whenever the process is killed.

    Raises CheckpointError when they cannot be written; what was there before is untouched then. All ranks must call it.
    """
    learner.refresh()
    if not dist.writes():
        return
    unfinished, replaced = _beside(folder)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        save_module(learner.module, unfinished, learner.tokenizer)
        for path in unfinished.rglob("*"):
            _sync(path)
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)
        unfinished.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"{folder}: the best weights so far could not be written ({reason}). They are in the newest checkpoint: "
            "make room or choose another disk, then continue with --resume."
        ) from error


class _Judge:
    """Evaluates held-out rows and says when training has stopped helping."""

    def __init__(self, cfg: StageConfig, evaluate: Callable[[], dict[str, float]] | None, best: Best) -> None:
        self.cfg, self.evaluate, self.best = cfg, evaluate, best

    @phase("evaluation")
    def __call__(self, done: int) -> tuple[dict[str, float], bool]:
        """What is measured after `done` steps, and whether it is the best so far."""
        if self.evaluate is None:
            return {}, False
        measured = self.evaluate()
        loss = measured["eval/loss"]
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"eval/loss is {loss} after {done} steps. Lower optim.lr, or look at the held-out rows."
            )
        return measured, self.best.see(done, loss, min_improvement=self.cfg.min_improvement)

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return 0 < self.cfg.patience <= self.best.waited

    def reason(self, folder: Path) -> str:
        """Why training ended early, in one line."""
        enough = f" by more than {self.cfg.min_improvement:g}" if self.cfg.min_improvement else ""
        return (
            f"stopped early: eval/loss has not fallen{enough} in {self.best.waited} evaluations. "
            f"The lowest was {self.best.loss:.4g} after {self.best.step} steps; those weights are in {folder}."
        )


def _mend(folder: Path, best: Best, learner: Learner, done: int) -> None:
    """Finish what a killed process left halfway in the folder of the best weights."""
    if dist.writes():
        unfinished, replaced = _beside(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    if best.loss is None:
        return
    if best.step == done:
        publish(folder, learner)
    elif dist.writes() and not folder.exists():
        raise CheckpointError(
            f"{folder} is gone: it held the weights of step {best.step}, the best so far. Put it back, or start a new "
            "run with another --out."
        )


def _beside(folder: Path) -> tuple[Path, Path]:
    """Where the next weights are written, and where the last ones wait until they are replaced."""
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def _sync(path: Path) -> None:
    """Force a file or the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
