"""Perceptrons that control: credit where episodes end, runs that are killed, data that do not fit, and learning."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium")

from echelon import cli
from echelon.config.loading import load
from echelon.envs.experts import expert
from echelon.envs.vector import Lanes
from echelon.errors import ConfigError, DataError
from echelon.models.mlp import ValueMlp, load_policy
from echelon.recipes import control_mlp
from echelon.rollout.lanes import Finished, Played
from echelon.train.checkpoint import find_checkpoint

ROOT = Path(__file__).parents[2]
SMALL = ["--env", "CartPole-v1", "--horizon", "40", "--steps", "4", "--envs", "3", "--rollout", "24", "--threads", "1"]
SMALL += ["--groups", "2", "--group-size", "3", "--rows-per-step", "16", "--eval-episodes", "3", "--hidden", "8"]
METHODS = ["bc", "ppo", "grpo"]


def settings(*words: object) -> control_mlp.Config:
    return load(control_mlp.Config, [], ["--out", "x", "--env", "CartPole-v1", *map(str, words)])


def recorded(folder: Path, env: str = "CartPole-v1", *, episodes: int = 4, horizon: int = 60, **instead: Any) -> Path:
    """What control-data would have written of an expert's episodes, a quarter of them held out."""
    lanes, act, rows = Lanes(env, 1, horizon=horizon), expert(env), []
    for episode in range(episodes):
        lanes.begin({0: episode})
        over = False
        while not over:
            seen = lanes.observations[0]
            action = np.asarray(act(seen))
            moved = lanes.step(action[None])
            over = bool(moved.ended[0])
            rows.append((seen, action, moved.rewards[0], moved.terminated[0], moved.truncated[0], episode))
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    names = ("observations", "actions", "rewards", "terminated", "truncated", "episode")
    arrays = dict(zip(names, columns, strict=True)) | {"return_to_go": columns[2], "held_out": columns[5] % 4 == 3}
    folder.mkdir(exist_ok=True)
    np.savez(folder / "arrays.npz", **(arrays | instead))
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """A command line that runs a method for a few seconds."""
    data = recorded(tmp_path_factory.mktemp("data"))

    def words(method: str) -> list[str]:
        return ["control-mlp", "--method", method, *SMALL, *(["--data", str(data)] if method == "bc" else [])]

    return words


