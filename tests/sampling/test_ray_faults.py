"""Clusters of Ray to which things happen: workers killed, machines that leave, memory that is full, whole runs."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from echelon import cli
from echelon.config import LoraConfig, RayConfig
from echelon.envs import load_env
from echelon.models import lora
from echelon.models.lm import tiny
from echelon.sampling.local import LocalSampler
from echelon.sampling.ray import RaySampler
from echelon.types import Completion
from tests.recipes.conftest import GAME, made
from tests.sampling.test_ray import ask, requests, same, small
from tests.train.test_dist_runs import rows
from tests.train.test_dist_runs import same as same_rows

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]

ROOT = Path(__file__).parents[2]
STORE = 80 * 2**20
"""The smallest store of objects that Ray allows, almost."""


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A cluster of one machine with room for two workers, to which others can be added."""
    import ray
    from ray.cluster_utils import Cluster

    room = {"num_cpus": 2, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=room)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def pids(sampler: RaySampler) -> list[int]:
    """Of the workers that have started."""
    import ray

    started = [place.actor for place in sampler._pool.workers if place.started and not place.lost]
    return list(ray.get([actor.__ray_call__.remote(lambda worker: os.getpid()) for actor in started]))


def test_ten_workers_killed_at_random_change_nothing(cluster: Any) -> None:
    asked, draw = requests(400, 40), random.Random(0)
    sampler = RaySampler(*small(), RayConfig(in_flight=8, timeout=300))
    expected = ask(LocalSampler(sampler.module, sampler.tokenizer), asked)

    async def play() -> tuple[list[Completion], int]:
        tasks = [asyncio.create_task(sampler.sample(*request)) for request in asked]
        killed = 0
        while killed < 10:
            before = sum(task.done() for task in tasks)
            while sum(task.done() for task in tasks) < min(before + 20, len(tasks)):
                await asyncio.sleep(0.01)
            if there := pids(sampler):
                os.kill(draw.choice(there), signal.SIGKILL)
                killed += 1
        return await asyncio.gather(*tasks), killed

    found, killed = asyncio.run(play())
    same(found, expected)
    assert killed == 10


def test_a_machine_that_leaves_is_done_without(cluster: Any) -> None:
    other = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    sampler = RaySampler(*small(), RayConfig(workers=3, address=cluster.address, in_flight=4, timeout=300))
    asked = requests(90, 40)
    expected = ask(LocalSampler(sampler.module, sampler.tokenizer), asked)

    async def play() -> list[Completion]:
        tasks = [asyncio.create_task(sampler.sample(*request)) for request in asked]
        while sum(task.done() for task in tasks) < 10:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(cluster.remove_node, other)
        return await asyncio.gather(*tasks)

    same(asyncio.run(play()), expected)
    assert sorted(place.started for place in sampler._pool.workers) == [False, True, True]  # no machine for the third
    cluster.add_node(num_cpus=1, object_store_memory=STORE)
    while not all(place.started for place in sampler._pool.workers):
        ask(sampler, asked[:3])


def test_weights_find_room_in_a_store_that_is_full(cluster: Any) -> None:
    import numpy as np
    import ray

    module, tokenizer = tiny(["a cat"], vocab_size=300, hidden=512, layers=4, heads=4, max_positions=128)  # 50 MiB
    sampler = RaySampler(module, tokenizer, RayConfig(timeout=300))
    kept = [ray.put(np.zeros(2**20 * 8, dtype=np.uint8)) for _ in range(9)]
    asked = requests(4)
    for version in (1, 2, 3):
        with torch.no_grad():
            for weight in module.parameters():
                weight.mul_(1.1)
        sampler.load(module.state_dict().items(), version)
        same(ask(sampler, asked), ask(LocalSampler(module, tokenizer), asked))
    assert len(kept) == 9


def test_an_adapter_is_followed_and_its_base_stays_where_it_is(cluster: Any) -> None:
    module, tokenizer = small()
    adapted = lora.attach(module, LoraConfig(rank=2))
    sampler = RaySampler(adapted, tokenizer, RayConfig(timeout=300))
    asked = requests(8)
    for version in (1, 2):
        with torch.no_grad():
            for weight in adapted.parameters():
                if weight.requires_grad:
                    weight.normal_(std=0.5)
        sampler.load(lora.merged_weights(adapted), version)
        found = ask(sampler, asked)
        same(found, ask(LocalSampler(adapted, tokenizer), asked))
        assert {each.version for each in found} == {version}


def test_a_recipe_on_ray_logs_what_it_logs_in_process(tmp_path: Path) -> None:
    model = made(load_env("guess_number", GAME), tmp_path / "model", layers=1)
    words = ["grpo", "--model.path", str(model), "--env", "guess_number", "--env-settings"]
    words += [*(f"{key}={value}" for key, value in GAME.items()), "--sampling.max-tokens", "3", "--steps", "3"]
    words += ["--threads", "1", "--tasks-per-step", "2", "--group-size", "4", "--out"]
    command = [sys.executable, "-m", "echelon", "launch", "--on", "ray", "--rollout-workers", "2"]
    around = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *words, str(tmp_path / "ray")], env=around, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert cli.main([*words, str(tmp_path / "here")]) == 0
    same_rows(rows(tmp_path / "ray"), rows(tmp_path / "here"), 1e-4)
    said = [
        [[turn["text"] for turn in row["turns"]] for row in rows(tmp_path / run, "episodes")] for run in ("ray", "here")
    ]
    assert said[0] == said[1]
