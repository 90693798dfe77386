"""Direct preference optimisation: make preferred answers more likely than others, compared with where training began.

No reward model and no sampling: the policy's own log-ratio to the reference is the reward (DPO). The reference is the
model before the first step, so its log-probabilities are computed once and no second model is kept. IPO and the hinge
loss of SLiC are settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from echelon.config import SamplingConfig, demand
from echelon.data.datasets import load_rows
from echelon.data.pairs import Pair, Pairs, pack_pairs, passes, render_pairs
from echelon.errors import CheckpointError, DataError
from echelon.models.lm import check_end_to_end, lays_end_to_end, load_tokenizer, shares_prompts, token_logprobs
from echelon.ops import losses, preference
from echelon.rollout.evaluate import bootstrap
from echelon.rollout.learners import learner_of
from echelon.rollout.memory import Plan
from echelon.rollout.setup import Pupil, describe, model_path, open_actor, open_pupil, set_threads
from echelon.train.fit import StageConfig, fit, total_steps
from echelon.train.learner import Learner


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Settings of direct preference optimisation."""

    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """DPO's logistic loss, IPO's squared distance from a finite optimum, or SLiC's hinge."""
    beta: float = 0.1
    """How strongly the policy is held to the reference; small values let it go far."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong (conservative DPO); with the logistic loss only."""
    length_normalised: bool = False
    """Compare log-ratios per token instead of per answer; IPO always does."""
    reference: str = ""
    """Model folder to compare with; empty is the model as it is before training."""
    reference_free: bool = False
    """Compare with a reference to which all answers are equally likely."""
    rpo_alpha: float = 0.0
    """Weight of the negative log-likelihood, per token, of the chosen answer (RPO)."""
    too_long: Literal["error", "drop"] = "error"
    """A pair with an answer longer than max_tokens: refuse it or leave it out. Prompts are cut, answers never are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        demand(self, "beta", 0 < self.beta < math.inf, "without it nothing is learned. Give 0.1, or near it.")
        demand(self, "label_smoothing", 0 <= self.label_smoothing < 0.5, "more would mean the opposite. Give 0 to 0.4.")
        logistic = self.loss == "sigmoid" or not self.label_smoothing
        demand(self, "label_smoothing", logistic, f"loss = {self.loss} knows no probabilities. Give 0, or use sigmoid.")
        averages = self.loss == "ipo" and self.length_normalised
        demand(self, "length_normalised", not averages, "loss = ipo is always per token. Leave it out.")
        both = bool(self.reference) and self.reference_free
        demand(self, "reference", not both, "reference_free compares with no model. Leave one of the two out.")
        demand(self, "rpo_alpha", 0 <= self.rpo_alpha < math.inf, "it is a weight. Give 0 or a little more.")


def main(cfg: Config) -> None:
    """Train; the run directory holds checkpoints, the best policy on held-out pairs, and metrics.jsonl."""
    actor = open_pupil(cfg.model, lora=cfg.lora, max_tokens=cfg.max_tokens, settings=cfg.dist)
    set_threads(cfg.threads, actor.module)
    data = load_rows(cfg.data, "preference", seed=cfg.seed)
    render = partial(render_pairs, max_tokens=cfg.max_tokens, drop=cfg.too_long == "drop")
    train, notes = render(actor.renderer, data.train)
    held_out, more_notes = render(actor.renderer, data.held_out)
    steps = total_steps(cfg, len(train))
    learner = learner_of(actor, cfg.optim, steps)
    if lays_end_to_end(actor.module):
        learner.read(check_end_to_end)
    share = learner.read(shares_prompts)
    if cfg.dry_run:
        plan = Plan({"actor": learner}, cfg.dist, cfg.tokens_per_pass)
        return describe({"actor": actor.module}, tokens_per_step=2 * cfg.rows_per_step * cfg.max_tokens, plan=plan)
    if cfg.reference and not cfg.resume:  # its log-probs are in the checkpoints
        check_words(cfg, actor)
    reference = Reference(lambda: refer(cfg, learner, {"train": train, "held_out": held_out}, share=share))
    fit(
        cfg,
        learner=learner,
        rows=range(len(train)),
        pack=lambda rows: pack_pairs(
            [train[row] for row in rows], share=share, reference_P2=reference.logprobs["train"][rows]
        ),
        loss_fn=partial(loss_fn, cfg=cfg),
        evaluate=partial(evaluate, learner, held_out, reference, share=share, cfg=cfg) if held_out else None,
        parts={"reference": reference},
        notes=[*notes, *more_notes],
        name="dpo",
    )


def loss_fn(module: nn.Module, pairs: Pairs, *, cfg: Config) -> tuple[Tensor, dict[str, float]]:
    """The mean loss of the pairs, and what to watch."""
    loss_P, stats = pair_losses(module, pairs, cfg)
    sums = torch.stack([stat.detach().sum() / pairs.denom for stat in stats.values()]).tolist()
    return loss_P.sum() / pairs.denom, dict(zip(stats, sums, strict=True))


def pair_losses(
    module: nn.Module, pairs: Pairs, cfg: Config
) -> tuple[Float[Tensor, "P"], dict[str, Float[Tensor, "P"]]]:
    """The loss of each pair, and what there is to say about it."""
    logprob_P2, tokens_P2 = answer_logprobs(module, pairs)
    assert pairs.reference_P2 is not None, "log-probabilities of the reference, even if they are zero"
    ratio_P2 = logprob_P2 - pairs.reference_P2
    if cfg.loss == "ipo" or cfg.length_normalised:
        ratio_P2 = ratio_P2 / tokens_P2
    chosen_P, rejected_P = ratio_P2.unbind(1)
    if cfg.loss == "ipo":
        loss_P = preference.ipo(chosen_P, rejected_P, beta=cfg.beta)
    elif cfg.loss == "hinge":
        loss_P = preference.hinge(chosen_P, rejected_P, beta=cfg.beta)
    else:
        loss_P = preference.dpo(chosen_P, rejected_P, beta=cfg.beta, label_smoothing=cfg.label_smoothing)
    nll_P = losses.nll(logprob_P2[:, 0]) / tokens_P2[:, 0]
    stats = {
        "accuracy": preference.agreement(chosen_P, rejected_P),
        "rewards/chosen": cfg.beta * chosen_P,
        "rewards/rejected": cfg.beta * rejected_P,
        "rewards/margin": cfg.beta * (chosen_P - rejected_P),
        "logps/chosen": logprob_P2[:, 0],
        "logps/rejected": logprob_P2[:, 1],
        "nll": nll_P,
    }
    return loss_P + cfg.rpo_alpha * nll_P if cfg.rpo_alpha else loss_P, stats


def answer_logprobs(module: nn.Module, pairs: Pairs) -> tuple[Float[Tensor, "P 2"], Float[Tensor, "P 2"]]:
    """log π of each pair's chosen and rejected answer, summed over the assistant's tokens; and how many those are."""
    batch = pairs.batch
    logprob_N = batch.pool(token_logprobs(module, batch))[batch.index_N]
    tokens_N = batch.pool(batch.mask.float())[batch.index_N]
    return logprob_N.view(-1, 2), tokens_N.view(-1, 2)


@torch.no_grad()
def evaluate(
    learner: Learner, rows: Sequence[Pair], reference: Reference, *, share: bool, cfg: Config
) -> dict[str, float]:
    """The loss of held-out pairs, and how often the chosen answer has the higher implicit reward."""
    found: dict[str, Tensor] = {}
    for numbers, pairs in passes(rows, cfg.tokens_per_pass, share=share):
        referred = replace(pairs, reference_P2=reference.logprobs["held_out"][numbers])
        loss_P, stats = learner.read(pair_losses, referred.to(learner.device), cfg)
        for name, value_P in {"loss": loss_P, **stats}.items():
            found.setdefault(name, torch.zeros(len(rows)))[numbers] = value_P.cpu()
    accuracy = bootstrap(found["accuracy"].tolist(), seed=cfg.seed)
    interval = {"eval/accuracy/low": accuracy.low, "eval/accuracy/high": accuracy.high}
    return {f"eval/{name}": value_P.mean().item() for name, value_P in found.items()} | interval


class Reference:
    """log π_ref of every answer: computed when it is first asked for, before anything is learned, and then kept."""

    def __init__(self, compute: Callable[[], dict[str, Tensor]]) -> None:
        self._compute = compute
        self._logprobs: dict[str, Tensor] = {}

    @property
    def logprobs(self) -> dict[str, Tensor]:
        """(pairs, 2) for `train` and for `held_out`: of the chosen answers and of the rejected ones."""
        self._logprobs = self._logprobs or self._compute()
        return self._logprobs

    def save(self, folder: Path) -> None:
        """All of them."""
        save_file(self.logprobs, folder / "logprobs.safetensors")

    def attend(self, folder: Path) -> list[Path]:
        """All ranks compute them at once, where ranks hold parts of the model; none but the one that saves writes."""
        assert self.logprobs
        return []

    def load(self, folder: Path) -> None:
        """As they were saved: by now the model says something else."""
        try:
            self._logprobs = load_file(folder / "logprobs.safetensors")
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{folder} holds no log-probabilities of the reference, so training cannot continue from it. Give a "
                "checkpoint of echelon dpo."
            ) from error


def check_words(cfg: Config, actor: Pupil) -> None:
    """Raise DataError, before anything is written, for a reference that is not there or reads other tokens."""
    if load_tokenizer(model_path(cfg.reference)).get_vocab() != actor.tokenizer.get_vocab():
        raise DataError(
            f"reference = {cfg.reference}: its tokenizer is not that of {cfg.model.path}, so their log-probabilities "
            "are of different tokens. Give a model with the same one."
        )


@torch.no_grad()
def refer(cfg: Config, learner: Learner, rows: dict[str, list[Pair]], *, share: bool) -> dict[str, Tensor]:
    """log π_ref of every answer: of the model as it is now, or of another one, which is dropped afterwards."""
    if cfg.reference_free:
        return {name: torch.zeros(len(pairs), 2) for name, pairs in rows.items()}
    ask, device = partial(learner.read, answer_logprobs), learner.device
    if cfg.reference:
        other = open_actor(replace(cfg.model, path=cfg.reference), SamplingConfig(), plain_template=True).module.eval()
        ask, device = partial(answer_logprobs, other), next(other.parameters()).device
    found = {name: torch.zeros(len(pairs), 2) for name, pairs in rows.items()}
    for name, pairs in rows.items():
        for numbers, some in passes(pairs, cfg.tokens_per_pass, share=share):
            found[name][numbers] = ask(some.to(device))[0].cpu()
    return found
