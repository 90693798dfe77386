"""The average of the weights: what it is, that it leaves the weights alone, and that it survives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from echelon.config import LoraConfig, OptimConfig
from echelon.models import lora
from echelon.models.lm import tiny
from echelon.train.ema import Average
from echelon.train.learner import Learner


class Numbers(nn.Module):
    """Three weights, and one that does not learn."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.fixed = nn.Parameter(torch.ones(1), requires_grad=False)


def moved(learner: Learner, value: float) -> None:
    with torch.no_grad():
        for master, parameter in zip(learner.masters, learner.trained, strict=True):
            master.fill_(value)
            parameter.copy_(master)


def test_a_part_of_the_average_stays_at_every_update_and_the_weights_are_left_alone() -> None:
    learner = Learner(Numbers(), OptimConfig())
    mean = Average(learner, 0.9)
    for _ in range(2):
        moved(learner, 1.0)
        mean.update()
    assert mean.tensors[0].tolist() == pytest.approx([0.19] * 3)
    assert learner.module.weight.tolist() == [1.0] * 3
    assert len(mean.tensors) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_saved_exactly_and_saving_leaves_the_weights_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    learner = Learner(Numbers(dtype), OptimConfig())
    mean = Average(learner, 0.999)
    moved(learner, 1.0)
    mean.update()
    mean.save(tmp_path)
    assert learner.module.weight.tolist() == [1.0] * 3
    other = Average(Learner(Numbers(dtype), OptimConfig()), 0.999)
    other.load(tmp_path)
    assert other.tensors[0].tolist() == mean.tensors[0].tolist()
    assert other.tensors[0].tolist() == pytest.approx([0.001] * 3)
    assert other.learner.module.weight.tolist() == [0.0] * 3


def test_of_a_16_bit_weight_the_average_moves_by_less_than_the_weight_could() -> None:
    learner = Learner(Numbers(torch.bfloat16), OptimConfig())
    moved(learner, 1.0)
    mean = Average(learner, 0.9)
    learner.masters[0].data.fill_(1.001)  # rounds to 1 in 16 bits
    mean.update()
    assert mean.tensors[0].tolist() == pytest.approx([1.0001] * 3, abs=1e-6)


def test_of_a_model_with_an_adapter_only_the_adapter_is_averaged(tmp_path: Path) -> None:
    module, tokenizer = tiny(["one two three"], vocab_size=300, hidden=16, layers=1, heads=2)
    (tmp_path / "base").mkdir()
    module.save_pretrained(tmp_path / "base")
    adapted = lora.attach(module, LoraConfig(rank=2), base=str(tmp_path / "base"))
    learner = Learner(adapted, OptimConfig(), tokenizer=tokenizer)
    mean = Average(learner, 0.5)
    assert sum(tensor.numel() for tensor in mean.tensors) == sum(p.numel() for p in learner.trained)
    before = [tensor.clone() for tensor in mean.tensors]
    moved(learner, 2.0)
    mean.update()
    mean.save(tmp_path / "ema")
    assert (tmp_path / "ema/adapter_model.safetensors").is_file()
    again = Average(learner, 0.5)
    again.load(tmp_path / "ema")
    expected: list[Tensor] = [(one + 2.0) / 2 for one in before]
    torch.testing.assert_close(again.tensors, expected)
    assert all(bool((parameter == 2.0).all()) for parameter in learner.trained)