def rows(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """A JSONL file without the clock."""
    found = [json.loads(line) for line in (out / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in found]


def played(ends: list[str]) -> Played:
    """Episodes of steps that earn 1 each, described by how each step ends: "" goes on."""
    count = len(ends)
    episode = np.cumsum([0, *(end != "" for end in ends[:-1])])
    return Played(
        observations_ND=torch.zeros(count, 4),
        chosen=torch.zeros(count, dtype=torch.long),
        logprobs_N=torch.zeros(count),
        rewards_N=torch.ones(count),
        next_ND=torch.ones(count, 4),
        terminated_N=torch.tensor([end == "terminated" for end in ends]),
        episode_N=torch.from_numpy(episode),
        finished=[Finished(0, 1.0, 1, True)],
    )


def critic(here: float, there: float) -> ValueMlp:
    """Values one observation of zeros, and one of ones."""
    value = ValueMlp(4, hidden=(1,))
    with torch.no_grad():
        value.body[0].weight.fill_(100.0)  # tanh is 0 at zeros and 1 at ones
        value.body[-1].weight.fill_(there - here)
        value.body[-1].bias.fill_(here)
    return value


def test_what_is_cut_off_bootstraps_from_where_it_was_cut_off_and_what_is_over_does_not() -> None:
    cfg = settings("--gamma", 0.5, "--lam", 1.0, "--no-whiten")
    ends = ["", "terminated", "", "truncated", ""]  # the last one has not ended yet
    steps, _ = control_mlp.judge(cfg, critic(here=0.25, there=8.0), played(ends))
    assert steps.returns_N is not None
    assert steps.returns_N.tolist() == pytest.approx([1.5, 1.0, 1 + 0.5 * (1 + 0.5 * 8), 1 + 0.5 * 8, 1 + 0.5 * 8])
    assert steps.advantages_N.tolist() == pytest.approx([x - 0.25 for x in steps.returns_N.tolist()])


def test_groups_are_compared_by_what_was_earned_from_a_step_on() -> None:
    both = played(["", "terminated", "terminated"])
    by_step, _ = control_mlp.compare(settings("--no-whiten", "--gamma", 1), both, [0, 0])
    assert by_step.advantages_N.tolist() == [0.5, 0.5, -0.5]  # the second step: 1 against a sibling that is over
    by_episode, metrics = control_mlp.compare(settings("--no-whiten", "--credit", "episode"), both, [0, 0])
    assert by_episode.advantages_N.tolist() == [0.5, 0.5, -0.5]
    assert metrics["group/zero_variance"] == 0.0
    alone, _ = control_mlp.compare(settings("--no-whiten"), both, [0, 1])
    assert alone.advantages_N.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_the_ratio_is_1_until_a_weight_moves(method: str, env: str, tmp_path: Path) -> None:
    still = ["--optim.lr", "0", "--kl-coef", "0.1", "--entropy-coef", "0.1", "--eval-episodes", "0"]
    assert (
        cli.main(["control-mlp", *SMALL, "--method", method, *still, "--env", env, "--out", str(tmp_path / "a")]) == 0
    )
    first = rows(tmp_path / "a")[0]
    assert first["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert first["policy/ratio/max"] == pytest.approx(1.0, abs=1e-4)
    assert first["policy/clipped"] == 0.0
    assert first["policy/kl_to_start"] == pytest.approx(0.0, abs=1e-8)
    assert all(row["policy/first_mismatch"] < 1e-4 for row in rows(tmp_path / "a"))  # in later steps, too


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_resumed_equals_one_that_was_not_stopped(
    method: str, words: Callable[[str], list[str]], tmp_path: Path
) -> None:
    whole, parts = ["--out", str(tmp_path / "whole")], ["--out", str(tmp_path / "parts")]
    also = ["--kl-coef", "0.1"] if method == "ppo" else []
    assert cli.main([*words(method), *also, *whole]) == 0
    assert cli.main([*words(method), *also, *parts, "--steps", "2", "--eval-episodes", "3"]) == 0
    assert cli.main([*words(method), *also, *parts, "--resume"]) == 0
    expected, found = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    found[1] = {name: number for name, number in found[1].items() if not name.startswith("eval/")}
    assert found == expected
    assert rows(tmp_path / "whole", "episodes.jsonl") == rows(tmp_path / "parts", "episodes.jsonl")
    files = {
        path.relative_to(tmp_path / "whole"): path.read_bytes()
        for path in (tmp_path / "whole/checkpoints/step_000004").rglob("*.safetensors")
    }
    assert {"bc": 3, "ppo": 7, "grpo": 3}[method] == len(files)
    for name, content in files.items():
        assert (tmp_path / "parts" / name).read_bytes() == content or name.name == "rng.safetensors", name


def test_a_run_that_is_killed_in_the_middle_of_an_episode_continues_there(tmp_path: Path) -> None:
    flags = ["control-mlp", *SMALL, "--steps", "40", "--save-every", "1", "--method", "ppo"]
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "echelon", *flags, "--out", str(out)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    limit = time.monotonic() + 100
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 5:
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (out / "metrics.jsonl").read_text().count("\n") < 40
    assert cli.main([*flags, "--out", str(out), "--resume"]) == 0
    assert cli.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    assert rows(out) == rows(tmp_path / "whole")
    assert rows(out, "episodes.jsonl") == rows(tmp_path / "whole", "episodes.jsonl")


def test_a_run_starts_from_the_policy_of_another(words: Callable[[str], list[str]], tmp_path: Path) -> None:
    assert cli.main([*words("bc"), "--out", str(tmp_path / "bc")]) == 0
    flags = ["--start", str(tmp_path / "bc"), "--optim.lr", "0", "--steps", "1", "--no-normalize"]
    assert cli.main([*words("ppo"), *flags, "--out", str(tmp_path / "ppo")]) == 0
    seen = np.random.default_rng(0).normal(size=(20, 4))
    one, other = (load_policy(find_checkpoint(tmp_path / name)) for name in ("bc", "ppo"))
    assert np.array_equal(one.act(seen), other.act(seen))
    assert one.about == {"env": "CartPole-v1"}
    assert rows(tmp_path / "bc")[-1]["eval/reward/mean"] == rows(tmp_path / "ppo")[-1]["eval/reward/mean"]


def test_a_policy_of_another_environment_is_no_start(
    words: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words("grpo"), "--steps", "1", "--out", str(tmp_path / "a")]) == 0
    flags = [*words("ppo"), "--env", "Acrobot-v1", "--start", str(tmp_path / "a"), "--out", str(tmp_path / "b")]
    assert cli.main(flags) == 2
    assert "is for CartPole-v1 and reads 4 numbers; Acrobot-v1 gives 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("instead", "expected"),
    [
        ({"observations": np.zeros((5, 3))}, "have 3 numbers and those of CartPole-v1 4"),
        ({"actions": np.zeros((5, 2), dtype=np.float32)}, "actions are vectors of 2, and CartPole-v1 takes others"),
        ({"actions": np.array([0, 1, 2, 0, 1])}, "holds an action that CartPole-v1 does not have"),
        ({"observations": np.full((5, 4), np.nan)}, "holds a number that is not finite"),
        ({"held_out": np.ones(5, dtype=bool)}, "all of its steps are held out"),
    ],
)
def test_data_that_do_not_fit(instead: dict[str, Any], expected: str, tmp_path: Path) -> None:
    five = {"observations": np.zeros((5, 4)), "actions": np.array([0, 1, 0, 1, 1]), "held_out": np.zeros(5, dtype=bool)}
    np.savez(tmp_path / "arrays.npz", rewards=np.ones(5), return_to_go=np.ones(5), **(five | instead))
    cfg = settings("--method", "bc", "--data", tmp_path)
    with pytest.raises(DataError, match=expected):
        control_mlp.recorded(cfg, control_mlp.open_policy(cfg, Lanes("CartPole-v1", 1)))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--method", "bc"], "data is missing: nothing sets it"),
        (["--data", "x"], "data = x: method = ppo learns from what it does itself"),
        (["--method", "grpo", "--group-size", "1"], "group_size = 1: GRPO compares siblings"),
        (["--method", "grpo", "--warmup-steps", "2"], "warmup_steps = 2: only a value model warms up"),
        (["--hidden", "0"], "hidden = .0.: a hidden layer has a width"),
    ],
)
def test_settings_that_cannot_work(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        settings(*words)


def test_a_dry_run_says_how_large_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["control-mlp", "--env", "Pendulum-v1", "--dry-run", "--out", str(tmp_path / "none")]) == 0
    said = capsys.readouterr().out
    assert "actor: GaussianMlp, 4,482 parameters" in said
    assert "Pendulum-v1: 3 numbers seen; steps per training step: at most 2,048" in said
    assert not (tmp_path / "none").exists()


