"""What playing ahead gains where an environment takes its time, and what playing many episodes at once gains.

    python benchmarks/asynchronous.py
    python benchmarks/asynchronous.py --latency 0.2 --rows 64

Training steps per second: `ahead` plays the episodes of the next step while one trains (`max_staleness` 1), `in turn`
plays and trains one after the other. Both are `Rollouts` as recipes use them, with the local engine, the same episodes
and the same update: clipped policy gradient with importance weights in `ahead`, without in `in turn`, AdamW. The
environment answers after `latency` seconds, by waiting, as one does that lives elsewhere. No more can be gained than
the smaller of the two parts, so the episodes of a step are such that playing and training take about as long.

Episodes per second: 64 episodes at once over one after the other, in an environment that answers after 0.05 s.

Targets are 1.5 and 40. The last line is JSON: the smallest ratio over target, and a row for each.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tyro
from _harness import Args, Row, Run, Side, choose_peers, finish, measure, model_folder, versus

TARGETS: dict[str, float] = {"in turn": 1.5, "one by one": 40.0}


@dataclass(kw_only=True)
class Asynchronous(Args):
    """What to measure."""

    sizes: tuple[str, ...] = ("tiny",)
    threads: int = 1
    keep_memory: bool = True
    steps: int = 8
    """Training steps per round."""
    rows: int = 32
    """Episodes per training step."""
    turns: int = 8
    """Turns per episode."""
    latency: float = 0.05
    """Seconds until the environment answers, where it is trained on."""
    at_once: int = 64
    """Episodes at once, where nothing is trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quick:
            self.steps, self.rows, self.turns, self.latency, self.at_once = 2, 4, 2, 0.01, 8


@dataclass(frozen=True)
class Job:
    """What every side is given."""

    folder: str
    staleness: int = 0
    steps: int = 0
    rows: int = 0
    turns: int = 0
    latency: float = 0.0
    at_once: int = 0


@dataclass
class Distant:
    """An environment that answers the same to whatever is said, after a while."""

    turns: int
    latency: float
    said: int = field(default=0, init=False)

    def start(self) -> list[Any]:
        """What is asked."""
        return [{"role": "user", "content": "w4 w5 w6 w7"}]

    async def step(self, action: str) -> Any:
        """The answer, once it has come."""
        from echelon.types import Step

        await asyncio.sleep(self.latency)
        self.said += 1
        return Step([{"role": "user", "content": "w8 w9"}], float(len(action) % 2), terminated=self.said == self.turns)


def opened(job: Job, max_tokens: int) -> Any:
    """The model, and its role."""
    from echelon.config import ModelConfig, SamplingConfig
    from echelon.rollout.setup import open_actor

    sampling = SamplingConfig(max_tokens=max_tokens)
    return open_actor(ModelConfig(path=job.folder, device="cpu"), sampling), sampling


def training(job: Job) -> Run:
    """Steps of playing and training, so many of them ahead."""
    import torch

    from echelon.config import OptimConfig
    from echelon.data.packing import pack
    from echelon.rollout.ahead import Level, Played, Rollouts
    from echelon.rollout.plays import env_loop
    from echelon.rollout.roles import collect
    from echelon.train.learner import Learner
    from echelon.train.policy import PolicyConfig, update_policy
    from echelon.train.stale import AsyncConfig
    from echelon.types import Task

    actor, sampling = opened(job, 8)
    learner = Learner(actor.module, OptimConfig(lr=1e-5))
    tasks = [Task(str(number)) for number in range(job.rows)]
    spent = {"playing": 0.0, "training": 0.0}

    def play(roles: Mapping[str, Any], step: int, run: Any) -> Played:
        began = time.perf_counter()
        loop = env_loop(lambda task: Distant(job.turns, job.latency), roles["actor"])
        episodes = run(collect(tasks, loop, seed=step))
        spent["playing"] += time.perf_counter() - began
        return Played(episodes)

    def train(found: Played, stale: Any) -> None:
        began = time.perf_counter()
        batch = pack([turn for episode in found.episodes for turn in episode.turns])
        batch.advantages = batch.spread(torch.linspace(-1.0, 1.0, batch.turns))
        how = {"settings": PolicyConfig(epochs=2), "reference": None, "temperature": 1.0, "tokens_per_pass": 4096}
        update_policy(learner, batch, **how, seed=0, stale=stale)
        spent["training"] += time.perf_counter() - began

    def run(number: int) -> dict[str, float]:
        spent.update(playing=0.0, training=0.0)
        settings, level = AsyncConfig(max_staleness=job.staleness), Level(actor, learner, sampling)
        with Rollouts(settings, {"actor": level}, play, steps=job.steps, read=Played.from_json) as rollouts:
            rollouts.publish()
            for step in range(job.steps):
                train(rollouts.take(step), rollouts.stale("actor"))
                rollouts.publish()
        return {"steps": job.steps, **spent}

    run(-1)
    return run


def playing(job: Job) -> Run:
    """Episodes, so many at once."""
    from echelon.rollout.plays import env_loop
    from echelon.rollout.roles import collect
    from echelon.types import Task

    actor, _ = opened(job, 2)
    loop = env_loop(lambda task: Distant(job.turns, job.latency), actor.role)
    tasks = [Task(str(number)) for number in range(job.at_once)]

    def run(number: int) -> dict[str, float]:
        actor.sampler.load(iter(()), number + 1)  # forgets what is cached
        for first in range(0, job.rows, job.at_once):
            asyncio.run(collect(tasks, loop, seed=first))
        return {"episodes": job.rows}

    run(-1)
    return run


def ahead_row(args: Asynchronous, folder: str, size: str) -> Row:
    """Steps ahead over steps in turn."""
    jobs = {name: Job(folder, n, args.steps, args.rows, args.turns, args.latency) for name, n in PACES.items()}
    results = measure([Side(name, training, job) for name, job in jobs.items()], args, same=("steps",))
    (row,) = versus(results, count="steps", size=size, targets=TARGETS, ours="ahead")
    parts = results["in turn"].counts[-1]
    row.note += (
        f"; in turn {parts['playing'] / args.steps:.2f} s playing, {parts['training'] / args.steps:.2f} training"
    )
    return row


PACES = {"ahead": 1, "in turn": 0}


def at_once_row(args: Asynchronous, folder: str, size: str) -> Row:
    """Many episodes at once over one at a time."""
    turns, latency = args.turns, 0.05
    counts = {"at once": (2 * args.at_once, args.at_once), "one by one": (4, 1)}
    jobs = {name: Job(folder, rows=n, turns=turns, latency=latency, at_once=at) for name, (n, at) in counts.items()}
    results = measure([Side(name, playing, job) for name, job in jobs.items()], args, same=())
    (row,) = versus(results, count="episodes", size=size, targets=TARGETS, ours="at once")
    return row


def main(args: Asynchronous) -> None:
    """Measure what is asked for, print the table and the JSON line."""
    peers, rows = choose_peers(args, list(TARGETS)), []
    for size in args.sizes:
        with model_folder(size) as folder:
            rows += [ahead_row(args, folder, size)] if "in turn" in peers else []
            rows += [at_once_row(args, folder, size)] if "one by one" in peers else []
    finish(rows, args, title="waiting for an environment", unit="steps/s, episodes/s")


if __name__ == "__main__":
    main(tyro.cli(Asynchronous))
