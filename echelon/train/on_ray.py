"""Starts the ranks of a run on the machines of a Ray cluster, in places that are reserved together with those of its
rollout workers.

A rank is a process of its own, as a launcher of torch would have started it; an actor of Ray on its machine starts it,
passes on what it says, and ends with it. Knows nothing of what is trained or drawn.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echelon.config import RESERVED, RayConfig
from echelon.errors import ConfigError, EchelonError, need
from echelon.models.lm import first_line
from echelon.train.dist import LAUNCHED_BY_US

SOON = 10.0
"""Seconds after which it is said that a run waits for places."""
GRACE = 30.0
"""Seconds that ranks have to end once they are told to."""


class RankGone(EchelonError, RuntimeError):
    """A rank is gone with its machine, or Ray has ended it."""


@dataclass(frozen=True, slots=True)
class Here:
    """Where a rank is."""

    machine: str
    address: str
    port: int
    """That nobody else is given there (`held_port`)."""
    gpus: tuple[str, ...]


def held_port() -> socket.socket:
    """A socket whose port is given to nobody by chance while it is open; who names the port may listen on it."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    return held


class Host:
    """What starts a rank on its machine, as an actor."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.held = held_port()

    def where(self) -> Here:
        """This machine, and the GPUs that are booked on it."""
        ray = need("ray", "ray")
        context, port = ray.get_runtime_context(), self.held.getsockname()[1]
        gpus = tuple(str(each) for each in context.get_accelerator_ids().get("GPU", ()))
        return Here(context.get_node_id(), ray.util.get_node_ip_address(), port, gpus)

    def run(self, words: Sequence[str], variables: dict[str, str], folder: str) -> Iterator[tuple[int, bytes] | int]:
        """What the process says, on 1 or 2, as it says it; last its exit status."""
        if not Path(folder).is_dir():
            raise ConfigError(f"launch: {folder} is not there on {socket.gethostname()}. Ranks work in one folder.")
        prctl = getattr(
            ctypes.CDLL(None), "prctl", None
        )  # of Linux: it ends when this process does, however that comes
        self.process = subprocess.Popen(
            [sys.executable, "-m", "echelon", *words],
            env=variables,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=prctl and functools.partial(prctl, 1, signal.SIGKILL),
        )
        yield from _said(self.process)
        yield self.process.wait()

    def stop(self, number: int) -> None:
        """Send it a signal."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)


def _said(process: subprocess.Popen[bytes]) -> Iterator[tuple[int, bytes]]:
    """What a process writes, until it has closed both streams."""
    with selectors.DefaultSelector() as streams:
        streams.register(process.stdout or 0, selectors.EVENT_READ, 1)
        streams.register(process.stderr or 0, selectors.EVENT_READ, 2)
        while streams.get_map():
            for stream, _ in streams.select():
                if some := os.read(stream.fd, 1 << 16):
                    yield stream.data, some
                else:
                    streams.unregister(stream.fileobj)


def run(recipe: Sequence[str], ranks: int, threads: int, drawn: Sequence[RayConfig], address: str) -> dict[int, int]:
    """Run a recipe on so many ranks; rank → exit status of those that were the first not to end well.

    `drawn` are the settings of all who draw rollouts, each with workers of its own, and `threads` the cores of a rank.
    A rank has a GPU where the cluster has one or a worker wants one. Raises ConfigError where the cluster cannot be
    joined or lacks the room, RankGone for a rank of which nothing more is heard.
    """
    ray = need("ray", "ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ends = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR")
        signal.signal(signal.SIGTERM, ends)  # Ray's own prints where this process was
    except Exception as error:  # of many kinds, plain ones among them
        raise ConfigError(
            f"launch: there is no Ray cluster at {address} ({first_line(error)}) Start one with ray start --head, or "
            "give no address."
        ) from error
    try:
        gpus = ray.cluster_resources().get("GPU", 0) > 0 or any(said.gpus for said in drawn)
        book = {"CPU": float(threads), "GPU": float(gpus)}
        groups = _reserved([book] * ranks, drawn)
        place = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        how = {"num_cpus": threads, "num_gpus": int(gpus), "max_concurrency": 4}
        kind = ray.remote(Host)
        hosts = [kind.options(**how, scheduling_strategy=place(groups[0], each)).remote() for each in range(ranks)]
        told = json.dumps({repr(said): group.id.hex() for said, group in zip(drawn, groups[1:], strict=True)})
        hosts, variables = _ranked(hosts, {RESERVED: told, "RAY_ADDRESS": ray.get_runtime_context().gcs_address})
        return _watched(hosts, recipe, variables)
    finally:
        ray.shutdown()


