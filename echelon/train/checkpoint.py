"""Checkpoints of a run: written whole or not at all, checked when read, one writer at a time.

Knows files, checksums and locks, and which settings a run keeps; knows nothing of what is in a part. Parts save
themselves.

    <run>/.lock
    <run>/checkpoints/step_000120/<part>/…  config.yaml  extra.json  rng.safetensors  manifest.json (written last)
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeAlias, get_origin, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from echelon.config.loading import completed, settings_of, show, to_yaml
from echelon.errors import CheckpointError, ConfigError
from echelon.train import dist
from echelon.train.clock import phase

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

Label: TypeAlias = int | Literal["auto", "latest", "best"]
"""Which model of a run: that of a step, the newest whole one, or the best kept; auto is the best, else the newest."""

MAY_CHANGE = frozenset(
    {"steps", "epochs", "max_steps", "resume", "save_every", "keep_last", "threads", "dry_run", "traceback", "out"}
    | {"log.to", "log.project", "log.name", "log.quiet", "log.tokens", "dist.strategy", "dist.reshard_after_forward"}
    | {"dist.cpu_offload", "dist.reduce_every_pass", "dist.timeout", "sampling.ray.workers", "sampling.ray.address"}
    | {"sampling.ray.cpus", "sampling.ray.gpus", "sampling.ray.in_flight", "sampling.ray.timeout", "asynchronous.alarm"}
)
"""Settings that may differ when a run is resumed, of every level where there are several."""

_STEP = re.compile(r"step_(\d{6,})")
_UNFINISHED = ".tmp-"
_REPLACED = ".old-"
_NO_LOCKS_HERE = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)


class Saveable(Protocol):
    """Anything that survives a kill: a learner, a replay, a loader."""

    def save(self, folder: Path) -> None:
        """Write everything needed to continue into `folder`, which exists and is empty."""
        ...

    def load(self, folder: Path) -> None:
        """Become what was saved there."""
        ...


@runtime_checkable
class Attends(Protocol):
    """A part that ranks may hold in pieces: those that do not save it must be there when it is saved."""

    def attend(self, folder: Path) -> list[Path]:
        """Write what this rank holds into the folder that another one saves to; returns the files it wrote."""
        ...


class Checkpoints:
    """A run directory, claimed by this process, and the checkpoints in it.

    Of several ranks rank 0 claims it and writes what is whole; what ranks hold in parts each writes itself. All read.

    A recipe saves step 0 before it trains, so everything that has metrics has a checkpoint: a run killed before that is
    simply started again, and one killed later is resumed. While it is open no other process can claim the directory.

    Raises CheckpointError when another process writes there, when there is a run already and `resume` is False, and
    when `resume` is True and there is none.
    """

    def __init__(self, folder: Path, *, config: DataclassInstance, keep_last: int = 2, resume: bool = False) -> None:
        if keep_last < 1:
            raise ConfigError(
                f"keep_last = {keep_last}: a run needs its newest checkpoint. Set keep_last to 1 or more."
            )
        self.folder = folder
        self._home = folder / "checkpoints"
        self._config, self._keep_last = config, keep_last
        self._lock: int | None = None
        if dist.writes():
            self._open(resume)
        dist.wait()

    def _open(self, resume: bool) -> None:
        folder = self.folder
        if resume and not self._home.is_dir():
            raise _nothing_to_resume(folder)
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            self._lock = _claim(folder)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: no run can be kept there ({error.strerror}). Choose another --out."
            ) from error
        try:
            self._clean()
            self._check_start(resume)
        except OSError as error:
            self.close()
            raise CheckpointError(
                f"{error.filename}: {error.strerror}. Set it right, or choose another --out."
            ) from error
        except CheckpointError:
            self.close()
            raise

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order; whether each is whole is seen when it is read."""
        return sorted(_steps(self._home))

    @phase("saving")
    def save(self, step: int, parts: Mapping[str, Saveable], extra: Mapping[str, JSON] | None = None) -> Path:
        """Write a checkpoint that says: `step` steps are done. Then drop all but the newest `keep_last`.

        Saves every part, `extra`, the config and torch's global random state. It appears under its name only when every
        byte is on the disk. If that fails, the earlier checkpoints are untouched. Raises CheckpointError on a full disk
        and other input or output errors; what a part raises otherwise passes through.
        """
        final = self._home / f"step_{step:06d}"
        unfinished = self._home / (_UNFINISHED + final.name)
        try:
            self._make(unfinished, parts)
            theirs = _save_parts(unfinished, parts)
            if dist.writes():
                self._seal(unfinished, {"step": step, "parts": sorted(parts)}, extra or {}, theirs)
                self._publish(unfinished, final)
                self._drop_all_but_newest(step)
        except (OSError, SafetensorError) as error:
            _remove(unfinished)
            reason = getattr(error, "strerror", None) or str(error)
            kept = ", ".join(map(str, self.steps)) or "none"
            raise CheckpointError(
                f"{final}: step {step} could not be saved ({reason}). Checkpoints still there: {kept}. "
                "Make room or choose another disk, then continue with --resume."
            ) from error
        except BaseException:
            _remove(unfinished)
            raise
        return final

    def restore(self, parts: Mapping[str, Saveable]) -> tuple[int, dict[str, Any]]:
        """Load every part from the newest whole checkpoint; returns its step and its `extra`.

        A checkpoint that is incomplete or does not match its checksums is skipped, with a notice on stderr; the next
        save removes it. Raises CheckpointError if none is whole, if a part is missing, or if the config differs in a
        setting that must not change within a run (`MAY_CHANGE` may; `steps` grows to train longer).
        """
        path = dist.agreed(lambda: _newest_whole(self._home))
        manifest = _read_manifest(path)
        if missing := sorted(set(parts) - set(manifest["parts"])):
            raise CheckpointError(
                f"{path}: holds {_listed(manifest['parts'])}, but this run also needs {_listed(missing)}. "
                "Resume it with the recipe that wrote it."
            )
        _check_config((path / "config.yaml").read_text(encoding="utf-8"), self._config, path)
        for name, part in parts.items():
            part.load(path / name)
        _set_random_state(load_file(path / "rng.safetensors"))  # last: loading may draw numbers
        extra = json.loads((path / "extra.json").read_text(encoding="utf-8"))
        dist.wait()  # the next save may remove what another rank still reads
        return int(manifest["step"]), extra

    def close(self) -> None:
        """Let other processes have the directory; harmless when repeated."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _clean(self) -> None:
        """Finish what a killed process left halfway: nothing with a dot in front is a checkpoint."""
        for path in self._home.glob(f"{_REPLACED}*"):
            final = self._home / path.name.removeprefix(_REPLACED)
            if final.exists():
                shutil.rmtree(path)
            else:
                path.rename(final)
        for path in self._home.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path)

    def _check_start(self, resume: bool) -> None:
        if resume and not self.steps:
            raise _nothing_to_resume(self.folder)
        metrics = self.folder / "metrics.jsonl"
        begun = bool(self.steps) or (metrics.exists() and metrics.stat().st_size > 0)
        if begun and not resume:
            raise CheckpointError(
                f"{self.folder}: there is a run already, and it is never overwritten. Continue it with --resume, "
                "or choose another --out."
            )

    def _make(self, folder: Path, parts: Mapping[str, Saveable]) -> None:
        """A folder with an empty one for each part, there before any rank writes into it."""
        if dist.writes():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name in parts:
                assert re.fullmatch(r"\w[\w-]*", name), f"not a folder name: {name}"
                (folder / name).mkdir()
        dist.wait()

    def _seal(
        self, folder: Path, said: Mapping[str, JSON], extra: Mapping[str, JSON], theirs: Mapping[str, JSON]
    ) -> None:
        """Write the rest, and the manifest: what is `said`, and a line for each file; other ranks know `theirs`."""
        (folder / "extra.json").write_text(json.dumps(extra, allow_nan=False), encoding="utf-8")
        (folder / "config.yaml").write_text(to_yaml(self._config), encoding="utf-8")
        save_file(_random_state(), folder / "rng.safetensors")
        own = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
        files = {**{name: _line(path) for name, path in own.items() if name not in theirs}, **theirs}
        body = {**said, "files": dict(sorted(files.items()))}
        manifest = folder / "manifest.json"
        manifest.write_text(json.dumps({**body, "sha256": _sha256_of(body)}, indent=1), encoding="utf-8")
        _sync(manifest)
        for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            _sync(path)

    def _publish(self, unfinished: Path, final: Path) -> None:
        """Give the folder its name. One of the same name makes way without a moment in which neither is on the disk."""
        replaced = self._home / (_REPLACED + final.name)
        if final.exists():
            final.rename(replaced)
        unfinished.rename(final)
        _sync(self._home)
        shutil.rmtree(replaced, ignore_errors=True)

    def _drop_all_but_newest(self, step: int) -> None:
        # Later ones than the step just saved are leftovers that could not be restored: this run will pass them again.
        keep = [other for other in self.steps if other <= step][-self._keep_last :]
        for other, path in _steps(self._home).items():
            if other not in keep:
                gone = path.rename(self._home / f"{_UNFINISHED}{path.name}")  # half removed, it is no candidate
                shutil.rmtree(gone, ignore_errors=True)  # what is left goes when the run is next opened


def find_checkpoint(path: Path, role: str = "actor", label: Label = "latest") -> Path:
    """The Hugging Face folder meant by `path`: a model folder, a checkpoint, or a run directory, of which `label` says
    which model.

    In a checkpoint it is the folder of `role`. Raises CheckpointError that says what was found instead.
    """
    home = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    is_run = home != path or bool(_steps(home))
    if label not in ("auto", "latest") and not is_run:
        raise CheckpointError(f"label = {label}: '{path}' is no run directory, so there is no choice. Leave it out.")
    if label in ("auto", "best") and _is_model(path / "best"):
        return path / "best"
    if label == "best":
        raise CheckpointError(
            f"label = best: {path} kept no best model; sft, reward and dpo do, with rows held out. "
            f"Give latest, or one of the steps {', '.join(map(str, sorted(_steps(home))))}."
        )
    if _is_model(path):
        return path
    checkpoint = _of_step(home, label) if isinstance(label, int) else whole_checkpoint(path)
    if not _is_model(checkpoint / role):
        models = sorted(child.name for child in checkpoint.iterdir() if _is_model(child))
        raise CheckpointError(f"{checkpoint}: holds no model '{role}', but {_listed(models)}. Name one of these roles.")
    return checkpoint / role


def whole_checkpoint(path: Path) -> Path:
    """The checkpoint meant by `path`: itself, or the newest whole one of a run directory. Raises CheckpointError."""
    if path.is_dir() and (_STEP.fullmatch(path.name) or (path / "manifest.json").is_file()):
        if problem := _problem(path):
            raise CheckpointError(f"{path}: {problem}. Use another checkpoint.")
        return path
    if (path / "checkpoints").is_dir() or _steps(path):
        return _newest_whole(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    what = "has no config.json, no manifest.json and no checkpoints" if path.is_dir() else "is not a folder"
    raise CheckpointError(f"{path}: {what}. Name a model folder, a checkpoint or a run directory.")


def _of_step(home: Path, step: int) -> Path:
    """The checkpoint of one step, if it is whole."""
    found = _steps(home)
    if step not in found:
        raise CheckpointError(
            f"label = {step}: {home} has no checkpoint of that step. "
            f"There are: {', '.join(map(str, sorted(found))) or 'none'}."
        )
    return whole_checkpoint(found[step])


def _nothing_to_resume(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder}: there is no checkpoint to resume from. Start without --resume, "
        "or name the directory of the run with --out."
    )


def _claim(folder: Path) -> int | None:
    """An exclusive lock that ends with the process however it ends; the file says who holds it."""
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise CheckpointError(
            f"{folder}: process {holder} is writing to this run. Wait for it or stop it, or choose another --out."
        ) from error
    except OSError as error:
        os.close(lock)
        if error.errno not in _NO_LOCKS_HERE:
            raise
        _notice(f"{folder}: this file system has no locks. Make sure that one process only writes to the run.")
        return None
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())
    return lock


def _steps(home: Path) -> dict[int, Path]:
    """Step → checkpoint folder, whole or not."""
    matches = ((_STEP.fullmatch(path.name), path) for path in (home.iterdir() if home.is_dir() else ()))
    return {int(match[1]): path for match, path in matches if match and path.is_dir()}


def _newest_whole(home: Path) -> Path:
    """The newest checkpoint that matches its checksums; each one skipped is named on stderr."""
    found = sorted(_steps(home).items(), reverse=True)
    for _, path in found:
        problem = _problem(path)
        if problem is None:
            return path
        _notice(f"{path} is skipped: {problem}")
    raise CheckpointError(
        f"{home}: "
        + ("none of its checkpoints is whole." if found else "there is no checkpoint.")
        + " Start a new run."
    )


def _problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if every file is there as it was written."""
    try:
        files = _read_manifest(checkpoint)["files"]
    except FileNotFoundError:
        return "it has no manifest.json, so it was not finished"
    except (OSError, ValueError) as error:
        return f"its manifest.json cannot be used ({error})"
    for name, wanted in files.items():
        path = checkpoint / name
        try:
            if path.stat().st_size != wanted["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {wanted['size']}"
            if _sha256(path) != wanted["sha256"]:
                return f"{name} does not match its checksum"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _sha256_of(manifest):
        raise ValueError("it does not match its checksum")
    return manifest


def _check_config(saved: str, config: DataclassInstance, checkpoint: Path) -> None:
    """Raise CheckpointError if a run would continue under other settings than it began with.

    A setting that is newer than the run had its default then. One that is gone cannot be kept, unless it held nothing.
    """
    old, new = (dict(_flat(completed(type(config), text))) for text in (saved, to_yaml(config)))
    differing = [key for key in sorted(old.keys() | new.keys()) if _differs(key, old, new)]
    refused = [key for key in differing if key[max(key.find("sampling.ray."), 0) :] not in MAY_CHANGE]
    if gone := [key for key in refused if not _is_setting(key, type(config))]:
        values = ", ".join(f"{key} ({show(old[key])})" for key in gone)
        raise CheckpointError(
            f"{checkpoint}: it was written with settings that this recipe does not have: {values}. "
            "Resume it with the recipe and the version that wrote it, or start a new run with another --out."
        )
    if refused:
        changes = ", ".join(f"{key} ({old.get(key)} → {new.get(key)})" for key in refused)
        raise CheckpointError(
            f"{checkpoint}: it was written with other settings: {changes}. A run keeps its settings. "
            "Set them back, or start a new run with another --out."
        )


def _differs(key: str, old: Mapping[str, object], new: Mapping[str, object]) -> bool:
    """Whether a setting says something else; where one side lacks it, whether the other says anything."""
    if key in old and key in new:
        return old[key] != new[key]
    return (old[key] if key in old else new[key]) not in (None, "", [], {})


def _is_setting(key: str, config: type[DataclassInstance]) -> bool:
    """Whether the recipe has this setting, or the free mapping that it is an entry of."""
    settings, block = settings_of(config), key.rpartition(".")[0]
    return key in settings or get_origin(settings.get(block)) is dict


def _flat(tree: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted key → value of everything that is not a mapping with entries."""
    if not isinstance(tree, dict) or not tree:
        if prefix:
            yield prefix, tree
        return
    for key, value in tree.items():
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda:{index}": device for index, device in enumerate(torch.cuda.get_rng_state_all())}
    return state


def _set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda:{index}" in state:
            torch.cuda.set_rng_state(state[f"cuda:{index}"], index)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _save_parts(folder: Path, parts: Mapping[str, Saveable]) -> dict[str, JSON]:
    """Save all parts, each rank what it holds of them; returns the manifest's lines of what others have written."""
    written: list[Path] = []
    for name, part in parts.items():
        if dist.writes():
            part.save(folder / name)
        elif isinstance(part, Attends):
            written += part.attend(folder / name)
    return dist.union({path.relative_to(folder).as_posix(): _line(path) for path in written})


def _remove(unfinished: Path) -> None:
    """Take away what a save has left halfway; what another rank still writes there goes when the run is next opened."""
    if dist.writes():
        shutil.rmtree(unfinished, ignore_errors=True)


def _line(path: Path) -> dict[str, JSON]:
    """Force a finished file to the disk; returns its line of the manifest."""
    _sync(path)
    return {"sha256": _sha256(path), "size": path.stat().st_size}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "nothing"


def _notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
