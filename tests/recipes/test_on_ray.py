"""Recipes whose rollouts are drawn by workers of Ray log what they log when they draw themselves.

One cluster of this machine and two workers serve all of them: every sampler that is opened with the same settings
shares those that there are.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import signal
from collections.abc import Iterator

import pytest
import torch

from echelon.config import RayConfig
from echelon.sampling import ray as on_ray
from echelon.sampling.local import LocalSampler
from echelon.types import Completion, SamplingParams
from tests.recipes.conftest import Train
from tests.recipes.talk import Talk
from tests.sampling.test_ray import ask, requests, same, small
from tests.train.test_dist_runs import same as same_rows

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]

NAMES = Talk.inventory().strategies


VARY = ("--env", "tests.recipes.talk:Vary", "--env-settings")
ONE = ("--model.path", "{model}", *VARY, "turns=2", "--sampling.max-tokens", 4)
EPISODES = ("--episodes-per-step", 6)
LOW = ("--sampling.max-tokens", 4, "--low.policy.minibatches", 1, "--low.value-minibatches", 1)
STEER = ("--model.path", "{model}", "--env", "tests.recipes.steer:Steer", "--sampling.max-tokens", 3)
STEER += ("--tasks-per-step", 4, "--group-size", 2, "--value-epochs", 1)

GRPO = ("grpo", *ONE, "--tasks-per-step", 2, "--group-size", 4)
PPO = ("ppo", *ONE, *EPISODES, "--warmup-steps", 0)
ARCHER = ("archer", *ONE, *EPISODES, "--warmup-steps", 0, "--critic-updates", 2, "--critic-episodes", 4)
RANK = ("rank", *ONE, *EPISODES, "--candidates", 2, "--warmup-steps", 0, "--ranker-updates", 1, "--ranker-batch", 4)
FEEDBACK = ("feedback", "--solver.model.path", "{model}", "--coach.model.path", "{model}", *VARY, "turns=1")
FEEDBACK += ("--solver.sampling.max-tokens", 4, "--coach.sampling.max-tokens", 4, "--tasks-per-step", 2)
RESPONDER = ("responder", "--model.path", "{model}", "--data.path", "{rows}", "--strategies", *NAMES, *LOW, *EPISODES)
RESPONDER += ("--reward", "{rewards}:long")
TOSCA = ("tosca", "--responder.path", "{model}", "--env", "tests.recipes.talk:Talk", *LOW, *EPISODES)
TOSCA += ("--high-updates", 1, "--high-batch", 4)
CONTROL = ("control", *STEER)
PLANNED = (*CONTROL, "--plan-every", 2, "--plan-tokens", 3, "--planner.path", "{model}")
ADAPTER = ("--lora.rank", 2, "--policy.optim.lr", 1e-2)
AHEAD = "--asynchronous.max-staleness"


@pytest.fixture(scope="module")
def workers() -> Iterator[on_ray.Pool]:
    """The workers of all who ask for two, on a cluster of this machine; they start when the first one does."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield on_ray.pool_of(RayConfig())
    ray.shutdown()


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of every completion that workers gave: which weights had been loaded when it was asked, and which it names."""
    found: list[tuple[int, int]] = []
    sample = on_ray.RaySampler.sample

    async def noted(sampler: on_ray.RaySampler, prompt: list[int], params: SamplingParams) -> Completion:
        asked = sampler.version
        said = await sample(sampler, prompt, params)
        found.append((asked, said.version))
        return said

    monkeypatch.setattr(on_ray.RaySampler, "sample", noted)
    return found


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(GRPO, id="grpo"),
        pytest.param((*GRPO, *ADAPTER), id="grpo-adapter"),
        pytest.param((*GRPO, AHEAD, 2), id="grpo-ahead"),
        pytest.param(PPO, id="ppo"),
        pytest.param((*PPO, AHEAD, 1), id="ppo-ahead"),
        pytest.param(ARCHER, id="archer"),
        pytest.param((*ARCHER, AHEAD, 1), id="archer-ahead"),
        pytest.param(RANK, id="rank"),
        pytest.param((*RANK, AHEAD, 1), id="rank-ahead"),
        pytest.param(FEEDBACK, id="feedback"),
        pytest.param((*FEEDBACK, AHEAD, 1, "--credit.gap", 1), id="feedback-ahead"),
        pytest.param(RESPONDER, id="responder"),
        pytest.param((*RESPONDER, AHEAD, 1), id="responder-ahead"),
        pytest.param(TOSCA, id="tosca"),
        pytest.param((*TOSCA, AHEAD, 1), id="tosca-ahead"),
        pytest.param(CONTROL, id="control"),
        pytest.param((*PLANNED, AHEAD, 1), id="control-planned-ahead"),
    ],
)
def test_a_recipe_logs_what_it_logs_without_workers(
    train: Train,
    workers: on_ray.Pool,
    files: dict[str, str],
    versions: list[tuple[int, int]],
    words: tuple[object, ...],
) -> None:
    """Also in steps that are played with weights that it has learned and sent."""
    ahead = int(str(words[words.index(AHEAD) + 1])) if AHEAD in words else 0
    flags = [str(word).format(**files) for word in words] + ["--steps", str(2 + ahead)]
    here, there = train(*flags, name="here"), train(*flags, "--sampler", "ray", name="ray")
    same_rows(there.rows(), here.rows(), 1e-3)
    said = [[[turn["text"] for turn in row["turns"]] for row in run.rows("episodes")] for run in (there, here)]
    assert said[0] == said[1]
    assert all(named == asked for asked, named in versions)
    assert len({named for _, named in versions}) > 1
    assert len(workers.workers) == 2, "nobody has started others"


def pids(workers: on_ray.Pool) -> list[int]:
    import ray

    return list(ray.get([place.actor.__ray_call__.remote(lambda _: os.getpid()) for place in workers.workers]))


def held(workers: on_ray.Pool) -> list[int]:
    """Of how many models each worker knows."""
    import ray

    return list(
        ray.get([place.actor.__ray_call__.remote(lambda worker: len(worker.held)) for place in workers.workers])
    )


def test_a_worker_that_dies_while_weights_are_sent_is_replaced_by_one_that_has_them(workers: on_ray.Pool) -> None:
    gc.collect()  # what nobody holds any more, workers do not either
    sampler, asked = on_ray.RaySampler(*small(), RayConfig()), requests(16)
    here = LocalSampler(sampler.module, sampler.tokenizer)
    expected = {0: ask(here, asked)}
    same(ask(sampler, asked), expected[0])
    assert held(workers) == [1, 1]
    (killed, _) = pids(workers)
    with torch.no_grad():
        for weight in sampler.module.parameters():
            weight.mul_(1.5)
    expected[7] = ask(here, asked)

    async def play() -> list[Completion]:
        tasks = [asyncio.create_task(sampler.sample(*request)) for request in asked]
        await asyncio.sleep(0)
        sampler.load(sampler.module.state_dict().items(), 7)
        os.kill(killed, signal.SIGKILL)
        return await asyncio.gather(*tasks)

    found = asyncio.run(play())
    same(found, [expected[said.version][place] for place, said in enumerate(found)])
    while not all(place.started for place in workers.workers):
        ask(sampler, asked[:1])
    assert killed not in pids(workers)
    after = ask(sampler, asked)
    same(after, expected[7])
    assert {said.version for said in after} == {7}
