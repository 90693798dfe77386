"""Optimizers by name, 16-bit weights that follow float32 masters, float16 gradients that neither vanish nor burst."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from echelon.config import LoraConfig, OptimConfig
from echelon.errors import CheckpointError, ConfigError, DataError, MissingExtra
from echelon.models import lora
from echelon.models.lm import pick_device, quantized, tiny
from echelon.rollout.setup import describe
from echelon.train.learner import Learner, NonFiniteLoss
from echelon.train.optimizers import LossScale, learning_rate, make_optimizer

LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Numbers:
    """A micro-batch that is one tensor."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device | str) -> Numbers:
        return Numbers(self.x.to(device))


def line(dtype: torch.dtype = torch.float32, *, start: float = 1.0) -> nn.Module:
    """y = w·x + b with w = b = start."""
    module = nn.Linear(1, 1, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(start)
    return module


def output(module: nn.Module, batch: Numbers) -> tuple[Tensor, dict[str, float]]:
    """Descending, every weight falls by the rate."""
    return module(batch.x.to(next(module.parameters()).dtype)).float().sum(), {}


def squares(module: nn.Module, batch: Numbers) -> tuple[Tensor, dict[str, float]]:
    return (module(batch.x.to(next(module.parameters()).dtype)).float() ** 2).sum(), {}


ONE = Numbers(torch.ones(1, 1))


@pytest.mark.parametrize("dtype", LOW)
def test_small_updates_of_16_bit_weights_are_not_lost(dtype: str) -> None:
    """Around 1, bfloat16 numbers lie 1/128 apart (below 1: 1/256): steps of 1e-4 would all be rounded away."""
    rate = 1e-4
    learner = Learner(line(LOW[dtype]), OptimConfig(lr=rate))
    plain = line(LOW[dtype])
    optimizer = torch.optim.AdamW(plain.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(200):
        learner.update([ONE], output)
        optimizer.zero_grad()
        output(plain, ONE)[0].backward()
        optimizer.step()
    exact = Learner(line(), OptimConfig(lr=rate))
    for _ in range(200):
        exact.update([ONE], output)
    for master, parameter, wanted in zip(learner.masters, learner.trained, exact.trained, strict=True):
        found, expected = float(master.detach()), float(wanted.detach())
        assert found == pytest.approx(expected, abs=1e-5) == pytest.approx(0.98, abs=1e-4)
        assert parameter.equal(master.to(LOW[dtype]))
    if dtype == "bfloat16":
        assert all(float(parameter.detach()) == 1.0 for parameter in plain.parameters()), (
            "without masters nothing moves"
        )


def test_float32_weights_are_their_own_masters() -> None:
    learner = Learner(line(), OptimConfig())
    assert all(master is parameter for master, parameter in zip(learner.masters, learner.trained, strict=True))
    assert learner.loss_scale is None


def test_gradients_of_micro_batches_are_added_in_float32() -> None:
    """1 + 256 x 1/256 is 2; added in bfloat16, one small one after the other is lost and it stays 1."""
    seen: list[float] = []

    def loss(module: nn.Module, batch: Numbers) -> tuple[Tensor, dict[str, float]]:
        return (module.weight * batch.x).float().sum(), {}  # type: ignore[operator]

    learner = Learner(line(torch.bfloat16), OptimConfig(max_grad_norm=0.0))
    learner.optimizer.register_step_pre_hook(lambda *_: seen.append(float(learner.masters[0].grad)))  # type: ignore[arg-type]
    parts = [Numbers(torch.ones(1, 1)), *[Numbers(torch.full((1, 1), 1 / 256))] * 256]
    metrics = learner.update(parts, loss)
    assert seen == [2.0]
    assert metrics["grad_norm"] == 2.0


@pytest.mark.parametrize("dtype", LOW)
def test_masters_survive_a_kill(dtype: str, tmp_path: Path) -> None:
    optim = OptimConfig(lr=1e-3, weight_decay=0.01)
    learner = Learner(line(LOW[dtype]), optim)
    for _ in range(5):
        learner.update([ONE], squares)
    learner.save(tmp_path)
    resumed = Learner(line(LOW[dtype], start=3.0), optim)
    resumed.update([ONE], squares)
    resumed.load(tmp_path)
    for _ in range(3):
        assert resumed.update([ONE], squares) == learner.update([ONE], squares)
    assert all(a.equal(b) for a, b in zip(resumed.masters, learner.masters, strict=True))
    with pytest.raises(CheckpointError, match="belongs to other weights"):
        Learner(line(), optim).load(tmp_path)


def test_an_adapter_on_16_bit_weights_learns_in_float32() -> None:
    module = tiny(["a b c"], vocab_size=270, hidden=32, layers=1, heads=2)[0].to(torch.bfloat16)
    learner = Learner(lora.attach(module, LoraConfig(rank=2)), OptimConfig())
    assert {parameter.dtype for parameter in learner.trained} == {torch.float32}
    assert learner.loss_scale is None


def test_a_loss_scale_keeps_small_gradients_of_float16() -> None:
    """A gradient of 2⁻²⁶ is zero in float16, whose smallest number is 2⁻²⁴."""

    def loss(module: nn.Module, batch: Numbers) -> tuple[Tensor, dict[str, float]]:
        return output(module, batch)[0] * 2.0**-26, {}

    learner = Learner(line(torch.float16), OptimConfig(lr=1e-2, eps=1e-12))
    metrics = learner.update([ONE], loss)
    assert metrics["grad_norm"] == pytest.approx(2.0**-26 * math.sqrt(2))
    assert metrics["loss"] == pytest.approx(2 * 2.0**-26)
    assert metrics["loss_scale"] == 2.0**16
    assert [float(master.detach()) for master in learner.masters] == pytest.approx([0.99, 0.99], abs=1e-4)


def test_a_gradient_that_overflows_is_computed_again_with_half_the_scale() -> None:
    """A slope of 4 times 2^16 is more than 65504; times 2^13 it is not."""

    def loss(module: nn.Module, batch: Numbers) -> tuple[Tensor, dict[str, float]]:
        return 4 * output(module, batch)[0], {}

    learner = Learner(line(torch.float16), OptimConfig(lr=1e-2))
    assert learner.update([ONE], loss)["loss_scale"] == 2.0**13
    assert learner.version == 1
    assert [float(master.detach()) for master in learner.masters] == pytest.approx([0.99, 0.99], abs=1e-4)


def test_a_gradient_that_is_never_finite_is_an_error_and_changes_nothing() -> None:
    def loss(module: nn.Module, batch: Numbers) -> tuple[Tensor, dict[str, float]]:
        return torch.sqrt(output(module, batch)[0] * 0), {}

    learner = Learner(line(torch.float16), OptimConfig(), name="actor")
    learner.update([ONE], output)
    before, scale = [master.clone() for master in learner.masters], learner.loss_scale.scale
    with pytest.raises(NonFiniteLoss, match="actor: the gradient is nan at update 1"):
        learner.update([ONE], loss)
    assert all(a.equal(b) for a, b in zip(learner.masters, before, strict=True))
    assert learner.loss_scale is not None
    assert (learner.loss_scale.scale, learner.loss_scale.steps, learner.version) == (scale, 1, 1)


def test_the_loss_scale_grows_after_a_while_and_survives_a_kill(tmp_path: Path) -> None:
    scale = LossScale(8.0, LossScale.PATIENCE - 2)
    scale.worked()
    assert scale.scale == 8.0
    scale.worked()
    assert (scale.scale, scale.steps) == (16.0, 0)
    assert scale.overflowed()
    assert (scale.scale, scale.steps) == (8.0, 0)
    assert not LossScale(LossScale.SMALLEST).overflowed()

    learner = Learner(line(torch.float16), OptimConfig())
    learner.loss_scale = LossScale(32.0, 7)
    learner.save(tmp_path)
    resumed = Learner(line(torch.float16), OptimConfig())
    resumed.load(tmp_path)
    assert resumed.loss_scale is not None
    assert (resumed.loss_scale.scale, resumed.loss_scale.steps) == (32.0, 7)


def test_an_adapter_on_float16_weights_needs_a_loss_scale_too() -> None:
    module = tiny(["a b c"], vocab_size=270, hidden=32, layers=1, heads=2)[0].to(torch.float16)
    assert Learner(lora.attach(module, LoraConfig(rank=2)), OptimConfig()).loss_scale is not None


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_every_optimizer_learns_and_goes_on_exactly_after_a_kill(name: Any, tmp_path: Path) -> None:
    optim = OptimConfig(name=name, lr=1e-2, weight_decay=0.01, decay="matrices")

    def fresh() -> Learner:
        torch.manual_seed(0)
        return Learner(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), optim)

    learner, batch = fresh(), Numbers(torch.linspace(-1, 1, 20).view(5, 4))
    losses = [learner.update([batch], squares)["loss"] for _ in range(6)]
    assert losses[-1] < losses[0]
    learner.save(tmp_path)
    resumed = fresh()
    resumed.load(tmp_path)
    assert resumed.update([batch], squares) == learner.update([batch], squares)
    assert all(a.equal(b) for a, b in zip(resumed.trained, learner.trained, strict=True))


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    learner = Learner(line(), OptimConfig())
    learner.update([ONE], squares)
    learner.save(tmp_path)
    with pytest.raises(CheckpointError, match="or to another optimizer"):
        Learner(line(), OptimConfig(name="adafactor")).load(tmp_path)


@pytest.mark.parametrize(("decay", "expected"), [("all", [0.9, 0.9]), ("matrices", [0.9, 1.0])])
def test_decay_takes_biases_and_norms_only_if_it_takes_all(decay: Any, expected: list[float]) -> None:
    """Without a gradient a weight falls by lr x decay of itself."""

    def nothing(module: nn.Module, batch: Numbers) -> tuple[Tensor, dict[str, float]]:
        return output(module, batch)[0] * 0, {}

    learner = Learner(line(), OptimConfig(lr=0.1, weight_decay=1.0, decay=decay))
    learner.update([ONE], nothing)
    assert [float(parameter.detach()) for parameter in learner.module.parameters()] == pytest.approx(expected)


def test_warming_up_for_a_part_of_the_run_by_hand() -> None:
    half = OptimConfig(lr=8.0, warmup_fraction=0.5, schedule="linear")
    assert [learning_rate(half, step, 8) for step in range(9)] == [2.0, 4.0, 6.0, 8.0, 8.0, 6.0, 4.0, 2.0, 0.0]
    steps = OptimConfig(lr=8.0, warmup_steps=4, schedule="linear")
    assert [learning_rate(half, step, 8) for step in range(9)] == [learning_rate(steps, step, 8) for step in range(9)]
    assert [learning_rate(OptimConfig(lr=8.0, warmup_fraction=0.1), step, 11) for step in range(3)] == [4.0, 8.0, 8.0]
    with pytest.raises(AssertionError, match="warmup_fraction needs total_steps"):
        learning_rate(half, 0, 0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warmup_fraction": 1.5}, "warmup_fraction = 1.5: it is a part of the steps"),
        ({"warmup_fraction": 0.1, "warmup_steps": 3}, "warmup_fraction = 0.1: warmup_steps says how long it takes too"),
    ],
)
def test_settings_that_cannot_work_say_why(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        OptimConfig(**settings)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_optimizers_of_bitsandbytes_need_it_and_a_gpu(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, optim = [torch.zeros(2, requires_grad=True)], OptimConfig(name=name, lr=0.5, betas=(0.8, 0.9))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    install = r"bitsandbytes is not installed. Run: pip install 'echelon\[quantization\]'"
    with pytest.raises(MissingExtra, match=install):
        make_optimizer(parameters, optim, torch.device("cuda"))

    monkeypatch.setitem(sys.modules, "bitsandbytes", fake_bitsandbytes())
    with pytest.raises(ConfigError, match=f"optim.name = {name}: it needs a GPU, and what learns is on cpu"):
        make_optimizer(parameters, optim, torch.device("cpu"))
    made: Any = make_optimizer(parameters, optim, torch.device("cuda"))
    assert made.called == {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW32bit"}.get(name, "PagedAdamW8bit")
    assert made.given == {"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.0}


def fake_bitsandbytes() -> ModuleType:
    """Optimizers that say what they are and what they were given."""
    library = ModuleType("bitsandbytes")

    def make(called: str) -> Any:
        return lambda groups, **given: SimpleNamespace(called=called, given=given)

    library.optim = SimpleNamespace(  # type: ignore[attr-defined]
        **{called: make(called) for called in ("AdamW8bit", "PagedAdamW32bit", "PagedAdamW8bit")}
    )
    return library


class Packed(torch.optim.AdamW):
    """Keeps a number, nested tensors and one tensor that all weights share in its state, as bitsandbytes does."""

    LEVELS = torch.linspace(-1, 1, 256)

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        states = found["state"].items()
        more = {"step": 3, "levels": self.LEVELS}
        return {**found, "state": {index: {**more, "packed": dict(entry)} for index, entry in states}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = state_dict["state"].items()
        assert len(states) == 2
        assert all(entry["step"] == 3 and entry["levels"].equal(self.LEVELS) for _, entry in states)
        super().load_state_dict({**state_dict, "state": {index: entry["packed"] for index, entry in states}})


def test_numbers_and_nested_and_shared_tensors_in_a_state_survive_a_kill(tmp_path: Path) -> None:
    def fresh() -> Learner:
        learner = Learner(line(), OptimConfig())
        learner.optimizer = Packed(learner.masters, lr=1e-3, weight_decay=0.0)
        return learner

    learner, resumed = fresh(), fresh()
    for _ in range(2):
        learner.update([ONE], squares)
    learner.save(tmp_path)
    resumed.load(tmp_path)
    assert resumed.update([ONE], squares) == learner.update([ONE], squares)
    assert all(a.equal(b) for a, b in zip(resumed.trained, learner.trained, strict=True))


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_weights_of_few_bits_need_bitsandbytes_and_a_gpu(bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"pip install 'echelon\[quantization\]'"):
        quantized(bits, "bfloat16", torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake_bitsandbytes())
    with pytest.raises(DataError, match=f"model.quantization = {bits}: it needs an NVIDIA or AMD GPU.* is on cpu"):
        quantized(bits, "bfloat16", torch.device("cpu"))
    assert quantized("none", "bfloat16", pick_device("cpu")) == {}


def test_weights_of_few_bits_do_not_learn_without_an_adapter() -> None:
    module: Any = tiny(["a"], vocab_size=270, hidden=32, layers=1, heads=2)[0]
    module.is_quantized = True
    with pytest.raises(ConfigError, match=r"model.quantization: .* actor has no adapter that could. Set lora.rank"):
        Learner(module, OptimConfig(), name="actor")
    adapted = lora.attach(module, LoraConfig(rank=2))
    Learner(adapted, OptimConfig())
    with pytest.raises(DataError, match=r"'some/adapter' is an adapter, and quantised weights cannot take it in"):
        lora.fold(adapted, "some/adapter")


def test_what_16_bits_need_in_training_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    describe({"actor": nn.Linear(1 << 20, 1, bias=False, dtype=torch.bfloat16)}, tokens_per_step=1)
    assert "2.0 MiB of weights, 16.0 MiB more" in capsys.readouterr().out
