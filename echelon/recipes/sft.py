"""Supervised fine-tuning on conversations: learn to say what the assistant said.

Negative log-likelihood of every assistant message (its end-of-turn token included) given the exact tokens a model would
have seen before it; or of the whole conversation. Where a row begins its last message, of what completes it. All tokens
that are learned weigh the same within a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from echelon.data.conversations import imitated
from echelon.data.datasets import Sft, load_rows
from echelon.data.packing import Batch, group_rows, pack, pack_documents
from echelon.errors import DataError
from echelon.models.lm import check_end_to_end, check_masks, lays_end_to_end, token_logprobs
from echelon.ops import losses
from echelon.rollout.learners import learner_of
from echelon.rollout.memory import Plan
from echelon.rollout.setup import Pupil, describe, open_pupil, set_threads
from echelon.rollout.untrained import untrained
from echelon.text.chat import Example
from echelon.train.fit import StageConfig, fit, total_steps
from echelon.train.learner import Learner


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Settings of supervised fine-tuning."""

    untrained: bool = False
    """Start from random weights in the shape that model.path describes. Where that folder has no tokenizer, one is
    learned from the rows."""
    learn: Literal["completions", "everything"] = "completions"
    """What is learned: every assistant message with its end-of-turn token, or every token of a conversation."""
    packing: bool = False
    """Lay several conversations into one row of at most max_tokens; none sees another."""
    too_long: Literal["error", "drop", "cut"] = "error"
    """A conversation longer than max_tokens: refuse it, leave it out, or cut its beginning, never its last answer."""


def main(cfg: Config) -> None:
    """Train; the run directory holds checkpoints, the best weights on held-out rows, and metrics.jsonl."""
    data, notes = load_rows(cfg.data, "sft", seed=cfg.seed), list[str]()
    actor = open_start(cfg, data.train)
    set_threads(cfg.threads, actor.module)
    train = tokenised(data.train, actor, cfg, notes)
    held_out = tokenised(data.held_out, actor, cfg, notes, what="held-out conversations")
    steps = total_steps(cfg, len(train))
    learner = learner_of(actor, cfg.optim, steps)
    lay_out = layout(cfg, learner)
    if cfg.dry_run:
        print(*notes, sep="\n", end="\n" if notes else "")
        plan = Plan({"actor": learner}, cfg.dist, cfg.tokens_per_pass)
        return describe({"actor": actor.module}, tokens_per_step=cfg.rows_per_step * cfg.max_tokens, plan=plan)
    fit(
        cfg,
        learner=learner,
        rows=train,
        pack=lambda rows: lay_out([example for row in rows for example in row]),
        loss_fn=loss_fn,
        evaluate=partial(evaluate, learner, held_out, cfg.tokens_per_pass) if held_out else None,
        more=lambda metrics: {"perplexity": perplexity(metrics["loss"])},
        notes=notes,
        name="sft",
    )


def open_start(cfg: Config, rows: Sequence[Sft]) -> Pupil:
    """The model as it starts."""
    how: dict[str, Any] = {"lora": cfg.lora, "max_tokens": cfg.max_tokens, "settings": cfg.dist}
    if not cfg.untrained:
        return open_pupil(cfg.model, **how)
    texts = ["".join(message["content"] for message in row.messages) + row.completion for row in rows]
    with untrained(cfg.model, seed=cfg.seed, texts=texts) as model:
        return open_pupil(model, **how)


