"""Two ranks of which one fails while they write a checkpoint: the newest whole one stays the newest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from echelon import cli
from echelon.envs import load_env
from echelon.train.checkpoint import whole_checkpoint
from tests.recipes.conftest import GAME, made

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[2]
NO_ROOM = "step 1 could not be saved (No space left on device). Checkpoints still there: 0."
FAULTY = """
import errno, os, signal
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from echelon.train import learner


def strike(place):
    rank, _, what = os.environ.get("FAULT", "").partition(" ")
    if rank == os.environ.get("RANK") and what == f"is killed {place}":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == os.environ.get("RANK") and what == f"has no room {place}":
        raise OSError(errno.ENOSPC, "No space left on device")


def write_part(writer, plan, planner):
    done = kept(writer, plan, planner)
    strike("for its part")
    return done


def save_module(*args, **how):
    calls.append(1)
    if len(calls) == 2:
        strike("for the weights")
    return kept_too(*args, **how)


def reward(completions, **_):
    return [float(len(text)) for text in completions]


if "FAULT" in os.environ:
    calls, kept, kept_too = [], HuggingFaceStorageWriter.write_data, learner.save_module
    HuggingFaceStorageWriter.write_data, learner.save_module = write_part, save_module
"""
"""A reward whose file has one rank fail at the second checkpoint: when its part of the optimizer is written, which it
has at the first one nothing of, or the weights."""


NO_ROOM = "step 1 could not be saved (No space left on device). Checkpoints still there: 0."


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("1 is killed for its part", "rank 1 was ended by SIGKILL, so the others were stopped."),
        pytest.param("1 has no room for its part", NO_ROOM, marks=pytest.mark.slow),
        pytest.param("0 has no room for the weights", NO_ROOM, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_fails_while_all_save_leaves_the_checkpoint_before(tmp_path: Path, fault: str, line: str) -> None:
    model = made(load_env("guess_number", GAME), tmp_path / "model", layers=1)
    (tmp_path / "faulty.py").write_text(FAULTY)
    out = tmp_path / "run"
    words = ["grpo", "--model.path", str(model), "--env", "guess_number", "--sampling.max-tokens", "2"]
    words += ["--env-settings", *(f"{key}={value}" for key, value in GAME.items())]
    words += ["--reward", f"{tmp_path / 'faulty.py'}:reward", "--tasks-per-step", "2", "--group-size", "2"]
    words += ["--steps", "1", "--save-every", "1", "--threads", "1", "--max-turns", "1", "--out", str(out)]
    launched = [sys.executable, "-m", "echelon", "launch", "--nproc", "2", *words, "--dist.strategy", "fsdp"]
    around = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FAULT": fault}
    done = subprocess.run(launched, env=around, capture_output=True, text=True, timeout=600)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert line in done.stderr
    saved = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert [name for name in saved if name[0] != "."] == ["step_000000"]
    assert whole_checkpoint(out).name == "step_000000"

    assert cli.main([*words, "--resume"]) == 0
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_000000", "step_000001"]
