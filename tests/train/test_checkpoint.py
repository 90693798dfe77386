"""A checkpoint is whole or it is not there, whatever happens while it is written."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from echelon.errors import CheckpointError, ConfigError
from echelon.train.checkpoint import Checkpoints, find_checkpoint


@dataclass(frozen=True)
class ModelSettings:
    name: str = "tiny"
    settings: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    lr: float = 0.1
    steps: int = 10
    model: ModelSettings = ModelSettings()


ROOT = Path(__file__).parents[2]


class Part:
    """A counter that saves itself; `fault` is what happens in the middle of saving."""

    def __init__(self, value: int = 0, fault: BaseException | None = None) -> None:
        self.value, self.fault = value, fault

    def save(self, folder: Path) -> None:
        (folder / "value.json").write_text(json.dumps(self.value))
        (folder / "deep").mkdir()
        (folder / "deep" / "weights.bin").write_bytes(bytes(range(100)))
        if self.fault:
            raise self.fault

    def load(self, folder: Path) -> None:
        self.value = json.loads((folder / "value.json").read_text())


def begin(folder: Path, **options: Any) -> Checkpoints:
    return Checkpoints(folder, config=options.pop("config", Settings()), **options)


def write(folder: Path, *steps: int, keep_last: int = 9) -> None:
    with begin(folder, keep_last=keep_last) as checkpoints:
        for step in steps:
            checkpoints.save(step, {"actor": Part(step)}, {"stage": f"at {step}"})


def resumed(folder: Path, **options: Any) -> tuple[int, int]:
    """The step restored, and what the part then holds."""
    part = Part(-1)
    with begin(folder, resume=True, **options) as checkpoints:
        step, _ = checkpoints.restore({"actor": part})
    return step, part.value


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_restore_brings_back_the_step_the_parts_and_the_extra(tmp_path: Path) -> None:
    write(tmp_path, 0, 120)
    part = Part()
    with begin(tmp_path, resume=True) as checkpoints:
        assert checkpoints.steps == [0, 120]
        assert checkpoints.restore({"actor": part}) == (120, {"stage": "at 120"})
    assert part.value == 120
    folder = tmp_path / "checkpoints" / "step_000120"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    parts = {"actor/value.json", "actor/deep/weights.bin"}
    assert files == parts | {"config.yaml", "extra.json", "rng.safetensors", "manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == files - {"manifest.json"}


def test_the_random_state_continues_where_it_was_saved(tmp_path: Path) -> None:
    with begin(tmp_path) as checkpoints:
        checkpoints.save(1, {})
    expected = torch.rand(3)
    torch.manual_seed(99)
    with begin(tmp_path, resume=True) as checkpoints:
        checkpoints.restore({})
    assert torch.equal(torch.rand(3), expected)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 0, 10, 20, 1_000_000, keep_last=2)
    assert names(tmp_path) == ["step_000020", "step_1000000"]


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    with begin(tmp_path) as checkpoints:
        for value in (1, 2):
            checkpoints.save(5, {"actor": Part(value)})
    assert resumed(tmp_path) == (5, 2)
    assert names(tmp_path) == ["step_000005"]


@pytest.mark.parametrize("fault", [ValueError("a bug in the part"), KeyboardInterrupt()])
def test_an_error_in_the_middle_of_saving_leaves_the_earlier_checkpoints(tmp_path: Path, fault: BaseException) -> None:
    write(tmp_path, 10)
    with begin(tmp_path, resume=True) as checkpoints, pytest.raises(type(fault)):
        checkpoints.save(20, {"actor": Part(20, fault)})
    assert names(tmp_path) == ["step_000010"]
    assert resumed(tmp_path) == (10, 10)


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_clear_error_and_leaves_the_earlier_checkpoints(tmp_path: Path) -> None:
    write(tmp_path, 10)
    with begin(tmp_path, resume=True) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.save(20, {"actor": Part(20, FULL)})
    assert str(caught.value) == (
        f"{tmp_path}/checkpoints/step_000020: step 20 could not be saved (No space left on device). "
        "Checkpoints still there: 10. Make room or choose another disk, then continue with --resume."
    )
    assert names(tmp_path) == ["step_000010"]
    assert resumed(tmp_path) == (10, 10)


@pytest.mark.parametrize("call", range(1, 12))
def test_a_disk_that_fails_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    write(tmp_path, 10)
    calls = 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise FULL

    with begin(tmp_path, resume=True, keep_last=1) as checkpoints:
        monkeypatch.setattr(os, "fsync", fsync)
        try:
            checkpoints.save(20, {"actor": Part(20)})
        except CheckpointError:
            failed = True
        else:
            failed = False
    assert failed == (call <= 10)  # 5 files, the manifest, 3 folders, and the folder above: all are forced to the disk
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    assert resumed(tmp_path) in [(10, 10), (20, 20)]


KILLED = """
import os, signal, sys
from pathlib import Path
from echelon.config import RunConfig
from echelon.train.checkpoint import Checkpoints

