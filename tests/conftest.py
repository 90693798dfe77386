"""The conditions every test runs under: one thread, fixed seeds, no network."""

from __future__ import annotations

import os
import random
import time
from itertools import groupby

# Before anything imports huggingface_hub, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch

# A tiny model on many threads is over 30 times slower than on one.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_draws_every_time() -> None:
    """The same global random state at the start of every test, alone or in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


UNTIL = os.environ.get("UNTIL")
"""The time, in seconds since 1970, after which no slow test begins; the files are then in another order each time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if UNTIL:
        files = [list(tests) for _, tests in groupby(items, lambda item: item.path)]
        random.Random(UNTIL).shuffle(files)
        items[:] = [item for tests in files for item in tests]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if UNTIL and item.get_closest_marker("slow") and time.time() > float(UNTIL):
        pytest.skip("the time is over")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`@pytest.mark.seeds(0, 1, 2)`: what holds for each; the first is always tried, the others are slow."""
    for mark in metafunc.definition.iter_markers("seeds"):
        first, *further = mark.args
        metafunc.parametrize("seed", [first, *(pytest.param(seed, marks=pytest.mark.slow) for seed in further)])
