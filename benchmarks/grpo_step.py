"""A GRPO step, generation and update included, against TRL's GRPOTrainer: samples per second and peak memory.

    python benchmarks/grpo_step.py
    python benchmarks/grpo_step.py --sizes tiny --repeats 5

A step samples 8 completions for each of 8 prompts (64 to 128 tokens), which end at lengths drawn once from a log-normal
distribution (median 32, at most 128), rewards them, and takes one optimizer step (clipped surrogate, no KL, AdamW,
gradients clipped). Both sides: the same float32 model, prompts, lengths and reward, the same number of completion
tokens (checked), weights that moved (checked). Ours goes through what the `grpo` recipe calls, with its
`tokens_per_pass`: `collect`, `LocalSampler`, `group_baseline`, `pack_siblings`, `update_policy`.

TRL is given what makes it fastest here: no gradient checkpointing, float32, all 64 rows in one generation batch with a
static cache, 16 rows in a pass of the update (64 are as slow and take twice the memory), no reference model, old
log-probs taken from the update's own pass (num_iterations 1), no logging or saving. Its completions end by a logits
processor that makes the end token certain at the planned length. The target is 3 times as many samples per second; the
memory rows, whose ratio is their MiB over ours, have none.
The last line is JSON: the smallest ratio over target, and a row per size.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tyro
from _harness import (
    END,
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

TARGETS = {"trl": 3.0}
RATE = 1e-5


@dataclass(kw_only=True)
class Grpo(Args):
    """What to measure."""

    keep_memory: bool = True
    prompts: int = 8
    """Prompts per step."""
    group: int = 8
    """Completions per prompt."""
    longest: int = 128
    """Most tokens of a completion."""
    steps: int = 2
    """Steps per round."""
    rows_per_pass: int = 16
    """Rows TRL takes per forward and backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quick:
            self.prompts, self.group, self.longest, self.steps, self.rows_per_pass = 2, 2, 8, 1, 4


@dataclass(frozen=True)
class Job:
    """What both sides are given."""

    folder: str
    prompts: tuple[str, ...]
    lengths: tuple[tuple[int, ...], ...]
    """Of every completion, prompt by prompt."""
    steps: int
    rows_per_pass: int

    @property
    def samples(self) -> int:
        """Completions per round."""
        return self.steps * sum(map(len, self.lengths))


def plan(args: Grpo, folder: str, size: str, *, seed: int = 0) -> Job:
    """The prompts as text and the lengths of what follows them."""
    draw = np.random.default_rng(seed)
    texts = [draw.integers(FIRST_WORD, SIZES[size]["vocab"], draw.integers(64, 129)) for _ in range(args.prompts)]
    drawn = np.exp(np.log(32) + 0.7 * draw.standard_normal((args.prompts, args.group))).astype(int)
    lengths = drawn.clip(2, args.longest).tolist()
    prompts = tuple(" ".join(f"w{word}" for word in text) for text in texts)
    return Job(folder, prompts, tuple(map(tuple, lengths)), args.steps, args.rows_per_pass)


def reward(text: str) -> float:
    """The fraction of words with an even number."""
    words = [word for word in text.split() if word.startswith("w")]
    return sum(int(word[1:]) % 2 == 0 for word in words) / max(1, len(words))


def ours(job: Job) -> Run:
    """What the `grpo` recipe does in a step."""
    import torch

    from echelon.config import ModelConfig, OptimConfig, SamplingConfig
    from echelon.data.packing import pack_siblings
    from echelon.ops.credit import group_baseline
    from echelon.recipes.grpo import Config
    from echelon.rollout.plays import env_loop
    from echelon.rollout.roles import Role, collect
    from echelon.rollout.setup import open_actor
    from echelon.train.learner import Learner
    from echelon.train.policy import PolicyConfig, update_policy
    from echelon.types import Episode, Message, Step, Task

    class Words:
        """One exchange: a prompt, and a reward for the answer."""

        def __init__(self, task: Task) -> None:
            self.text = task.data["text"]

        def start(self) -> Sequence[Message]:
            return [{"role": "user", "content": self.text}]

        def step(self, action: str) -> Step:
            return Step(reward=reward(action), terminated=True)

    actor = open_actor(ModelConfig(path=job.folder, device="cpu"), SamplingConfig())
    policy = Learner(actor.module, OptimConfig(lr=RATE), name="actor")
    tasks = [Task(id=str(place), data={"text": text}) for place, text in enumerate(job.prompts)]
    groups = [place for place, lengths in enumerate(job.lengths) for _ in lengths]

    learn = partial(
        update_policy,
        policy,
        settings=PolicyConfig(epochs=1),
        reference=None,
        temperature=1.0,
        tokens_per_pass=Config.tokens_per_pass,
    )

    def role(length: int) -> Role:
        params = replace(actor.role.params, max_tokens=length, temperature=1.0, stop_ids=(-1,))  # only lengths end it
        return Role("actor", actor.sampler, actor.role.renderer, params)

    def step(number: int) -> float:
        left = {task.id: iter(lengths) for task, lengths in zip(tasks, job.lengths, strict=True)}

        async def play(task: Task, episode: Episode) -> None:
            await env_loop(Words, role(next(left[task.id])), max_turns=1)(task, episode)

        episodes = asyncio.run(collect(tasks, play, seed=number, siblings=len(job.lengths[0])))
        turns = [turn for episode in episodes for turn in episode.turns]
        returns = torch.tensor([episode.reward for episode in episodes])
        batch = pack_siblings(turns)
        batch.advantages = batch.spread(group_baseline(returns, groups, scale="std"))
        learn(batch, seed=number)
        actor.sampler.load(policy.weights(), policy.version)
        return float(sum(len(turn.action) for turn in turns))

    def run(number: int) -> dict[str, float]:
        before = fingerprint(actor.module)
        start = time.perf_counter()
        tokens = sum(step(number * job.steps + more) for more in range(job.steps))
        seconds = time.perf_counter() - start
        assert fingerprint(actor.module) != before, "the weights did not move"
        return {"samples": float(job.samples), "tokens": tokens, "seconds": seconds}

    run(-1)
    return run


