"""Adapters: they learn alone, switch, fold into the weights, and are files that peft and we read alike."""

from __future__ import annotations

import asyncio
import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from echelon.config import LoraConfig, OptimConfig
from echelon.data.packing import Batch, Sampled, pack
from echelon.errors import CheckpointError, DataError
from echelon.models import lora
from echelon.models.heads import TokenValue, UtteranceCritic
from echelon.models.lm import check_masks, count_parameters, load_lm, load_tokenizer, tiny, token_logprobs
from echelon.models.stacked import Lower
from echelon.ops import losses
from echelon.sampling.local import LocalSampler
from echelon.train.learner import Learner, load_module, save_module
from echelon.types import Completion, SamplingParams

SIZES = {"vocab_size": 270, "hidden": 32, "layers": 2, "heads": 2}
SMALL = LoraConfig(rank=4)
IDS = torch.arange(5, 25)[None]
WHOLE = {"embeddings": ("embed_tokens",), "head": ("lm_head",), "nothing": ()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with tied embeddings, and its tokenizer."""
    return saved(tmp_path / "base")


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    """A model whose head is a matrix of its own."""
    settings = {"vocab_size": 270, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(3)
    module = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings, **heads, tie_word_embeddings=False))
    module.save_pretrained(tmp_path / "untied")
    tiny(["a b c"], **SIZES)[1].save_pretrained(tmp_path / "untied")
    return tmp_path / "untied"


def saved(path: Path, seed: int = 0) -> Path:
    module, tokenizer = tiny(["a b c"], **SIZES, seed=seed)
    module.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def base(folder: Path) -> nn.Module:
    return load_lm(str(folder), device="cpu")


def taught(module: nn.Module, seed: int = 1, size: float = 0.2) -> Any:
    """What learns of a model, moved somewhere else."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=draw)
    return module


@torch.no_grad()
def logits(module: nn.Module) -> Tensor:
    training = module.training
    found: Tensor = module.eval()(input_ids=IDS).logits
    module.train(training)
    return found


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def learning(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def some_batch(seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(5, 260, (9 + number,), generator=draw).tolist() for number in range(4)]
    return pack([Sampled(row[:5], row[5:], [-1.0] * len(row[5:])) for row in rows])


def imitate(module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    return losses.token_sum(losses.nll(token_logprobs(module, batch)), batch.mask, batch.denom), {}


def test_a_new_adapter_changes_nothing_and_is_all_that_learns(folder: Path) -> None:
    plain = base(folder)
    before = logits(plain)
    adapted = lora.attach(plain, SMALL)
    assert logits(adapted).equal(before)
    assert learning(adapted) == {name for name in learning(adapted) if ".lora_" in name}
    per_layer = 4 * (4 * 64 + 3 * (32 + 80))  # rank times the two sides of each matrix: four of 32 by 32, three with 80
    assert sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad) == 2 * per_layer
    assert count_parameters(adapted) == count_parameters(base(folder)) + 2 * per_layer


def test_the_first_numbers_of_an_adapter_come_from_its_seed_alone(folder: Path) -> None:
    found = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        adapted = lora.attach(base(folder), SMALL, seed=seed)
        assert torch.get_rng_state().equal(state) or noise  # loading a model may draw; attaching does not
        found.append(next(p for n, p in adapted.named_parameters() if "lora_A" in n))
    assert found[0].equal(found[1])
    assert not found[0].equal(found[2])


def test_a_gradient_reaches_the_adapter_and_only_the_adapter(folder: Path) -> None:
    adapted = lora.attach(base(folder), SMALL)
    below = {name: parameter.clone() for name, parameter in adapted.named_parameters() if not parameter.requires_grad}
    learner = Learner(adapted, OptimConfig(lr=1e-2, weight_decay=0.1))
    for _ in range(2):  # B starts at zero, so A gets a gradient from the second step on
        assert learner.update([some_batch()], imitate)["grad_norm"] > 0
    assert len(learner.trained) == len(learning(adapted)) == 28
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in learner.trained)
    for name, parameter in adapted.named_parameters():
        assert name not in below or (parameter.grad is None and parameter.equal(below[name]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("whole", WHOLE)
def test_an_adapter_that_is_saved_while_it_learns_goes_on_exactly_there(
    whole: str, dtype: str, folder: Path, tmp_path: Path
) -> None:
    """Matrices in float32, what is trained in full in the type of the model with its masters, moments, loss scale."""

    def learner() -> Learner:
        module = load_lm(str(folder), device="cpu", dtype=dtype)
        adapted = lora.attach(module, LoraConfig(rank=4, modules_to_save=WHOLE[whole]))
        return Learner(adapted, OptimConfig(lr=1e-2, schedule="linear"), total_steps=6)

    first, second = learner(), learner()
    for number in range(3):
        first.update([some_batch(number)], imitate)
    first.save(tmp_path / "saved")
    second.update([some_batch(9)], imitate)
    second.load(tmp_path / "saved")
    files = {lora.CONFIG, lora.WEIGHTS, "optimizer.json", "optimizer.safetensors"}
    assert {path.name for path in (tmp_path / "saved").iterdir()} == files, "the model below is not copied"
    for number in range(3, 6):
        for one, other in zip(first.module.parameters(), second.module.parameters(), strict=True):
            assert one.equal(other)
        assert first.update([some_batch(number)], imitate) == second.update([some_batch(number)], imitate)
    assert all(one.equal(other) for one, other in zip(first.masters, second.masters, strict=True))


def test_gradient_checkpointing_gives_an_adapter_the_same_gradient(folder: Path) -> None:
    found = []
    for checkpointing in (False, True):
        module = load_lm(str(folder), device="cpu", gradient_checkpointing=checkpointing)
        learner = Learner(taught(lora.attach(module, SMALL)), OptimConfig())
        computed: list[int] = []
        layer: Any = learner.module.get_decoder().layers[0]  # type: ignore[operator]
        layer.mlp.register_forward_pre_hook(lambda *_, computed=computed: computed.append(1))
        learner.update([some_batch()], imitate)
        found.append(([parameter.grad for parameter in learner.trained], len(computed)))
    assert [count for _, count in found] == [1, 2]
    for one, other in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("whole", WHOLE)
def test_what_is_sampled_through_an_adapter_has_the_log_probs_of_the_trainer(
    whole: str, dropout: float, folder: Path
) -> None:
    module = lora.attach(base(folder), LoraConfig(rank=4, dropout=dropout, modules_to_save=WHOLE[whole]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the engine says so when it has to read one conversation at a time
        sampler = LocalSampler(taught(module), load_tokenizer(str(folder)))
    answers, prompts = ask(sampler)
    batch = pack([Sampled(p, a.tokens, a.logprobs) for p, a in zip(prompts, answers, strict=True)])
    with torch.no_grad():
        assert distance(token_logprobs(module.eval(), batch)[batch.mask], batch.logprobs[batch.mask]) < 1e-4
        with lora.off(module):
            assert distance(token_logprobs(module, batch)[batch.mask], batch.logprobs[batch.mask]) > 1e-2


def ask(sampler: LocalSampler) -> tuple[list[Completion], list[list[int]]]:
    prompts = [list(range(5, 30)), list(range(40, 47)), list(range(5, 25))]

    async def go() -> list[Completion]:
        params = [SamplingParams(max_tokens=12, seed=number) for number in range(3)]
        return await asyncio.gather(*map(sampler.sample, prompts, params))

    return asyncio.run(go()), prompts


def test_dropout_is_for_learning_only(folder: Path) -> None:
    module = taught(lora.attach(base(folder), LoraConfig(rank=4, dropout=0.5)))
    assert module.training
    with torch.no_grad():
        assert not module(input_ids=IDS).logits.equal(module(input_ids=IDS).logits)
    check_masks(module)  # whether masks are heard is asked without dropout
    assert module.training
    learner = Learner(module, OptimConfig())
    first, again = (learner.evaluate(some_batch(), token_logprobs, 1000) for _ in range(2))
    assert first.equal(again)
    value = TokenValue.from_lm(module).train()
    nn.init.ones_(value.head.weight)
    assert value(IDS).any()
    assert value(IDS).equal(value(IDS)), "not in a critic's copy"


@pytest.mark.parametrize("kind", ["value", "critic", "critic on the actor's body"])
def test_a_critic_made_from_a_model_with_an_adapter_learns_an_adapter_of_its_own(kind: str, folder: Path) -> None:
    actor = taught(lora.attach(base(folder), SMALL))
    critic: nn.Module
    if kind == "value":
        critic = TokenValue.from_lm(actor)
    else:
        critic = UtteranceCritic.from_lm(actor, shared_body=kind != "critic")
    names = learning(critic)
    assert any("lora" in name for name in names) == (kind != "critic on the actor's body")
    assert all("lora" in name or name.split(".")[0] in ("head", "q", "v") for name in names)
    own = {id(parameter) for parameter in critic.parameters()}
    assert own.isdisjoint(id(parameter) for parameter in actor.parameters())


def test_several_adapters_take_turns_on_one_model(folder: Path) -> None:
    module = lora.attach(base(folder), SMALL)
    plain = logits(module)
    first = logits(taught(module))
    lora.attach(module, replace(SMALL, rank=2), name="high")
    assert lora.names(module) == ["default", "high"]
    assert lora.speaking(module) == "default"
    assert logits(module).equal(first), "the new one is silent"
    assert not any("high" in name for name in learning(module))
    with lora.use(module, "high"):
        assert logits(module).equal(plain)
        assert learning(module) == {name for name in learning(module) if ".high." in name}
        second = logits(taught(module, seed=2))
        with lora.use(module, "default"):
            assert logits(module).equal(first)
        with lora.off(module):
            assert lora.speaking(module) == ""
            assert logits(module).equal(plain)
        assert logits(module).equal(second)
    assert logits(module).equal(first)
    assert learning(module) == {name for name in learning(module) if ".default." in name}
    assert distance(first, second) > 1e-2
    with (
        pytest.raises(DataError, match=r"no adapter 'low' on the model, but \['default', 'high'\]"),
        lora.use(module, "low"),
    ):
        pass


def test_what_was_frozen_is_frozen_after_another_adapter_had_its_turn(folder: Path, tmp_path: Path) -> None:
    save_module(taught(lora.attach(base(folder), SMALL)), tmp_path)
    module = lora.load(base(folder), str(tmp_path), trains=False)
    lora.attach(module, SMALL, name="high")
    assert learning(module) == set()
    with lora.use(module, "high"):
        assert learning(module) == {name for name in learning(module) if ".high." in name} != set()
    assert learning(module) == set()
    assert lora.speaking(module) == "default"


@pytest.mark.parametrize("whole", ["embeddings", "head"])
def test_embeddings_that_are_the_head_learn_as_one_matrix(whole: str, folder: Path) -> None:
    module: Any = lora.attach(base(folder), LoraConfig(rank=2, modules_to_save=WHOLE[whole]))
    Learner(module, OptimConfig(lr=1e-2)).update([some_batch()], imitate)
    below = base(folder).get_input_embeddings().weight  # type: ignore[operator]
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    assert lora.spoken_through(head).weight is lora.spoken_through(embedding).weight
    moved = distance(lora.spoken_through(head).weight.detach(), below.detach())
    assert moved == pytest.approx(1e-2, rel=1e-3), "Adam's first step"
    with lora.off(module):
        assert lora.spoken_through(head).weight.equal(below)


def test_two_levels_learn_and_speak_through_two_adapters_of_one_model(folder: Path, tmp_path: Path) -> None:
    module, tokenizer = lora.attach(base(folder), SMALL, name="high"), load_tokenizer(str(folder))
    lora.attach(module, SMALL, name="low")
    learners = {name: Learner(module, OptimConfig(lr=1e-2), adapter=name, name=name) for name in ("high", "low")}
    frozen = {name: parameter.clone() for name, parameter in module.named_parameters() if ".low." in name}
    for _ in range(2):
        learners["high"].update([some_batch()], imitate)
    assert all(parameter.equal(frozen[name]) for name, parameter in module.named_parameters() if name in frozen)
    learners["low"].update([some_batch(1)], imitate)

    samplers = {name: LocalSampler(module, tokenizer, adapter=name) for name in learners}
    for name, sampler in samplers.items():
        answers, prompts = ask(sampler)
        batch = pack([Sampled(p, a.tokens, a.logprobs) for p, a in zip(prompts, answers, strict=True)])
        with lora.use(module, name), torch.no_grad():
            assert distance(token_logprobs(module, batch)[batch.mask], batch.logprobs[batch.mask]) < 1e-4

    learners["high"].save(tmp_path / "high")
    assert [path.parent.name for path in (tmp_path / "high").rglob(lora.WEIGHTS)] == ["high"]
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    learners["high"].update([some_batch()], imitate)
    learners["high"].load(tmp_path / "high")
    assert all(parameter.equal(before[name]) for name, parameter in module.named_parameters())


def test_a_sampler_forgets_what_another_adapter_said(folder: Path) -> None:
    """Keys and values depend on the adapter that speaks, not on weights alone."""
    module, tokenizer = taught(lora.attach(base(folder), SMALL)), load_tokenizer(str(folder))
    sampler = LocalSampler(module, tokenizer)
    spoken, _ = ask(sampler)
    with lora.off(module):
        assert ask(sampler)[0] == ask(LocalSampler(module, tokenizer))[0]
    assert ask(sampler)[0] == spoken


@pytest.mark.parametrize("more", [{}, {"target": ("q_proj", "embed_tokens")}, {"modules_to_save": ("lm_head",)}])
def test_merged_weights_are_those_of_a_model_that_says_the_same(untied: Path, more: dict[str, Any]) -> None:
    adapted = taught(lora.attach(base(untied), replace(SMALL, **more)))
    before = {name: weight.clone() for name, weight in adapted.named_parameters()}
    merged = base(untied)
    merged.load_state_dict(dict(lora.merged_weights(adapted)))
    assert distance(logits(merged), logits(adapted)) < 1e-4
    assert distance(logits(merged), logits(base(untied))) > 1e-2
    with lora.off(adapted):
        merged.load_state_dict(dict(lora.merged_weights(adapted)))
    assert logits(merged).equal(logits(base(untied)))
    assert all(weight.equal(before[name]) for name, weight in adapted.named_parameters())


def test_merged_weights_of_a_view_are_those_of_its_adapter(folder: Path) -> None:
    module = lora.attach(lora.attach(base(folder), SMALL, name="high"), SMALL, name="low")
    for seed, name in enumerate(("high", "low")):
        view = taught(lora.AdapterView(module, name), seed)
        merged = base(folder)
        merged.load_state_dict(dict(lora.merged_weights(view)))
        assert distance(logits(merged), logits(view)) < 1e-4
        assert distance(logits(merged), logits(base(folder))) > 1e-2


@pytest.mark.parametrize("whole", WHOLE)
def test_the_start_of_an_adapter_is_remembered(whole: str, folder: Path, tmp_path: Path) -> None:
    module = lora.attach(base(folder), LoraConfig(rank=4, modules_to_save=WHOLE[whole]))
    plain = logits(module)
    lora.keep_start(module)
    assert lora.names(module) == ["default"], "a new one says what the model says: nothing has to be kept"
    began = logits(taught(module))
    with lora.as_it_began(module):
        assert logits(module).equal(plain)

    lora.keep_start(module)
    assert lora.names(module) == ["default", "start"]
    grown = learning(module)
    later = logits(taught(module, seed=2))
    with lora.as_it_began(module):
        assert logits(module).equal(began)
    assert logits(module).equal(later)
    assert learning(module) == grown
    assert not any(".start" in name for name in grown)

    lora.save(module, tmp_path)
    other = taught(lora.attach(base(folder), LoraConfig(rank=4, modules_to_save=WHOLE[whole])), seed=3)
    lora.keep_start(other)
    lora.restore(other, tmp_path)
    assert logits(other).equal(later)
    with lora.as_it_began(other):
        assert logits(other).equal(began)


def test_a_model_without_adapters_is_as_it_began(folder: Path) -> None:
    module = base(folder)
    with lora.as_it_began(module), lora.off(module):
        assert lora.speaking(module) == ""
    assert lora.names(module) == []


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("tied", [True, False])
def test_what_we_save_loads_with_peft_alone_and_says_the_same(
    tied: bool, whole: str, folder: Path, untied: Path, tmp_path: Path
) -> None:
    module = taught(lora.attach(base(folder if tied else untied), LoraConfig(rank=4, modules_to_save=WHOLE[whole])))
    save_module(module, tmp_path / "adapter", load_tokenizer(str(folder)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert logits(loaded).equal(logits(module))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template
    ours = load_lm(str(tmp_path / "adapter"), device="cpu")
    assert logits(ours).equal(logits(module))
    assert learning(ours) == learning(module), "it goes on learning"


@pytest.mark.parametrize(
    "extra", [{}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ["q_proj", "down_proj"]}]
)
def test_what_peft_saves_loads_here_and_says_the_same(extra: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """As TRL leaves it too: it calls the same two functions."""
    settings = {"target_modules": "all-linear", "r": 3, "lora_alpha": 7, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(**(settings | extra))
    )
    taught(theirs).save_pretrained(tmp_path)
    ours = load_lm(str(tmp_path), device="cpu")
    assert logits(ours).equal(logits(theirs))
    assert load_tokenizer(str(tmp_path)).encode("a b") == load_tokenizer(str(folder)).encode("a b"), "of its base"


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_model_says_what_the_adapter_said(
    tied: bool, whole: str, folder: Path, untied: Path, tmp_path: Path
) -> None:
    module = taught(lora.attach(base(folder if tied else untied), LoraConfig(rank=4, modules_to_save=WHOLE[whole])))
    expected = logits(module)
    merged = lora.merge(module)
    assert not lora.has_adapters(merged)
    assert distance(logits(merged), expected) < 1e-3
    merged.save_pretrained(tmp_path)  # type: ignore[operator]
    assert distance(logits(base(tmp_path)), expected) < 1e-3


def test_embeddings_that_were_tied_and_learned_apart_stay_apart(folder: Path, tmp_path: Path) -> None:
    """As peft leaves them when the head alone is trained."""
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = taught(peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), settings))
        theirs.save_pretrained(tmp_path / "adapter")
    module = load_lm(str(tmp_path / "adapter"), device="cpu")
    assert logits(module).equal(logits(theirs))
    merged: Any = lora.merge(module)
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    assert distance(logits(base(tmp_path / "merged")), logits(theirs)) < 1e-4


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("upper", [SMALL, LoraConfig(rank=2, alpha=3, target=("q_proj", "up_proj"))])
@pytest.mark.parametrize("rslora", [True, False])
def test_an_adapter_on_an_adapter_is_saved_as_one_that_peft_reads(
    rslora: bool, upper: LoraConfig, whole: str, folder: Path, tmp_path: Path
) -> None:
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    if WHOLE[whole]:
        settings |= {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lower = peft.get_peft_model(base(folder), peft.LoraConfig(**settings, use_rslora=rslora))
    save_module(taught(lower), tmp_path / "lower")
    module = lora.attach(lora.fold(load_lm(str(tmp_path / "lower"), device="cpu"), str(tmp_path / "lower")), upper)
    assert distance(logits(module), logits(lower)) < 1e-4
    said = logits(taught(module, seed=2))
    assert distance(said, logits(lower)) > 1e-3
    save_module(module, tmp_path / "both")

    stored = json.loads((tmp_path / "both" / lora.CONFIG).read_text())
    assert stored["r"] == 3 + upper.rank
    assert stored["base_model_name_or_path"] == str(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "both")
    assert distance(logits(theirs), said) < 1e-4
    with lora.off(module):
        assert distance(logits(module), logits(lower)) < 1e-4, "without the upper one it is the lower one"

    again = lora.attach(lora.fold(load_lm(str(tmp_path / "lower"), device="cpu"), str(tmp_path / "lower")), upper)
    load_module(again, tmp_path / "both")
    assert logits(again).equal(said), "and continued it is the same to the last bit"


def test_an_adapter_is_written_alone_for_whoever_has_what_lies_below_it_here(folder: Path, tmp_path: Path) -> None:
    first = taught(lora.attach(base(folder), SMALL), 1)
    lora.save(first, tmp_path / "first")
    below = lora.merge(copy.deepcopy(first))
    second = taught(lora.attach(lora.fold(first, str(tmp_path / "first")), LoraConfig(rank=2)), 2)
    with lora.off(second):
        assert torch.allclose(logits(second), logits(below), atol=1e-5)
    lora.write(second, "default", tmp_path / "alone")
    alone = peft.PeftModel.from_pretrained(below, str(tmp_path / "alone"))
    assert alone.peft_config["default"].r == 2, "what was folded in is not written again"
    assert torch.allclose(logits(alone), logits(second), atol=1e-5)
    assert distance(logits(second), logits(base(folder))) > 0.1


def test_the_adapter_without_a_name_changes_nothing(folder: Path, tmp_path: Path) -> None:
    adapted = taught(lora.attach(base(folder), LoraConfig(rank=3)))
    lora.write(adapted, "", tmp_path / "silent")
    silent = peft.PeftModel.from_pretrained(base(folder), str(tmp_path / "silent"))
    assert logits(silent).equal(logits(base(folder)))
    assert lora.widths(adapted) == {"default": 3}


def test_bases_are_the_same_to_the_last_bit_or_not_at_all(folder: Path) -> None:
    one, other = lora.attach(base(folder), SMALL), taught(lora.attach(base(folder), LoraConfig(rank=2)))
    assert lora.same_base(one, other)
    assert lora.same_base(lora.AdapterView(one, "default"), one)
    with torch.no_grad():
        other.get_base_model().get_input_embeddings().weight[0, 0] += 1e-6
    assert not lora.same_base(one, other)


def test_two_products_side_by_side_by_hand(tmp_path: Path) -> None:
    """One layer of two by two: lower [1,0]ᵀ[2,0]·8 and upper [0,1]ᵀ[0,5]·3 are one product of rank 2."""
    front = "base_model.model.layer"
    first, second = f"{front}.lora_A.weight", f"{front}.lora_B.weight"
    upper = {first: torch.tensor([[0.0, 5.0]]), second: torch.tensor([[0.0], [1.0]])}
    lower = {first: torch.tensor([[2.0, 0.0]]), second: torch.tensor([[1.0], [0.0]])}
    save_file(upper, tmp_path / lora.WEIGHTS)
    settings = {"r": 1, "lora_alpha": 3, "modules_to_save": None, "ensure_weight_tying": False}
    (tmp_path / lora.CONFIG).write_text(json.dumps(settings))
    Lower(lower, {**settings, "lora_alpha": 8}).add_to(tmp_path, {"layer"})
    both, stored = load_file(tmp_path / lora.WEIGHTS), json.loads((tmp_path / lora.CONFIG).read_text())
    product = both[f"{front}.lora_B.weight"] @ both[f"{front}.lora_A.weight"] * stored["lora_alpha"] / stored["r"]
    assert product.tolist() == [[pytest.approx(16.0), 0.0], [0.0, 15.0]]


def test_what_is_more_than_two_matrices_does_not_lie_below_another_adapter(
    folder: Path, untied: Path, tmp_path: Path
) -> None:
    dora = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    peft.get_peft_model(base(folder), dora).save_pretrained(tmp_path / "dora")
    module = lora.fold(load_lm(str(tmp_path / "dora"), device="cpu"), str(tmp_path / "dora"))
    with pytest.raises(DataError, match=r"an adapter with use_dora, so no other one .* echelon merge --adapter"):
        lora.attach(module, SMALL)
    head = LoraConfig(rank=2, target=("q_proj",), modules_to_save=("lm_head",))
    save_module(lora.attach(base(untied), head), tmp_path / "head")
    module = lora.fold(load_lm(str(tmp_path / "head"), device="cpu"), str(tmp_path / "head"))
    with pytest.raises(DataError, match=r"the adapter below trained lm_head in full, so there can be no matrices"):
        lora.attach(module, LoraConfig(rank=2, target=("lm_head",)))


def test_a_base_is_found_from_here_and_from_where_the_adapter_lies(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_module(lora.attach(base(folder), SMALL), tmp_path / "runs" / "adapter")
    assert lora.base_path(str(tmp_path / "runs" / "adapter")) == str(folder)
    for name, found in (("../../base", tmp_path / "runs" / "adapter" / "../../base"), ("base", Path("base"))):
        edit(tmp_path / "runs" / "adapter", base_model_name_or_path=name)
        monkeypatch.chdir(tmp_path if name == "base" else tmp_path / "runs")
        assert lora.base_path(str(tmp_path / "runs" / "adapter")) == str(found)
        assert lora.names(load_lm(str(tmp_path / "runs" / "adapter"), device="cpu")) == ["default"]


def edit(folder: Path, **changes: Any) -> None:
    stored = json.loads((folder / lora.CONFIG).read_text())
    (folder / lora.CONFIG).write_text(json.dumps(stored | changes))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "its base is gone": (
        lambda at: edit(at, base_model_name_or_path="/no/such/model"),
        r"is an adapter of the model '/no/such/model', which is not there",
    ),
    "its base is on the hub, which cannot be reached": (
        lambda at: edit(at, base_model_name_or_path="some/model"),
        r"is an adapter of the model 'some/model': no causal language model could be loaded from 'some/model'",
    ),
    "it does not say of which model it is": (
        lambda at: edit(at, base_model_name_or_path=None),
        r"does not say of which model: base_model_name_or_path in its adapter_config.json is empty",
    ),
    "another kind of adapter": (lambda at: edit(at, peft_type="IA3"), r"is an adapter of kind IA3: only LoRA"),
    "a reward model's": (lambda at: edit(at, task_type="SEQ_CLS"), r"is the adapter of a reward model"),
    "settings that are no JSON": (lambda at: (at / lora.CONFIG).write_text("{"), r"has no adapter_config.json that"),
    "settings that are a list": (lambda at: (at / lora.CONFIG).write_text("[]"), r"does not hold the settings"),
    "no weights": (lambda at: (at / lora.WEIGHTS).unlink(), r"has adapter_config.json and no adapter_model.safe"),
    "weights cut short": (lambda at: (at / lora.WEIGHTS).write_bytes(b"12"), r"the adapter does not fit"),
    "some weights missing": (lambda at: halve(at), r"the adapter does not fit .*missing adapter keys"),
    "the rank of another": (lambda at: edit(at, r=5), r"the adapter does not fit .*size mismatch"),
}


def halve(folder: Path) -> None:
    tensors = load_file(folder / lora.WEIGHTS)
    save_file(dict(sorted(tensors.items())[: len(tensors) // 2]), folder / lora.WEIGHTS)


@pytest.mark.parametrize("defect", BROKEN)
def test_an_adapter_that_cannot_be_used_says_why(defect: str, folder: Path, tmp_path: Path) -> None:
    save_module(lora.attach(base(folder), SMALL), tmp_path / "adapter", load_tokenizer(str(folder)))
    spoil, expected = BROKEN[defect]
    spoil(tmp_path / "adapter")
    with pytest.raises(DataError, match=expected) as caught:
        load_lm(str(tmp_path / "adapter"), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target": ("qproj",)}, r"lora.target = qproj: LlamaForCausalLM has no such layer. Did you mean 'q_proj'\?"),
        ({"target": ("q_proj", "fc1")}, r"lora.target = fc1: .*Its layers are called embed_tokens, q_proj, k_proj"),
        ({"modules_to_save": ("head",)}, r"lora.modules_to_save = head: LlamaForCausalLM has no such layer. Did you"),
        ({"target": ("embed_tokens",)}, r"lora.target = embed_tokens: .* are one matrix, which cannot have an adapter"),
        ({"target": ("q_proj", "lm_head")}, r"lora.target = lm_head: .*lora.modules_to_save = lm_head"),
    ],
)
def test_layers_that_are_not_there_are_named(settings: dict[str, Any], expected: str, folder: Path) -> None:
    with pytest.raises(DataError, match=expected):
        lora.attach(base(folder), LoraConfig(rank=2, **settings))


def test_the_head_of_its_own_can_have_an_adapter(untied: Path, tmp_path: Path) -> None:
    module = taught(lora.attach(base(untied), LoraConfig(rank=2, target=("q_proj", "lm_head", "embed_tokens"))))
    save_module(module, tmp_path)
    assert logits(load_lm(str(tmp_path), device="cpu")).equal(logits(module))


def test_a_saved_adapter_of_another_model_or_shape_is_refused_and_nothing_is_loaded(
    folder: Path, tmp_path: Path
) -> None:
    save_module(taught(lora.attach(base(folder), SMALL)), tmp_path / "adapter")
    wider, elsewhere = lora.attach(base(folder), LoraConfig(rank=8)), lora.attach(base(saved(tmp_path / "b")), SMALL)
    refused = ((wider, "other layers or another rank"), (elsewhere, "belongs to the model '.*base', and"))
    for module, expected in refused:
        before = logits(module)
        with pytest.raises(CheckpointError, match=expected):
            load_module(module, tmp_path / "adapter")
        assert logits(module).equal(before)
    with pytest.raises(CheckpointError, match="holds no adapter that can be read"):
        load_module(wider, folder)


def test_a_copy_of_a_model_with_an_adapter_is_a_copy(folder: Path) -> None:
    module = taught(lora.attach(base(folder), SMALL))
    twin = copy.deepcopy(module)
    taught(twin, seed=5)
    assert distance(logits(twin), logits(module)) > 1e-2


def test_what_is_no_adapter_is_not_taken_for_one(folder: Path, tmp_path: Path) -> None:
    assert not lora.is_adapter(str(folder))
    assert not lora.is_adapter("someone/model")
    assert not lora.is_adapter(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"has no adapter_config.json that can be read"):
        lora.base_path(str(folder))
