"""What a plan says that a run will hold, against what a run holds."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from echelon import cli
from echelon.config import DistConfig, LoraConfig, OptimConfig, RayConfig, SamplingConfig, TrainConfig
from echelon.data.packing import copies, pack
from echelon.models import lora
from echelon.models.heads import TokenValue
from echelon.models.lm import enable_checkpointing, tiny
from echelon.rollout.memory import SIZES, Engine, Plan, activations, needs, optimizer_state, shard, table
from echelon.sampling.local import LocalSampler
from echelon.sampling.ray import RaySampler
from echelon.train import dist
from echelon.train.ema import Average
from echelon.train.learner import Learner, Weights
from tests.train.learning_together import nll, under

ZERO3 = DistConfig(strategy="fsdp")
SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 128}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 160},
    "qwen3": {"intermediate_size": 256, "num_key_value_heads": 2, "head_dim": 16},
    "gpt2": {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 0, "eos_token_id": 0},
    "gpt_neox": {"intermediate_size": 256, "bos_token_id": 0, "eos_token_id": 0},
}
WITHIN = 1.7
"""How far the estimate of what layers keep may be off, either way."""


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny(["a b c"], vocab_size=270, hidden=32, layers=2, heads=2)[0].to(dtype)


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def held(learner: Learner) -> dict[str, int]:
    """What a learner holds after an update, counted."""
    state = [value for entry in learner.optimizer.state.values() for name, value in entry.items() if name != "step"]
    masters = [own for own, weight in zip(learner.masters, learner.trained, strict=True) if own is not weight]
    return {
        "weights": bytes_of(learner.module.parameters()),
        "gradients": bytes_of(master.grad for master in learner.masters),
        "optimizer": bytes_of([*state, *masters]),
    }


@pytest.mark.parametrize("case", ["all", "adapter", "half", "adafactor", "head"])
def test_weights_gradients_and_optimizer_are_those_of_a_learner_to_the_byte(case: str) -> None:
    module = model(torch.bfloat16 if case == "half" else torch.float32)
    module = lora.attach(module, LoraConfig(rank=4)) if case == "adapter" else module
    module = TokenValue.from_lm(module) if case == "head" else module
    learner = Learner(module, OptimConfig(name="adafactor" if case == "adafactor" else "adamw"))
    learner.update(
        pack(copies(2, vocabulary=260, seed=0, length=24)).split(24),
        nll if case != "head" else lambda own, rows: (sum(weight.sum() for weight in own.parameters()), {}),
    )
    planned, measured = needs(Plan({"lm": learner}, DistConfig(), 9), 1, tokens_per_step=0), held(learner)
    assert planned["lm: weights"] == measured["weights"]
    assert planned["lm: optimizer"] == measured["optimizer"]
    passing = 2 * sum(weight.numel() for weight in learner.trained) if case == "half" else 0  # of one micro-batch
    assert planned["lm: gradients"] - passing == measured["gradients"]


def kept(module: nn.Module, rows: int, length: int) -> int:
    """Bytes of what autograd keeps of a loss, besides weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    seen: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = pack(copies(rows, vocabulary=120, seed=0, length=length))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        nll(module.train(), batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_what_layers_keep_is_estimated_within_a_factor(kind: str, checkpointed: bool) -> None:
    config = AutoConfig.for_model(kind, **{**SHAPE, **MODELS[kind]})
    module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if checkpointed:
        enable_checkpointing(module)
    rows, length = 4, 48
    estimated, measured = activations(module, rows * length, 4), kept(module, rows, length)
    if checkpointed:  # what one layer keeps while it is computed again is not there yet
        estimated -= 4 * rows * length * (12 * 64 + 4 * MODELS[kind].get("intermediate_size", 256))
    logits = 4 * rows * length * 128  # worked on besides those that are kept
    assert measured / WITHIN < estimated - logits < measured * WITHIN


def test_the_formula_of_activations_by_hand() -> None:
    config = AutoConfig.for_model("llama", **SHAPE, intermediate_size=160)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    layers = 10 * 2 * 3 * (12 * 64 + 4 * 160)
    assert activations(module, 10, 2) == layers + 4 * 2 * 10 * 128
    assert activations(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), 10, 4) == 10 * 4 * (3 + 8 + 8 + 1)