class Part:
    def save(self, folder):
        (folder / "value.json").write_text("20")
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoints(Path(sys.argv[1]), config=RunConfig(out="r"), resume=True).save(20, {"actor": Part()})
"""


def test_a_process_killed_while_saving_leaves_the_earlier_checkpoints_and_no_lock(tmp_path: Path) -> None:
    write(tmp_path, 10)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert names(tmp_path) == [".tmp-step_000020", "step_000010"]
    assert resumed(tmp_path) == (10, 10)
    assert names(tmp_path) == ["step_000010"]


def test_a_process_killed_while_replacing_a_checkpoint_leaves_one_of_the_two(tmp_path: Path) -> None:
    write(tmp_path, 10)
    home = tmp_path / "checkpoints"
    (home / "step_000010").rename(home / ".old-step_000010")  # the moment between the two renames
    assert resumed(tmp_path) == (10, 10)
    assert names(tmp_path) == ["step_000010"]


HOLDER = """
import sys
from pathlib import Path
from echelon.config import RunConfig
from echelon.train.checkpoint import Checkpoints

with Checkpoints(Path(sys.argv[1]), config=RunConfig(out="r")):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_cannot_write_to_the_same_run(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdin
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(CheckpointError, match=f"process {holder.pid} is writing to this run"):
            begin(tmp_path)
        holder.stdin.close()
    begin(tmp_path).close()


def test_a_refused_start_gives_the_lock_back(tmp_path: Path) -> None:
    begin(tmp_path).close()
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        begin(tmp_path, resume=True)
    begin(tmp_path).close()


def test_resuming_what_never_started_is_an_error_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"typo: there is no checkpoint to resume from\. Start without --resume"):
        begin(tmp_path / "typo", resume=True)
    assert list(tmp_path.iterdir()) == []


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["actor/value.json", "actor/deep/weights.bin", "config.yaml", "extra.json", "rng.safetensors"]
)
def test_one_flipped_bit_makes_the_checkpoint_before_it_the_newest(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 10, 20)
    broken = tmp_path / "checkpoints" / "step_000020"
    flip(broken / name, -1)
    assert resumed(tmp_path) == (10, 10)
    assert capsys.readouterr().err == f"{broken} is skipped: {name} does not match its checksum\n"


def test_a_manifest_with_any_flipped_bit_is_not_believed(tmp_path: Path) -> None:
    write(tmp_path, 10, 20)
    manifest = tmp_path / "checkpoints" / "step_000020" / "manifest.json"
    whole = manifest.read_bytes()
    for position in [index for index, byte in enumerate(whole) if not chr(byte).isspace()][::7]:
        flip(manifest, position)
        assert resumed(tmp_path) == (10, 10)
        manifest.write_bytes(whole)
    assert resumed(tmp_path) == (20, 20)


def test_an_incomplete_checkpoint_is_skipped_and_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 10, 20, 30, 40)
    home = tmp_path / "checkpoints"
    (home / "step_000040" / "manifest.json").unlink()
    (home / "step_000030" / "actor" / "value.json").unlink()
    (home / "step_000020" / "actor" / "value.json").write_text("2")
    assert resumed(tmp_path) == (10, 10)
    assert capsys.readouterr().err.splitlines() == [
        f"{home}/step_000040 is skipped: it has no manifest.json, so it was not finished",
        f"{home}/step_000030 is skipped: actor/value.json cannot be read (No such file or directory)",
        f"{home}/step_000020 is skipped: actor/value.json has 1 bytes instead of 2",
    ]


