"""A user's environment, in a file outside the package, trains like any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from echelon.envs import load_env
from tests.recipes.conftest import made, recorded, taught

EXAMPLE = f"{Path(__file__).parents[2] / 'examples/own_env.py'}:CountDown"


@pytest.mark.learning
def test_grpo_learns_to_count_down(train, tmp_path: Path) -> None:
    """Random play of starts 2 to 4 earns about 0.12; forty steps add at least 0.15 over three seeds, and something in
    each (of ten seeds, one or two get stuck after the first number)."""
    env = load_env(EXAMPLE, {"top": 4})
    games = recorded(env, ("random",), 128, tmp_path / "games.jsonl")
    model = taught(made(env, tmp_path / "model", layers=1), games, tmp_path / "sft", epochs=4)
    flags = ("--model.path", model, "--env", EXAMPLE, "--env-settings", "top=4", "--sampling.max-tokens", 6)
    gains = []
    for seed in range(3):
        run = train("grpo", *flags, "--steps", 40, "--policy.optim.lr", 3e-3, "--seed", seed, name=f"run_{seed}")
        earned = [row["reward/mean"] for row in run.rows()]
        gains.append(sum(earned[-5:]) / 5 - sum(earned[:3]) / 3)
    assert min(gains) > 0.03
    assert sum(gains) / 3 > 0.15