def test_parts_of_eight_ranks_by_hand() -> None:
    module = model()
    count = sum(weight.numel() for weight in module.parameters())
    layer = sum(weight.numel() for weight in module.model.layers[0].parameters())  # type: ignore[union-attr, index]
    learner = Learner(module, OptimConfig())
    found = needs(Plan({"lm": learner}, ZERO3, 64), 8, tokens_per_step=0)
    assert {name.removeprefix("lm: "): size for name, size in found.items() if name != "activations of a pass"} == {
        "weights": 4 * count,
        "part of the weights": -(-4 * count // 8),
        "part of the gradients": -(-4 * count // 8),
        "part of the optimizer": count,
        "layers that compute": 4 * count,  # there are two layers, and two are gathered
        "gradients not yet summed": 4 * count,
    }
    assert shard(module, replace(ZERO3, reshard_after_forward=False), 8, 2) == (-(-4 * count // 8), 2 * count)
    thin = needs(
        Plan({"lm": learner}, replace(ZERO3, reduce_every_pass=True, cpu_offload=True), 64), 8, tokens_per_step=0
    )
    assert set(thin) == {"lm: weights", "lm: layers that compute", "activations of a pass"}
    waits = Learner(model(), OptimConfig(), resident=False)
    assert "lm: weights" not in needs(Plan({"lm": waits}, ZERO3, 64), 8, tokens_per_step=0)
    assert layer < count / 2


def test_eight_ranks_of_ddp_hold_what_one_process_holds_and_a_sum() -> None:
    learner = Learner(model(), OptimConfig())
    one, eight = (needs(Plan({"lm": learner}, DistConfig(), 64), ranks, tokens_per_step=0) for ranks in (1, 8))
    assert eight == {**one, "lm: gradients": 2 * one["lm: gradients"]}


def test_references_targets_averages_and_shared_weights_are_counted_once() -> None:
    actor, reference = Learner(model(), OptimConfig()), Weights(model().requires_grad_(False))
    size = bytes_of(actor.module.parameters())
    parts = {
        "actor": actor,
        "again": actor.module,
        "reference": reference,
        "ema": Average(actor, 0.9),
        "replay": object(),
    }
    found = needs(Plan(parts, DistConfig(), 64), 1, tokens_per_step=0)
    assert {name: at for name, at in found.items() if name.endswith("weights")} == {
        "actor: weights": size,
        "reference: weights": size,
        "ema: weights": size,
    }


def test_keys_and_values_are_those_of_a_step_and_at_most_the_budget() -> None:
    module, tokenizer = tiny(["a b c"], vocab_size=270, hidden=32, layers=2, heads=2)
    sampling = SamplingConfig(max_tokens=10, max_prompt_tokens=90)
    per_token = 2 * 2 * 32 * 4  # two layers, keys and values, of 32 float32
    for budget, ranks, tokens in ((10**9, 1, 2 * 6 * 100), (10**9, 3, 2 * 2 * 100), (500, 1, 500)):
        engine = Engine(LocalSampler(module, tokenizer, cache_tokens=budget), sampling)
        found = needs(Plan({}, DistConfig(), 64, {"actor": engine}), ranks, tokens_per_step=60)
        assert found["actor: keys and values, at most"] == tokens * per_token


def test_rollouts_ahead_hold_copies_and_workers_elsewhere_nothing() -> None:
    module, tokenizer = tiny(["a b c"], vocab_size=270, hidden=32, layers=2, heads=2)
    sampling = SamplingConfig(max_tokens=10, max_prompt_tokens=90)
    engine = Engine(LocalSampler(module, tokenizer, cache_tokens=500), sampling)

    def held(engine: Engine) -> dict[str, int]:
        found = needs(Plan({}, DistConfig(), 64, {"actor": engine}), 1, tokens_per_step=60)
        return {name: size for name, size in found.items() if name.startswith("actor")}

    kept = held(engine)["actor: keys and values, at most"]
    twice = {"actor: keys and values, at most": 2 * kept, "actor: copies that play": 2 * bytes_of(module.parameters())}
    assert held(replace(engine, ahead=2)) == twice
    for count in (0, 3):  # what chooses is read and samples nothing
        plan = Plan({}, DistConfig(), 64, copies={"ranker": (module, count)})
        expected = {"ranker: copies that play": 3 * bytes_of(module.parameters())} if count else {}
        found = needs(plan, 1, tokens_per_step=60)
        assert {name: size for name, size in found.items() if name.startswith("ranker")} == expected
    pytest.importorskip("ray")
    assert held(Engine(RaySampler(module, tokenizer, RayConfig()), sampling)) == {}


def test_the_plan_on_the_page_about_scaling_is_what_is_computed() -> None:
    shape = {"hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 12288, "vocab_size": 151936}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    with torch.device("meta"):
        config = AutoConfig.for_model("qwen3", **shape, **heads, tie_word_embeddings=False)
        module, reference = (AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16) for _ in range(2))
    enable_checkpointing(module)
    sampling = SamplingConfig(max_tokens=512, max_prompt_tokens=1024)
    engine: Any = SimpleNamespace(module=module, cache_tokens=65536)
    plan = Plan(
        {"actor": Learner(module, OptimConfig()), "reference": reference},
        replace(ZERO3, reduce_every_pass=True),
        8192,
        {"actor": Engine(engine, sampling)},
    )
    columns = [needs(plan, ranks, tokens_per_step=64 * 8 * 512) for ranks in SIZES]
    columns = [{**column, "together": sum(column.values())} for column in columns]
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    for name in dict.fromkeys(name for column in columns for name in column):
        row = [f"{column[name] / 2**30:.1f}" if name in column else "–" for column in columns]
        assert f"| {name} | {' | '.join(row)} |" in page


def test_states_of_optimizers_by_hand() -> None:
    weights = [torch.zeros(4, 6), torch.zeros(6)]
    assert {name: optimizer_state(weights, name) for name in ("adamw", "adamw_8bit", "adafactor")} == {
        "adamw": 8 * 30,
        "adamw_8bit": 2 * 30,
        "adafactor": 4 * (4 + 6 + 6),
    }


def test_the_table_has_a_column_for_each_number_of_ranks_and_their_sums() -> None:
    plan = Plan({"lm": Learner(model(), OptimConfig())}, replace(ZERO3, cpu_offload=True), 64)
    head, ranks, *rows = table(plan, tokens_per_step=0)
    assert head == "memory of each rank, MiB: fsdp, ZeRO-3, parts on the host"
    assert ranks.split() == ["ranks", *map(str, SIZES)]
    assert rows[0].startswith("  lm: weights")
    total = f"{sum(needs(plan, 1, tokens_per_step=0).values()) / 2**20:,.1f}"
    assert rows[-1].split()[:2] == ["together", total]
    assert next(row for row in rows if "not yet summed" in row).split()[-3] == "-", "one process sums nothing"


def test_every_recipe_that_ranks_can_train_says_what_each_will_hold() -> None:
    modules = {name: importlib.import_module(f"echelon.recipes.{name.replace('-', '_')}") for name in cli.recipes()}
    trains = {name: module for name, module in modules.items() if issubclass(module.Config, TrainConfig)}
    assert len(trains) >= 14
    assert [name for name, module in trains.items() if "Plan(" not in inspect.getsource(module)] == []


def test_of_ranks_that_were_started_theirs_is_the_only_column() -> None:
    plan = Plan({"lm": Learner(model(), OptimConfig())}, ZERO3, 64)
    with under(dist.Ranks(0, 2, 2, ZERO3)):
        _, ranks, first, *_ = table(plan, tokens_per_step=0)
    assert ranks.split() == ["ranks", "2"]
    assert len(first.split()) == len(["lm:", "weights", "0.1"])
