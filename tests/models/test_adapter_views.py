"""Two adapters on one base as two modules: each is what a model of its own with that adapter would be."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from echelon.config import LoraConfig, OptimConfig
from echelon.data.packing import pack
from echelon.errors import CheckpointError, DataError
from echelon.models import lora
from echelon.models.heads import TokenValue, token_values
from echelon.models.lm import count_parameters, load_lm, load_tokenizer, token_logprobs
from echelon.models.lora import AdapterView
from echelon.ops.bellman import hard_copy_, polyak_
from echelon.sampling.local import LocalSampler
from echelon.train.learner import Learner, load_module, save_module
from echelon.train.policy import PolicyConfig, drops, reference_logprobs, starting_policy
from echelon.types import Completion, SamplingParams
from tests.models.test_lora import IDS, base, distance, imitate, logits, saved, some_batch, taught

KINDS = {
    "everywhere": LoraConfig(rank=4),
    "some layers": LoraConfig(rank=2, target=("q_proj", "v_proj")),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "base")


def pair(folder: Path, config: LoraConfig = KINDS["everywhere"]) -> tuple[AdapterView, AdapterView]:
    """Two views of one base, their adapters moved apart."""
    model = lora.attach(base(folder), config, name="high", seed=1)
    lora.attach(model, config, name="low", seed=2)
    return taught(AdapterView(model, "high"), 1), taught(AdapterView(model, "low"), 2)


def apart(folder: Path, name: str, seed: int, config: LoraConfig = KINDS["everywhere"]) -> Any:
    """A model of its own with the same adapter."""
    return taught(lora.attach(base(folder), config, name=name, seed=seed), seed)


def numbers(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_each_view_says_what_a_model_of_its_own_with_that_adapter_says(kind: str, folder: Path) -> None:
    views, batch = pair(folder, KINDS[kind]), some_batch()
    for seed, (name, view) in enumerate(zip(("high", "low"), views, strict=True), start=1):
        own = apart(folder, name, seed, KINDS[kind])
        assert logits(view).equal(logits(own))
        assert token_logprobs(view.eval(), batch).equal(token_logprobs(own.eval(), batch))
    assert distance(logits(views[0]), logits(views[1])) > 0.1
    assert logits(views[0]).equal(logits(apart(folder, "high", 1, KINDS[kind])))  # and still, after the other spoke


def test_one_base_is_in_memory_however_many_views_copies_and_values_there_are(folder: Path) -> None:
    high, low = pair(folder)
    value, target, kept = TokenValue.from_lm(low), copy.deepcopy(high), copy.deepcopy(low)
    model, plain = high.model, count_parameters(base(folder))
    adapter = count_parameters(high) - high.base.numel()
    assert count_parameters(model) == plain + 5 * adapter
    assert {view.base.data_ptr() for view in (high, low, target, kept, value.body)} == {high.base.data_ptr()}
    assert lora.names(model) == ["high", "low", "low_1", "high_1", "low_2"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_one_leaves_the_other_and_the_base_as_they_were_bit_for_bit(kind: str, folder: Path) -> None:
    high, low = pair(folder, KINDS[kind])
    own = Learner(apart(folder, "low", 2, KINDS[kind]), OptimConfig(lr=1e-2))
    before, beside = numbers(high), logits(high)
    frozen = [parameter.clone() for parameter in high.model.parameters() if not parameter.requires_grad]
    learner = Learner(low, OptimConfig(lr=1e-2))
    assert len(learner.trained) == len(own.trained)
    for step in range(3):
        assert learner.update([some_batch(step)], imitate) == own.update([some_batch(step)], imitate)
        logits(high)  # the other speaks in between
    assert logits(low).equal(logits(own.module))
    assert same(numbers(high), before)
    assert logits(high).equal(beside)
    assert same([parameter for parameter in high.model.parameters() if not parameter.requires_grad], frozen)
    assert all(parameter.grad is None for parameter in high.parameters())


def test_both_learn_in_turns_as_two_models_would(folder: Path) -> None:
    together = [Learner(view, OptimConfig(lr=1e-2)) for view in pair(folder)]
    alone = [Learner(apart(folder, name, seed), OptimConfig(lr=1e-2)) for seed, name in ((1, "high"), (2, "low"))]
    for step in range(3):
        for one, other in zip(together, alone, strict=True):
            assert one.update([some_batch(step)], imitate) == other.update([some_batch(step)], imitate)


def test_layers_that_are_computed_again_for_the_gradient_have_the_same_adapter(folder: Path) -> None:
    found = []
    for checkpointing in (False, True):
        model = load_lm(str(folder), device="cpu", gradient_checkpointing=checkpointing)
        model = lora.attach(model, KINDS["everywhere"], name="high", seed=1)
        lora.attach(model, KINDS["everywhere"], name="low", seed=2)
        high, low = taught(AdapterView(model, "high"), 1), taught(AdapterView(model, "low"), 2)
        learner = Learner(low, OptimConfig(lr=1e-2))
        logits(high)
        learner.update([some_batch(), some_batch(1)], imitate)
        found.append(numbers(low))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_view_that_is_saved_and_loaded_says_the_same_and_is_an_ordinary_adapter(folder: Path, tmp_path: Path) -> None:
    high, low = pair(folder)
    tokenizer = load_tokenizer(str(folder))
    for view, name in ((high, "high"), (low, "low")):
        save_module(view, tmp_path / name, tokenizer)
        assert {"adapter_model.safetensors", "adapter_config.json"} <= {f.name for f in (tmp_path / name).iterdir()}
        assert logits(load_lm(str(tmp_path / name), device="cpu")).equal(logits(view))
    others = pair(folder)
    for view in others:
        taught(view, 7)
    for view, name in zip(others, ("high", "low"), strict=True):
        load_module(view, tmp_path / name)
    assert logits(others[0]).equal(logits(high))
    assert logits(others[1]).equal(logits(low))
    with pytest.raises(CheckpointError, match="holds no adapter that can be read, but 'high'"):
        load_module(others[0], tmp_path)


def test_a_learner_of_a_view_goes_on_exactly_where_it_was_saved(folder: Path, tmp_path: Path) -> None:
    learner = Learner(pair(folder)[1], OptimConfig(lr=1e-2))
    learner.update([some_batch()], imitate)
    (tmp_path / "saved").mkdir()
    learner.save(tmp_path / "saved")
    again = Learner(pair(folder)[1], OptimConfig(lr=1e-2))
    again.load(tmp_path / "saved")
    assert again.update([some_batch(1)], imitate) == learner.update([some_batch(1)], imitate)
    assert same(numbers(again.module), numbers(learner.module))


def test_the_reference_of_a_new_adapter_is_the_base_and_of_one_that_has_learned_its_start(folder: Path) -> None:
    settings, batch, plain = PolicyConfig(kl_coef=0.1), some_batch(), base(folder).eval()
    model = lora.attach(base(folder), KINDS["everywhere"], name="high", seed=1)
    lora.attach(model, KINDS["everywhere"], name="low", seed=2)
    fresh, warm = AdapterView(model, "high"), taught(AdapterView(model, "low"), 2)
    began = token_logprobs(warm.eval(), batch).detach()
    for view, expected in ((fresh, token_logprobs(plain, batch).detach()), (warm, began)):
        reference = starting_policy(view, settings)
        assert reference is view
        learner = Learner(view, OptimConfig(lr=1e-1))
        learner.update([batch], imitate)
        found = reference_logprobs(view.eval(), batch, temperature=1.0, tokens_per_pass=1000)
        assert found.equal(expected)
        assert distance(token_logprobs(view, batch).detach(), expected) > 1e-2  # it speaks for itself again
    assert lora.names(model) == ["high", "low", "low_1"]


def test_a_copy_lags_behind_and_follows_when_told(folder: Path) -> None:
    high, _ = pair(folder)
    target, before = copy.deepcopy(high).requires_grad_(False), logits(high)
    Learner(high, OptimConfig(lr=1e-2)).update([some_batch()], imitate)
    assert logits(target).equal(before)
    assert distance(logits(high), before) > 1e-3
    polyak_(target, high, 0.5)
    assert 0 < distance(logits(target), before) < distance(logits(high), before)
    hard_copy_(target, high)
    assert logits(target).equal(logits(high))
    with pytest.raises(AssertionError, match="its own object"):
        hard_copy_(high, high)


def test_a_value_model_on_the_same_base_learns_alone(folder: Path, tmp_path: Path) -> None:
    _, low = pair(folder)
    own = TokenValue.from_lm(apart(folder, "low", 2))
    value, batch = TokenValue.from_lm(low), some_batch()
    torch.nn.init.ones_(value.head.weight)
    torch.nn.init.ones_(own.head.weight)

    def fit(module: nn.Module, batch: Any) -> tuple[Tensor, dict[str, float]]:
        found, _ = token_values(module, batch)
        return (found - 3).square()[batch.mask].mean(), {}

    before = logits(low)
    learner, alone = Learner(value, OptimConfig(lr=1e-2)), Learner(own, OptimConfig(lr=1e-2))
    for _ in range(2):
        assert learner.update([batch], fit) == alone.update([batch], fit)
    assert logits(low).equal(before)
    expected = value(batch.tokens).detach()
    save_module(value, tmp_path / "value")
    other = TokenValue.from_lm(pair(folder)[1])
    load_module(other, tmp_path / "value")
    assert other(batch.tokens).equal(expected)


def test_the_engine_writes_what_it_writes_with_a_model_of_its_own(folder: Path) -> None:
    views, tokenizer = pair(folder), load_tokenizer(str(folder))
    engines = [LocalSampler(view, tokenizer) for view in views]
    alone = [LocalSampler(apart(folder, n, s), tokenizer) for s, n in ((1, "high"), (2, "low"))]
    prompts = [[5, 6, 7, 8], [5, 6, 9]]

    async def both(samplers: list[LocalSampler]) -> list[Completion]:
        params = [SamplingParams(max_tokens=8, seed=number) for number in range(4)]
        asked = [s.sample(p, x) for s in samplers for p, x in zip(prompts * 2, params, strict=True)]
        return list(await asyncio.gather(*asked))

    found, expected = asyncio.run(both(engines)), asyncio.run(both(alone))
    assert [said.tokens for said in found] == [said.tokens for said in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert len({tuple(said.tokens) for said in found}) > 4
    batch = pack([Said(p, c) for p, c in zip(prompts * 2, found[4:], strict=True)])
    trained = token_logprobs(views[1].eval(), batch).detach()
    assert batch.logprobs is not None
    assert distance(trained[batch.mask], batch.logprobs[batch.mask]) < 1e-4


class Said:
    def __init__(self, prompt: list[int], said: Completion) -> None:
        self.prompt, self.action, self.logprobs = prompt, said.tokens, said.logprobs


def test_each_has_a_mode_of_its_own_so_that_one_drops_nothing_while_the_other_learns(folder: Path) -> None:
    config = LoraConfig(rank=4, dropout=0.5)
    high, low = pair(folder, config)
    assert drops(high)
    high.train()
    low.eval()
    with torch.no_grad():
        first, heard, second = high(input_ids=IDS).logits, low(input_ids=IDS).logits, high(input_ids=IDS).logits
        assert low(input_ids=IDS).logits.equal(heard)
    assert distance(first, second) > 1e-3
    body = high.get_decoder()
    high.eval()
    with torch.no_grad():
        assert body(input_ids=IDS).last_hidden_state.equal(body(input_ids=IDS).last_hidden_state)


def test_a_layer_that_is_trained_in_full_cannot_be_one_of_several(folder: Path) -> None:
    model = lora.attach(base(folder), LoraConfig(rank=4, modules_to_save=("embed_tokens",)), name="high")
    with pytest.raises(DataError, match=r"lora.modules_to_save = .*embed_tokens.*: a base that carries several"):
        AdapterView(model, "high")
