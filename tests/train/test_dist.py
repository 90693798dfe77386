"""Ranks that learn together: shares, sums, and two real ones that do what one process does."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore

from echelon.config import DistConfig
from echelon.data.packing import Sampled, pack
from echelon.errors import ConfigError
from echelon.rollout import memory
from echelon.train import dist, parts
from echelon.train.launcher import _ended, _parse
from echelon.train.learner import Learner
from echelon.train.on_ray import held_port
from tests.train import learning_together

ROOT = Path(__file__).parents[2]
TO_THE_LETTER = 1e-5
ROUNDED = 2e-3
"""Of weights of 16 bits: gradients are rounded to 8 binary digits in each micro-batch, and those are cut otherwise."""


def ranks(rank: int, size: int) -> dist.Ranks:
    return dist.Ranks(rank, size, size, DistConfig())


def rows(lengths: list[int]) -> Any:
    return pack([Sampled([1], [2] * (length - 1), [0.0] * (length - 1)) for length in lengths])


def test_micro_batches_are_dealt_in_turn() -> None:
    assert ranks(0, 2).deal("abcde", alike=False) == [("a", True), ("c", True), ("e", True)]
    assert ranks(1, 2).deal("abcde", alike=False) == [("b", True), ("d", True)]


def test_ranks_that_compute_at_once_have_as_many_passes_and_those_too_many_do_not_count() -> None:
    assert ranks(1, 2).deal("abc", alike=True) == [("b", True), ("a", False)]
    assert ranks(2, 3).deal("a", alike=True) == [("a", False)]


def test_micro_batches_are_split_until_every_rank_has_as_many() -> None:
    (whole,) = rows([8, 8, 8, 8]).split(32)
    assert [part.tokens.shape for part in dist.divided([whole], 2)] == [(2, 8), (2, 8)]
    three = rows([8, 8, 8]).split(8)
    assert [part.tokens.shape for part in dist.divided(three, 2)] == [(1, 8)] * 3  # single rows stay as they are


def test_a_batch_that_is_read_is_cut_small_enough_for_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(dist.parts_of(rows([8, 8, 8, 8]), 4096)) == 1
    monkeypatch.setattr(dist, "_ranks", ranks(0, 2))
    assert len(dist.parts_of(rows([8, 8, 8, 8]), 4096)) == 2


def test_shares_are_consecutive_and_leave_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rank in range(3):
        monkeypatch.setattr(dist, "_ranks", ranks(rank, 3))
        found.append(list(range(7))[dist.share(7)])
    assert found == [[0, 1], [2, 3], [4, 5, 6]]


def test_a_process_alone_does_everything_and_asks_nobody() -> None:
    assert dist.ranks() is None
    assert dist.writes()
    assert dist.share(3) == slice(0, 3)
    assert dist.together(["a"]) == ["a"]
    assert dist.union({1: "a"}) == {1: "a"}
    assert dist.agreed(lambda: 5) == 5
    dist.wait()


def test_sums_and_maxima_of_what_ranks_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [{"loss": 1.0, "ratio/max": 2.0}, {"loss": 0.5, "ratio/max": 3.0, "ptx_loss": 4.0}]
    monkeypatch.setattr(dist.Ranks, "gathered", lambda self, value: others)
    assert dist.total(ranks(0, 2), others[0]) == {"loss": 1.5, "ratio/max": 3.0, "ptx_loss": 4.0}


def test_ranks_about_to_learn_from_different_rows_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist.Ranks, "gathered", lambda self, value: [value, [(1, 9)]])
    with pytest.raises(dist.RanksDisagree, match="actor: rank 1 has micro-batches of shapes"):
        dist.check_alike(ranks(0, 2), "actor", rows([8]).split(8))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--nproc 3 grpo a.yaml --steps 2", (3, 1, ["grpo", "a.yaml", "--steps", "2"])),
        ("--nproc=2 --nnodes 2 --rendezvous host:29500 sft", (2, 2, ["sft"])),
        ("sft --nproc 4", (1, 1, ["sft", "--nproc", "4"])),
    ],
)
def test_what_the_launcher_reads_and_what_it_hands_on(words: str, expected: tuple[int, int, list[str]]) -> None:
    asked, recipe = _parse(words.split())
    if not torch.cuda.is_available() or words.startswith("--nproc"):
        assert (asked.nproc, asked.nnodes, recipe) == expected


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--nproc 2", "launch: no recipe to run"),
        ("--nproc -1 sft", "count ranks and machines"),
        ("--nnodes 2 sft", "Give --rendezvous HOST:PORT"),
        ("--rollout-workers 2 sft", "workers of Ray. Give --on ray too"),
        ("--on ray --nproc -1 sft", "count ranks and machines"),
        ("--on ray --nnodes 2 sft", "Give --rendezvous HOST:PORT"),
        ("--on kubernetes sft", "invalid choice: 'kubernetes'"),
        ("--nprocs 2 sft", "unrecognized arguments: --nprocs"),
    ],
)
def test_a_launch_that_cannot_be_meant_is_refused(words: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        _parse(words.split())


def test_a_launch_on_ray_is_the_recipe_with_that_sampler() -> None:
    words = ["--on", "ray", "--rollout-workers", "3", "grpo", "a.yaml", "--steps", "2"]
    assert _parse(words)[1] == ["grpo", "a.yaml", "--steps", "2", "--sampler", "ray", "--rollout-workers", "3"]
    assert _parse(["--on", "ray", "sft"])[1] == ["sft", "--sampler", "ray"]


def test_a_launch_on_ray_has_the_ranks_that_it_is_asked_for() -> None:
    asked, recipe = _parse(["--on", "ray", "--nproc", "2", "--rollout-workers", "4", "grpo"])
    assert (asked.nproc, recipe) == (2, ["grpo", "--sampler", "ray", "--rollout-workers", "4"])
    assert _parse(["--on", "ray", "grpo"])[0].nproc == 0, "one process, which is not launched"


def test_ranks_may_meet_at_a_port_that_is_held_for_them() -> None:
    with held_port() as held:
        port = held.getsockname()[1]
        first = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        TCPStore("127.0.0.1", port).set("said", "here")
        assert first.get("said") == b"here"


def test_the_rank_that_was_killed_is_named_not_those_stopped_because_of_it() -> None:
    with pytest.raises(Exception, match=r"^rank 1 was ended by SIGKILL, so the others were stopped\..* --resume"):
        _ended({0: -15, 1: -9})
    with pytest.raises(Exception, match=r"^rank 1 was ended by SIGKILL"):
        _ended({0: 2, 1: -9})
    assert _ended({0: -15, 1: 2}) == 2
    assert _ended({}) == 0


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"cpu_offload": True}, r"cpu_offload = true: only parts can be so"),
        ({"reduce_every_pass": True}, r"reduce_every_pass = true: only parts can be so"),
        ({"compute_dtype": "bfloat16"}, r"compute_dtype = bfloat16: ddp computes in the type of the weights"),
        ({"timeout": 0.0}, r"timeout = 0\.0: others need time"),
    ],
)
def test_settings_of_ranks_that_cannot_work_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        DistConfig(**settings)


def test_optimizers_whose_state_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ConfigError, match="adafactor keeps sums over whole weights"):
        dist.check_shardable(torch.nn.Linear(1, 1), "adafactor", "actor")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process computes in all scenarios."""
    return learning_together.scenarios(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks compute in them, by strategy."""
    out = tmp_path_factory.mktemp("two") / "results.json"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = [sys.executable, *launcher, learning_together.__file__, str(out)]
    around = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=around, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found | {"folder": out.parent}


def same(found: Any, expected: Any, rel: float) -> None:
    """Two trees of numbers agree."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            same(found[name], value, rel)
    else:
        assert found == pytest.approx(expected, rel=rel)


@pytest.mark.dist
@pytest.mark.parametrize("strategy", list(learning_together.STRATEGIES))
def test_twenty_clipped_steps_of_two_ranks_are_those_of_one_process(
    alone: dict[str, Any], two: dict[str, Any], strategy: str
) -> None:
    assert min(alone["sft"]["grad_norm"]) > learning_together.OPTIM.max_grad_norm  # every gradient was clipped
    assert alone["sft"]["loss"][-1] < alone["sft"]["loss"][0]
    same(two[strategy]["sft"], alone["sft"], TO_THE_LETTER)


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
@pytest.mark.parametrize(
    ("scenario", "rel"),
    [
        ("on the host", TO_THE_LETTER),
        ("one row", TO_THE_LETTER),
        ("adapter", TO_THE_LETTER),
        ("critic", TO_THE_LETTER),
        ("read", TO_THE_LETTER),
        ("moved", TO_THE_LETTER),
        ("given", TO_THE_LETTER),
        ("half", ROUNDED),
        ("saved", ROUNDED),
    ],
)
def test_two_ranks_do_what_one_process_does(
    alone: dict[str, Any], two: dict[str, Any], strategy: str, scenario: str, rel: float
) -> None:
    same(two[strategy][scenario], alone[scenario], rel)


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_learning_goes_on_from_what_ranks_saved_as_if_it_had_gone_on(two: dict[str, Any], strategy: str) -> None:
    saved = two[strategy]["saved"]
    assert saved["again"] == saved["first"]


@pytest.mark.dist
def test_one_process_goes_on_from_parts_that_two_ranks_have_written(alone: dict[str, Any], two: dict[str, Any]) -> None:
    folder = two["folder"] / "zero3-saved" / "moved" / "first"
    files = sorted(path.name for path in (folder / "optimizer").iterdir())
    assert files == [f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)]
    assert not (folder / "optimizer.safetensors").exists()
    learner = Learner(learning_together.model(), learning_together.OPTIM, name="lm")
    learner.load(folder)
    same(learning_together.curve(learner, steps=2, tokens_per_pass=72), alone["moved"], TO_THE_LETTER)


