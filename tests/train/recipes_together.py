"""Recipes on two ranks, one after the other in the same two processes, which is cheaper than new ones for each.

`python recipes_together.py commands.json` runs command lines (a JSON list of lists of words) as `echelon launch` does.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path

import torch

from echelon import cli
from echelon.train.on_ray import held_port

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


def main(commands: list[list[str]]) -> int:
    """Import what the commands need, then fork the ranks; the exit status of the first that fails, which ends the
    other."""
    for recipe in {words[0] for words in commands}:
        importlib.import_module(f"echelon.recipes.{recipe.replace('-', '_')}")
    importlib.import_module("transformers.models.llama.modeling_llama")
    context, held = multiprocessing.get_context("fork"), [held_port() for _ in commands]
    ports = [each.getsockname()[1] for each in held]
    ranks = [context.Process(target=run, args=(rank, commands, ports)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    running = {rank.sentinel: rank for rank in ranks}
    while running:
        for ended in wait([*running]):
            if status := running.pop(ended).exitcode:  # type: ignore[call-overload]
                for other in running.values():
                    other.kill()
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
