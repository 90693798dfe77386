"""The conditions every test runs under: one thread, fixed seeds, no network."""

from __future__ import annotations

import os
import random

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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`@pytest.mark.seeds(0, 1, 2)`: what holds for each; the first is always tried, the others are slow."""
    for mark in metafunc.definition.iter_markers("seeds"):
        first, *further = mark.args
        metafunc.parametrize("seed", [first, *(pytest.param(seed, marks=pytest.mark.slow) for seed in further)])
