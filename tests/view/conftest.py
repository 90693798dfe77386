"""Run directories written by hand: what recipes leave, without training anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

Write = Callable[..., Path]


def turn(text: str, role: str = "actor", **more: Any) -> dict[str, Any]:
    """A turn as `episode_rows` writes it, its index and parent left to `episode`."""
    return {"role": role, "text": text, "reward": 0.0, **more}


def episode(step: int, task: str, turns: Iterable[dict[str, Any]], reward: float = 0.0, **more: Any) -> dict[str, Any]:
    """An episode: a chain of turns unless they say otherwise."""
    chain = [{"index": at, "parent": at - 1 if at else None, **one} for at, one in enumerate(turns)]
    row = {"step": step, "task": task, "seed": 1, "ending": "terminated", "reward": reward, "error": None}
    return row | {"metrics": {}, "turns": chain} | more


def lines(rows: Iterable[object]) -> str:
    """JSONL; what is text already stays as it is."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a run: rows of metrics and of episodes, and settings. Twenty rising steps where no metrics are given."""

    def write(
        name: str = "run",
        *,
        metrics: Iterable[object] | None = None,
        episodes: Iterable[object] = (),
        settings: dict[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / name
        (folder / "checkpoints" / "step_000020").mkdir(parents=True)
        rising = [{"step": at, "seconds": 2.0 * (at + 1), "reward/mean": at / 10 + at % 2 / 20} for at in range(20)]
        (folder / "metrics.jsonl").write_text(lines(rising if metrics is None else metrics))
        (folder / "episodes.jsonl").write_text(lines(episodes))
        chosen = {"seed": 0, "steps": 20, "episodes_per_step": 4, "env": "maze"} if settings is None else settings
        (folder / "checkpoints" / "step_000020" / "config.yaml").write_text(yaml.safe_dump(chosen))
        return folder

    return write
