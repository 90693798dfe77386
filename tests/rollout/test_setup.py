"""What a run opens before its loop, and the order of its tasks."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.config import LoraConfig, ModelConfig, SamplingConfig
from echelon.errors import CheckpointError, DataError
from echelon.models import lora
from echelon.models.lm import tiny
from echelon.rollout import setup
from echelon.rollout.setup import describe, model_path, open_actor, open_env, set_threads, task_batch, usable_cores
from echelon.train.learner import save_module
from echelon.types import Episode, SamplingParams, Task


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 3))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_epoch_is_a_new_order_of_all_tasks(count: int, per_step: int, seed: int) -> None:
    tasks = [Task(str(number)) for number in range(count)]
    steps = 3 * count
    played = [task.id for step in range(steps) for task in task_batch(tasks, step, per_step, seed=seed)]
    assert len(played) == steps * per_step
    epochs = [played[start : start + count] for start in range(0, len(played), count)]
    for epoch in epochs:
        assert max(Counter(epoch).values()) == 1
    if count > 5:
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_tasks_of_a_step_need_no_history() -> None:
    tasks = [Task(str(number)) for number in range(7)]
    assert task_batch(tasks, 5, 3, seed=1) == task_batch(tasks, 5, 3, seed=1)
    assert [task_batch(tasks, n, 3, seed=1) for n in range(5)] != [task_batch(tasks, n, 3, seed=2) for n in range(5)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    module, tokenizer = tiny(["open the door"], vocab_size=290, hidden=32, layers=1, heads=2)
    module.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_an_actor_is_a_model_that_can_answer(folder: Path) -> None:
    sampling = SamplingConfig(temperature=0.7, max_tokens=5, max_prompt_tokens=99, stop=("!",))
    actor = open_actor(ModelConfig(path=str(folder), device="cpu"), sampling, name="solver")
    assert actor.role.params == SamplingParams(
        max_tokens=5, temperature=0.7, stop=("!",), stop_ids=actor.role.renderer.stop_ids
    )
    assert actor.role.renderer.max_tokens == 99
    turn = asyncio.run(actor.role.act(Episode("t"), [{"role": "user", "content": "open"}]))
    assert (turn.role, turn.prompt) == ("solver", actor.role.renderer.render([{"role": "user", "content": "open"}]))
    assert 1 <= len(turn.action) <= 5
    assert actor.sampler.module is actor.module


def test_other_sampling_can_be_asked_for(folder: Path) -> None:
    config = ModelConfig(path=str(folder), device="cpu")
    actor = open_actor(config, SamplingConfig(), params=SamplingParams(temperature=0, top_k=3))
    assert (actor.role.params.temperature, actor.role.params.top_k) == (0, 3)


def test_of_an_actor_with_an_adapter_only_that_learns(folder: Path, tmp_path: Path) -> None:
    config = ModelConfig(path=str(folder), device="cpu")
    plain = open_actor(config, SamplingConfig())
    assert lora.names(plain.module) == []
    actor = open_actor(config, SamplingConfig(), lora=LoraConfig(rank=2))
    assert all(".lora_" in name for name, parameter in actor.module.named_parameters() if parameter.requires_grad)
    assert actor.sampler.module is actor.module
    save_module(actor.module, tmp_path / "adapter", actor.tokenizer)

    goes_on = open_actor(replace(config, path=str(tmp_path / "adapter")), SamplingConfig())
    on_top = open_actor(replace(config, path=str(tmp_path / "adapter")), SamplingConfig(), lora=LoraConfig(rank=3))
    ranks = [each.module.peft_config["default"].r for each in (actor, goes_on, on_top)]
    assert ranks == [2, 2, 3]
    assert all(lora.names(each.module) == ["default"] for each in (goes_on, on_top))


def test_of_a_run_that_kept_its_best_model_that_one_is_meant(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(folder, run / "best")
    assert model_path(str(run)) == str(run / "best")
    (run / "best" / "config.json").unlink()
    (run / "best" / lora.CONFIG).touch()
    assert model_path(str(run)) == str(run / "best")


def test_a_path_that_is_no_run_is_left_to_the_loader(tmp_path: Path, folder: Path) -> None:
    assert model_path("someone/model") == "someone/model"
    assert model_path(str(folder)) == str(folder)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError):
        model_path(str(tmp_path / "run"))


def test_an_environment_is_played_before_anything_is_trained(tmp_path: Path) -> None:
    assert open_env("text_lock", {"doors": 2}).tasks("train")
    (tmp_path / "broken.py").write_text(
        "from echelon.types import Step, Task\n"
        "class Broken:\n"
        "    def __init__(self, task): pass\n"
        "    @classmethod\n"
        "    def tasks(cls, split): return [Task('t')]\n"
        "    def start(self): return 'not messages'\n"
        "    def step(self, action): return Step()\n"
    )
    with pytest.raises(DataError):
        open_env(f"{tmp_path}/broken.py:Broken", {})


def test_sizes_are_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    module, _ = tiny(["a"], vocab_size=270, hidden=32, layers=1, heads=1)
    count = sum(parameter.numel() for parameter in module.parameters())
    describe({"actor": module, "reference": tiny(["a"], hidden=32)[0].requires_grad_(False)}, tokens_per_step=12_345)
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"actor: LlamaForCausalLM, {count:,} parameters, {count:,} trained; ")
    assert f"{4 * count / 2**20:.1f} MiB of weights, {12 * count / 2**20:.1f} MiB more for gradients" in told[0]
    assert " 0 trained; " in told[1]
    assert told[2] == "tokens per step: at most 12,345"


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_threads_are_as_many_as_asked_for_or_as_the_model_is_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "usable_cores", lambda: 3)
    for asked, parameters, expected in ((2, 10, 2), (0, 10, 1), (0, 1_100_000, 2), (0, 25_000_000, 3)):
        set_threads(asked, torch.nn.Linear(parameters, 1, bias=False, device="meta"))
        assert torch.get_num_threads() == expected
    set_threads(0)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("siblings", "share", "expected"),
    [
        ({0: "0", 1: "1", 2: "2", 3: "3"}, "max 100000", 4),
        ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, "max 100000", 2),  # two threads on each of two cores
        ({0: "0", 1: "1", 2: "2", 3: "3"}, "150000 100000", 1),  # a container that gets one and a half
        ({}, "", 4),  # a system that does not say
    ],
)
def test_cores_are_counted_once_and_only_those_of_this_process(
    siblings: dict[int, str], share: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in siblings.items()}
    monkeypatch.setattr(setup, "_read", lambda file: (files | {"/sys/fs/cgroup/cpu.max": share}).get(str(file), ""))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    assert usable_cores() == expected


PAGE_FAULTS = """
import resource, torch
from echelon.rollout.setup import keep_freed_memory
def faults():
    for _ in range(3):
        torch.ones(3 << 22).mul(2)  # two blocks of 48 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(12):
        torch.ones(3 << 22).mul(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fresh = faults()
keep_freed_memory()
print(fresh, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks of glibc's allocator")
def test_large_blocks_are_used_again() -> None:
    """Counted in page faults: each would be a page that the system clears again."""
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], capture_output=True, text=True, check=True)
    fresh, kept = map(int, done.stdout.split())
    assert kept < fresh / 3, (fresh, kept)  # a small block in between may still cost a large one, now and then