def test_no_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, 10)
    flip(tmp_path / "checkpoints" / "step_000010" / "extra.json", 0)
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is whole\. Start a new run"):
        resumed(tmp_path)


def test_a_skipped_checkpoint_never_crowds_out_the_whole_one(tmp_path: Path) -> None:
    write(tmp_path, 10, 20)
    flip(tmp_path / "checkpoints" / "step_000020" / "extra.json", 0)
    with begin(tmp_path, resume=True, keep_last=1) as checkpoints:
        checkpoints.restore({})
        checkpoints.save(15, {"actor": Part(15)})
    assert names(tmp_path) == ["step_000015"]


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "a", 0)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 0}\n')
    for name in "ab":
        with pytest.raises(CheckpointError, match=r"there is a run already.*--resume, or choose another --out"):
            begin(tmp_path / name)


def test_a_run_killed_before_its_first_checkpoint_is_started_again(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".tmp-step_000000" / "actor").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").touch()
    with begin(tmp_path) as checkpoints:
        checkpoints.save(0, {"actor": Part(7)})
    assert resumed(tmp_path) == (0, 7)


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/run: no run can be kept there \(Not a directory\)"):
        begin(tmp_path / "file" / "run")


def test_at_least_one_checkpoint_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep_last = 0"):
        begin(tmp_path, keep_last=0)


def test_a_run_may_grow_but_keeps_its_other_settings(tmp_path: Path) -> None:
    write(tmp_path, 10)
    assert resumed(tmp_path, config=Settings(steps=20)) == (10, 10)
    changed = Settings(lr=0.2, steps=20, model=ModelSettings(settings={"layers": 4}))
    with pytest.raises(CheckpointError) as caught:
        resumed(tmp_path, config=changed)
    assert str(caught.value) == (
        f"{tmp_path}/checkpoints/step_000010: it was written with other settings: lr (0.1 → 0.2), "
        "model.settings.layers (None → 4). A run keeps its settings. Set them back, or start a new run with another "
        "--out."
    )


@dataclass(frozen=True)
class Sharing:
    workers: int = 2
    rate: float = 1e-5
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class NewerModel(ModelSettings):
    parts: int = 1
    sharing: Sharing = Sharing(rate=1e-7)


@dataclass(frozen=True)
class Newer(Settings):
    model: NewerModel = NewerModel(parts=3)
    more: dict[str, int] = field(default_factory=dict)
    depth: tuple[float, float] = (0.9, 0.999)
    threads: int = 0


def test_a_text_that_looks_like_something_else_is_the_same_text(tmp_path: Path) -> None:
    for number, text in enumerate(("2026-13-45", "1:30", "no", "1e-3")):
        config = Settings(model=ModelSettings(name=text))
        with begin(tmp_path / str(number), config=config) as checkpoints:
            checkpoints.save(1, {"actor": Part(1)})
        assert resumed(tmp_path / str(number), config=config) == (1, 1)


def test_a_setting_that_is_newer_than_the_run_had_its_default(tmp_path: Path) -> None:
    write(tmp_path, 10)
    assert resumed(tmp_path, config=Newer(steps=20, threads=2)) == (10, 10)
    with begin(tmp_path, config=Newer(steps=20), resume=True) as checkpoints:
        checkpoints.save(20, {"actor": Part(20)})
    assert resumed(tmp_path, config=Newer(steps=30)) == (20, 20)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Newer(depth=(0.9, 0.99)), "depth ([0.9, 0.999] → [0.9, 0.99])"),
        (Newer(more={"a": 1}), "more.a (None → 1)"),
        (Newer(model=NewerModel(parts=1)), "model.parts (3 → 1)"),
        (Newer(model=NewerModel(parts=3, sharing=Sharing())), "model.sharing.rate (1e-07 → 1e-05)"),
        (Newer(model=NewerModel(parts=3, settings={"a": 1})), "model.settings.a (None → 1)"),
    ],
)
def test_a_newer_setting_with_another_value_than_its_default_is_a_change(
    tmp_path: Path, config: Newer, said: str
) -> None:
    write(tmp_path, 10)
    with pytest.raises(CheckpointError) as caught:
        resumed(tmp_path, config=config)
    assert f"it was written with other settings: {said}. A run keeps" in str(caught.value)


