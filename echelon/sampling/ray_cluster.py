"""The Ray cluster of a process: joined or started, what is reserved on it, and what is laid into its store.

Knows nothing of models, requests and workers.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from echelon.config import RESERVED, RayConfig
from echelon.errors import ConfigError, RolloutError, need
from echelon.models.lm import first_line
from echelon.sampling.copied import rank_count

RANK = re.compile(r"(LOCAL_)?(RANK|WORLD_SIZE)|TORCHELASTIC_.*")
"""By these variables a process knows that it is one of several that train."""


def guard(settings: RayConfig) -> None:
    """Have a cluster that is started here ask for a token, by which the ranks of this machine join it. Ray reads this
    once, when it is imported; who has done that before has decided."""
    if not address_of(settings) and "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def connect(settings: RayConfig) -> None:
    """Join the cluster, or start one on this machine, unless this process has one."""
    ray = need("ray", "ray")
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address_of(settings)
    said = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        with _same_end():
            if address:
                ray.init(address, **said)
            else:
                _start_or_join(said)
    except Exception as error:  # of many kinds, plain ones among them
        told = f"address = {address}: Ray is not to be reached there" if address else "workers: Ray does not start"
        raise ConfigError(
            f"sampling.ray.{told} ({first_line(error)}) Give the address of a cluster that was started with: ray "
            "start --head, or none for one on this machine."
        ) from error


def _start_or_join(said: dict[str, Any]) -> None:
    """Start a cluster on this machine. Of several ranks the first that comes here does, and those beside it join."""
    from torch import distributed
    from torch.distributed import distributed_c10d

    ray, several = need("ray", "ray"), distributed.is_initialized() and distributed.get_world_size() > 1
    store: Any = distributed_c10d._get_default_store() if several else None
    place = f"echelon/ray/{platform.node()}"
    if several and store.add(f"{place}/ranks", 1) > 1:
        address, _, why = store.get(place).decode().partition(" ")
        if not address:
            raise ConnectionError(why)
        ray.init(address, **said)
        return
    told = " no reason known"
    try:
        with _without_rank():
            told = ray.init("local", include_dashboard=False, **said).address_info["address"]
    except Exception as error:
        told = f" {first_line(error)}"
        raise
    finally:
        if several:
            store.set(place, told)


@contextmanager
def _same_end() -> Iterator[None]:
    """SIGTERM ends this process as it did before, without a word: Ray would have it print where it was."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _without_rank() -> Iterator[None]:
    """Processes that are started within know nothing of this one being a rank."""
    told = {name: os.environ.pop(name) for name in [*os.environ] if RANK.fullmatch(name)}
    try:
        yield
    finally:
        os.environ.update(told)


def own(settings: RayConfig) -> int:
    """How many of the workers this rank asks. Raises ConfigError where ranks cannot have as many each."""
    ranks = rank_count()
    if settings.workers % ranks:
        raise ConfigError(
            f"sampling.ray.workers = {settings.workers}: each of {ranks} ranks asks workers of its own, as many as the "
            f"others. Give {ranks}, or a multiple of it."
        )
    return settings.workers // ranks


def place_of(settings: RayConfig) -> Any:
    """Where workers go: to what is reserved for them, else far from each other."""
    group = json.loads(os.environ.get(RESERVED, "{}")).get(repr(settings))
    if group is None:
        return "SPREAD"
    ray = need("ray", "ray")
    reserved = need("ray.util.placement_group", "ray").PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group)))
    return ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(reserved)


def address_of(settings: RayConfig) -> str:
    """Of the cluster to join; empty where one is started."""
    return settings.address or os.environ.get("RAY_ADDRESS", "")


def put(numbers: Any) -> Any:
    """One object for all workers. Raises RolloutError where neither memory nor disk has room for it."""
    ray = need("ray", "ray")
    try:
        return ray.put(numbers)
    except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
        raise RolloutError(
            f"Ray has no room for the weights ({first_line(error)}) Give its nodes more: ray start "
            "--object-store-memory, or room on the disk that it spills to."
        ) from error
