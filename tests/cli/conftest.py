"""A directory with things that are wrong in it, and commands typed there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from echelon import cli


@dataclass
class Place:
    """A working directory, and the command typed there."""

    folder: Path
    capsys: pytest.CaptureFixture[str]

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def run(self, line: str) -> tuple[int, str]:
        """Exit status and what was said on stderr; paths in it are relative."""
        self.capsys.readouterr()
        status = cli.main(line.split())
        return status, self.capsys.readouterr().err.replace(f"{self.folder.resolve()}/", "")

    def files(self) -> dict[str, bytes]:
        """Everything in the run directory `r`, its lock aside."""
        files = (path for path in (self.folder / "r").rglob("*") if path.is_file() and path.name != ".lock")
        return {str(path): path.read_bytes() for path in files}


@pytest.fixture
def place(
    materials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Place:
    """A fresh directory with the `materials` of the test's own file, which it must not write into."""
    for path in materials.iterdir():
        if path.is_dir():
            (tmp_path / path.name).symlink_to(path)
        else:
            shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, capsys)


def edit(name: str, **changes: Any) -> Callable[[Path], object]:
    """Change keys of a JSON file of a model; None removes one."""

    def change(folder: Path) -> None:
        content = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def without(*names: str) -> Callable[[Path], object]:
    """Remove files of a model."""
    return lambda folder: [(folder / name).unlink() for name in names]


def says(said: str, message: str) -> bool:
    """Whether exactly one line was said, and this one; `…` at the end of a message stands for any end of the line."""
    whole = f"{message}\n"
    return said.count("\n") == 1 and (said.startswith(message[:-1]) if message.endswith("…") else said == whole)
