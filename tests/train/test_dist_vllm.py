"""Two ranks, each of which draws its rollouts with a vLLM of its own: the files of one process with one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from echelon import cli
from echelon.envs import load_env
from echelon.envs.players import corpus
from echelon.models.lm import tiny
from tests.recipes.conftest import GAME
from tests.train.test_dist_runs import FSDP, PLAYS, ROOT, rows, same

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.dist,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]


def test_two_ranks_with_a_vllm_each_log_and_say_what_one_process_with_one_does(tmp_path: Path) -> None:
    for part in tiny(corpus(load_env("guess_number", GAME)), vocab_size=400, hidden=64, layers=1, heads=2):
        part.save_pretrained(tmp_path / "model")
    words = ["grpo", "--model.path", str(tmp_path / "model"), *PLAYS, "--tasks-per-step", "2", "--group-size", "4"]
    words += ["--policy.optim.lr", "1e-2", "--sampler", "vllm", "--sampling.cache-tokens", "2048", "--out"]
    command = [sys.executable, "-m", "echelon", "launch", "--nproc", "2", *words, str(tmp_path / "two"), *FSDP]
    around = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr  # vLLM says some things about the machine
    assert cli.main([*words, str(tmp_path / "one")]) == 0
    same(rows(tmp_path / "two"), rows(tmp_path / "one"), 1e-4)
    said, expected = (
        [[turn["text"] for turn in row["turns"]] for row in rows(tmp_path / run, "episodes")] for run in ("two", "one")
    )
    assert said == expected