@dataclass(frozen=True)
class Filled(Settings):
    model: ModelSettings = ModelSettings(settings={"layers": 2})


def test_an_entry_of_a_free_mapping_is_not_a_newer_setting(tmp_path: Path) -> None:
    write(tmp_path, 10)  # with an empty mapping, which the run gave itself
    with pytest.raises(CheckpointError, match=r"settings: model\.settings\.layers \(None → 2\)\. A run keeps"):
        resumed(tmp_path, config=Filled())
    with begin(tmp_path / "other", config=Filled()) as checkpoints:
        checkpoints.save(1, {"actor": Part()})
    with pytest.raises(CheckpointError, match=r"settings: model\.settings\.layers \(2 → None\)\. A run keeps"):
        resumed(tmp_path / "other")


@dataclass(frozen=True)
class Older(Settings):
    depth: float | None = None
    name: str = ""
    tags: tuple[str, ...] = ()
    free: dict[str, int] = field(default_factory=dict)


def test_a_setting_that_is_gone_is_named(tmp_path: Path) -> None:
    with begin(tmp_path, config=Older(depth=0.5, free={"a": 1}, tags=("x",))) as checkpoints:
        checkpoints.save(10, {"actor": Part(10)})
    with pytest.raises(CheckpointError) as caught:
        resumed(tmp_path, config=Settings(lr=0.2))
    assert str(caught.value) == (
        f"{tmp_path}/checkpoints/step_000010: it was written with settings that this recipe does not have: "
        "depth (0.5), free.a (1), tags ([x]). Resume it with the recipe and the version that wrote it, or start a new "
        "run with another --out."
    )


def test_a_setting_that_is_gone_and_held_nothing_is_not_missed(tmp_path: Path) -> None:
    with begin(tmp_path, config=Older()) as checkpoints:
        checkpoints.save(10, {"actor": Part(10)})
    assert resumed(tmp_path) == (10, 10)


def test_a_part_that_was_not_saved_is_missed(tmp_path: Path) -> None:
    write(tmp_path, 10)
    with (
        begin(tmp_path, resume=True) as checkpoints,
        pytest.raises(CheckpointError, match="holds 'actor', but this run also needs 'critic', 'replay'"),
    ):
        checkpoints.restore({"actor": Part(), "replay": Part(), "critic": Part()})


class Model(Part):
    """A part that is a model folder."""

    def save(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}")


def test_a_model_is_found_in_a_run_a_checkpoint_or_its_own_folder(tmp_path: Path) -> None:
    with begin(tmp_path) as checkpoints:
        older = checkpoints.save(1, {"actor": Model(), "coach": Model()})
        newest = checkpoints.save(2, {"actor": Model(), "coach": Model()})
        # Reading needs no lock.
        assert find_checkpoint(tmp_path) == newest / "actor"
    assert find_checkpoint(tmp_path / "checkpoints", "coach") == newest / "coach"
    assert find_checkpoint(older, "coach") == older / "coach"
    assert find_checkpoint(older / "actor") == older / "actor"
    flip(newest / "extra.json", 0)
    assert find_checkpoint(tmp_path) == older / "actor"
    with pytest.raises(CheckpointError, match=r"extra\.json does not match its checksum\. Use another checkpoint"):
        find_checkpoint(newest)


def test_a_path_without_a_model_says_what_it_is_instead(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: is not a folder\. Name a model folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json, no manifest\.json and no checkpoints"):
        find_checkpoint(tmp_path)
    with begin(tmp_path) as checkpoints:
        checkpoints.save(1, {"strategist": Model(), "replay": Part()})
    with pytest.raises(CheckpointError, match=r"holds no model 'actor', but 'strategist'\. Name one"):
        find_checkpoint(tmp_path)
