"""Group rollouts: 16 prompts of 256 to 768 tokens, 8 samples of each that end early; sampled tokens per second.

    python benchmarks/rollout_group.py
    python benchmarks/rollout_group.py --peers generate --sizes tiny --repeats 5

Replies end at lengths drawn once from a log-normal distribution with median 24 and a heavy tail, at most 128, so most
samples are done long before the last one; all sides sample the same lengths.

Peers: Hugging Face `generate` with all 128 rows in one batch, which goes on until the longest row ends (as it does when
rows end with their stop token), and vLLM on the CPU with prefix caching, a request per sample. `_rollouts.py` says how
each is run. The target is 2.5 times as fast as `generate`; vLLM is shown beside it.
The last line is JSON: the smallest ratio over target, and a row per peer and size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tyro
from _harness import Args, choose_peers, finish, measure, model_folder, versus
from _rollouts import Job, Plan, side

TARGETS = {"generate": 2.5, "vllm": None}


@dataclass(kw_only=True)
class Group(Args):
    """What to measure."""

    keep_memory: bool = True
    prompts: int = 16
    """Different prompts."""
    samples: int = 8
    """Samples of each prompt."""
    longest: int = 128
    """Most tokens of a sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quick:
            self.prompts, self.samples, self.longest = 2, 2, 16


def plan(prompts: int, samples: int, longest: int, *, seed: int = 0) -> Plan:
    """Lengths of every prompt and every sample of it."""
    draw = np.random.default_rng(seed)
    shown = draw.integers(256, 769, prompts).repeat(samples)
    replies = np.exp(np.log(24) + 0.9 * draw.standard_normal(prompts * samples)).astype(int).clip(1, longest)
    return tuple((pair,) for pair in zip(shown.tolist(), replies.tolist(), strict=True))


def main(args: Group) -> None:
    """Measure every size, print the table and the JSON line."""
    peers = choose_peers(args, list(TARGETS))
    lengths = plan(args.prompts, args.samples, args.longest)
    replies = [reply for ((_, reply),) in lengths]
    print(f"{len(replies)} samples of {np.mean(replies):.1f} tokens on average, at most {max(replies)}")
    rows = []
    for size in args.sizes:
        with model_folder(size) as folder:
            job = Job(folder, size, (lengths,), args.threads, siblings=args.samples)
            results = measure([side(name, job) for name in ("ours", *peers)], args)
        rows += versus(results, count="tokens", size=size, targets=TARGETS)
    finish(rows, args, title="Group rollouts with early stops", unit="tokens/s")


if __name__ == "__main__":
    main(tyro.cli(Group))
