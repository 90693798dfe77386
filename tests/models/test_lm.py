"""Loading models and making tiny ones. What they compute is tested in tests/parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from echelon.data.packing import Batch, Sampled, pack
from echelon.errors import DataError
from echelon.models.lm import (
    backbone,
    check_masks,
    count_parameters,
    head_reads,
    load_lm,
    load_tokenizer,
    output_head,
    pick_device,
    tiny,
    token_logprobs,
)

CORPUS = ["is it alive? no. is it a chair? yes!"] * 3


def small(seed: int = 0) -> tuple[Any, Any]:
    return tiny(CORPUS, vocab_size=280, hidden=32, layers=2, heads=2, seed=seed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    module, tokenizer = small()
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_tiny_model_is_the_same_every_time_and_disturbs_no_other_draws() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    (one, tokens), (two, _), (other, _) = small(), small(), small(seed=1)
    assert torch.rand(3).equal(expected)
    assert all(a.equal(b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(a.equal(b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert len(tokens) <= 280


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_alone_are_those_of_the_model_and_no_weights_are_read(folder: Path, dtype: str) -> None:
    whole = load_lm(str(folder), dtype=dtype, device="cpu", gradient_checkpointing=True)
    (folder / "model.safetensors").unlink()
    shapes: Any = load_lm(str(folder), dtype=dtype, gradient_checkpointing=True, shapes_only=True)
    assert all(parameter.is_meta for parameter in shapes.parameters())
    assert shapes.get_output_embeddings().weight is shapes.get_input_embeddings().weight
    told, expected = (
        [(name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in module.named_parameters()]
        for module in (shapes, whole)
    )
    assert told == expected
    assert {name: buffer.tolist() for name, buffer in shapes.named_buffers()} == {
        name: buffer.tolist() for name, buffer in whole.named_buffers()
    }
    assert shapes.training
    assert shapes.is_gradient_checkpointing


def test_a_tiny_tokenizer_takes_any_text_and_a_message_costs_two_tokens() -> None:
    _, tokenizer = small()
    for text in ("is it alive?", "naïve \N{GRINNING FACE}\n\t  x ", "<|end|"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "no."}], tokenize=False)
    assert len(tokenizer.encode(rendered)) == len(tokenizer.encode("no.")) + 2


def test_a_saved_model_loads_ready_to_sample_and_to_train(folder: Path) -> None:
    module, _ = small()
    loaded = load_lm(str(folder), device="cpu")
    assert all(a.equal(b) for a, b in zip(module.parameters(), loaded.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert load_tokenizer(str(folder)).chat_template


def test_dropout_is_off_even_in_training(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=280, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    assert config.resid_pdrop == 0.1
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    loaded = load_lm(str(tmp_path), device="cpu")
    batch = pack([Sampled([3, 4, 5], [6, 7], [0.0, 0.0])])
    assert loaded.training
    assert token_logprobs(loaded, batch).equal(token_logprobs(loaded, batch))


def gradients(module: Any, batch: Batch) -> list[Tensor]:
    found = torch.autograd.grad(token_logprobs(module, batch).sum(), list(module.parameters()))
    return list(found)


def test_checkpointed_layers_are_computed_twice_and_give_the_same_gradients(folder: Path) -> None:
    batch = pack([Sampled([3, 4, 5], [6, 7], [0.0, 0.0]), Sampled([8], [9], [0.0])])
    plain, checkpointed = (
        load_lm(str(folder), device="cpu", gradient_checkpointing=asked).train() for asked in (False, True)
    )
    found: list[list[Tensor]] = []
    computed: list[int] = []
    for module in (plain, checkpointed):
        computed.append(0)
        for layer in module.model.layers:  # type: ignore[union-attr]
            layer.mlp.register_forward_pre_hook(lambda *_: computed.append(computed.pop() + 1))
        found.append(gradients(module, batch))
    assert computed == [2, 4]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_checkpointed_model_keeps_its_cache_when_it_samples(folder: Path) -> None:
    module: Any = load_lm(str(folder), device="cpu", gradient_checkpointing=True).eval()
    with torch.no_grad():
        assert module(input_ids=torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values.get_seq_length() == 3


def test_a_model_that_cannot_be_checkpointed_is_explained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(DataError, match=r"^model\.gradient_checkpointing = True: LlamaForCausalLM cannot do that"):
        load_lm(str(folder), device="cpu", gradient_checkpointing=True)


def test_weights_take_the_type_they_are_asked_for(folder: Path) -> None:
    loaded = load_lm(str(folder), dtype="bfloat16", device="cpu")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert token_logprobs(loaded, pack([Sampled([3], [4], [0.0])])).dtype == torch.float32


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "model.path is empty"),
        ("./nowhere", r"there is no model folder '\./nowhere'"),
        ("nowhere", "there is no model folder 'nowhere'"),
        ("tests/nowhere", "there is no model folder 'tests/nowhere'"),  # the hub has no such owner: tests is a folder
        ("someone/nothing", "could be loaded from 'someone/nothing'"),
    ],
)
def test_a_path_that_is_no_model_is_explained(path: str, message: str) -> None:
    for load in (load_lm, load_tokenizer):
        with pytest.raises(DataError, match=message):
            load(path)


def test_a_folder_that_is_no_model_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a folder without config\.json"):
        load_lm(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="no causal language model could be loaded"):
        load_lm(str(tmp_path))
    with pytest.raises(DataError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_model_whose_layers_take_no_mask_loads_but_cannot_have_branches(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=280, hidden_size=32, num_hidden_layers=1, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    module = load_lm(str(tmp_path), attention="eager", device="cpu")
    with pytest.raises(DataError, match="no mask says what their tokens may see"):
        check_masks(module)


def test_the_head_reads_what_is_chosen_and_only_meanwhile() -> None:
    module, _ = small()
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        whole = module(input_ids=tokens).logits
        with head_reads(module, lambda hidden: hidden[:, 1:2]):
            one = module(input_ids=tokens).logits
        assert one.shape[1] == 1
        torch.testing.assert_close(one, whole[:, 1:2])
        assert module(input_ids=tokens).logits.equal(whole)
    with pytest.raises(KeyError), head_reads(module, lambda hidden: hidden[:, :0]):
        raise KeyError
    assert module(input_ids=tokens).logits.shape[1] == 3, "taken off again after an error too"


def test_parts_and_sizes() -> None:
    module, tokenizer = small()
    assert output_head(module) is module.lm_head
    assert backbone(module) is module.model
    embedding = len(tokenizer) * 32  # tied to the head, so counted once
    assert count_parameters(module) == embedding + sum(p.numel() for p in module.model.layers.parameters()) + 32
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")
