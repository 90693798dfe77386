"""Two ranks whose rollouts are drawn by workers of Ray: the files of one process, and a rank that dies.

They are started by torch's launcher, and the last ones on a cluster of two machines.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from echelon import cli
from echelon.config import RayConfig, SamplingConfig
from echelon.envs import load_env
from echelon.errors import ConfigError
from echelon.rollout.setup import open_sampler
from echelon.train import launcher, on_ray
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
import os, signal, time

calls = []


def reward(completions, **_):
    calls.append(1)
    if os.environ.get("RANK") == os.environ.get("DEADLY") and len(calls) == 2:
        os.kill(os.getppid() if "WITH_HOST" in os.environ else os.getpid(), signal.SIGKILL)
        time.sleep(60)
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
    """The processes that still run of such a job after two minutes: agents of Ray take long on a busy machine."""
    wanted, until = f"MARKED_BY={marked}\0".encode(), time.monotonic() + 120
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
    commands = {"grpo": GRPO, "archer": [*ARCHER, *FSDP]}
    told = [[*words, *model, "--sampler", "ray", "--out", str(tmp_path / name)] for name, words in commands.items()]
    (tmp_path / "commands.json").write_text(json.dumps(told))
    command = [sys.executable, recipes_together.__file__, str(tmp_path / "commands.json")]
    done = subprocess.run(command, env=around(tmp_path), capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    for name, words in ("grpo", GRPO), ("archer", ARCHER):
        alone = tmp_path / f"{name}-alone"
        assert cli.main([*words, *model, "--out", str(alone)]) == 0
        run = tmp_path / name
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


def test_the_cluster_that_settings_or_the_environment_name_is_where_ranks_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    load = partial(cli._load, package="echelon.recipes")
    words = ["feedback", "--solver.model.path", "m", "--env", "maze", "--out", "o", "--sampler", "ray"]
    assert launcher._cluster(load(words)) is None
    other = ["--coach.sampling.ray.address", "far:1", "--coach.sampling.ray.workers", "4"]
    assert launcher._cluster(load([*words, *other])) == ("far:1", [RayConfig(workers=4, address="far:1")])
    monkeypatch.setenv("RAY_ADDRESS", "near:2")
    assert launcher._cluster(load(words)) == ("near:2", [RayConfig()])
    assert launcher._cluster(load([*words, "--sampler", "local"])) is None


def test_ranks_of_a_machine_are_in_a_row_and_see_each_others_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [on_ray.Here(f"node{n % 2}", f"10.0.0.{n % 2}", 100 + n, (str(n // 2),)) for n in range(4)]
    monkeypatch.setattr("ray.get", lambda found: found)

    class Named:
        def __init__(self, number: int) -> None:
            self.number, self.where = number, self

        def remote(self) -> on_ray.Here:
            return told[self.number]

    hosts, variables = on_ray._ranked([Named(number) for number in range(4)], {"RAY_ADDRESS": "far:1"})
    assert [host.number for host in hosts] == [0, 2, 1, 3]
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
    assert [[each[name] for name in names] for each in variables] == [
        ["0", "0", "2", "4", "0,1"],
        ["1", "1", "2", "4", "0,1"],
        ["2", "0", "2", "4", "0,1"],
        ["3", "1", "2", "4", "0,1"],
    ]
    assert {(each["MASTER_ADDR"], each["MASTER_PORT"], each["RAY_ADDRESS"]) for each in variables} == {
        ("10.0.0.0", "100", "far:1")
    }


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two machines with two cores each: two ranks and two workers fill it."""
    import ray
    from ray.cluster_utils import Cluster

    room = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=room | {"include_dashboard": False})
    cluster.add_node(**room)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


def launched(address: str, *words: str, marked: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """`echelon launch` of these words on two ranks of a cluster, to its end."""
    command = [sys.executable, "-m", "echelon", "launch", "--on", "ray", "--nproc", "2", *words]
    told = around(marked, RAY_ADDRESS=address, **more)
    return subprocess.run(command, env=told, capture_output=True, text=True, timeout=600)


def all_free() -> bool:
    """Whether all cores of the cluster are free again, within half a minute."""
    import ray

    until = time.monotonic() + 120
    while ray.available_resources().get("CPU") != 4.0:
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


@pytest.mark.slow
def test_ranks_on_two_machines_of_a_cluster_log_what_one_process_does(
    model: list[str], cluster: str, tmp_path: Path
) -> None:
    words = [*GRPO, *model, "--out"]
    done = launched(cluster, *words, str(tmp_path / "two"), *FSDP, marked=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("grpo 1/2") == 1
    assert left(tmp_path) == []
    assert all_free()
    assert cli.main([*words, str(tmp_path / "one")]) == 0
    same(rows(tmp_path / "two"), rows(tmp_path / "one"), 1e-4)


@pytest.mark.slow
def test_what_a_cluster_lacks_is_said_in_one_line(model: list[str], cluster: str, tmp_path: Path) -> None:
    words = [*GRPO, *model, "--sampling.ray.timeout", "1", "--out", str(tmp_path / "run")]
    done = launched(cluster, "--rollout-workers", "4", *words, marked=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "launch: no room within 1 s: 2 ranks and 4 workers ask for 6 CPUs where the cluster has 4 and 0 GPUs where the "
        "cluster has 0. Ask for less with --nproc, --rollout-workers or sampling.ray, or add machines.\n"
    )
    assert all_free()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "line"),
    [
        pytest.param({}, "rank 1 was ended by SIGKILL, so", id="itself"),
        pytest.param({"WITH_HOST": "1"}, "rank 1 is gone (The actor died", id="with-its-host"),
    ],
)
def test_a_rank_that_is_killed_on_a_cluster_ends_the_job_in_one_line(
    model: list[str], cluster: str, tmp_path: Path, more: dict[str, str], line: str
) -> None:
    (tmp_path / "deadly.py").write_text(DEADLY)
    words = [*GRPO, *model, "--reward", f"{tmp_path / 'deadly.py'}:reward", "--save-every", "1"]
    words += ["--out", str(tmp_path / "run")]
    done = launched(cluster, *words, marked=tmp_path, DEADLY="1", **more)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith(line)
    assert done.stderr.endswith(
        "so the others were stopped. Start the same command again with --resume; it goes on from the newest whole "
        "checkpoint.\n"
    )
    assert left(tmp_path) == []
    assert all_free()
    done = launched(cluster, *words, "--resume", marked=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1]


@pytest.mark.slow
def test_when_the_launcher_is_killed_its_ranks_and_their_workers_end(
    model: list[str], cluster: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "echelon", "launch", "--on", "ray", "--nproc", "2", *GRPO, *model]
    command += ["--steps", "100000", "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, env=around(tmp_path, RAY_ADDRESS=cluster), stdout=subprocess.DEVNULL) as running:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert running.poll() is None
            time.sleep(0.2)
        running.kill()
    assert left(tmp_path) == []
    assert all_free()
