"""The files for clusters: a script for Slurm, run with stand-ins for what a cluster has, and a file for Ray itself."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from echelon import cli
from echelon.config import loading
from echelon.train.launcher import _parse

EXAMPLES = Path(__file__).parents[1] / "examples"


def stand_ins(folder: Path) -> dict[str, str]:
    """Commands that write down how they were called, and by which they are found; the job they are part of."""
    for name in ("ray", "srun", "echelon"):
        note = f'printf "%s\\n" "$RAY_AUTH_MODE $RAY_AUTH_TOKEN" "$RAY_ADDRESS" "$@" > "{folder}/{name}.$1.said"\n'
        (folder / name).write_text(f"#!/bin/bash\n{note}")
        (folder / name).chmod(0o755)
    (folder / "scontrol").write_text("#!/bin/bash\nprintf 'node1\\nnode2\\n'\n")
    (folder / "scontrol").chmod(0o755)
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "node[1-2]"}
    return {**os.environ, **job, "SLURM_JOB_ID": "77", "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(("ranks", "workers"), [("", 7), ("2", 6), ("3", 3)])
def test_the_script_for_ray_on_slurm_gives_each_rank_a_gpu_and_as_many_workers(
    tmp_path: Path, ranks: str, workers: int
) -> None:
    script = EXAMPLES / "slurm_ray.sbatch"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    words = ["bash", str(script), "grpo", "settings.yaml", str(tmp_path / "run"), "--env", "maze", "--model.path", "m"]
    subprocess.run(words, check=True, env=stand_ins(tmp_path) | {"RANKS": ranks}, timeout=300)
    said = {path.name: path.read_text().splitlines() for path in tmp_path.glob("*.said")}
    secret, *told = said["ray.start.said"]
    assert told == ["node1:20077", "start", "--head", "--port=20077", "--num-gpus=4"]
    assert re.fullmatch("token [0-9a-f]{64}", secret)
    others = said["srun.--nodes=1.said"][2:]
    assert others[1:3] == ["--ntasks=1", "--exclude=node1"]
    assert others[3:] == ["ray", "start", "--address=node1:20077", "--num-gpus=4", "--block"]
    assert said["ray.stop.said"][2:] == ["stop"]
    shown, address, command, *typed = said["echelon.launch.said"]
    assert (shown, address, command) == (secret, "node1:20077", "launch")
    asked, (recipe, file, *flags) = _parse(typed)
    assert (asked.on, asked.nproc, recipe, file) == ("ray", int(ranks or 1), "grpo", "settings.yaml")
    settings = loading.load(importlib.import_module("echelon.recipes.grpo").Config, [], flags)
    assert (settings.sampling.sampler, settings.sampling.ray.workers) == ("ray", workers)
    assert settings.sampling.ray.gpus == 1.0
    assert settings.resume


@pytest.mark.ray
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_the_file_of_a_cluster_is_one_that_ray_takes() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole = yaml.safe_load((EXAMPLES / "ray_cluster.yaml").read_text())
    validate_config(prepare_config(whole))
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(whole | {"max_worker": 3}))
    learning, drawing = whole["available_node_types"].values()
    assert learning["resources"]["GPU"] == 0
    assert whole["max_workers"] == drawing["max_workers"]


def test_the_command_in_the_file_of_a_cluster_is_one_of_ours() -> None:
    text = (EXAMPLES / "ray_cluster.yaml").read_text()
    words = text.partition("echelon launch ")[2].partition("'")[0].split()
    recipe, file, *flags = _parse(words)[1]
    assert recipe in cli.recipes()
    assert file == "settings.yaml"
    flags += ["--env", "maze", "--model.path", "m"]
    settings = loading.load(importlib.import_module(f"echelon.recipes.{recipe}").Config, [], flags)
    assert settings.sampling.ray.workers == 4
