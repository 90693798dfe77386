"""Experts that are learned because nobody has written one: policies of stable-baselines3, trained here or read.

An optional dependency, the extra `experts`. They act on numbers, and serve to record data with.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from echelon.errors import ConfigError, DataError, did_you_mean, need

EXTRA = "experts"
ALGORITHMS = ("a2c", "ddpg", "dqn", "ppo", "sac", "td3")


def learned_expert(algorithm: str, env: Any, file: Path, *, steps: int, seed: int) -> Callable[[Any], Any]:
    """From an observation to the likeliest action of a policy that learned `steps` steps in a Gymnasium environment.

    It is kept in `file`, and read from there if it is there already: learning it again would take as long. Raises
    ConfigError for an algorithm there is not, DataError for a file that holds no policy of it.
    """
    if algorithm not in ALGORITHMS:
        raise ConfigError(
            f"algorithm = {algorithm}: there is no such one.{did_you_mean(algorithm, ALGORITHMS)} There are: "
            f"{', '.join(ALGORITHMS)}."
        )
    kind = getattr(need("stable_baselines3", EXTRA), algorithm.upper())
    if file.is_file():
        try:
            policy = kind.load(file, device="cpu")
        except Exception as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{file}: it holds no policy of {algorithm} ({line}). Delete it to learn one.") from error
    else:
        try:
            policy = kind("MlpPolicy", env, seed=seed % 2**31, device="cpu")
        except AssertionError as error:
            line = (str(error).splitlines() or ["its spaces do not fit"])[0]
            raise ConfigError(f"algorithm = {algorithm}: {line}. Choose another.") from error
        policy.learn(steps)
        file.parent.mkdir(parents=True, exist_ok=True)
        policy.save(file)
    return lambda observation: policy.predict(observation, deterministic=True)[0]
