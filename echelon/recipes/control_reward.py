"""A reward model of control: learn from recorded steps what an action earns in a state, as a network of numbers.

Regression (mean squared error) of the reward, or of the return that followed, on observation and action; both sides
normalised, the scales stored with the weights. What comes out is a reward for `--reward`: it needs no environment.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from echelon.config import OptimConfig, TrainConfig, demand, require
from echelon.data.control import CODEC, read_arrays, read_codec
from echelon.errors import DataError
from echelon.models.lm import pick_device
from echelon.models.reward_mlp import RewardMLP
from echelon.rollout.memory import Plan
from echelon.rollout.setup import describe, set_threads
from echelon.seeds import derive_seed
from echelon.train.checkpoint import Checkpoints
from echelon.train.clock import phase
from echelon.train.fit import Best, publish, step_rows
from echelon.train.learner import Learner
from echelon.train.log import Log


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Settings of a reward model of control."""

    data: str = ""
    """A folder that control-data wrote."""
    target: Literal["reward", "return_to_go"] = "reward"
    """What is learned: what a step paid, or what it and all those after it did."""
    width: int = 256
    """Width of the two hidden layers."""
    dropout: float = 0.1
    """Part of the hidden units that is dropped while learning."""
    device: str = "auto"
    """Where it learns: cpu, cuda, …; auto takes an accelerator if there is one."""
    optim: OptimConfig = OptimConfig(lr=1e-3, weight_decay=1e-4, schedule="cosine")
    """Optimizer."""
    epochs: int = 300
    """Passes over the data."""
    max_steps: int = 0
    """Optimizer steps, in place of epochs; 0 leaves it to epochs."""
    rows_per_step: int = 2048
    """Steps of the data per optimizer step."""
    eval_every: int = 50
    """Optimizer steps between evaluations on the episodes held out, if there are any; 0 evaluates at the end only."""
    patience: int = 10
    """Stop after this many evaluations in a row without improvement; 0 never stops early."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "data")
        for name in ("width", "epochs", "rows_per_step"):
            demand(self, name, getattr(self, name) >= 1, "it counts something there must be one of. Give 1 or more.")
        for name in ("max_steps", "eval_every", "patience"):
            demand(self, name, getattr(self, name) >= 0, "it is a count. Give 0 to do without.")
        demand(self, "dropout", 0 <= self.dropout < 1, "it is a part of the units. Give 0 to 0.5.")


@dataclass(frozen=True, slots=True)
class Steps:
    """Recorded steps: what was seen, what was done, and what that is to be worth."""

    observations_NO: Float[Tensor, "N O"]
    actions_N: Tensor
    rewards_N: Float[Tensor, "N"]
    denom: float = 1.0
    """Summed losses are divided by it: the number of rows of the optimizer step."""

    def __len__(self) -> int:
        return len(self.rewards_N)

    def take(self, rows: Tensor) -> Steps:
        """Those with these numbers, as one optimizer step."""
        return Steps(self.observations_NO[rows], self.actions_N[rows], self.rewards_N[rows], float(len(rows)))

    def to(self, device: torch.device) -> Steps:
        """The same on a device."""
        return Steps(self.observations_NO.to(device), self.actions_N.to(device), self.rewards_N.to(device), self.denom)


def main(cfg: Config) -> None:
    """Train; the run directory holds checkpoints, the best model on held-out episodes, and metrics.jsonl."""
    train, test = read_steps(cfg)
    module = new_model(cfg, train)
    set_threads(cfg.threads, module)
    total = cfg.max_steps or cfg.epochs * math.ceil(len(train) / cfg.rows_per_step)
    learner = Learner(module.to(pick_device(cfg.device)), cfg.optim, total_steps=total, name="reward")
    if cfg.dry_run:
        plan = Plan({"reward": learner}, cfg.dist, cfg.rows_per_step)
        return describe({"reward": module}, tokens_per_step=0, plan=plan)
    out, parts = Path(cfg.out), {"reward": learner}
    with Checkpoints(out, config=cfg, keep_last=cfg.keep_last, resume=cfg.resume) as checkpoints:
        start, extra = checkpoints.restore(parts) if cfg.resume else (0, {})
        best = Best(**extra["best"]) if start else Best()
        if not cfg.resume:
            checkpoints.save(0, parts)
        with Log(out, total=total, start=start, name="reward", config=cfg.log, settings=cfg) as log:
            for step in range(start, 0 if exhausted(cfg, best) else total):
                done = step + 1
                torch.manual_seed(derive_seed(cfg.seed, "update", step))  # dropout
                rows = step_rows(range(len(train)), step, cfg.rows_per_step, seed=cfg.seed)
                metrics = learner.update([train.take(torch.tensor(rows))], loss_fn)
                judged = len(test) > 0 and (done == total or due(done, cfg.eval_every))
                measured = evaluate(learner, test) if judged else {}
                log.metrics(step, {**metrics, **measured})
                if judged and best.see(done, measured["eval/loss"]):
                    publish(out / "best", learner)  # killed before the checkpoint, a resumed run finds it again
                if exhausted(cfg, best) or done == total or due(done, cfg.save_every):
                    checkpoints.save(done, parts, {"best": asdict(best)})
                if exhausted(cfg, best):
                    log.note(f"stopped early: the lowest eval/loss, {best.loss:.4g}, was that of step {best.step}")
                    break


def exhausted(cfg: Config, best: Best) -> bool:
    """Whether patience has run out."""
    return 0 < cfg.patience <= best.waited


def due(done: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now."""
    return every > 0 and done % every == 0


