"""Two ranks whose rollouts are drawn by workers of Ray: the files of one process, and a rank that dies."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from echelon import cli
from echelon.config import RayConfig, SamplingConfig
from echelon.envs import load_env
from echelon.errors import ConfigError
from echelon.rollout.setup import open_sampler
from tests.recipes.conftest import GAME, made
from tests.sampling.test_ray import small
from tests.train import recipes_together
from tests.train.test_dist_runs import FSDP, PLAYS, ROOT, rows, same

pytestmark = [
    pytest.mark.ray,
    pytest.mark.dist,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]

GRPO = ["grpo", *PLAYS, "--tasks-per-step", "2", "--group-size", "4"]
ARCHER = ["archer", *PLAYS, "--episodes-per-step", "6", "--warmup-steps", "1", "--critic-updates", "2"]
DEADLY = """
import os, signal

calls = []


def reward(completions, **_):
    calls.append(1)
    if os.environ.get("RANK") == os.environ.get("DEADLY") and len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(text)) for text in completions]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a model of one layer."""
    folder = tmp_path_factory.mktemp("start") / "model"
    return ["--model.path", str(made(load_env("guess_number", GAME), folder, layers=1))]


def around(marked: Path, **more: str) -> dict[str, str]:
    """The environment of a job, and of all that it starts, by which `left` finds what is left of it."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MARKED_BY": str(marked)} | more


def left(marked: Path) -> list[str]:
    """The processes that still run of such a job, after half a minute at most."""
    wanted, until = f"MARKED_BY={marked}\0".encode(), time.monotonic() + 30
    while found := [process for process in Path("/proc").glob("[0-9]*") if wanted in read(process / "environ")]:
        if time.monotonic() > until:
            return [read(process / "cmdline").replace(b"\0", b" ").decode() for process in found]
        time.sleep(0.2)
    return []


def read(file: Path) -> bytes:
    """What it holds; nothing where the process is gone or somebody else's."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def test_two_ranks_with_a_worker_each_log_and_say_what_one_process_does(model: list[str], tmp_path: Path) -> None:
    commands = {"grpo": GRPO, "grpo-parts": [*GRPO, *FSDP], "archer": ARCHER, "archer-parts": [*ARCHER, *FSDP]}
    told = [[*words, *model, "--sampler", "ray", "--out", str(tmp_path / name)] for name, words in commands.items()]
    (tmp_path / "commands.json").write_text(json.dumps(told))
    command = [sys.executable, recipes_together.__file__, str(tmp_path / "commands.json")]
    done = subprocess.run(command, env=around(tmp_path), capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    for name, words in ("grpo", GRPO), ("archer", ARCHER):
        alone = tmp_path / f"{name}-alone"
        assert cli.main([*words, *model, "--out", str(alone)]) == 0
        for run in (tmp_path / name, tmp_path / f"{name}-parts"):
            same(rows(run), rows(alone), 1e-4)
            said, expected = (
                [[turn["text"] for turn in row["turns"]] for row in rows(each, "episodes")] for each in (run, alone)
            )
            assert said == expected


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_is_killed_ends_the_job_in_one_line_and_leaves_nothing_of_ray(
    model: list[str], tmp_path: Path, rank: str
) -> None:
    (tmp_path / "deadly.py").write_text(DEADLY)
    words = [*GRPO, *model, "--reward", f"{tmp_path / 'deadly.py'}:reward", "--save-every", "1"]
    words += ["--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "echelon", "launch", "--on", "ray", "--nproc", "2", "--rollout-workers", "2"]
    command += words
    done = subprocess.run(command, env=around(tmp_path, DEADLY=rank), capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"rank {rank} was ended by SIGKILL, so the others were stopped. Start the same command again with --resume; it "
        "goes on from the newest whole checkpoint."
    ]
    assert left(tmp_path) == []
    assert [row["step"] for row in rows(tmp_path / "run")] == [0]
    done = subprocess.run([*command, "--resume"], env=around(tmp_path), capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_that_ranks_cannot_share_out_are_refused(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=rf"^sampling\.ray\.workers = {workers}: each of 2 ranks .*multiple of it\.$"):
        open_sampler(*small(), SamplingConfig(sampler="ray", ray=RayConfig(workers=workers)))
