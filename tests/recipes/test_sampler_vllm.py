"""Every recipe that draws, with vLLM drawing: what it says is the policy's, and what is learned it says next."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
from torch import Tensor

from echelon import cli
from echelon.config.loading import settings_of
from echelon.models.lm import load_lm, tiny
from echelon.sampling.vllm import VllmSampler
from echelon.types import SamplingParams
from tests.recipes.conftest import Train
from tests.recipes.speller import speller, spelling
from tests.recipes.talk import Talk
from tests.sampling.test_vllm import ask, ids, mismatch
from tests.test_docs import config_of

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")

REWARD = "def length(prompts, completions):\n    return [float(len(text) % 5) for text in completions]\n"
TALK = "--env tests.recipes.talk:Talk --max-turns 3"
ACTOR = "--model.path MODEL --policy.optim.lr 1e-2 --policy.epochs 1 --policy.minibatches 1 --sampling.max-tokens 6"
REPLIES = "--low.policy.optim.lr 1e-2 --low.policy.epochs 1 --low.policy.minibatches 1 --sampling.max-tokens 6"
SOLVES = "--solver.model.path MODEL --solver.sampling.max-tokens 6 --coach.sampling.max-tokens 6"
LEARNS = "--LEVEL.policy.optim.lr 1e-2 --LEVEL.policy.epochs 1 --LEVEL.policy.minibatches 1"
BOTH = " ".join(LEARNS.replace("LEVEL", level) for level in ("solver", "coach"))
RUNS = {
    "archer": f"{ACTOR} {TALK} --episodes-per-step 6 --warmup-steps 0 --critic-updates 2",
    "control": f"{ACTOR} --env tests.recipes.steer:Steer --tasks-per-step 3 --group-size 4 --plan-every 3 "
    "--planner.path MODEL --plan-tokens 4",
    "feedback": f"{SOLVES} {BOTH} --data.path MODEL/asked.jsonl --reward MODEL/rewards.py:length "
    "--tasks-per-step 2 --attempts 2",
    "grpo": f"{ACTOR} {TALK} --tasks-per-step 2 --group-size 4",
    "ppo": f"{ACTOR} {TALK} --episodes-per-step 6 --warmup-steps 0",
    "rank": f"{ACTOR} {TALK} --episodes-per-step 6 --warmup-steps 0 --candidates 3 --ranker-updates 2",
    "responder": f"--model.path MODEL {REPLIES} {TALK} --episodes-per-step 6 --low.warmup-steps 0",
    "tosca": f"--responder.path MODEL {REPLIES} {TALK} --episodes-per-step 6 --high-updates 2 --high-batch 4",
}
"""Two steps of every recipe that draws for training, each with one update per set of weights."""
LEVELS = {
    "control": ("policy", "planner"),
    "feedback": ("solver", "coach"),
    "responder": ("low/policy",),
    "tosca": ("low/policy",),
}
"""What is logged of each set of weights that draws stands under these names; elsewhere under policy."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with random weights, heads as wide as vLLM wants them on a CPU, and something to ask it."""
    folder = tmp_path_factory.mktemp("model")
    texts = [message["content"] for task in Talk.tasks("train") for message in Talk(task).start()]
    for part in tiny(texts, vocab_size=300, hidden=64, layers=2, heads=2, max_positions=1200):
        part.save_pretrained(folder)
    (folder / "asked.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    (folder / "rewards.py").write_text(REWARD)
    return folder


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[VllmSampler]:
    """All samplers with vLLM that were given weights."""
    found: list[VllmSampler] = []
    load = VllmSampler.load

    def noted(sampler: VllmSampler, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        load(sampler, weights, version)
        found.extend([sampler] if sampler not in found else [])

    monkeypatch.setattr(VllmSampler, "load", noted)
    return found


def test_every_recipe_that_draws_for_training_is_tried() -> None:
    settings = {recipe: " ".join(settings_of(config_of(recipe))) for recipe in cli.recipes()}
    assert set(RUNS) == {recipe for recipe, names in settings.items() if "sampling.sampler" in names}


@pytest.mark.vllm
@needs_vllm
@pytest.mark.parametrize("recipe", RUNS)
def test_what_vllm_says_is_the_policys_before_and_after_it_learned(
    train: Train, model: Path, given: list[VllmSampler], recipe: str
) -> None:
    flags = RUNS[recipe].replace("MODEL", str(model)).split()
    rows = train(recipe, *flags, "--sampler", "vllm", "--steps", 2).rows()
    assert len(rows) == 2
    assert all(math.isfinite(value) for row in rows for value in row.values())
    for row in rows:
        for level in LEVELS.get(recipe, ("policy",)):
            assert row[f"{level}/first_mismatch"] <= 1e-4
            assert row[f"{level}/ratio"] == pytest.approx(1, abs=1e-4)
            assert row[f"{level}/grad_norm"] > 0
    assert len(given) == len(LEVELS.get(recipe, ("policy",)))
    start = load_lm(str(model), device="cpu")
    requests = [(ids(20 + 9 * n, n), SamplingParams(max_tokens=6, seed=n)) for n in range(4)]
    for sampler in given:
        said = ask(sampler, requests)
        assert mismatch(sampler.module, requests, said, 1.0) <= 1e-4
        assert mismatch(start, requests, said, 1.0) > 1e-2


@pytest.mark.vllm
@pytest.mark.learning
@needs_vllm
def test_a_rule_is_learned_through_vllm(train: Train, tmp_path: Path) -> None:
    """From every other letter right to four in five, as with the local engine; measured: to 0.99."""
    flags = ["--steps", 30, "--tasks-per-step", 6, "--group-size", 8, "--policy.optim.lr", 1e-3]
    flags += ["--policy.optim.schedule", "linear", "--sampler", "vllm", "--sampling.cache-tokens", 4096]
    rows = train("grpo", *spelling(speller(tmp_path, hidden=64, lr=3e-3)), *flags).rows()
    right = [row["reward/same"] for row in rows]
    assert right[0] < 0.6
    assert sum(right[-3:]) / 3 > 0.8
    assert all(row["policy/first_mismatch"] <= 1e-4 for row in rows)
