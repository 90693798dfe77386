"""From rows to a controller that acts well: by imitation, and by rewards of single actions.

What learns from whole episodes is tried in `test_control.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from echelon import cli
from echelon.data.control import Recorded, control_rows
from echelon.text.codec import Codec, Space

pytest.importorskip("gymnasium")

TINY = Path(__file__).parents[2] / "configs" / "models" / "tiny"
BINS = ("--env-settings", "style=bins", "bins=29", "instruction=")
NINTHS = Codec(
    Space("box", (-1.0,), (1.0,)),
    Space("discrete", n=2),
    observation_style="bins",
    action_style="index",
    bins=9,
    instruction="",
)
"""One number, written from 0 to 9; two choices."""


@pytest.mark.learning
@pytest.mark.slow
@pytest.mark.seeds(0, 1)
def test_a_clone_of_the_expert_gets_up_the_mountain(train, tmp_path: Path, seed: int) -> None:
    """Chance never does: it earns -200 in every episode. The expert earns -106, a clone -149 and -137."""
    data = tmp_path / "data"
    flags = ["--env-id", "MountainCar-v0", *BINS, "--ranges", "data", "--episodes", "20", "--out", str(data)]
    assert cli.main(["control-data", *flags]) == 0
    rows = ("--data.path", data / "train.jsonl", "--data.eval-path", data / "test.jsonl", "--eval-every", 0)
    fit = ("--rows-per-step", 64, "--max-steps", 250, "--optim.lr", 3e-3, "--optim.schedule", "cosine", "--seed", seed)
    clone = train("sft", "--model.path", TINY, "--untrained", *rows, *fit)
    flags = ["--env-id", "MountainCar-v0", "--env-settings", f"codec={data}/codec.json", "--max-tokens", "8"]
    assert cli.main(["evaluate", str(clone.out), *flags, "--episodes", "10", "--out", str(tmp_path / "e")]) == 0
    assert json.loads((tmp_path / "e" / "summary.json").read_text())["estimates"]["return"]["mean"] > -185


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """A folder of 400 states. The expert answers 1 above 0, else 0; a part of what was done there is the expert's, the
    rest a coin's."""

    def states(share: float) -> Path:
        folder, draw = tmp_path_factory.mktemp("states"), np.random.default_rng(0)
        seen = draw.uniform(-1, 1, (401, 1)).astype(np.float32)
        right = (seen[:-1, 0] > 0).astype(np.int64)
        done = np.where(draw.random(400) < share, right, draw.integers(0, 2, 400))
        episode = Recorded(seen, done, np.zeros(400), True)
        (folder / "codec.json").write_text(json.dumps(NINTHS.to_json()))
        (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in control_rows(episode, NINTHS)))
        return folder

    return states


@pytest.mark.learning
@pytest.mark.seeds(0, 1, 2)
def test_rewards_of_actions_alone_teach_what_the_expert_does(train, states: Callable[[float], Path], seed: int) -> None:
    """0 is the expert's action every time, -1 another one, -10 none at all.

    From -0.53, -0.44 and -0.56 in the first five steps to -0.04, -0.05 and -0.06 in the last.
    """
    rows = ("--data.path", states(0.4) / "train.jsonl", "--rows-per-step", 64, "--max-steps", 250)
    fit = ("--optim.lr", 3e-3, "--optim.schedule", "cosine")
    start = train("sft", "--model.path", TINY, "--untrained", *rows, *fit, name="start")
    flags = ("--data.path", states(1.0) / "train.jsonl", "--env=", "--reward", "format", "imitation_discrete")
    few = ("--steps", 30, "--tasks-per-step", 16, "--group-size", 16, "--policy.optim.lr", 1e-3, "--seed", seed)
    said = ("--sampling.max-tokens", 4, "--sampling.stop", "</action>")
    run = train("grpo", "--model.path", start.out, *flags, *few, *said)
    earned = [row["reward/imitation_discrete"] for row in run.rows()]
    assert np.mean(earned[:5]) < -0.35
    assert np.mean(earned[-5:]) > -0.15
