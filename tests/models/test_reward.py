"""Reward models: the same scores with and without echelon, read at the last token whatever padding is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from echelon.config import LoraConfig, ModelConfig
from echelon.data.packing import pack, pack_branches
from echelon.errors import DataError
from echelon.models.lm import tiny
from echelon.models.reward import (
    RewardModel,
    Scale,
    answers_share,
    choose_padding,
    last_scores,
    load_reward_model,
    open_reward_module,
    read_scale,
    turn_scores,
    write_scale,
)
from echelon.text.chat import Example, Renderer
from echelon.train.learner import save_module
from echelon.types import Message
from tests.text.templates import KINDS, make_tokenizer

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WIDE = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
STYLES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama, no padding token": ("llama", "LlamaConfig", WIDE),
    "qwen, padding ends conversations": ("chatml", "Qwen2Config", WIDE),
    "qwen 3": ("forgets thoughts", "Qwen3Config", WIDE),
    "gpt2, one special token": ("plain", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "gemma, padding of its own": ("gemma", "Gemma2Config", WIDE),
    "tiny": ("tiny", "LlamaConfig", WIDE),
}
"""Name → kind of template, configuration, sizes."""
styles = pytest.mark.parametrize("style", STYLES)


def conversation(asked: str, answer: str) -> list[Message]:
    return [Message(role="user", content=asked), Message(role="assistant", content=answer)]


CONVERSATIONS = [conversation("hello" * n, "the answer" + " is" * (7 - n)) for n in range(1, 7)]


def language_model(style: str, folder: Path) -> ModelConfig:
    """The folder of a small random model of this style; its tokenizer's padding is what the style says."""
    kind, config, sizes = STYLES[style]
    tokenizer = make_tokenizer(**KINDS[kind])
    if "padding ends" in style:
        tokenizer.pad_token = "<|im_end|>"
    if "gpt2" in style:  # its positions ignore the attention mask, so padding on the left would move every token
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    settings = getattr(transformers, config)(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ends, **sizes
    )
    made = transformers.AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim > 1:
                weight.mul_(4)  # as initialised, attention is close to uniform and hides mistakes
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelConfig(path=str(folder), device="cpu")


def draw_head(module: Any, seed: int = 1) -> None:
    """A head that says something, in place of the new one."""
    inner = module.get_base_model() if hasattr(module, "peft_config") else module
    head = getattr(inner.score, "modules_to_save", {"default": inner.score})["default"]
    nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(seed))


def saved(module: Any, tokenizer: Any, folder: Path) -> Path:
    save_module(module, folder, tokenizer)
    return folder


def rendered(tokenizer: Any) -> list[list[int]]:
    """The conversations as a reader of the documentation would make them: up to the end-of-turn token."""
    renderer = Renderer(tokenizer)
    return [renderer.render(messages[:1]) + renderer.action_ids(messages[1]["content"]) for messages in CONVERSATIONS]