def _reserved(ranks: Sequence[Mapping[str, float]], drawn: Sequence[RayConfig]) -> list[Any]:
    """Groups of places: of the ranks, close together, and of the workers of each kind, far apart. All or none."""
    ray = need("ray", "ray")
    workers = [[{"CPU": float(said.cpus), "GPU": said.gpus}] * said.workers for said in drawn]
    bundles = [[{name: some for name, some in each.items() if some} for each in kind] for kind in (ranks, *workers)]
    strategies = ["PACK"] + ["SPREAD"] * len(workers)
    groups = [ray.util.placement_group(kind, how) for kind, how in zip(bundles, strategies, strict=True)]
    ready, patience = [group.ready() for group in groups], max((said.timeout for said in drawn), default=SOON)
    for seconds in (min(SOON, patience), max(0.0, patience - SOON)):
        if not ray.wait(ready, num_returns=len(ready), timeout=seconds)[1]:
            return groups
        if patience > SOON:
            print(f"waiting for places: {_lacking(bundles)}", file=sys.stderr, flush=True)
    raise ConfigError(
        f"launch: no room within {patience:g} s: {_lacking(bundles)}. Ask for less with --nproc, --rollout-workers or "
        "sampling.ray, or add machines."
    )


def _lacking(bundles: Sequence[Sequence[Mapping[str, float]]]) -> str:
    """What is asked for, and what there is."""
    ray = need("ray", "ray")
    every = [each for kind in bundles for each in kind]
    there = ray.cluster_resources()
    asked = " and ".join(
        f"{sum(each.get(name, 0.0) for each in every):g} {name}s where the cluster has {there.get(name, 0.0):g}"
        for name in ("CPU", "GPU")
    )
    return f"{len(bundles[0])} ranks and {len(every) - len(bundles[0])} workers ask for {asked}"


def _ranked(hosts: Sequence[Any], more: Mapping[str, str]) -> tuple[list[Any], list[dict[str, str]]]:
    """The hosts in the order of their ranks, those of a machine in a row, and the variables of each."""
    told = need("ray", "ray").get([host.where.remote() for host in hosts])
    machines = {here.machine: number for number, here in reversed([*enumerate(told)])}
    order = sorted(range(len(hosts)), key=lambda each: (machines[told[each].machine], each))
    first, variables = told[order[0]], []
    for rank, each in enumerate(order):
        beside = [other for other in order if told[other].machine == told[each].machine]
        numbers = {"RANK": rank, "WORLD_SIZE": len(hosts)}
        numbers |= {"LOCAL_RANK": beside.index(each), "LOCAL_WORLD_SIZE": len(beside), "MASTER_PORT": first.port}
        seen = {"CUDA_VISIBLE_DEVICES": ",".join(gpu for other in beside for gpu in told[other].gpus)}
        mine = {name: str(number) for name, number in numbers.items()} | (seen if told[each].gpus else {})
        mine |= {"MASTER_ADDR": first.address, LAUNCHED_BY_US: "1", "PYTHONUNBUFFERED": "1"}
        variables.append({"OMP_NUM_THREADS": "1"} | dict(os.environ) | mine | dict(more))
    return [hosts[each] for each in order], variables


def _watched(hosts: Sequence[Any], recipe: Sequence[str], variables: Sequence[dict[str, str]]) -> dict[int, int]:
    """Have all run, write what they say, and stop all when one ends badly: its exit status, by its rank."""
    ray, folder = need("ray", "ray"), os.getcwd()
    streams = [
        host.run.options(num_returns="streaming").remote(list(recipe), told, folder)
        for host, told in zip(hosts, variables, strict=True)
    ]
    with ThreadPoolExecutor(len(hosts)) as threads:
        running = {threads.submit(_written, rank, stream): rank for rank, stream in enumerate(streams)}
        failed: dict[int, int] = {}
        number = signal.SIGTERM
        try:
            left: set[Future[int]] = set(running)
            while left and not failed:
                done, left = wait(left, return_when=FIRST_COMPLETED)
                failed = {running[each]: status for each in done if (status := each.result())}
            return failed
        except KeyboardInterrupt:
            number = signal.SIGINT
            raise
        finally:
            for host in hosts:
                host.stop.remote(number)
            wait(running, timeout=GRACE)
            for host in hosts:
                ray.kill(host)


def _written(rank: int, stream: Any) -> int:
    """Write what a rank says where this process writes, until it has ended; its exit status."""
    ray = need("ray", "ray")
    try:
        for said in stream:
            match ray.get(said):
                case (place, text):
                    into = (sys.stdout if place == 1 else sys.stderr).buffer
                    into.write(text)
                    into.flush()
                case status:
                    return int(status)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from None
    except ray.exceptions.RayError as error:
        raise RankGone(
            f"rank {rank} is gone ({first_line(error).rstrip('.')}), so the others were stopped. Start the same "
            "command again with --resume; it goes on from the newest whole checkpoint."
        ) from error
    raise AssertionError("the last it says is its exit status")