RANDOM = 22.0
"""What a random policy earns on CartPole-v1."""


@pytest.mark.learning
@pytest.mark.seeds(0, 1)
def test_cloning_an_expert_balances_the_pole(seed: int, tmp_path: Path) -> None:
    data = recorded(tmp_path / "data", episodes=8, horizon=500)
    flags = ["--env", "CartPole-v1", "--method", "bc", "--data", str(data), "--steps", "400", "--optim.lr", "3e-3"]
    assert cli.main(["control-mlp", *flags, "--seed", str(seed), "--out", str(tmp_path / "a"), "--threads", "1"]) == 0
    last = rows(tmp_path / "a")[-1]
    assert last["eval/accuracy"] > 0.95
    assert last["eval/reward/mean"] > 20 * RANDOM


@pytest.mark.learning
@pytest.mark.seeds(0, 1)
def test_ppo_learns_to_balance_the_pole(seed: int, tmp_path: Path) -> None:
    flags = ["--env", "CartPole-v1", "--method", "ppo", "--steps", "30", "--seed", str(seed), "--threads", "1"]
    assert cli.main(["control-mlp", *flags, "--out", str(tmp_path / "a")]) == 0
    found = rows(tmp_path / "a")
    assert found[0]["reward/mean"] < 2 * RANDOM
    assert found[-1]["eval/reward/mean"] > 15 * RANDOM


@pytest.mark.learning
@pytest.mark.seeds(0, 1)
def test_grpo_learns_to_balance_the_pole(seed: int, tmp_path: Path) -> None:
    flags = ["--env", "CartPole-v1", "--method", "grpo", "--steps", "15", "--seed", str(seed), "--threads", "1"]
    assert cli.main(["control-mlp", *flags, "--out", str(tmp_path / "a")]) == 0
    found = rows(tmp_path / "a")
    assert found[0]["reward/mean"] < 2 * RANDOM
    assert found[-1]["eval/reward/mean"] > 10 * RANDOM
