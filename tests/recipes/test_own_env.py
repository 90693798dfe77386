"""A user's environment, in a file outside the package, trains like any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from echelon.envs import load_env
from tests.recipes.conftest import made, recorded, taught

EXAMPLE = f"{Path(__file__).parents[2] / 'examples/own_env.py'}:CountDown"


@pytest.mark.learning
@pytest.mark.parametrize("seed", range(3))
def test_grpo_learns_to_count_down(train, tmp_path: Path, seed: int) -> None:
    """Random play of starts 2 to 4 earns about 0.12; forty steps must add at least 0.15."""
    env = load_env(EXAMPLE, {"top": 4})
    games = recorded(env, ("random",), 128, tmp_path / "games.jsonl")
    model = taught(made(env, tmp_path / "model", layers=1), games, tmp_path / "sft", epochs=4)
    flags = ("--model.path", model, "--env", EXAMPLE, "--env-settings", "top=4", "--sampling.max-tokens", 6)
    run = train("grpo", *flags, "--steps", 40, "--policy.optim.lr", 3e-3, "--seed", seed, "--threads", 1)
    earned = [row["reward/mean"] for row in run.rows()]
    assert sum(earned[-5:]) / 5 > sum(earned[:3]) / 3 + 0.15
