"""Supervised fine-tuning against TRL's SFTTrainer: tokens per second and peak memory.

    python benchmarks/sft_step.py
    python benchmarks/sft_step.py --sizes tiny --repeats 5

A step is one optimizer step (AdamW, gradients clipped) on 32 conversations. Their lengths are drawn once from a
log-normal distribution (median 128 tokens, at most 512, at least 24); what the user and the assistant say takes turns,
and the assistant's half of the tokens is learned. Both sides: the same float32 model, ids, labels, batches in the same
order and learning rate; what is counted is tokens of conversations, padding excluded. That they do the same is checked:
tokens, learned tokens, and the loss of the last step, to three digits.

Ours goes through what the `sft` recipe calls: `pack`, `Learner.update`, the recipe's `tokens_per_pass`. TRL is given
what makes it fastest here: ids and labels made beforehand, no gradient checkpointing, no logging or saving, and passes
of 8 rows, four to a step: with 32 rows padding costs more, with 4 the passes are too small. The target is 1.5 times as
many tokens per second; the memory rows, whose ratio is their MiB over ours, have none.
The last line is JSON: the smallest ratio over target, and a row per size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tyro
from _harness import (
    FIRST_WORD,
    SIZES,
    Args,
    Result,
    Row,
    Run,
    Side,
    choose_peers,
    finish,
    measure,
    model_folder,
    versus,
)

TARGETS = {"trl": 1.5}
RATE = 1e-4


@dataclass(kw_only=True)
class Sft(Args):
    """What to measure."""

    keep_memory: bool = True
    conversations: int = 32
    """Conversations per optimizer step."""
    longest: int = 512
    """Most tokens of a conversation."""
    steps: int = 2
    """Optimizer steps per round; five times as many with the tiny model."""
    rows_per_pass: int = 8
    """Rows TRL takes per forward and backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quick:
            self.conversations, self.longest, self.steps, self.rows_per_pass = 4, 48, 1, 2


@dataclass(frozen=True)
class Job:
    """What both sides are given."""

    folder: str
    rows: tuple[tuple[list[int], list[bool]], ...]
    """Ids of every conversation, and which of them are learned, in the order of the steps."""
    conversations: int
    rows_per_pass: int

    @property
    def steps(self) -> int:
        """Optimizer steps per round."""
        return len(self.rows) // self.conversations

    @property
    def counts(self) -> dict[str, float]:
        """What a round takes, padding excluded."""
        learned = sum(sum(mask) for _, mask in self.rows)
        return {"tokens": float(sum(len(ids) for ids, _ in self.rows)), "learned": float(learned)}


def plan(args: Sft, folder: str, size: str, *, seed: int = 0) -> Job:
    """Conversations in which both sides take turns, in parts of about 24 tokens."""
    draw = np.random.default_rng(seed)
    count = args.conversations * args.steps * (5 if size == "tiny" and not args.quick else 1)
    lengths = np.exp(np.log(128) + 0.8 * draw.standard_normal(count)).astype(int).clip(24, args.longest)
    rows = []
    for length in lengths:
        ids = draw.integers(FIRST_WORD, SIZES[size]["vocab"], length).tolist()
        parts = draw.integers(12, 37, length)  # more than enough
        rows.append((ids, np.repeat(np.arange(length) % 2 == 1, parts)[:length].tolist()))
    return Job(folder, tuple(rows), args.conversations, args.rows_per_pass)


def ours(job: Job) -> Run:
    """What the `sft` recipe does in a step."""
    from echelon.config import ModelConfig, OptimConfig, SamplingConfig
    from echelon.data.packing import pack
    from echelon.recipes.sft import Config, loss_fn
    from echelon.rollout.setup import open_actor
    from echelon.text.chat import Example
    from echelon.train.learner import Learner

    actor = open_actor(ModelConfig(path=job.folder, device="cpu"), SamplingConfig())
    learner = Learner(actor.module, OptimConfig(lr=RATE), name="actor")
    examples = [examples_of(ids, mask, Example) for ids, mask in job.rows]

    def run(number: int) -> dict[str, float]:
        start = time.perf_counter()
        for step in range(job.steps):
            chosen = examples[step * job.conversations : (step + 1) * job.conversations]
            batch = pack([example for conversation in chosen for example in conversation])
            logged = learner.update(batch.split(Config.tokens_per_pass), loss_fn)
        return {**job.counts, "loss": round(logged["loss"], 3), "seconds": time.perf_counter() - start}

    run(-1)
    return run


def examples_of(ids: list[int], mask: list[bool], example: Any) -> list[Any]:
    """What was seen and said, once for every stretch of learned tokens."""
    edges = np.flatnonzero(np.diff([False, *mask, False])).reshape(-1, 2)
    return [example(ids[:start], ids[start:stop]) for start, stop in edges.tolist()]


def trl(job: Job) -> Run:
    """TRL's trainer, one pass over the rows; timed from when training begins to the end of the last step."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        """Seconds from the beginning of training to the end of its last step."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.start

    class Trainer(SFTTrainer):
        """The trainer, which remembers the losses of its passes."""

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            passes.append(float(loss))
            return loss

    passes: list[float] = []
    per_step = job.conversations // job.rows_per_pass
    labels = [[word if learned else -100 for word, learned in zip(*row, strict=True)] for row in job.rows]
    rows = Dataset.from_dict({"input_ids": [ids for ids, _ in job.rows], "labels": labels})
    out = TemporaryDirectory(prefix="echelon_trl_")
    settings = SFTConfig(
        output_dir=out.name,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=job.rows_per_pass,
        gradient_accumulation_steps=per_step,
        max_steps=job.steps,
        max_length=None,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32, attn_implementation="sdpa"),
        args=settings,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(job.folder),
        callbacks=[clock],
    )

    def run(number: int) -> dict[str, float]:
        passes.clear()
        trainer.train()
        assert out.name
        return {**job.counts, "loss": round(sum(passes[-per_step:]), 3), "seconds": clock.seconds}

    run(-1)
    return run


def memory(results: dict[str, Result], size: str) -> list[Row]:
    """Peak resident memory in MiB, and how many times as much a peer takes."""
    peaks = {name: median(result.peak) / 2**20 for name, result in results.items()}
    ours = peaks.pop("ours")
    return [Row(f"{name}, peak MiB", size, ours, peak, peak / ours) for name, peak in peaks.items()]


def main(args: Sft) -> None:
    """Measure every size, print the table and the JSON line."""
    peers = choose_peers(args, list(TARGETS))
    rows = []
    for size in args.sizes:
        with model_folder(size) as folder:
            job = plan(args, folder, size)
            sides = [Side("ours", ours, job), *(Side(name, trl, job) for name in peers)]
            results = measure(sides, args, same=("tokens", "learned"))
        losses = {name: [counts["loss"] for counts in result.counts] for name, result in results.items()}
        print(f"{size}: {job.counts['tokens'] / len(job.rows):.0f} tokens per conversation; losses {losses}")
        rows += versus(results, count="tokens", size=size, targets=TARGETS)
        rows += memory(results, size)
    finish(rows, args, title="supervised fine-tuning", unit="tokens/s")


if __name__ == "__main__":
    main(tyro.cli(Sft))