def trl(job: Job) -> Run:
    """TRL's trainer, told to take so many steps; timed from when training begins to the end of the last step."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM, LogitsProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    lengths = torch.tensor([length for group in job.lengths for length in group])

    class Planned(LogitsProcessor):
        """Every row ends with the end token, at its own length and not before."""

        def __init__(self, prompt: int) -> None:
            self.prompt = prompt

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            ends = lengths == ids.shape[1] - self.prompt + 1
            scores[:, END] = -torch.inf
            scores[ends] = -torch.inf
            scores[ends, END] = 0.0
            return scores

    class Model(LlamaForCausalLM):
        """The model, whose replies have the planned lengths."""

        def generate(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return super().generate(input_ids, logits_processor=[Planned(input_ids.shape[1])], **kwargs)

    class Clock(TrainerCallback):
        """Seconds from the beginning of training to the end of its last step."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.start

    counted = {"samples": 0.0, "tokens": 0.0}

    def rewarded(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        counted["samples"] += len(completion_ids)
        counted["tokens"] += sum(map(len, completion_ids))
        return [reward(completion[0]["content"]) for completion in completions]

    rows = len(lengths)
    assert rows % job.rows_per_pass == 0, f"{rows} rows do not make passes of {job.rows_per_pass}"
    out = TemporaryDirectory(prefix="echelon_trl_")
    settings = GRPOConfig(
        output_dir=out.name,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=job.rows_per_pass,
        gradient_accumulation_steps=rows // job.rows_per_pass,
        num_generations=len(job.lengths[0]),
        max_completion_length=int(lengths.max()),
        max_steps=job.steps,
        learning_rate=RATE,
        beta=0.0,
        num_iterations=1,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        cache_implementation="static",
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = GRPOTrainer(
        model=Model.from_pretrained(job.folder, dtype=torch.float32, attn_implementation="sdpa"),
        reward_funcs=rewarded,
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in job.prompts]),
        processing_class=AutoTokenizer.from_pretrained(job.folder, padding_side="left"),
        callbacks=[clock],
    )

    def run(number: int) -> dict[str, float]:
        counted.update(samples=0.0, tokens=0.0)
        before = fingerprint(trainer.model)
        trainer.train()
        assert fingerprint(trainer.model) != before, "the weights did not move"
        assert out.name
        return {**counted, "seconds": clock.seconds}

    run(-1)
    return run


def fingerprint(module: Any) -> float:
    """A number that changes when the weights do."""
    return float(sum(parameter.detach().double().abs().sum() for parameter in module.parameters()))


def memory(results: dict[str, Result], size: str) -> list[Row]:
    """Peak resident memory in MiB, and how many times as much a peer takes."""
    peaks = {name: median(result.peak) / 2**20 for name, result in results.items()}
    ours = peaks.pop("ours")
    return [Row(f"{name}, peak MiB", size, ours, peak, peak / ours) for name, peak in peaks.items()]


def main(args: Grpo) -> None:
    """Measure every size, print the table and the JSON line."""
    peers = choose_peers(args, list(TARGETS))
    rows = []
    for size in args.sizes:
        with model_folder(size) as folder:
            job = plan(args, folder, size)
            sides = [Side("ours", ours, job), *(Side(name, trl, job) for name in peers)]
            results = measure(sides, args, same=("samples", "tokens"))
        print(f"{size}: {results['ours'].counts[0]['tokens'] / job.samples:.1f} tokens per completion")
        rows += versus(results, count="samples", size=size, targets=TARGETS)
        rows += memory(results, size)
    finish(rows, args, title="GRPO steps, generation included", unit="samples/s")


if __name__ == "__main__":
    main(tyro.cli(Grpo))
