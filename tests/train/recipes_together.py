"""Recipes on two ranks, one after the other in the same two processes, which is cheaper than new ones for each.

`python recipes_together.py commands.json` runs command lines (a JSON list of lists of words) as `echelon launch` does.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from echelon import cli

RANKS = 2


def run(rank: int, commands: Sequence[list[str]], ports: Sequence[int]) -> None:
    """Run all commands as one of the ranks; ends with the status of the first that fails."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ |= {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    for words, port in zip(commands, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        if status := cli.main([*words, "--traceback"]):
            print(f"rank {rank}: echelon {' '.join(words)}", file=sys.stderr, flush=True)
            sys.exit(status)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def main(commands: list[list[str]]) -> int:
    """Import what the commands need, then fork the ranks; the exit status of the first that fails."""
    for recipe in {words[0] for words in commands}:
        importlib.import_module(f"echelon.recipes.{recipe.replace('-', '_')}")
    importlib.import_module("transformers.models.llama.modeling_llama")
    context, ports = multiprocessing.get_context("fork"), free_ports(len(commands))
    ranks = [context.Process(target=run, args=(rank, commands, ports)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return next((rank.exitcode or 0 for rank in ranks if rank.exitcode), 0)


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
