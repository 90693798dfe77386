"""Log-probs over a vocabulary of 131,072, forth and back, against the naive way: peak memory and time.

    python benchmarks/logprob_memory.py
    python benchmarks/logprob_memory.py --sizes wide --positions 512

The naive way makes all float32 logits, takes their log_softmax and gathers the targets: two tensors of positions by
vocabulary for the values and another for the gradient. Ours is `echelon.ops.vocabulary.linear_scores`, which every
`token_logprobs` goes through. Both sides: the same hidden states (1024 positions), head and targets, in float32, a
temperature, a loss in which no two positions weigh the same, gradients of hidden states and head, and the same values
(checked to three digits). Nothing else of a model runs and every position is a sampled one, which is the hardest
comparison: the gradient of ours makes most logits a second time, up to four matrix products instead of three.

Sizes are widths of the hidden states: tiny 128, small 512, wide 2048. Memory is what a round adds to the process, the
gradient of the head included; there the allocator returns freed memory, for time it keeps it, as the recipes have it.
The targets: a quarter of the naive way's memory at 1.2 times its time or less (a ratio of 0.83).
The last line is JSON: the smallest ratio over target, and two rows per size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

import tyro
from _harness import Args, Row, Run, Side, choose_peers, finish, measure

TARGETS = {"naive": 4.0}
TIME_TARGET = 1 / 1.2
WIDTHS = {"tiny": 128, "small": 512, "wide": 2048}
TEMPERATURE = 0.7


@dataclass(kw_only=True)
class LogProbs(Args):
    """What to measure."""

    sizes: tuple[Literal["tiny", "small", "wide"], ...] = ("tiny", "small")  # type: ignore[assignment]
    """Widths of the hidden states: tiny 128, small 512, wide 2048."""
    positions: int = 1024
    """Sampled tokens."""
    vocabulary: int = 131_072
    """Entries of the vocabulary."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quick:
            self.positions, self.vocabulary = 512, 20_000


@dataclass(frozen=True)
class Job:
    """What both sides are given."""

    positions: int
    vocabulary: int
    width: int

    def inputs(self) -> tuple[Any, Any, Any, Any]:
        """Hidden states, head, targets and the weights of the loss, the same for both."""
        import torch

        draw = torch.Generator().manual_seed(0)
        hidden = torch.randn(self.positions, self.width, generator=draw).requires_grad_()
        head = (torch.randn(self.vocabulary, self.width, generator=draw) / self.width**0.5).requires_grad_()
        targets = torch.randint(0, self.vocabulary, (self.positions,), generator=draw)
        return hidden, head, targets, torch.randn(self.positions, generator=draw)


def ours(job: Job) -> Run:
    """In blocks of the vocabulary."""
    from echelon.ops.vocabulary import linear_scores

    hidden, head, targets, weights = job.inputs()

    def run(number: int) -> dict[str, float]:
        logprobs, _ = linear_scores(hidden, head, None, targets, temperature=TEMPERATURE, with_entropy=False)
        (logprobs * weights).sum().backward()
        return counted(job, logprobs, hidden, head)

    run(-1)
    return run


def naive(job: Job) -> Run:
    """All logits at once."""
    import torch

    hidden, head, targets, weights = job.inputs()

    def run(number: int) -> dict[str, float]:
        logits = (hidden @ head.T).float() / TEMPERATURE
        logprobs = torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
        (logprobs * weights).sum().backward()
        return counted(job, logprobs, hidden, head)

    run(-1)
    return run


def counted(job: Job, logprobs: Any, hidden: Any, head: Any) -> dict[str, float]:
    """Positions, and numbers that must agree. The gradients go, so that the next round has to make them again."""
    sums = {"logprobs": logprobs.detach().mean(), "hidden": hidden.grad.norm(), "head": head.grad.norm()}
    hidden.grad = head.grad = None
    return {"positions": float(job.positions), **{name: float(f"{float(value):.3g}") for name, value in sums.items()}}


def compare(job: Job, size: str, args: LogProbs) -> list[Row]:
    """A row for memory, in MiB, and one for time, in milliseconds."""
    sides = [Side("ours", ours, job), Side("naive", naive, job)]
    same = ("positions", "logprobs", "hidden", "head")
    memory = measure(sides, replace(args, keep_memory=False), same=same)
    time = measure(sides, replace(args, keep_memory=True), same=same)
    grown = [median(memory[name].grown) / 2**20 for name in ("ours", "naive")]
    taken = [1000 * median(time[name].seconds) for name in ("ours", "naive")]
    return [
        Row("naive, peak MiB", size, *grown, grown[1] / grown[0], TARGETS["naive"]),
        Row("naive, ms", size, *taken, taken[1] / taken[0], TIME_TARGET),
    ]


def main(args: LogProbs) -> None:
    """Measure every width, print the table and the JSON line."""
    choose_peers(replace(args, sizes=()), list(TARGETS))  # widths are sizes of its own
    rows = []
    for size in args.sizes:
        rows += compare(Job(args.positions, args.vocabulary, WIDTHS[size]), size, args)
    finish(rows, args, title=f"log-probs, {args.vocabulary:,} words, {args.positions:,} positions", unit="see row")


if __name__ == "__main__":
    main(tyro.cli(LogProbs))
