"""Starts the ranks of a run, with torch's elastic launcher or on a Ray cluster, and says in one line how they ended; or
one process, where workers of Ray draw the rollouts and no ranks are asked for.

Knows processes; knows nothing of what they train.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from echelon.config import RayConfig, SamplingConfig
from echelon.errors import ConfigError, EchelonError, need
from echelon.train.dist import LAUNCHED_BY_US

USAGE = (
    "echelon launch [--nproc N] [--nnodes N --rendezvous HOST:PORT] <recipe> [file.yaml ...] [--key value ...], or "
    "echelon launch --on ray [--rollout-workers N] [--nproc N ...] <recipe> [file.yaml ...] [--key value ...]"
)


class RankEnded(EchelonError, RuntimeError):
    """A rank ended before its work was done, and the others were stopped."""


def launch(words: Sequence[str], load: Callable[[Sequence[str]], Any]) -> int:
    """Run a recipe on several ranks and return the exit status: 0, or that of the rank that ended the job.

    Without `--nproc`, one rank per GPU of this machine, or one. On several machines every one runs the same command,
    with `--nnodes` and the address of one of them (`--rendezvous`). With `--on ray` and no ranks asked for, this
    process becomes the recipe's, and does not return; with ranks and the address of a cluster, they start there. `load`
    reads the settings of a recipe's command. Raises ConfigError for words that cannot be meant so, RankEnded for a rank
    that was killed.
    """
    asked, recipe = _parse(words)
    if asked.on:
        need("ray", "ray")
        if asked.nproc == 0:
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, "-m", "echelon", *recipe])
        if asked.nnodes == 1 and (found := _cluster(settings := load(recipe))):
            from echelon.train import on_ray

            address, drawn = found
            return _ended(on_ray.run(recipe, asked.nproc, settings.threads or 1, drawn, address))
    return _elastic(asked, recipe)


def _elastic(asked: argparse.Namespace, recipe: Sequence[str]) -> int:
    """The exit status of ranks that torch's elastic launcher starts."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its report would bury the one line
    os.environ[LAUNCHED_BY_US] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before ranks share out cores (`threads`)
    settings = LaunchConfig(
        min_nodes=asked.nnodes,
        max_nodes=asked.nnodes,
        nproc_per_node=asked.nproc,
        run_id="echelon",
        rdzv_backend="c10d",
        rdzv_endpoint=asked.rendezvous or "localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(settings, sys.executable)("-m", "echelon", *recipe)
    except ChildFailedError as error:
        return _ended({rank: failure.exitcode for rank, failure in error.failures.items()})
    return 0


def _parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What the launcher is told, and the command of every rank."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc", type=int, default=0)
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--rendezvous", default="")
    parser.add_argument("--on", choices=["ray"])
    parser.add_argument("--rollout-workers", type=int)
    split = next((at for at, word in enumerate(words) if _is_recipe(words, at)), len(words))
    asked = parser.parse_args(list(words[:split]))
    if split == len(words):
        raise ConfigError(f"launch: no recipe to run. {USAGE}")
    if asked.rollout_workers is not None and not asked.on:
        raise ConfigError("launch: --rollout-workers are workers of Ray. Give --on ray too.")
    recipe = [*words[split:], *_on_ray(asked)]
    if asked.on and (asked.nproc, asked.nnodes, asked.rendezvous) == (0, 1, ""):
        return asked, recipe
    asked.nproc = asked.nproc or _accelerators()
    if asked.nproc < 1 or asked.nnodes < 1:
        raise ConfigError("launch: --nproc and --nnodes count ranks and machines. Give 1 or more.")
    if asked.nnodes > 1 and not asked.rendezvous:
        raise ConfigError("launch: --nnodes is more than 1 and machines must meet. Give --rendezvous HOST:PORT.")
    return asked, recipe


def _on_ray(asked: argparse.Namespace) -> list[str]:
    """Flags by which a recipe has its rollouts drawn by workers of Ray."""
    if not asked.on:
        return []
    several = [] if asked.rollout_workers is None else ["--rollout-workers", str(asked.rollout_workers)]
    return ["--sampler", "ray", *several]


def _cluster(settings: Any) -> tuple[str, list[RayConfig]] | None:
    """The address of the cluster that settings or RAY_ADDRESS name, if any, and who draws rollouts there."""
    drawn = [*dict.fromkeys(_drawn_by_ray(settings))]
    named = [said.address or os.environ.get("RAY_ADDRESS", "") for said in drawn]
    address = next(filter(None, named), "")
    return (address, [said for said, name in zip(drawn, named, strict=True) if name == address]) if address else None


def _drawn_by_ray(block: Any) -> Iterator[RayConfig]:
    """Settings of workers, wherever in the settings of a recipe they are in use."""
    if isinstance(block, SamplingConfig):
        yield from [block.ray] if block.sampler == "ray" else []
    elif dataclasses.is_dataclass(block):
        for entry in dataclasses.fields(block):
            yield from _drawn_by_ray(getattr(block, entry.name))


def _is_recipe(words: Sequence[str], at: int) -> bool:
    """Whether this word is no flag of the launcher, nor the value of one."""
    return not words[at].startswith("-") and not (at and words[at - 1].startswith("--") and "=" not in words[at - 1])


def _accelerators() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _ended(failed: Mapping[int, int]) -> int:
    """The exit status of the rank that was the first to fail by itself; 0 where none has."""
    killed = {rank: -status for rank, status in failed.items() if status < 0}
    alone = {rank: number for rank, number in killed.items() if number != signal.SIGTERM} or killed
    explained = [status for status in failed.values() if status > 0]
    if alone and (not explained or alone is not killed):
        rank, number = next(iter(alone.items()))
        raise RankEnded(
            f"rank {rank} was ended by {signal.Signals(number).name}, so the others were stopped. Start the same "
            "command again with --resume; it goes on from the newest whole checkpoint."
        )
    return next(iter(explained), 0)


class _Parser(argparse.ArgumentParser):
    """One that explains itself in one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"launch: {message}. {USAGE}")
