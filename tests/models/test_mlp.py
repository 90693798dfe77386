"""Perceptrons that act and value: their scale, their distributions, their units, and that a saved one says the same."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from echelon.errors import CheckpointError
from echelon.models.mlp import CategoricalMlp, GaussianMlp, MlpPolicy, RunningNorm, ValueMlp, load_policy, make_policy
from echelon.text.codec import Space

CHOICES = Space("discrete", n=3, start=1)
BOX = Space("box", low=(-2.0, 0.0), high=(2.0, 1.0))
OPEN = Space("box", low=(-math.inf,), high=(3.0,))


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lively(actions: Space, width: int = 4) -> MlpPolicy:
    """A policy whose last layer is not close to zero, and that has seen something."""
    policy = make_policy(width, actions, hidden=(8,), about={"env": "Toy-v0"})
    with torch.no_grad():
        policy.body[-1].weight.mul_(100)
    policy.norm.see(3 + 2 * torch.randn(50, width, generator=draws(1)))
    return policy


def test_the_scale_is_that_of_everything_seen() -> None:
    norm = RunningNorm(1)
    assert norm(torch.tensor([[7.0]])).item() == 7.0  # nothing seen yet
    norm.see(torch.tensor([[0.0], [2.0]]))
    norm.see(torch.tensor([[4.0]]))
    assert norm.mean.item() == 2.0
    assert norm.squares.item() / norm.count.item() == pytest.approx(8 / 3)
    out = norm(torch.tensor([[2.0], [4.0], [1e9]]))
    assert out[:, 0].tolist() == pytest.approx([0.0, 2 / math.sqrt(8 / 3), 10.0])


def test_a_number_that_never_varies_is_moved_and_not_divided() -> None:
    norm = RunningNorm(2)
    norm.see(torch.tensor([[0.1, 1.0], [0.1, 3.0], [0.1, 1.0]]))
    assert norm(torch.tensor([[0.1, 1.0], [1.1, 1.0]]))[:, 0].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


def test_log_probabilities_and_entropy_of_choices() -> None:
    policy = make_policy(2, CHOICES, hidden=(4,))
    with torch.no_grad():
        policy.body[-1].weight.zero_()
        policy.body[-1].bias.copy_(torch.tensor([1 / 2, 1 / 4, 1 / 4]).log())
    logprobs, entropy = policy.logprobs(torch.zeros(3, 2), torch.tensor([0, 1, 2]))
    assert logprobs.exp().tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 4])
    assert entropy[0].item() == pytest.approx(1.5 * math.log(2))
    assert policy.best(torch.zeros(1, 2)).item() == 0
    assert policy.imitation_loss(torch.zeros(1, 2), torch.tensor([1])).item() == pytest.approx(math.log(4))


def test_log_densities_and_entropy_of_points() -> None:
    policy = make_policy(2, BOX, hidden=(4,), initial_std=0.5)
    with torch.no_grad():
        policy.body[-1].weight.zero_()
    logprobs, entropy = policy.logprobs(torch.zeros(1, 2), torch.tensor([[0.5, 0.0]]))
    one = -0.5 * math.log(2 * math.pi) - math.log(0.5)  # at the middle
    assert logprobs.item() == pytest.approx(2 * one - 0.5)  # one part is a deviation away
    assert entropy.item() == pytest.approx(2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.5)))
    assert policy.imitation_loss(torch.zeros(1, 2), torch.tensor([[0.5, -1.0]])).item() == pytest.approx(1.25)


@pytest.mark.parametrize("actions", [CHOICES, BOX, OPEN])
def test_what_was_sampled_has_the_log_probability_it_was_sampled_with(actions: Space) -> None:
    policy, seen = lively(actions), torch.randn(20, 4, generator=draws())
    chosen, logprobs = policy.sample(seen, draws())
    assert torch.equal(policy.logprobs(seen, chosen)[0], logprobs)
    assert torch.equal(policy.sample(seen, draws())[1], logprobs)


def test_choices_are_frequent_as_they_are_probable() -> None:
    policy = lively(CHOICES)
    seen = torch.zeros(1, 4).expand(4000, 4)
    chosen, _ = policy.sample(seen, draws())
    expected = policy(seen[:1]).softmax(-1)[0]
    assert torch.bincount(chosen, minlength=3) / 4000 == pytest.approx(expected.detach().numpy(), abs=0.03)


def test_actions_in_the_units_of_the_environment() -> None:
    choices, box, unbounded = make_policy(1, CHOICES), make_policy(1, BOX), make_policy(1, OPEN)
    assert choices.to_env(torch.tensor([0, 2])).tolist() == [1, 3]
    assert choices.from_env(np.array([1, 3])).tolist() == [0, 2]
    points = box.to_env(torch.tensor([[0.0, 0.0], [0.5, 1.0], [-3.0, 9.0]]))
    assert points.tolist() == [[0.0, 0.5], [1.0, 1.0], [-2.0, 1.0]]
    assert points.dtype == np.float32
    assert box.from_env(points[:2]).tolist() == [[0.0, 0.0], [0.5, 1.0]]
    assert unbounded.to_env(torch.tensor([[-50.0], [50.0]])).tolist() == [[-50.0], [3.0]]


@pytest.mark.parametrize(("actions", "kind"), [(CHOICES, CategoricalMlp), (BOX, GaussianMlp), (OPEN, GaussianMlp)])
def test_a_saved_policy_acts_the_same(actions: Space, kind: type, tmp_path: Path) -> None:
    policy, seen = lively(actions), np.random.default_rng(0).normal(size=(5, 4))
    policy.save_pretrained(tmp_path / "p")
    loaded = load_policy(tmp_path / "p")
    assert type(loaded) is kind
    assert loaded.actions == actions
    assert loaded.about == {"env": "Toy-v0"}
    assert np.array_equal(loaded.act(seen), policy.act(seen))
    assert np.array_equal(loaded.act(seen, draws()), policy.act(seen, draws()))
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["config.json", "model.safetensors"]
    json.loads((tmp_path / "p/config.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_folder_without_a_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no MLP policy can be read there"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"a model of type llama is no MLP policy\. Give the run directory"):
        load_policy(tmp_path)
    lively(CHOICES).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="no MLP policy can be read there"):
        load_policy(tmp_path)


def test_the_weights_come_from_the_seed_and_nothing_else_is_drawn() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, same, other = (make_policy(4, CHOICES, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.body[0].weight, same.body[0].weight)
    assert not torch.equal(one.body[0].weight, other.body[0].weight)


def test_an_untrained_policy_is_close_to_indifferent() -> None:
    shares = make_policy(4, CHOICES)(torch.randn(9, 4)).softmax(-1)
    assert (shares - 1 / 3).abs().max().item() < 0.02


def test_values_stay_what_they_were_when_their_scale_moves() -> None:
    value, seen = ValueMlp(3, hidden=(8,)), torch.randn(6, 3, generator=draws())
    before = value.values(seen)
    value.rescale_(torch.tensor([-100.0, -300.0]), forget=1.0)
    assert value.mean.item() == -200.0
    assert value.std.item() == 100.0
    assert value.values(seen).tolist() == pytest.approx(before.tolist(), abs=1e-3)
    assert value.compared(torch.tensor([-200.0, -100.0])).tolist() == [0.0, 1.0]
    value.rescale_(torch.tensor([1000.0]), forget=0.5)
    assert value.values(seen).tolist() == pytest.approx(before.tolist(), abs=1e-2)


def test_returns_that_do_not_vary_leave_a_scale_to_divide_by() -> None:
    value = ValueMlp(3)
    value.rescale_(torch.full((4,), 7.0), forget=1.0)
    assert value.compared(torch.tensor([7.0])).item() == 0.0
    assert value.std.item() == pytest.approx(7e-3)
