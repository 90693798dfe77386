"""Multi-turn rollouts: 64 conversations of 20 turns, sampled tokens per second.

    python benchmarks/rollout_multiturn.py
    python benchmarks/rollout_multiturn.py --peers generate --sizes tiny --repeats 5

Observations are 7 + geometric tokens (mean 24, at most 96), replies geometric (mean 16, at most 64), drawn once: all
sides sample the same lengths. Conversations go on independently of each other where the side can do that.

Peers: the Hugging Face `generate` loop, which prefills the whole conversation at every turn (what TRL-style code does),
and vLLM on the CPU with prefix caching, once with requests that come and go on their own, once with a batch per turn.
`_rollouts.py` says how each is run. The targets are 5 and 2 times as fast.
The last line is JSON: the smallest ratio over target, and a row per peer and size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tyro
from _harness import Args, choose_peers, finish, measure, model_folder, versus
from _rollouts import Job, Plan, side

TARGETS = {"generate": 5.0, "vllm": 2.0, "vllm-turns": 2.0}


@dataclass(kw_only=True)
class Multiturn(Args):
    """What to measure."""

    keep_memory: bool = True
    conversations: int = 64
    """Conversations at once."""
    turns: int = 20
    """Turns of each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quick:
            self.conversations, self.turns = 4, 3


def plan(conversations: int, turns: int, *, seed: int = 0) -> Plan:
    """Lengths of every observation and every reply."""
    draw = np.random.default_rng(seed)
    observed = np.minimum(7 + draw.geometric(1 / 17, (conversations, turns)), 96)
    replies = np.minimum(draw.geometric(1 / 16, (conversations, turns)), 64)
    return tuple(tuple(zip(*pair, strict=True)) for pair in zip(observed.tolist(), replies.tolist(), strict=True))


def main(args: Multiturn) -> None:
    """Measure every size, print the table and the JSON line."""
    peers = choose_peers(args, list(TARGETS))
    lengths = plan(args.conversations, args.turns)
    longest = max(sum(map(sum, turns)) for turns in lengths)
    print(f"{args.conversations} conversations of {args.turns} turns; the longest has {longest} tokens")
    rows = []
    for size in args.sizes:
        with model_folder(size) as folder:
            job = Job(folder, size, (lengths,), args.threads)
            results = measure([side(name, job) for name in ("ours", *peers)], args)
        rows += versus(results, count="tokens", size=size, targets=TARGETS)
    finish(rows, args, title="Multi-turn rollouts", unit="tokens/s")


if __name__ == "__main__":
    main(tyro.cli(Multiturn))
