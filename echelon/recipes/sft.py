"""Supervised fine-tuning on conversations: learn to say what the assistant said.

Negative log-likelihood of every assistant message (its end-of-turn token included) given the exact tokens a model would
have seen before it; nothing else is learned. Every token weighs the same within a step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from echelon.config import ModelConfig, OptimConfig, RunConfig, SamplingConfig, demand, require, to_yaml
from echelon.data.packing import Batch, pack
from echelon.errors import DataError
from echelon.models.lm import token_logprobs
from echelon.ops import losses
from echelon.rollout.setup import describe, open_actor, set_threads
from echelon.seeds import derive_seed
from echelon.text.chat import Example
from echelon.train.checkpoint import Checkpoints
from echelon.train.learner import Learner
from echelon.train.log import Log
from echelon.types import Message


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of supervised fine-tuning."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """What to fine-tune: a model folder, a run directory or a hub id."""
    data: str
    """A JSONL file, one conversation per line: {"messages": [{"role": …, "content": …}, …]}."""
    epochs: int = 1
    """Passes over the data."""
    conversations_per_step: int = 32
    """Conversations per optimizer step; the last step of an epoch may have fewer."""
    max_tokens: int = 1024
    """Longest row; a longer conversation is an error, since cutting it would hide what was learned from."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    tokens_per_pass: int = 4096
    """Most tokens, padding included, in one forward and backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "data", "model.path")
        for name in ("epochs", "conversations_per_step", "max_tokens", "tokens_per_pass"):
            demand(self, name, getattr(self, name) >= 1, "it counts something there must be one of. Give 1 or more.")


def main(cfg: Config) -> None:
    """Train; the run directory holds checkpoints and metrics.jsonl."""
    actor = open_actor(cfg.model, SamplingConfig(max_prompt_tokens=cfg.max_tokens))
    set_threads(cfg.threads, actor.module)
    rows = [actor.role.renderer.examples(messages) for messages in read_conversations(Path(cfg.data))]
    check_lengths(rows, cfg)
    steps_per_epoch = math.ceil(len(rows) / cfg.conversations_per_step)
    steps = steps_per_epoch * cfg.epochs
    learner = Learner(actor.module, cfg.optim, total_steps=steps, name="actor", tokenizer=actor.tokenizer)
    if cfg.dry_run:
        return describe({"actor": actor.module}, tokens_per_step=cfg.conversations_per_step * cfg.max_tokens)

    with Checkpoints(
        Path(cfg.out), config_yaml=to_yaml(cfg), keep_last=cfg.keep_last, resume=cfg.resume
    ) as checkpoints:
        start = checkpoints.restore({"actor": learner})[0] if cfg.resume else 0
        if not cfg.resume:
            checkpoints.save(0, {"actor": learner})
        with Log(Path(cfg.out), total=steps, start=start, name="sft") as log:
            for step in range(start, steps):
                epoch, place = divmod(step, steps_per_epoch)
                order = np.random.default_rng(derive_seed(cfg.seed, "epoch", epoch)).permutation(len(rows))
                chosen = order[place * cfg.conversations_per_step : (place + 1) * cfg.conversations_per_step]
                batch = pack([example for number in chosen for example in rows[number]])

                metrics = learner.update(batch.split(cfg.tokens_per_pass), loss_fn)
                log.metrics(step, {**metrics, "perplexity": math.exp(metrics["loss"]), "tokens": batch.denom})
                if step + 1 == steps or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                    checkpoints.save(step + 1, {"actor": learner})


def loss_fn(module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Mean negative log-likelihood of the assistant's tokens."""
    return losses.token_sum(losses.nll(token_logprobs(module, batch)), batch.mask, batch.denom), {}


def read_conversations(path: Path) -> Iterator[list[Message]]:
    """The conversations of a JSONL file; DataError names the line that is not one."""
    if not path.is_file():
        raise DataError(f"data = {path}: there is no such file. Give a JSONL file with one conversation per line.")
    found = 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            yield _conversation(line, f"{path}:{number}")
            found += 1
    if not found:
        raise DataError(f"{path} holds no conversation. Put one JSON object with 'messages' on each line.")


def _conversation(line: str, where: str) -> list[Message]:
    try:
        messages: Any = json.loads(line)["messages"]
        found = [Message(role=str(message["role"]), content=str(message["content"])) for message in messages]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{where}: not a conversation ({type(error).__name__}: {error}). Each line must be {{"messages": '
            '[{"role": …, "content": …}, …]}.'
        ) from error
    if not any(message["role"] == "assistant" for message in found):
        raise DataError(f"{where}: no message is the assistant's, so there is nothing to learn from. Remove the line.")
    return found


def check_lengths(rows: list[list[Example]], cfg: Config) -> None:
    """Raise a DataError for a conversation longer than a row may be."""
    longest = max(len(row[-1].prompt) + len(row[-1].action) for row in rows)
    if longest > cfg.max_tokens:
        raise DataError(
            f"{cfg.data}: the longest conversation has {longest} tokens and max_tokens is {cfg.max_tokens}. "
            "Raise max_tokens, or split the conversation."
        )
