"""How much of the machine's arithmetic rollouts and updates use: FLOP/s over what a matrix product reaches, per dtype.

    python benchmarks/utilisation.py
    python benchmarks/utilisation.py --sizes small --dtypes float32

The ceiling is the product of two square matrices of 2048, measured in turns with the rest. An update is one optimizer
step of `Learner` (policy gradient with an entropy that is logged, AdamW, gradients clipped) on 32 conversations of 64
to 384 tokens, half of them sampled, in the recipes' `tokens_per_pass`. A rollout is 64 prompts of 32 to 96 tokens at
once through `LocalSampler`, 64 tokens sampled for each.

Only arithmetic that the result needs is counted: per token 2 × the weights of the layers' matrices, 4 × width × tokens
seen for attention, and 2 × vocabulary × width where a token is sampled; three times that with a gradient. Padding, the
optimizer, norms, and whatever is computed twice count as time and not as work. The target is half of the ceiling for
updates of the small model (26 M parameters) in float32; the other rows are shown.
The last line is JSON: the smallest ratio over target, and a row per size, dtype and kind of work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tyro
from _harness import FIRST_WORD, SIZES, Args, Row, Run, Side, choose_peers, finish, measure, model_folder

TARGETS: dict[str, float] = {"ceiling": 0.5}
WIDTH = 2048
"""Of the matrices whose product is the ceiling."""


@dataclass(kw_only=True)
class Utilisation(Args):
    """What to measure."""

    keep_memory: bool = True
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Types of the weights."""
    rows: int = 32
    """Conversations per update."""
    prompts: int = 64
    """Prompts per rollout."""
    sampled: int = 64
    """Tokens sampled for each prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quick:
            self.rows, self.prompts, self.sampled = 4, 4, 4


@dataclass(frozen=True)
class Job:
    """What every side is given."""

    folder: str
    shape: dict[str, int]
    dtype: str
    rows: tuple[int, ...]
    """Lengths of the conversations that are learned."""
    prompts: tuple[int, ...]
    """Lengths of the prompts."""
    sampled: int

    def flops(self, tokens: int, seen: int, scored: int) -> float:
        """Of a pass forward over so many tokens, which see so many others in all, and of which so many are scored."""
        shape = self.shape
        width, head_width = shape["hidden"], shape["hidden"] // shape["heads"]
        attention = width * head_width * (2 * shape["heads"] + 2 * shape["kv_heads"])
        layer = 2.0 * (attention + 3 * width * shape["inner"])
        return shape["layers"] * (layer * tokens + 4 * width * seen) + 2.0 * shape["vocab"] * width * scored


def ceiling(job: Job) -> Run:
    """Matrix products of that type and nothing else."""
    import torch

    one, other = (torch.randn(WIDTH, WIDTH).to(getattr(torch, job.dtype)) for _ in range(2))
    out = one @ other

    def run(number: int) -> dict[str, float]:
        for _ in range(20):
            torch.mm(one, other, out=out)
        return {"flops": 20 * 2.0 * WIDTH**3}

    run(-1)
    return run


def update(job: Job) -> Run:
    """One optimizer step of the policy on multi-turn conversations."""
    import torch

    from echelon.config import ModelConfig, OptimConfig, SamplingConfig
    from echelon.data.packing import Sampled, pack
    from echelon.recipes.grpo import Config
    from echelon.rollout.setup import open_actor
    from echelon.train.learner import Learner
    from echelon.train.policy import PolicyConfig, policy_loss

    actor = open_actor(ModelConfig(path=job.folder, device="cpu", dtype=job.dtype), SamplingConfig())  # type: ignore[arg-type]
    learner = Learner(actor.module, OptimConfig(lr=1e-5))
    turns = [Sampled(*turn, [-7.0] * len(turn[1])) for ids in words(job, job.rows) for turn in halves(ids)]
    batch = pack(turns)
    batch.advantages = batch.spread(torch.linspace(-1.0, 1.0, batch.turns))
    lengths, learned = np.array(job.rows), sum(len(turn.action) for turn in turns)
    work = 3 * job.flops(int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum()), learned)

    def loss_fn(module: Any, part: Any) -> Any:
        return policy_loss(module, part, settings=PolicyConfig(loss="reinforce"), temperature=1.0)

    def run(number: int) -> dict[str, float]:
        learner.update(batch.split(Config.tokens_per_pass), loss_fn)
        return {"flops": work}

    run(-1)
    return run


def rollout(job: Job) -> Run:
    """Completions of many prompts at once."""
    from echelon.config import ModelConfig, SamplingConfig
    from echelon.rollout.setup import open_actor
    from echelon.types import Completion, SamplingParams

    actor = open_actor(ModelConfig(path=job.folder, device="cpu", dtype=job.dtype), SamplingConfig())  # type: ignore[arg-type]
    prompts = words(job, job.prompts)
    lengths = np.array(job.prompts) + job.sampled - 1  # the last one sampled is never read
    seen = int((lengths * (lengths + 1) // 2).sum())
    work = job.flops(int(lengths.sum()), seen, job.sampled * len(prompts))

    async def sample(seed: int) -> Sequence[Completion]:
        params = [SamplingParams(max_tokens=job.sampled, seed=1000 * seed + place) for place in range(len(prompts))]
        return await asyncio.gather(*map(actor.sampler.sample, prompts, params))

    def run(number: int) -> dict[str, float]:
        done = asyncio.run(sample(number + 1))
        assert all(len(completion.tokens) == job.sampled for completion in done), "a completion ended early"
        actor.sampler.load(iter(()), number + 1)  # forgets what is cached: the next round reads the prompts again
        return {"flops": work}

    run(-1)
    return run


def words(job: Job, lengths: Sequence[int]) -> list[list[int]]:
    """Ids of texts of these lengths."""
    draw = np.random.default_rng(0)
    return [draw.integers(FIRST_WORD, job.shape["vocab"], length).tolist() for length in lengths]


def halves(ids: list[int]) -> list[tuple[list[int], list[int]]]:
    """Turns of 16 tokens each, heard and said by turns."""
    return [(ids[:start], ids[start : start + 16]) for start in range(16, len(ids), 32)]


def plan(args: Utilisation, folder: str, size: str, dtype: str) -> Job:
    """Lengths spread evenly over their range."""
    rows, prompts = np.linspace(64, 384, args.rows).astype(int), np.linspace(32, 96, args.prompts).astype(int)
    return Job(folder, SIZES[size], dtype, tuple(rows.tolist()), tuple(prompts.tolist()), args.sampled)


def main(args: Utilisation) -> None:
    """Measure every size and dtype, print the table and the JSON line."""
    choose_peers(args, list(TARGETS))
    rows = []
    for size in args.sizes:
        with model_folder(size) as folder:
            for dtype in args.dtypes:
                job = plan(args, folder, size, dtype)
                sides = [Side(work.__name__, work, job) for work in (ceiling, update, rollout)]
                results = measure(sides, args, same=())
                rates = {name: result.rate("flops") / 1e9 for name, result in results.items()}
                for name in ("update", "rollout"):
                    target = TARGETS["ceiling"] if (name, size, dtype) == ("update", "small", "float32") else None
                    share = rates[name] / rates["ceiling"]
                    rows.append(Row(f"ceiling: {name}, {dtype}", size, rates[name], rates["ceiling"], share, target))
    finish(rows, args, title="arithmetic over the ceiling of a matrix product", unit="GFLOP/s")


if __name__ == "__main__":
    main(tyro.cli(Utilisation))