@pytest.mark.dist
def test_each_rank_writes_its_part_alone(two: dict[str, Any]) -> None:
    folder = two["folder"] / "zero3-saved" / "moved" / "first" / "optimizer"
    whole = {name: shape for name, (shape, _) in parts.shapes(folder).items()}
    numbers = 0
    for file in folder.iterdir():
        for name, tensor in load_file(file).items():
            numbers += tensor.numel()
            assert not tensor.ndim or len(tensor) <= -(-whole[name][0] // 2)
    assert numbers == sum(map(math.prod, whole.values()))  # nothing is missing, and nothing is there twice


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_changes_nothing(
    alone: dict[str, Any], two: dict[str, Any], strategy: str
) -> None:
    assert two[strategy]["refused"] == alone["refused"]
    assert alone["refused"]["raised"] == [1.0]


@pytest.mark.dist
def test_more_micro_batches_cost_no_more_sums_over_ranks(two: dict[str, Any]) -> None:
    def summed(strategy: str, rows: int) -> int:
        return sum(count for name, count in two[strategy]["messages"][str(rows)].items() if "reduce" in name)

    assert summed("ddp", 2) == summed("ddp", 8) == 2  # which weights have a gradient, and the gradients
    assert summed("zero3", 2) == summed("zero3", 8) == 3  # two layers, and what is around them
    assert summed("every pass", 8) == 4 * summed("every pass", 2)


@pytest.mark.dist
def test_weights_that_stay_are_gathered_once_a_step(two: dict[str, Any]) -> None:
    gathered = {name: two[name]["messages"]["8"]["_allgather_base_.default"] for name in ("zero2", "zero3")}
    assert gathered == {"zero2": 3, "zero3": 20}  # 3 groups; four passes of 3 forward and 2 back


@pytest.mark.dist
def test_a_rank_holds_what_is_planned_for_it(two: dict[str, Any]) -> None:
    module = learning_together.model()
    learner = Learner(module, learning_together.OPTIM)
    for name, part in (("ddp", ""), ("zero3", "part of the ")):
        planned = memory.needs(
            memory.Plan({"lm": learner}, learning_together.STRATEGIES[name], 24), 2, tokens_per_step=0
        )
        if name == "ddp":  # the buffer of the sum becomes the gradients
            planned["lm: gradients"] //= 2
        for what, size in two[name]["held"].items():
            assert planned[f"lm: {part}{what}"] == pytest.approx(size, rel=0.02), "rank 0 has the longer halves"


def test_scenarios_leave_no_ranks_behind() -> None:
    with learning_together.under(replace(ranks(0, 2))):
        assert dist.ranks() is not None
    assert dist.ranks() is None
