"""vLLM with adapters apart from their base: levels that share one vLLM, each with its own, and the base beside them."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from echelon.config import DistConfig, LoraConfig, OptimConfig, SamplingConfig
from echelon.data.packing import Sampled, pack
from echelon.errors import ConfigError, DataError, RolloutError
from echelon.models import lora
from echelon.models.lm import token_logprobs
from echelon.models.lora import AdapterView
from echelon.rollout.memory import Engine, Plan, needs
from echelon.rollout.setup import open_sampler
from echelon.sampling import vllm_engine
from echelon.sampling.vllm import VllmSampler
from echelon.train.learner import Learner
from echelon.types import Completion, SamplingParams
from tests.sampling.conformance import check_sampler
from tests.sampling.test_vllm import Request, Watched, ask, check_feedback_trains, ids, mismatch, small

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]


@dataclass
class Place:
    """One base with two adapters that learn, and one vLLM that three ask: both levels, and the base itself."""

    model: Any
    tokenizer: Any
    views: dict[str, AdapterView]
    samplers: dict[str, VllmSampler]
    versions: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def move(self, name: str) -> None:
        """Change what one of them says, and hand it over."""
        with torch.no_grad():
            for parameter in self.views[name].parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        self.samplers[name].load(self.views[name].state_dict().items(), next(self.versions))


def two_levels() -> tuple[Any, Any]:
    module, tokenizer = small()
    model = lora.attach(module, LoraConfig(rank=4, alpha=8), name="high")
    return lora.attach(model, LoraConfig(rank=12), name="low"), tokenizer


def opened(model: nn.Module, tokenizer: Any, **settings: Any) -> VllmSampler:
    return VllmSampler(model, tokenizer, longest=200, cache_tokens=2048, apart=True, concurrency=32, **settings)


@pytest.fixture(scope="module")
def place() -> Place:
    model, tokenizer = two_levels()
    views = {name: AdapterView(model, name) for name in ("high", "low")}
    # The base comes first: without an adapter, vLLM on a CPU answers it with the numbers in its last place.
    base = opened(views["high"], tokenizer, adapter="")
    high, low = (opened(views[name], tokenizer, beside=base) for name in ("high", "low"))
    return Place(model, tokenizer, views, {"high": high, "low": low, "": base})


@pytest.fixture
def moved(place: Place) -> Place:
    """The same with two adapters that both say something of their own, and nothing resident of them."""
    torch.manual_seed(0)
    for name in place.views:
        place.move(name)
    return place


def off_by(place: Place, name: str, requests: Sequence[Request], said: Sequence[Completion]) -> float:
    """How far the log-probs are from those that the trainer computes with this adapter."""
    with lora.use(place.model, name):
        return mismatch(place.model, requests, said, 1.0)


def ask_all(place: Place, requests: Sequence[Request]) -> dict[str, list[Completion]]:
    """The same requests to the three of them, at once."""

    async def all_at_once() -> list[Completion]:
        asked = [place.samplers[name].sample(*request) for request in requests for name in place.samplers]
        return await asyncio.gather(*asked)

    said = asyncio.run(all_at_once())
    return {name: said[at :: len(place.samplers)] for at, name in enumerate(place.samplers)}


def test_levels_and_their_base_answer_in_one_batch_each_with_its_own_adapter(moved: Place) -> None:
    requests = [(ids(7 + n, n), SamplingParams(max_tokens=10, seed=n)) for n in range(3)]
    moved.samplers[""].load(iter(()), 0)  # vLLM runs
    with Watched(moved.samplers["high"]) as passes:
        said = ask_all(moved, requests)
    assert passes == [3 * (7 + 8 + 9), *[9] * 9], "all nine are in every pass"
    for name, completions in said.items():
        assert off_by(moved, name, requests, completions) <= 1e-4, name
        for other in said.keys() - {name}:
            assert off_by(moved, other, requests, completions) > 0.05, f"{name} is not {other}"


def test_log_probs_are_the_trainers_after_each_update_of_one_level_and_the_others_stay(moved: Place) -> None:
    learner = Learner(moved.views["high"], OptimConfig(lr=1e-2))
    requests = [(ids(40 + n, n), SamplingParams(max_tokens=8, seed=n)) for n in range(2)]
    told = []
    for _ in range(6):
        moved.samplers["high"].load(learner.weights(), next(moved.versions))
        said = ask_all(moved, requests)
        told.append({name: [each.tokens for each in found] for name, found in said.items()})
        for name, completions in said.items():
            assert off_by(moved, name, requests, completions) <= 1e-4
        batch = pack([Sampled(p, c.tokens, c.logprobs) for (p, _), c in zip(requests, said["high"], strict=True)])
        learner.update([batch], lambda module, part: (-token_logprobs(module, part).sum() / 40, {}))
    assert told[0]["high"] != told[-1]["high"], "the updates changed what is said"
    assert (told[0]["low"], told[0][""]) == (told[-1]["low"], told[-1][""])


def test_after_an_update_a_level_reads_anew_and_the_others_go_on_where_they_were(moved: Place) -> None:
    request = (ids(70, 1), SamplingParams(max_tokens=1))
    ask_all(moved, [request])
    moved.move("high")
    read = {}
    for name, sampler in moved.samplers.items():
        with Watched(sampler) as passes:
            ask(sampler, [request])
        read[name] = passes[0]
    assert read == {"high": 70, "low": 70 - 64, "": 70 - 64}


def test_only_the_adapter_is_handed_over(moved: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = moved.samplers["high"].engine.vllm

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("whole weights were replaced")

    monkeypatch.setattr(vllm, "collective_rpc", refuse)
    moved.move("low")
    assert len(vllm.list_loras()) == 3, "the old ones are gone"


def test_each_completion_names_the_version_of_its_own_adapter(moved: Place) -> None:
    moved.samplers["high"].load(iter(()), 70)
    moved.samplers["low"].load(iter(()), 80)
    said = ask_all(moved, [(ids(5, 1), SamplingParams(max_tokens=2))])
    assert (said["high"][0].version, said["low"][0].version) == (70, 80)


@pytest.mark.parametrize("change", ["dropped", "base"])
def test_an_adapter_that_changes_under_a_completion_is_an_error(moved: Place, change: str) -> None:
    high, vllm = moved.samplers["high"], moved.samplers["high"].engine.vllm

    async def changed() -> None:
        asked = asyncio.ensure_future(high.sample(ids(5, 1), SamplingParams(max_tokens=30)))
        while not high.engine.running:
            await asyncio.sleep(0)
        if change == "base":
            vllm.set_weight_version("another")
        else:
            vllm.list_loras = lambda: {0}
        with pytest.raises(RolloutError, match="Load weights between rollouts only"):
            await asked

    try:
        asyncio.run(changed())
    finally:
        vllm.__dict__.pop("list_loras", None)
    assert len(ask(high, [(ids(5, 1), SamplingParams(max_tokens=2))])[0].tokens) == 2


def test_it_keeps_the_promises_of_a_sampler(moved: Place) -> None:
    texts = ["what is in the box?", "a", "a cat, a hat, a bat. what is in", "the box"]
    prompts = [moved.tokenizer.encode(text) for text in texts]
    stop = moved.tokenizer.eos_token_id
    asyncio.run(check_sampler(moved.samplers["low"], moved.tokenizer, prompts, stop_id=stop))


def test_who_comes_after_vllm_has_started_is_refused(moved: Place) -> None:
    with pytest.raises(AssertionError, match="join before anything is asked"):
        opened(moved.views["low"], moved.tokenizer, beside=moved.samplers["high"])


def test_models_share_a_vllm_where_what_lies_below_their_adapters_is_the_same(moved: Place) -> None:
    settings = SamplingConfig(sampler="vllm", adapters="apart", cache_tokens=512, max_prompt_tokens=64)
    one, other, tokenizer = two_levels()[0], two_levels()[0], moved.tokenizer
    with torch.no_grad():
        next(weight for name, weight in other.named_parameters() if "lora_B" in name).add_(1.0)
    first = open_sampler(one, tokenizer, settings)
    assert open_sampler(other, tokenizer, settings, beside=first).engine is first.engine  # type: ignore[attr-defined]
    assert [voice.adapter for voice in first.engine.voices] == ["high", "high"]  # type: ignore[attr-defined]
    with torch.no_grad():
        next(weight for name, weight in other.named_parameters() if "base_layer" in name)[0, 0] += 1e-6
    assert open_sampler(other, tokenizer, settings, beside=first).engine is not first.engine  # type: ignore[attr-defined]
    folded = SamplingConfig(sampler="vllm", cache_tokens=512, max_prompt_tokens=64)
    assert open_sampler(one, tokenizer, folded, beside=first).engine is not first.engine  # type: ignore[attr-defined]


def test_a_vllm_that_levels_share_is_planned_for_once(moved: Place) -> None:
    sampling = SamplingConfig(sampler="vllm", adapters="apart", max_prompt_tokens=64)
    engines = {name: Engine(sampler, sampling) for name, sampler in moved.samplers.items()}
    planned = needs(Plan({}, DistConfig(), 100, engines), 1, tokens_per_step=100)
    whole = sum(weight.numel() * weight.element_size() for weight in moved.model.parameters())
    assert planned == {
        "activations of a pass": 0,
        "high: keys and values, at most": 2048 * 2 * 2 * 64 * 4,
        "high: copies that play": whole,
    }


def refused(kind: str) -> tuple[type[Exception], str, Any]:
    if kind == "no adapter":
        return ConfigError, r"sampling\.adapters = apart: LlamaForCausalLM has no adapter", small()[0]
    if kind == "layers in full":
        full = lora.attach(small()[0], LoraConfig(rank=2, modules_to_save=("norm",)))
        return ConfigError, r"lora\.modules_to_save = norm trains layers in full", full
    return ConfigError, "rank 513, and vLLM takes at most 512", lora.attach(small()[0], LoraConfig(rank=513))


@pytest.mark.parametrize("kind", ["no adapter", "layers in full", "a wide one"])
def test_what_cannot_be_apart_is_refused_in_one_line_before_anything_starts(place: Place, kind: str) -> None:
    error, message, module = refused(kind)
    with pytest.raises(error, match=message) as found:
        opened(module, place.tokenizer)
    assert "\n" not in str(found.value)


def test_an_adapter_that_vllm_reads_otherwise_or_not_at_all_is_refused(
    moved: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    high, write = moved.samplers["high"], lora.write

    def spoilt(module: Any, name: str, folder: Path, *, change: dict[str, Any]) -> None:
        write(module, name, folder)
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(settings | change))

    high._voice.checked = False
    with monkeypatch.context() as patch:
        patch.setattr(lora, "write", lambda *given: spoilt(*given, change={"lora_alpha": 80}))
        with pytest.raises(DataError, match="vLLM computes other log-probabilities than the model itself"):
            moved.move("high")
        patch.setattr(lora, "write", lambda *given: spoilt(*given, change={"use_dora": True}))
        with pytest.raises(DataError, match=r"vLLM does not take the adapter by itself \(.*DoRA") as found:
            moved.move("high")
    assert "\n" not in str(found.value)
    moved.move("high")
    assert high._voice.checked


def test_what_speaks_is_the_adapter_as_it_was_handed_over(moved: Place) -> None:
    request = (ids(9, 3), SamplingParams(max_tokens=8, seed=1))
    then = copy.deepcopy(moved.views["high"].state_dict())
    with torch.no_grad():
        for parameter in moved.views["high"].parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    said = ask(moved.samplers["high"], [request])
    assert off_by(moved, "high", [request], said) > 0.01
    moved.views["high"].load_state_dict(then, strict=False)
    assert off_by(moved, "high", [request], said) <= 1e-4


# A vLLM that ends takes what others in this process need with it, so nothing is asked of the one above after this.


def test_both_levels_of_feedback_train_through_one_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    start = vllm_engine._open
    monkeypatch.setattr(vllm_engine, "_open", lambda *given: started.append(start(*given)) or started[-1])
    check_feedback_trains(tmp_path, "vllm", **{"cache-tokens": 2048})
    assert len(started) == 1
