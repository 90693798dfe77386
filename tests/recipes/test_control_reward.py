"""A reward model of control: it learns, is resumed exactly, keeps the best, and is a reward of actions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from echelon.data.control import Recorded, control_arrays, control_rows
from echelon.models.lm import tiny
from echelon.models.reward_mlp import RewardMLP, load_reward_mlp
from echelon.text.codec import Codec, Space

CODEC = Codec(Space("box", (-1.0,), (1.0,)), Space("box", (-1.0,), (1.0,)), decimals=1, instruction="")
FEW = ("--width", 32, "--rows-per-step", 64, "--eval-every", 5, "--optim.lr", "1e-2", "--dropout", 0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight episodes of 32 steps that pay 10 − (a − s)²; two are held out."""
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    episodes = []
    for _ in range(8):
        seen, done = draw.uniform(-1, 1, (33, 1)).astype(np.float32), draw.uniform(-1, 1, (32, 1)).astype(np.float32)
        rewards = 10 - (done[:, 0] - seen[:-1, 0]).astype(np.float64) ** 2
        episodes.append(Recorded(seen, done, rewards, True))
    aside = {episode.name for episode in episodes[:2]}
    np.savez(folder / "arrays.npz", **control_arrays(episodes, aside))
    (folder / "codec.json").write_text(json.dumps(CODEC.to_json()))
    lines = [json.dumps(row) for episode in episodes[2:] for row in control_rows(episode, CODEC)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.learning
def test_it_learns_what_actions_earn_and_keeps_the_best_on_held_out_episodes(train, data: Path) -> None:
    run = train("control-reward", "--data", data, *FEW, "--max-steps", 150, "--patience", 0)
    assert run.rows()[-1]["loss"] < 0.1
    best = load_reward_mlp(run.out / "best")
    near, far = best.score(torch.tensor([[0.5], [0.5]]), torch.tensor([[0.5], [-0.9]])).tolist()
    assert near == pytest.approx(10, abs=0.3)
    assert far == pytest.approx(10 - 1.4**2, abs=0.6)
    losses = [row["eval/loss"] for row in run.rows() if "eval/loss" in row]
    assert len(losses) == 30
    assert best.codec == CODEC.to_json()


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(train, data: Path, killed_at) -> None:
    flags = ("--data", data, *FEW, "--dropout", 0.2, "--max-steps", 12, "--save-every", 4)
    whole = train("control-reward", *flags, name="whole")
    killed_at(9)
    train("control-reward", *flags, name="killed", status=130)
    killed_at(-1)
    resumed = train("control-reward", *flags, "--resume", name="killed")
    assert resumed.rows() == whole.rows()
    one, other = resumed.weights("reward"), whole.weights("reward")
    assert all(torch.equal(one[name], other[name]) for name in other)
    one, other = (load_file(run.out / "best/model.safetensors") for run in (resumed, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_patience_ends_a_run_that_no_longer_improves(train, data: Path) -> None:
    run = train("control-reward", "--data", data, *FEW, "--max-steps", 100, "--optim.lr", 0.0, "--patience", 2)
    assert len(run.rows()) == 15  # the first evaluation is the best, then two without improvement


def test_the_run_is_a_reward_for_the_states_of_the_data(train, data: Path, tmp_path: Path) -> None:
    run = train("control-reward", "--data", data, *FEW, "--max-steps", 5)
    texts = (data / "train.jsonl").read_text().splitlines()[:20]
    module, tokenizer = tiny(texts, vocab_size=300, hidden=32, layers=1, heads=2)
    module.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ("--model.path", tmp_path / "model", "--data.path", data / "train.jsonl", "--reward", run.out)
    few = ("--steps", 1, "--tasks-per-step", 2, "--group-size", 4, "--sampling.max-tokens", 4)
    (row,) = train("grpo", *flags, *few, name="grpo").rows()
    assert {"reward/run", "reward/run/unparsed"} <= row.keys()


def test_micro_batches_do_not_change_the_gradient() -> None:
    torch.manual_seed(0)
    module = RewardMLP(2, 1, width=8, dropout=0.0)
    seen, done = torch.randn(6, 2), torch.randn(6, 1)
    whole = torch.autograd.grad(module(seen, done).square().sum(), list(module.parameters()))
    parts = [module(seen[rows], done[rows]).square().sum() for rows in (slice(0, 1), slice(1, 6))]
    split = torch.autograd.grad(sum(parts), list(module.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, split, strict=True))


def test_choices_are_one_hot_from_where_they_begin_and_constant_inputs_do_no_harm() -> None:
    torch.manual_seed(0)
    module = RewardMLP(1, 1, choices=3, first=1, width=8)
    module.measure(torch.ones(4, 1), torch.tensor([1, 2, 3, 1]), torch.ones(4))
    scores = module.score(torch.ones(3, 1), torch.tensor([1, 2, 3]))
    assert torch.isfinite(scores).all()
    assert len(set(scores.tolist())) == 3
    with pytest.raises(RuntimeError):
        module.score(torch.ones(1, 1), torch.tensor([4]))


@pytest.mark.parametrize(
    ("missing", "message"),
    [("arrays.npz", "there is no such file"), ("codec.json", "it has no codec.json, so completions could not be read")],
)
def test_a_folder_that_control_data_did_not_write_is_refused(
    missing: str, message: str, train, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for file in data.iterdir():
        if file.name != missing:
            (folder / file.name).write_bytes(file.read_bytes())
    train("control-reward", "--data", folder, status=2)
    assert message in capsys.readouterr().err
