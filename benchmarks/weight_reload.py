"""How long vLLM takes to have the weights that were just learned, and how far its log-probs are from the trainer's.

    python benchmarks/weight_reload.py

In one process, float32: every round changes all weights of the model a little, times `VllmSampler.load` from the call
to its return, and then samples from what was loaded and compares the log-probs of all sampled tokens with the
trainer's. The first load also starts vLLM and does not count. The target is 0.3 s, and 1e-4 for the largest difference
in any round. The last line is JSON: `ratio` is the smallest of target over measured, so 1 means that both are met.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import tyro
from _harness import FIRST_WORD, SIZES, Args, load_module, machine, model_folder, word_tokenizer

SECONDS = 0.3
"""Most seconds a reload may take."""
MISMATCH = 1e-4
"""Most that a log-prob may differ."""


@dataclass(kw_only=True)
class Reload(Args):
    """What is measured."""

    sizes: tuple[str, ...] = ("small",)
    """Models to measure with: tiny (1.05 M parameters), small (26.2 M)."""
    repeats: int = 20
    """Rounds; the median time and the largest difference are reported."""
    prompts: int = 16
    """Completions that are compared in each round."""
    length: int = 16
    """Tokens of each."""


@dataclass(frozen=True)
class Row:
    """One model."""

    size: str
    parameters: int
    start: float
    """Seconds until vLLM ran with the first weights."""
    seconds: float
    """Median of a reload."""
    slowest: float
    cpu: float
    """Median of the processor time of a reload, which other work on the machine does not lengthen."""
    mismatch: float
    """Largest difference of a log-prob."""


def reload(args: Reload, size: str, folder: str) -> Row:
    """All rounds with one model."""
    import torch

    from echelon.models.lm import count_parameters
    from echelon.sampling.vllm import VllmSampler

    torch.set_num_threads(args.threads)
    module = load_module(folder)
    longest = 2 * args.length + 1
    sampler = VllmSampler(module, word_tokenizer(SIZES[size]["vocab"]), longest=longest, concurrency=args.prompts)
    began = time.perf_counter()
    sampler.load(module.state_dict().items(), 0)
    start, worst = time.perf_counter() - began, 0.0
    seconds, cpu = [], []
    for number in range(1, args.repeats + 1):
        with torch.no_grad():
            for weight in module.parameters():
                weight.add_(1e-2 * weight.std() * torch.randn_like(weight))
        began, worked = time.perf_counter(), time.process_time()
        sampler.load(module.state_dict().items(), number)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - worked)
        worst = max(worst, mismatch(args, sampler, module, SIZES[size]["vocab"], number))
        print(f"round {number}: {seconds[-1]:.3f} s, log-probs within {worst:.1g}", file=sys.stderr, flush=True)
    return Row(size, count_parameters(module), start, median(seconds), max(seconds), median(cpu), worst)


def mismatch(args: Reload, sampler: Any, module: Any, vocab: int, number: int) -> float:
    """The largest difference between a sampled token's log-prob and the trainer's."""
    import torch

    from echelon.data.packing import Sampled, pack
    from echelon.models.lm import token_logprobs
    from echelon.types import SamplingParams

    prompts = torch.randint(FIRST_WORD, vocab, (args.prompts, args.length)).tolist()

    async def everything() -> list[Any]:
        params = [SamplingParams(max_tokens=args.length, seed=1000 * number + place) for place in range(args.prompts)]
        return list(await asyncio.gather(*map(sampler.sample, prompts, params)))

    said = asyncio.run(everything())
    assert all(each.version == number for each in said), "a completion came from other weights"
    batch = pack([Sampled(prompt, each.tokens, each.logprobs) for prompt, each in zip(prompts, said, strict=True)])
    assert batch.logprobs is not None
    with torch.no_grad():
        return float((token_logprobs(module, batch) - batch.logprobs)[batch.mask].abs().max())


def main(args: Reload) -> None:
    """Measure every size, print what was found, and the JSON line last."""
    rows = []
    for size in args.sizes:
        with model_folder(size) as folder:
            rows.append(reload(args, size, folder))
    for row in rows:
        print(
            f"{row.size}: {row.parameters / 1e6:.1f} M parameters, vLLM started in {row.start:.1f} s; a reload takes "
            f"{row.seconds:.3f} s (at most {row.slowest:.3f}; {row.cpu:.3f} s of processor time), log-probs within "
            f"{row.mismatch:.1g}"
        )
    print(machine(args.threads))
    ratio = min(min(SECONDS / row.seconds, MISMATCH / max(row.mismatch, 1e-9)) for row in rows)
    print(json.dumps({"ratio": round(ratio, 3), "rows": [asdict(row) for row in rows]}), flush=True)


if __name__ == "__main__":
    from echelon.errors import EchelonError

    try:
        main(tyro.cli(Reload, description=__doc__))
    except EchelonError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