def loss_fn(module: nn.Module, steps: Steps) -> tuple[Tensor, dict[str, float]]:
    """Mean squared error of the normalised reward: 1 is that of the mean reward of the data."""
    assert isinstance(module, RewardMLP)
    errors_B = module(steps.observations_NO, steps.actions_N) - module.normalised(steps.rewards_N)
    return errors_B.square().sum() / steps.denom, {}


@phase("evaluation")
@torch.no_grad()
def evaluate(learner: Learner, steps: Steps) -> dict[str, float]:
    """The same error on held-out steps, and the mean absolute one in the unit of the reward."""
    module, there = learner.module, steps.to(learner.device)
    assert isinstance(module, RewardMLP)
    scores_N = module.score(there.observations_NO, there.actions_N)
    loss = (module.normalised(scores_N) - module.normalised(there.rewards_N)).square().mean()
    return {"eval/loss": loss.item(), "eval/absolute": (scores_N - there.rewards_N).abs().mean().item()}


def read_steps(cfg: Config) -> tuple[Steps, Steps]:
    """The steps to learn from, and those held out."""
    arrays = read_arrays(Path(cfg.data))
    steps = Steps(
        torch.from_numpy(arrays["observations"]).float(),
        torch.from_numpy(arrays["actions"]),
        torch.from_numpy(arrays["rewards" if cfg.target == "reward" else cfg.target]).float(),
    )
    held = torch.from_numpy(arrays["held_out"])
    return steps.take((~held).nonzero()[:, 0]), steps.take(held.nonzero()[:, 0])


def new_model(cfg: Config, train: Steps) -> RewardMLP:
    """A network for the spaces of the data, with their scales. Raises DataError where the codec is missing."""
    codec = read_codec(Path(cfg.data))
    if codec is None:
        raise DataError(f"{cfg.data}: it has no {CODEC}, so completions could not be read. Make it with control-data.")
    torch.manual_seed(derive_seed(cfg.seed, "weights"))
    module = RewardMLP(
        codec.observation.size,
        codec.action.size,
        choices=codec.action.n,
        first=codec.action.start,
        width=cfg.width,
        dropout=cfg.dropout,
        codec=codec.to_json(),
    )
    module.measure(train.observations_NO, train.actions_N, train.rewards_N)
    return module