def loss_fn(module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Mean negative log-likelihood of the tokens that are learned, and how many they are."""
    nll_BT = losses.nll(token_logprobs(module, batch))
    return losses.token_sum(nll_BT, batch.mask, batch.denom), {"tokens": float(batch.mask.sum())}


def evaluate(learner: Learner, rows: Sequence[list[Example]], tokens_per_pass: int) -> dict[str, float]:
    """Loss and perplexity of all held-out tokens together: longer conversations weigh more, and passes nothing."""
    total, count = 0.0, 0.0
    for group in group_rows([len(row[-1].prompt) + len(row[-1].action) for row in rows], tokens_per_pass):
        batch = pack([example for number in group for example in rows[number]])
        total -= learner.evaluate(batch, token_logprobs, tokens_per_pass).double().sum().item()
        count += batch.denom
    return {"eval/loss": total / count, "eval/perplexity": perplexity(total / count)}


def perplexity(loss: float) -> float:
    """e to the mean negative log-likelihood: among how many equally likely tokens it would be as hard to choose."""
    return math.exp(loss) if loss < 700 else math.inf


def layout(cfg: Config, learner: Learner) -> Callable[[list[Example]], Batch]:
    """How conversations become rows. Raises DataError for a model that cannot keep those of one row apart."""
    if lays_end_to_end(learner.module):
        learner.read(check_end_to_end)
        return pack  # nothing is computed of padding, so there is nothing to gain
    if not cfg.packing:
        return pack
    try:
        learner.read(check_masks)
    except DataError as error:
        raise DataError(
            f"packing = true: {type(learner.module).__name__} cannot be told by masks and positions which tokens see "
            "which, so conversations in one row would read each other. Leave packing out, or use another architecture."
        ) from error
    return partial(pack_documents, max_tokens=cfg.max_tokens)


def tokenised(
    rows: Sequence[Sft], actor: Pupil, cfg: Config, notes: list[str], *, what: str = "conversations"
) -> list[list[Example]]:
    """What is seen and said in each conversation, none longer than `max_tokens`; what had to be done goes to `notes`.

    Raises DataError for one that is too long, if `too_long` says so, and if none is left.
    """
    documents = [imitated(actor.renderer, row) for row in rows]
    if too_long := [document for document in documents if length(document) > cfg.max_tokens]:
        where = ", ".join(cfg.data.path)
        many = f"{len(too_long)} of {len(rows)} {what} are longer than max_tokens = {cfg.max_tokens}"
        if cfg.too_long == "error":
            raise DataError(
                f"{where}: {many}; the longest has {max(map(length, too_long))} tokens. Raise max_tokens, or give "
                "too_long = drop or cut."
            )
        keep = partial(shorten, max_tokens=cfg.max_tokens, bos=actor.tokenizer.bos_token_id)
        fitting = [keep(document) if cfg.too_long == "cut" else document for document in documents]
        documents = [document for document in fitting if document and length(document) <= cfg.max_tokens]
        if not documents:
            raise DataError(f"{where}: {many}, so no row is left. Raise max_tokens.")
        dropped = len(rows) - len(documents)
        notes.append(f"{many}: {len(too_long) - dropped} were cut, {dropped} dropped")
    return documents if cfg.learn == "completions" else [[whole(document)] for document in documents]


def length(document: list[Example]) -> int:
    """Tokens of a conversation up to the end of its last answer."""
    return len(document[-1].prompt) + len(document[-1].action)


def whole(document: list[Example]) -> Example:
    """A conversation of which every token is learned but the first, which nothing predicts."""
    ids = document[-1].prompt + document[-1].action
    return Example(ids[:1], ids[1:])


def shorten(document: list[Example], max_tokens: int, *, bos: int | None = None) -> list[Example]:
    """A conversation cut to `max_tokens` from its beginning; empty if its last answer alone does not fit.

    As in play, the oldest exchanges go first and the instruction stays; the answer that then follows the instruction,
    but never answered it, is not learned. If that is not enough, only the end of the prompt (after the token that opens
    every text, if there is one) and the last answer are left.
    """
    starts, last, excess = [len(example.prompt) for example in document], document[-1], length(document) - max_tokens
    if excess <= 0:
        return document
    for gone in range(1, len(document) - 1):
        if starts[gone] - starts[0] >= excess:
            head = document[0].prompt
            return [Example(head + said.prompt[starts[gone] :], said.action) for said in document[gone + 1 :]]
    opening = last.prompt[:1] if last.prompt[0] == bos else []
    left = max_tokens - len(last.action) - len(opening)
    return [Example(opening + last.prompt[-left:], last.action)] if left > 0 else []