@torch.no_grad()
def without_echelon(model: Any, folder: Path, rows: list[list[int]]) -> Tensor:
    """What the Hugging Face library makes of a padded batch of these rows."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    assert (batch["attention_mask"] == 0).any(), "nothing was padded"
    scores: Tensor = model.eval()(**batch).logits[:, 0]
    return scores


@styles
def test_a_saved_model_scores_the_same_without_echelon_alone_and_in_padded_batches(style: str, tmp_path: Path) -> None:
    module, tokenizer, fresh = open_reward_module(language_model(style, tmp_path / "lm"))
    assert fresh
    draw_head(module)
    folder = saved(module, tokenizer, tmp_path / "reward")
    ours = load_reward_model(str(folder), device="cpu").score(CONVERSATIONS, tokens_per_pass=100)
    assert ours.std() > 0.1, "scores that are all alike would hide where they are read"

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    rows = rendered(tokenizer)
    torch.testing.assert_close(without_echelon(theirs, folder, rows), ours, atol=1e-5, rtol=0)
    with torch.no_grad():
        alone = torch.cat([theirs(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])
    torch.testing.assert_close(alone, ours, atol=1e-5, rtol=0)


@styles
def test_padding_is_a_token_that_no_conversation_ends_with(style: str, tmp_path: Path) -> None:
    module, tokenizer, _ = open_reward_module(language_model(style, tmp_path))
    pad = module.config.pad_token_id
    assert pad == tokenizer.pad_token_id
    assert pad not in Renderer(tokenizer).stop_ids
    assert pad < module.get_input_embeddings().weight.shape[0]
    assert all(row[-1] != pad for row in rendered(tokenizer))


def test_with_padding_that_ends_conversations_the_library_scores_another_token(tmp_path: Path) -> None:
    """What `choose_padding` is for: this is what would happen without it."""
    module, tokenizer, _ = open_reward_module(language_model("tiny", tmp_path / "lm"))
    draw_head(module)
    module.config.pad_token_id = tokenizer.eos_token_id
    tokenizer.pad_token = tokenizer.eos_token
    folder = saved(module, tokenizer, tmp_path / "reward")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    ours = RewardModel(module, tokenizer).score(CONVERSATIONS)
    assert (without_echelon(theirs, folder, rendered(tokenizer)) - ours).abs().max() > 0.1


def test_a_special_token_that_is_there_is_taken_before_one_is_added() -> None:
    module, _ = tiny(["a b"], vocab_size=300, hidden=16, layers=1, heads=2)
    tokenizer = make_tokenizer(**{**KINDS["llama"], "special": [*KINDS["llama"]["special"], "<|reserved_1|>", "<unk>"]})
    rows = module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    choose_padding(module, tokenizer)
    assert tokenizer.pad_token == "<unk>"
    assert module.get_input_embeddings().weight.shape[0] == rows  # type: ignore[operator]


def test_where_a_score_is_read_does_not_depend_on_what_follows_the_row(tmp_path: Path) -> None:
    module, tokenizer, _ = open_reward_module(language_model("llama, no padding token", tmp_path))
    draw_head(module)
    row = torch.tensor(rendered(tokenizer)[0])
    lengths = torch.tensor([len(row)])
    alone = last_scores(module, row[None], lengths)
    for filling in (0, int(row[-1]), tokenizer.pad_token_id):
        padded = torch.cat([row, torch.full((9,), filling)])[None]
        torch.testing.assert_close(last_scores(module, padded, lengths), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("style", ["tiny", "gpt2, one special token", "gemma, padding of its own"])
def test_answers_that_share_a_row_score_as_each_in_a_row_of_its_own(style: str, tmp_path: Path) -> None:
    module, _, _ = open_reward_module(language_model(style, tmp_path))
    draw_head(module)
    assert answers_share(module)
    turns = [Example([5, 6, 7, 8], [9, 10]), Example([5, 6, 7, 8], [11]), Example([12], [13, 14, 15])]
    plain, branched = pack(turns), pack_branches(turns)
    assert len(plain.tokens) == 3
    assert len(branched.tokens) == 2
    torch.testing.assert_close(turn_scores(module, branched), turn_scores(module, plain), atol=1e-5, rtol=0)
    assert turn_scores(module, plain).std() > 0.1


def test_a_new_head_starts_at_zero_so_no_answer_is_better(tmp_path: Path) -> None:
    module, tokenizer, fresh = open_reward_module(language_model("tiny", tmp_path))
    assert fresh
    assert RewardModel(module, tokenizer).score(CONVERSATIONS).tolist() == [0.0] * 6


def test_a_reward_model_is_continued_with_its_head(tmp_path: Path) -> None:
    module, tokenizer, _ = open_reward_module(language_model("tiny", tmp_path / "lm"))
    draw_head(module)
    folder = saved(module, tokenizer, tmp_path / "reward")
    again, _, fresh = open_reward_module(ModelConfig(path=str(folder), device="cpu"))
    assert not fresh
    torch.testing.assert_close(again.state_dict(), module.state_dict())
    assert all(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("style", ["tiny", "llama, no padding token", "gpt2, one special token"])
def test_an_adapter_trains_beside_the_head_and_loads_with_peft_alone(style: str, tmp_path: Path) -> None:
    base = language_model(style, tmp_path / "lm")
    module, tokenizer, _ = open_reward_module(base, LoraConfig(rank=4), seed=3)
    learning = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert any("score" in name for name in learning)
    assert all("lora_" in name or "score" in name for name in learning)
    draw_head(module)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    folder = saved(module, tokenizer, tmp_path / "adapter")
    assert not (folder / "config.json").exists()

    model = load_reward_model(str(folder), device="cpu")
    ours = model.score(CONVERSATIONS)
    torch.testing.assert_close(RewardModel(module, tokenizer).score(CONVERSATIONS), ours)
    padding = 7  # any token that no row ends with: the adapter's base may have no padding token
    below = transformers.AutoModelForSequenceClassification.from_pretrained(
        base.path, num_labels=1, pad_token_id=padding
    )
    theirs = peft.PeftModel.from_pretrained(below, folder).eval()
    for row, score in zip(rendered(tokenizer), ours.tolist(), strict=True):
        padded = torch.tensor([row + [padding] * 3])
        with torch.no_grad():
            assert theirs(input_ids=padded).logits.item() == pytest.approx(score, abs=1e-5)


def test_the_adapter_of_a_language_model_is_folded_into_its_reward_model(tmp_path: Path) -> None:
    base = language_model("tiny", tmp_path / "lm")
    lm = transformers.AutoModelForCausalLM.from_pretrained(base.path)
    adapted: Any = peft.get_peft_model(lm, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path / "sft")
    tokens = torch.tensor([[5, 6, 7, 8]])
    expected = adapted.eval()(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
    module, _, fresh = open_reward_module(ModelConfig(path=str(tmp_path / "sft"), device="cpu"))
    assert fresh
    body: Any = module.base_model
    torch.testing.assert_close(body(input_ids=tokens).last_hidden_state, expected, atol=1e-5, rtol=0)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_an_adapter_on_an_adapter_of_a_language_model_loads_again(tmp_path: Path) -> None:
    base = language_model("tiny", tmp_path / "lm")
    lm = transformers.AutoModelForCausalLM.from_pretrained(base.path)
    adapted: Any = peft.get_peft_model(lm, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path / "sft")
    start = ModelConfig(path=str(tmp_path / "sft"), device="cpu")
    module, tokenizer, _ = open_reward_module(start, LoraConfig(rank=2))
    draw_head(module)
    folder = saved(module, tokenizer, tmp_path / "reward")
    ours = RewardModel(module, tokenizer).score(CONVERSATIONS)
    torch.testing.assert_close(load_reward_model(str(folder), device="cpu").score(CONVERSATIONS), ours)


def test_the_adapter_of_a_reward_model_goes_on_learning_or_is_folded_under_a_new_one(tmp_path: Path) -> None:
    first, tokenizer, _ = open_reward_module(language_model("tiny", tmp_path / "lm"), LoraConfig(rank=4))
    draw_head(first)
    for name, parameter in first.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    start = ModelConfig(path=str(saved(first, tokenizer, tmp_path / "first")), device="cpu")
    ours = RewardModel(first, tokenizer).score(CONVERSATIONS)
    for settings in (LoraConfig(), LoraConfig(rank=2)):
        module, _, fresh = open_reward_module(start, settings)
        assert not fresh
        learning = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        assert any("lora_A" in name for name in learning)
        assert any("score" in name for name in learning)
        torch.testing.assert_close(RewardModel(module, tokenizer).score(CONVERSATIONS), ours, atol=1e-5, rtol=0)


def test_scores_of_a_model_in_half_precision_are_float32(tmp_path: Path) -> None:
    module, tokenizer, _ = open_reward_module(language_model("tiny", tmp_path / "lm"))
    draw_head(module)
    folder = saved(module, tokenizer, tmp_path / "reward")
    half = load_reward_model(str(folder), device="cpu", dtype="bfloat16")
    assert next(half.module.parameters()).dtype == torch.bfloat16
    found = half.score(CONVERSATIONS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, RewardModel(module, tokenizer).score(CONVERSATIONS), atol=0.3, rtol=0.1)


def test_a_long_conversation_loses_its_beginning_and_no_word_of_the_answer(tmp_path: Path) -> None:
    module, tokenizer, _ = open_reward_module(language_model("tiny", tmp_path))
    draw_head(module)
    model = RewardModel(module, tokenizer, max_tokens=60)
    long = conversation("x" * 100, "y" * 20)
    short = conversation("x" * (60 - 21 - 3), "y" * 20)  # 20 letters and the end; user, end and cue
    assert model.score([long]).tolist() == model.score([short]).tolist()
    assert RewardModel(module, tokenizer).max_tokens == 256
    with pytest.raises(DataError, match="An answer is never cut"):
        model.score([conversation("x", "y" * 80)])


def test_scores_do_not_depend_on_what_shares_a_pass(tmp_path: Path) -> None:
    module, tokenizer, _ = open_reward_module(language_model("qwen 3", tmp_path))
    draw_head(module)
    model = RewardModel(module, tokenizer)
    together = model.score(CONVERSATIONS, tokens_per_pass=10_000)
    torch.testing.assert_close(model.score(CONVERSATIONS, tokens_per_pass=1), together, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.score(CONVERSATIONS[::-1]).flip(0), together, atol=1e-5, rtol=0)
    assert model.score([]).shape == (0,)
    assert not together.requires_grad


def test_the_spread_of_scores_is_kept_beside_the_weights_and_normalises(tmp_path: Path) -> None:
    module, tokenizer, _ = open_reward_module(language_model("tiny", tmp_path / "lm"))
    draw_head(module)
    folder = saved(module, tokenizer, tmp_path / "reward")
    model = load_reward_model(str(folder), device="cpu")
    assert model.scale is None
    with pytest.raises(DataError, match=r"has no reward.json, so its scores cannot be normalised"):
        model.score(CONVERSATIONS, normalised=True)
    write_scale(Scale(mean=0.5, std=2.0, held_out=True), folder)
    again = load_reward_model(str(folder), device="cpu")
    assert again.scale == read_scale(folder) == Scale(0.5, 2.0, True)
    expected = (model.score(CONVERSATIONS) - 0.5) / 2
    torch.testing.assert_close(again.score(CONVERSATIONS, normalised=True), expected)
    assert Scale(2.0, 0.0, True).normalise(torch.tensor([2.0, 3.0])).tolist() == [0.0, 1.0]


def test_a_broken_file_of_the_spread_is_named(tmp_path: Path) -> None:
    (tmp_path / "reward.json").write_text(json.dumps({"average": 1}))
    with pytest.raises(DataError, match=r"reward.json: not the spread of a reward model's scores"):
        read_scale(tmp_path)


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    config = language_model("tiny", tmp_path)
    with pytest.raises(DataError, match=r"is a language model, not a reward model. Train one from it with echelon"):
        load_reward_model(config.path, device="cpu")


def test_a_classifier_of_several_classes_is_refused(tmp_path: Path) -> None:
    config = language_model("tiny", tmp_path / "lm")
    classes = transformers.AutoModelForSequenceClassification.from_pretrained(config.path, num_labels=3)
    folder = saved(classes, make_tokenizer(**KINDS["tiny"]), tmp_path / "classes")
    with pytest.raises(DataError, match="tells 3 classes apart, and a reward is one number"):
        open_reward_module(ModelConfig(path=str(folder), device="cpu"))


def test_a_model_that_reads_both_ways_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(**KINDS["tiny"])
    settings = transformers.BertConfig(vocab_size=len(tokenizer), **SIZES, num_labels=1)
    folder = saved(transformers.BertForSequenceClassification(settings), tokenizer, tmp_path)
    with pytest.raises(DataError, match=r"does not score from its last token. Use a causal language model"):
        open_reward_module(ModelConfig(path=str(folder), device="cpu"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    config = language_model("tiny", tmp_path)
    tokenizer = make_tokenizer(**KINDS["tiny"])
    tokenizer.add_tokens([f"word{number}" for number in range(9)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="so it cannot read all of them"):
        open_reward_module(config)
