"""A reward model from preferences: learn which of two answers to the same prompt people would rather have.

Bradley-Terry: the probability that an answer is preferred is the logistic function of how much higher it scores. One
number is read at the last token of the conversation, by a head in the sequence-classification format of the Hugging
Face library. How the scores are spread is saved beside the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from echelon.config import demand
from echelon.data.datasets import load_rows
from echelon.data.pairs import Pair, Pairs, pack_pairs, passes, render_pairs
from echelon.errors import CheckpointError
from echelon.models.reward import Scale, answers_share, open_reward_module, read_scale, turn_scores, write_scale
from echelon.ops import losses, preference
from echelon.rollout.evaluate import bootstrap
from echelon.rollout.memory import Plan
from echelon.rollout.setup import describe, model_path, set_threads
from echelon.text.chat import Renderer
from echelon.train.fit import StageConfig, fit, total_steps
from echelon.train.learner import Learner


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Settings of a reward model."""

    margin: float = 1.0
    """What the margins of the data are multiplied by; 0 leaves them out."""
    center: float = 0.0
    """Weight of the squared sum of a pair's scores, which keeps scores around zero; 0.01 is usual."""
    too_long: Literal["error", "drop"] = "error"
    """A pair with an answer longer than max_tokens: refuse it or leave it out. Prompts are cut, answers never are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("margin", "center"):
            demand(self, name, 0 <= getattr(self, name) < math.inf, "it is a weight. Give 0 or a little more.")


def main(cfg: Config) -> None:
    """Train; the run directory holds checkpoints, the best model on held-out pairs, and metrics.jsonl."""
    model = replace(cfg.model, path=start_path(cfg.model.path))
    module, tokenizer, _ = open_reward_module(model, cfg.lora, seed=cfg.seed, plain_template=True)
    set_threads(cfg.threads, module)
    data = load_rows(cfg.data, "preference", seed=cfg.seed)
    render = partial(render_pairs, Renderer(tokenizer), max_tokens=cfg.max_tokens, drop=cfg.too_long == "drop")
    train, notes = render(data.train)
    held_out, more_notes = render(data.held_out)
    share, scores = answers_share(module), Scores(tokenizer)
    steps = total_steps(cfg, len(train))
    learner = Learner(module, cfg.optim, total_steps=steps, name="reward", tokenizer=scores, resident=False)
    if cfg.dry_run:
        plan = Plan({"reward": learner}, cfg.dist, cfg.tokens_per_pass)
        return describe({"reward": module}, tokens_per_step=2 * cfg.rows_per_step * cfg.max_tokens, plan=plan)
    fit(
        cfg,
        learner=learner,
        rows=train,
        pack=partial(pack_pairs, share=share),
        loss_fn=partial(loss_fn, margin=cfg.margin, center=cfg.center),
        evaluate=partial(evaluate, learner, held_out, scores, share=share, cfg=cfg) if held_out else None,
        parts={"scores": scores},
        more=None if held_out else scores.follow,
        notes=[*notes, *more_notes],
        name="reward",
    )


def start_path(path: str) -> str:
    """The folder or hub id to start from: of a run, its reward model or its policy, whichever it trained."""
    try:
        return model_path(path, "reward")
    except CheckpointError:
        return model_path(path)


def loss_fn(
    module: nn.Module, pairs: Pairs, *, margin: float = 1.0, center: float = 0.0
) -> tuple[Tensor, dict[str, float]]:
    """Mean negative log-probability that the chosen answer is preferred, and what to watch."""
    chosen_P, rejected_P = _scored(module, pairs)
    loss_P = losses.pairwise(chosen_P, rejected_P, margin * pairs.margin_P)
    if center:
        loss_P = loss_P + center * (chosen_P + rejected_P).square()
    stats = {
        "accuracy": preference.agreement(chosen_P, rejected_P),
        "margin": chosen_P - rejected_P,
        "reward/chosen": chosen_P,
        "reward/rejected": rejected_P,
        "reward/square": (chosen_P.square() + rejected_P.square()) / 2,
    }
    sums = torch.stack([stat.detach().sum() / pairs.denom for stat in stats.values()]).tolist()
    return loss_P.sum() / pairs.denom, dict(zip(stats, sums, strict=True))


@torch.no_grad()
def evaluate(learner: Learner, rows: Sequence[Pair], scores: Scores, *, share: bool, cfg: Config) -> dict[str, float]:
    """How often, how surely and how rightly the chosen answer of held-out pairs scores higher; `scores` is told."""
    chosen_P, rejected_P = torch.zeros(len(rows)), torch.zeros(len(rows))
    for numbers, pairs in passes(rows, cfg.tokens_per_pass, share=share):
        chosen, rejected = learner.read(_scored, pairs.to(learner.device))
        chosen_P[numbers], rejected_P[numbers] = chosen.cpu(), rejected.cpu()
    margins_P = cfg.margin * torch.tensor([pair.margin for pair in rows])
    accuracy = bootstrap(preference.agreement(chosen_P, rejected_P).tolist(), seed=cfg.seed)
    both = torch.cat([chosen_P, rejected_P])
    scores.scale = _scale(both.mean().item(), both.square().mean().item(), held_out=True)
    return {
        "eval/loss": losses.pairwise(chosen_P, rejected_P, margins_P).mean().item(),
        "eval/accuracy": accuracy.mean,
        "eval/accuracy/low": accuracy.low,
        "eval/accuracy/high": accuracy.high,
        "eval/margin": (chosen_P - rejected_P).mean().item(),
        "eval/brier": preference.brier(chosen_P, rejected_P).item(),
        "eval/calibration_error": preference.calibration_error(chosen_P, rejected_P).item(),
        "eval/reward/chosen": chosen_P.mean().item(),
        "eval/reward/chosen/std": chosen_P.std(correction=0).item(),
        "eval/reward/rejected": rejected_P.mean().item(),
        "eval/reward/rejected/std": rejected_P.std(correction=0).item(),
    }


class Scores:
    """What is saved beside the weights whenever they are: the tokenizer, and how scores are spread.

    Without rows held out to measure it on, the spread is that of the rows trained on, as a mean over steps that forgets
    a tenth at each.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.scale: Scale | None = None

    def follow(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Take a step's scores into account; there is nothing more to log."""
        mean = (metrics["reward/chosen"] + metrics["reward/rejected"]) / 2
        square = metrics["reward/square"]
        if (before := self.scale) is not None:
            mean = 0.9 * before.mean + 0.1 * mean
            square = 0.9 * (before.mean**2 + before.std**2) + 0.1 * square
        self.scale = _scale(mean, square, held_out=False)
        return {}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both into a model's folder."""
        self.tokenizer.save_pretrained(folder)
        self.save(Path(folder))

    def save(self, folder: Path) -> None:
        """Write the spread, if it is known."""
        if self.scale is not None:
            write_scale(self.scale, folder)

    def load(self, folder: Path) -> None:
        """Take the spread as it was saved."""
        self.scale = read_scale(folder)


def _scored(module: nn.Module, pairs: Pairs) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
    """Scores of the chosen and of the rejected answers."""
    scores_N = turn_scores(module, pairs.batch)
    return scores_N[0::2], scores_N[1::2]


def _scale(mean: float, square: float, *, held_out: bool) -> Scale:
    """From the mean of scores and of their squares."""
    return Scale(mean, math.sqrt(max(0.0, square - mean**2)), held_out)
