"""The ranker: where Q is read, what learns, and that a saved one says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from echelon.config import LoraConfig, OptimConfig
from echelon.data.packing import Sampled
from echelon.models import lora
from echelon.models.lm import tiny
from echelon.models.ranker import Ranker
from echelon.ops import bellman
from echelon.sampling.candidates import lay_candidates, q_of, q_values
from echelon.train.learner import Learner, load_module, save_module

STATE = [5, 6, 7, 8]
SAID = [Sampled(STATE, action, [0.0] * len(action)) for action in ([9], [10, 11, 12], [13, 14])]
SAID.append(Sampled([*STATE, 9, 20], [21, 22], [0.0, 0.0]))


@pytest.fixture(scope="module")
def lm() -> Any:
    return tiny(["a cat sat"], vocab_size=300, hidden=16, layers=2, heads=2)[0]


def lively(lm: Any, seed: int = 0, *, bounded: bool = False) -> Ranker:
    torch.manual_seed(seed)
    ranker = Ranker.from_lm(lm, bounded=bounded)
    torch.nn.init.normal_(ranker.head.weight)
    return ranker


def squares(ranker: Any, batch: Any) -> tuple[torch.Tensor, dict[str, float]]:
    return (q_of(ranker, batch) - 1).square().sum(), {}


def test_q_is_read_where_the_candidate_ends_and_in_nothing_after_it(lm: Any) -> None:
    ranker = lively(lm)
    for said in SAID:
        row = torch.tensor([[*said.prompt, *said.action]])
        hidden = ranker.body(input_ids=row).last_hidden_state[0, -1]
        expected = (ranker.head.weight[0] @ hidden + ranker.head.bias[0]).item()
        assert q_values(ranker, [said], 100).item() == pytest.approx(expected, abs=1e-5)
        longer = torch.cat([row, torch.tensor([[33, 44]])], 1)
        where = torch.tensor([0]), torch.tensor([row.shape[1] - 1])
        assert ranker(longer, *where).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("tokens_per_pass", [1000, 8])
@pytest.mark.parametrize("shares", [True, False])
def test_candidates_in_branches_are_valued_as_alone(lm: Any, tokens_per_pass: int, shares: bool) -> None:
    ranker = lively(lm)
    ranker.shares_prompts = shares
    alone = [q_values(ranker, [said], 100).item() for said in SAID]
    assert q_values(ranker, SAID, tokens_per_pass).tolist() == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == len(alone)
    assert len(lay_candidates(SAID, branches=True).rows) < len(lay_candidates(SAID, branches=False).rows)


def test_candidates_of_the_longest_length_have_their_score_at_their_last_token(lm: Any) -> None:
    """Rows without any padding: nothing is searched for in a mask."""
    ranker = lively(lm)
    said = [Sampled(STATE, action, [0.0] * 2) for action in ([9, 10], [11, 12])]
    batch = lay_candidates(said, branches=False)
    assert batch.lengths.tolist() == [6, 6] == [batch.tokens.shape[1]] * 2
    assert batch.last_N.tolist() == [5, 5]
    assert q_of(ranker, batch).tolist() == pytest.approx(q_values(ranker, said, 100).tolist(), abs=1e-6)


def test_padding_and_what_lies_in_it_do_not_matter(lm: Any) -> None:
    ranker = lively(lm)
    batch = lay_candidates(SAID, branches=False)
    before = q_of(ranker, batch)
    batch.tokens[torch.arange(batch.tokens.shape[1]) >= batch.lengths[:, None]] = 77
    assert q_of(ranker, batch).tolist() == before.tolist()


@pytest.mark.parametrize("adapter", [False, True])
def test_head_and_body_learn_also_beside_an_adapter(lm: Any, adapter: bool) -> None:
    base, _ = tiny(["a cat sat"], vocab_size=300, hidden=16, layers=2, heads=2)
    if adapter:
        base = lora.attach(base, LoraConfig(rank=2))
    ranker = Ranker.from_lm(base)
    learner = Learner(ranker, OptimConfig(lr=1e-2))
    before = {name: tensor.clone() for name, tensor in ranker.state_dict().items()}
    for _ in range(2):  # one half of an adapter begins at zero: the other one's gradient comes a step later
        learner.update([lay_candidates(SAID, branches=True)], squares)
    moved = {name for name, tensor in ranker.state_dict().items() if not tensor.equal(before[name])}
    learns = {name for name, parameter in ranker.named_parameters() if parameter.requires_grad}
    assert moved == learns
    assert {"head.weight", "head.bias"} < learns
    assert all("lora_" in name for name in learns - {"head.weight", "head.bias"}) == adapter


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_ranker_that_was_saved_and_loaded_says_the_same(tmp_path: Path, bounded: bool, adapter: bool) -> None:
    base, _ = tiny(["a cat sat"], vocab_size=300, hidden=16, layers=2, heads=2)
    if adapter:
        base = lora.attach(base, LoraConfig(rank=2))
    ranker = lively(base, 1, bounded=bounded)
    Learner(ranker, OptimConfig(lr=1e-2)).update([lay_candidates(SAID, branches=True)], squares)
    save_module(ranker, tmp_path)
    other = lively(base, 2, bounded=not bounded)
    said = q_values(ranker, SAID, 100)
    assert not q_values(other, SAID, 100).equal(said)
    load_module(other, tmp_path)
    assert q_values(other, SAID, 100).equal(said)


def test_a_bounded_ranker_stays_between_zero_and_one(lm: Any) -> None:
    free, bounded = lively(lm), lively(lm, bounded=True)
    torch.testing.assert_close(q_values(bounded, SAID, 100), q_values(free, SAID, 100).sigmoid())
    bounded.start_at(7.0)
    assert q_values(bounded, SAID, 100).max() < 1


def test_q_starts_where_it_is_told_to(lm: Any) -> None:
    for value, bounded in ((-12.0, False), (0.25, True)):
        ranker = Ranker.from_lm(lm, bounded=bounded)
        torch.nn.init.zeros_(ranker.head.weight)
        ranker.start_at(value)
        assert q_values(ranker, SAID, 100).tolist() == pytest.approx([value] * 4)


def test_the_target_is_another_ranker_that_does_not_learn(lm: Any) -> None:
    ranker = lively(lm)
    target = ranker.target()
    assert q_values(target, SAID, 100).equal(q_values(ranker, SAID, 100))
    assert not any(parameter.requires_grad for parameter in target.parameters())
    Learner(ranker, OptimConfig(lr=1e-2)).update([lay_candidates(SAID, branches=True)], squares)
    assert not q_values(target, SAID, 100).equal(q_values(ranker, SAID, 100))
    bellman.hard_copy_(target, ranker)
    assert q_values(target, SAID, 100).equal(q_values(ranker, SAID, 100))
