"""Supervised fine-tuning: what is learned from, that it is learned, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from echelon import cli
from echelon.data.packing import pack
from echelon.models.lm import load_lm, load_tokenizer
from echelon.recipes.sft import loss_fn
from echelon.text.chat import Renderer
from echelon.train.checkpoint import find_checkpoint

FEW = ("--epochs", 1, "--conversations-per-step", 16)


@pytest.fixture
def told(untrained: Path, conversations: Path) -> list[str]:
    return ["--model.path", str(untrained), "--data", str(conversations)]


def test_a_run_learns_and_leaves_a_model_that_loads(train, told: list[str]) -> None:
    run = train("sft", *told, "--epochs", 4, "--conversations-per-step", 8, "--optim.lr", 1e-2)
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(20))
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[0]["perplexity"] == pytest.approx(torch.tensor(rows[0]["loss"]).exp().item(), rel=1e-5)
    assert all(row["grad_norm"] > 0 for row in rows)
    folder = find_checkpoint(run.out)
    assert load_tokenizer(str(folder)).chat_template
    assert load_lm(str(folder), device="cpu").config.hidden_size == 32


def test_the_loss_is_that_of_the_assistants_words_and_end_tokens_alone(untrained: Path) -> None:
    module, tokenizer = load_lm(str(untrained), device="cpu"), load_tokenizer(str(untrained))
    said = [("user", "Guess."), ("assistant", "2"), ("user", "Higher."), ("assistant", "3")]
    batch = pack(Renderer(tokenizer).examples([{"role": role, "content": content} for role, content in said]))
    loss, _ = loss_fn(module, batch)

    text = "<|user|>Guess.<|end|><|assistant|>2<|end|><|user|>Higher.<|end|><|assistant|>3<|end|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    logprobs = torch.log_softmax(module(input_ids=torch.tensor([ids])).logits[0].float(), -1)
    cue, end = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    learned, speaking = [], False
    for place in range(1, len(ids)):
        speaking = speaking or ids[place - 1] == cue
        if speaking:
            learned.append(-logprobs[place - 1, ids[place]].item())
        speaking = speaking and ids[place] != end
    assert len(learned) == 4  # two numbers of one token, two ends
    assert loss.item() == pytest.approx(sum(learned) / 4, rel=1e-5)


def test_the_size_of_a_pass_does_not_change_the_update(train, told: list[str]) -> None:
    whole = train("sft", *told, *FEW, name="whole")
    parts = train("sft", *told, *FEW, "--tokens-per-pass", 64, name="parts")
    for one, other in zip(whole.rows(), parts.rows(), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert_close(whole.weights(), parts.weights(), 1e-6)


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(train, told: list[str], killed_at) -> None:
    flags = (*told, *FEW, "--epochs", 2, "--save-every", 2)
    whole = train("sft", *flags, name="whole")
    killed_at(3)
    train("sft", *flags, name="killed", status=130)
    killed_at(-1)
    resumed = train("sft", *flags, "--resume", name="killed")
    assert len(whole.rows()) == 6
    assert resumed.rows() == whole.rows()
    assert_close(resumed.weights(), whole.weights(), 0)


def test_a_dry_run_prints_sizes_and_writes_nothing(train, told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = train("sft", *told, "--dry-run")
    assert "actor: LlamaForCausalLM" in capsys.readouterr().out
    assert not run.out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such file. Give a JSONL file with one conversation per line."),
        ("\n\n", "holds no conversation. Put one JSON object with 'messages' on each line."),
        ('{"messages": [\n', "data.jsonl:1: not a conversation (JSONDecodeError"),
        ('{"prompt": "Hello"}\n', "data.jsonl:1: not a conversation (KeyError: 'messages')."),
        ('\n{"messages": [{"role": "user", "content": "Hello"}]}\n', "data.jsonl:2: no message is the assistant's"),
    ],
)
def test_data_that_cannot_be_used_is_named_in_one_line(
    text: str | None, message: str, untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "data.jsonl").write_text(text)
    words = [
        "sft",
        "--model.path",
        str(untrained),
        "--data",
        str(tmp_path / "data.jsonl"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_conversation_longer_than_a_row_is_refused_not_cut(
    train, untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": "Guess."}, {"role": "assistant", "content": "1 2 3 4 " * 9}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": messages}))
    flags = ("--model.path", untrained, "--data", tmp_path / "data.jsonl", "--max-tokens", 32)
    train("sft", *flags, status=2)
    assert "tokens and max_tokens is 32. Raise max_tokens, or split the conversation." in capsys.readouterr().err


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
