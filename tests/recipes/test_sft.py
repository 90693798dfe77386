"""Supervised fine-tuning: what is learned from, that it is learned, and what is refused."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from echelon import cli
from echelon.config import OptimConfig
from echelon.data.packing import group_rows, pack, pack_documents
from echelon.envs import load_env
from echelon.errors import DataError
from echelon.models.lm import load_lm, load_tokenizer
from echelon.recipes import sft
from echelon.recipes.sft import evaluate, loss_fn, perplexity, shorten, whole
from echelon.text.chat import PLAIN_CHAT_TEMPLATE, Example, Renderer
from echelon.train.checkpoint import find_checkpoint
from echelon.train.learner import Learner
from echelon.types import Message
from tests.parity.architectures import VOCABULARY, model
from tests.recipes.conftest import GAME, recorded

FEW = ("--epochs", 1, "--rows-per-step", 16)


@pytest.fixture
def told(untrained: Path, conversations: Path) -> list[str]:
    return ["--model.path", str(untrained), "--data.path", str(conversations)]


def test_a_run_learns_and_leaves_a_model_that_loads(train, told: list[str]) -> None:
    run = train("sft", *told, "--epochs", 4, "--rows-per-step", 8, "--optim.lr", 1e-2)
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(20))
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[0]["perplexity"] == pytest.approx(torch.tensor(rows[0]["loss"]).exp().item(), rel=1e-5)
    assert all(row["grad_norm"] > 0 for row in rows)
    folder = find_checkpoint(run.out)
    assert load_tokenizer(str(folder)).chat_template
    assert load_lm(str(folder), device="cpu").config.hidden_size == 32


def test_a_run_may_begin_with_a_shape_alone_and_learns_its_tokens_from_the_rows(
    train, conversations: Path, tmp_path: Path
) -> None:
    shape = tmp_path / "shape"
    shape.mkdir()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    (shape / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300, **sizes}))
    told = ("--untrained", "--model.path", shape, "--data.path", conversations, "--max-steps", 3)
    first, again, other = (
        train("sft", *told, "--seed", seed, name=f"{name}") for name, seed in zip("abc", (1, 1, 2), strict=True)
    )
    assert first.rows() == again.rows() != other.rows()
    folder = find_checkpoint(first.out)
    tokenizer = load_tokenizer(str(folder))
    assert 261 < len(tokenizer) <= 300, "the bytes, and words of the rows"
    module = load_lm(str(folder), device="cpu")
    assert module.get_input_embeddings().weight.shape == (len(tokenizer), 16)
    assert module.config.eos_token_id == tokenizer.eos_token_id == tokenizer.encode("<|end|>")[0]


def test_a_tokenizer_that_is_there_stays(train, told: list[str], untrained: Path) -> None:
    run = train("sft", *told, "--untrained", "--max-steps", 1)
    start = run.out / "checkpoints" / "step_000000" / "actor"
    folder = start if start.is_dir() else find_checkpoint(run.out)
    assert load_tokenizer(str(folder)).get_vocab() == load_tokenizer(str(untrained)).get_vocab()
    given, begun = (load_lm(str(place), device="cpu").get_input_embeddings().weight for place in (untrained, folder))
    assert (given - begun).abs().mean() > 0.01, "the weights are others"


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


@pytest.mark.parametrize("file", ["twenty_questions", "lora"])
def test_the_settings_files_run_on_a_tiny_model(file: str, told: list[str], tmp_path: Path) -> None:
    settings = Path(__file__).parents[2] / "configs/sft" / f"{file}.yaml"
    assert cli.main(["sft", str(settings), *told, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    assert find_checkpoint(tmp_path / "run").is_dir()


def test_a_dry_run_prints_sizes_and_writes_nothing(train, told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = train("sft", *told, "--dry-run")
    assert "actor: LlamaForCausalLM" in capsys.readouterr().out
    assert not run.out.exists()


def conversation(*said: str) -> list[Message]:
    """What the user and the assistant say in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": content} for place, content in enumerate(said)]


def written(path: Path, *conversations: list[Message]) -> Path:
    """A file of conversations."""
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return path


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Games that nobody trains on."""
    return recorded(load_env("guess_number", GAME), ("optimal",), 12, tmp_path_factory.mktemp("held") / "games.jsonl")


def documents(seed: int = 0) -> list[list[Example]]:
    """Conversations of random tokens, some with several turns, of 4 to 40 tokens."""
    draw = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(2, most))]

    found = []
    for _ in range(9):
        prompt, turns = ids(12), []
        for _ in range(draw.choice([1, 1, 2])):
            turns.append(Example(prompt, ids(8)))
            prompt = [*prompt, *turns[-1].action, *ids(6)]
        found.append(turns)
    return found


def loss_and_gradient(module: Any, batch: Any) -> tuple[float, list[Tensor]]:
    module.zero_grad()
    total = 0.0
    for micro in batch.split(96):
        loss, _ = loss_fn(module, micro)
        loss.backward()
        total += loss.item()
    return total, [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    "name", ["Llama", "Llama, eager", "GPT-2", "Mistral, sliding", "Gemma 2, mixed, soft-capped", "Mixtral"]
)
@pytest.mark.parametrize("learn", ["completions", "everything"])
def test_packed_documents_have_the_losses_and_gradients_of_rows_of_their_own(name: str, learn: str) -> None:
    module, rows = model(name), documents()
    turns = [example for row in rows for example in (row if learn == "completions" else [whole(row)])]
    plain, packed = pack(turns), pack_documents(turns, max_tokens=64)
    assert len(packed.tokens) < len(plain.tokens) == 9
    assert packed.denom == plain.denom
    loss, gradient = loss_and_gradient(module, plain)
    again, same = loss_and_gradient(module, packed)
    module.zero_grad()
    assert again == pytest.approx(loss, rel=1e-5)
    largest = max(float(part.abs().max()) for part in gradient)
    torch.testing.assert_close(same, gradient, rtol=1e-4, atol=1e-5 * largest)


def test_a_packed_run_learns_what_an_unpacked_one_does(train, told: list[str]) -> None:
    flags = (*told, *FEW, "--max-tokens", 128, "--epochs", 2)
    for learn in ("completions", "everything"):
        plain = train("sft", *flags, "--learn", learn, name=f"plain {learn}")
        packed = train("sft", *flags, "--learn", learn, "--packing", name=f"packed {learn}")
        for one, other in zip(plain.rows(), packed.rows(), strict=True):
            assert one == pytest.approx(other, rel=1e-4)


def test_a_model_that_takes_no_masks_is_not_packed(train, told: list[str], monkeypatch, capsys) -> None:
    def refuse(module: Any) -> None:
        raise DataError("cannot")

    monkeypatch.setattr(sft, "check_masks", refuse)
    train("sft", *told, "--packing", status=2)
    assert capsys.readouterr().err == (
        "packing = true: LlamaForCausalLM cannot be told by masks and positions which tokens see which, so "
        "conversations in one row would read each other. Leave packing out, or use another architecture.\n"
    )


def test_everything_learned_is_the_loss_that_the_model_itself_computes(untrained: Path) -> None:
    module, tokenizer = load_lm(str(untrained), device="cpu"), load_tokenizer(str(untrained))
    row = Renderer(tokenizer).examples(conversation("Guess.", "2", "Higher.", "3"))
    batch = pack([whole(row)])
    loss, stats = loss_fn(module, batch)
    ids = torch.tensor([row[-1].prompt + row[-1].action])
    assert loss.item() == pytest.approx(module(input_ids=ids, labels=ids).loss.item(), rel=1e-6)
    assert stats == {"tokens": ids.shape[1] - 1}
    assert batch.tokens.tolist() == ids.tolist()


@pytest.mark.parametrize("learn", ["completions", "everything"])
def test_the_end_of_every_answer_is_learned(learn: str, untrained: Path) -> None:
    tokenizer = load_tokenizer(str(untrained))
    row = Renderer(tokenizer).examples(conversation("Guess.", "2", "Higher.", "3"))
    batch = pack(row if learn == "completions" else [whole(row)])
    ends = (batch.tokens == tokenizer.eos_token_id) & batch.mask
    assert ends[0, [len(example.prompt) + len(example.action) - 1 for example in row]].tolist() == [True, True]
    assert int(ends.sum()) == (2 if learn == "completions" else 4), "a user's message ends with the same token here"


def test_held_out_loss_weighs_every_token_the_same_however_rows_share_passes(untrained: Path) -> None:
    module, tokenizer = load_lm(str(untrained), device="cpu"), load_tokenizer(str(untrained))
    said = [("Guess.", "2"), ("Guess.", "1 or 4, I think", "No.", "3"), ("Now?", "4")]
    rows = [Renderer(tokenizer).examples(conversation(*words)) for words in said]
    nll, count = 0.0, 0
    for example in (example for row in rows for example in row):
        ids = torch.tensor([example.prompt + example.action])
        labels = ids.clone()
        labels[0, : len(example.prompt)] = -100
        nll += module(input_ids=ids, labels=labels).loss.item() * len(example.action)
        count += len(example.action)
    learner = Learner(module, OptimConfig(), name="actor")
    for budget in (4096, 16):
        measured = evaluate(learner, rows, budget)
        assert measured == pytest.approx({"eval/loss": nll / count, "eval/perplexity": math.exp(nll / count)}, rel=1e-5)
    assert len(group_rows([len(row[-1].prompt) + len(row[-1].action) for row in rows], 16)) > 1
    assert not module.training, "dropout is off"
    assert perplexity(1e6) == math.inf


def test_evaluations_come_when_they_are_due_and_the_best_is_a_folder_that_loads(
    train, told: list[str], held_out: Path
) -> None:
    flags = ("--epochs", 4, "--rows-per-step", 8, "--optim.lr", 1e-2)
    run = train("sft", *told, *flags, "--data.eval-path", held_out, "--eval-every", 6, "--eval-first")
    measured = {(row["step"], "loss" in row): row["eval/loss"] for row in run.rows() if "eval/loss" in row}
    assert list(measured) == [(0, False), (5, True), (11, True), (15, True)]
    lowest = min(measured.values())
    assert lowest < 0.7 * measured[0, False]
    folder = run.out / "best"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    rows = [Renderer(tokenizer).examples(json.loads(line)["messages"]) for line in held_out.read_text().splitlines()]
    assert evaluate(Learner(module, OptimConfig()), rows, 512)["eval/loss"] == pytest.approx(lowest, rel=1e-5)


def test_it_stops_before_it_has_learned_the_rows_by_heart(train, untrained: Path, tmp_path: Path, capsys) -> None:
    """Answers that are drawn at random can be remembered and not foretold."""
    draw = random.Random(0)
    games = [conversation(f"Number {draw.randrange(1000)}?", str(draw.randint(1, 4))) for _ in range(40)]
    flags = ["--model.path", untrained, "--data.path", written(tmp_path / "a.jsonl", *games[:20])]
    flags += ["--data.eval-path", written(tmp_path / "b.jsonl", *games[20:]), "--rows-per-step", 20, "--epochs", 60]
    run = train("sft", *flags, "--eval-every", 4, "--patience", 3, "--optim.lr", 1e-2, "--save-every", 0)
    losses = {row["step"] + 1: row["eval/loss"] for row in run.rows() if "eval/loss" in row}
    lowest = min(losses, key=losses.__getitem__)
    assert 4 < lowest < 45
    assert len(run.rows()) == lowest + 12, "three evaluations later"
    newest = sorted((run.out / "checkpoints").iterdir())[-1]
    assert newest.name == f"step_{lowest + 12:06d}"
    assert f"evaluations. The lowest was {losses[lowest]:.4g} after {lowest} steps" in capsys.readouterr().out
    best, last = load_file(run.out / "best/model.safetensors"), load_file(newest / "actor/model.safetensors")
    assert not all(best[name].equal(last[name]) for name in best)
    kept = load_file(run.out / f"checkpoints/step_{lowest:06d}/actor/model.safetensors")
    assert_close(best, kept, 0)


@pytest.mark.parametrize("at", [3, 4])
def test_killed_around_an_evaluation_and_resumed_nothing_is_lost(
    train, told: list[str], held_out: Path, killed_at, at: int
) -> None:
    """With an adapter that drops a part of its inputs: dropout is repeated too."""
    flags = [*told, *FEW, "--epochs", 3, "--save-every", 2, "--data.eval-path", held_out, "--eval-every", 2]
    flags += ["--patience", 2, "--packing", "--max-tokens", 256, "--lora.rank", 4, "--lora.dropout", 0.3]
    left = train("sft", *flags, name="whole")
    killed_at(at)
    train("sft", *flags, name="killed", status=130)
    killed_at(-1)
    torch.manual_seed(99)
    resumed = train("sft", *flags, "--resume", name="killed")
    assert len(left.rows()) == 6
    assert resumed.rows() == left.rows()
    for part in ("best", f"checkpoints/{sorted((left.out / 'checkpoints').iterdir())[-1].name}/actor"):
        one, other = (load_file(run.out / part / "adapter_model.safetensors") for run in (left, resumed))
        assert_close(one, other, 0)


def test_an_adapter_learns_and_is_what_is_saved(train, told: list[str], held_out: Path, untrained: Path) -> None:
    flags = ("--epochs", 4, "--rows-per-step", 8, "--optim.lr", 1e-2, "--lora.rank", 4, "--data.eval-path", held_out)
    run = train("sft", *told, *flags)
    assert run.rows()[-1]["loss"] < run.rows()[0]["loss"] - 0.4
    base = transformers.AutoModelForCausalLM.from_pretrained(untrained)
    module = peft.PeftModel.from_pretrained(base, run.out / "best", is_trainable=True)
    rows = [
        Renderer(load_tokenizer(str(run.out / "best"))).examples(json.loads(line)["messages"])
        for line in held_out.read_text().splitlines()
    ]
    loss = evaluate(Learner(module, OptimConfig()), rows, 512)["eval/loss"]
    assert loss == pytest.approx(run.rows()[-1]["eval/loss"], rel=1e-4)


@pytest.mark.learning
def test_perplexity_on_words_never_seen_falls_to_almost_one(train, untrained: Path, tmp_path: Path) -> None:
    """Say the digit among three letters: from 295 to below 1.3 with seeds 0 to 2; without looking it would be √10."""
    draw = random.Random(0)
    digits = [str(draw.randrange(10)) for _ in range(300)]
    words = ["".join(draw.sample([*draw.sample("abcdefgh", 3), digit], 4)) for digit in digits]
    rows = [conversation(word, digit) for word, digit in zip(words, digits, strict=True)]
    flags = ["--model.path", untrained, "--data.path", written(tmp_path / "words.jsonl", *rows)]
    flags += ["--data.eval-fraction", 0.3, "--eval-first", "--max-steps", 300, "--rows-per-step", 8, "--optim.lr", 3e-3]
    for seed in range(3):
        run = train("sft", *flags, "--eval-every", 100, "--seed", seed, name=f"seed {seed}")
        measured = [row["eval/perplexity"] for row in run.rows() if "eval/perplexity" in row]
        assert measured[0] > 200
        assert measured[-1] < 1.3


def test_a_base_model_is_given_a_template_that_later_stages_find(
    train, untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    load_lm(str(untrained), device="cpu").save_pretrained(base)
    tokenizer = load_tokenizer(str(untrained))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(base)
    data = written(tmp_path / "data.jsonl", *[conversation("Guess.", "2", "Higher.", "3")] * 8)
    flags = ("--model.path", base, "--data.path", data)
    run = train("sft", *flags, "--data.eval-path", written(tmp_path / "held.jsonl", conversation("Guess.", "2")))
    assert capsys.readouterr().err == f"{base} has no chat template: it is given one with Question: and Answer:\n"
    for folder in (find_checkpoint(run.out), run.out / "best"):
        assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == PLAIN_CHAT_TEMPLATE
    train("sft", "--model.path", run.out, "--data.path", data, name="again")
    assert capsys.readouterr().err == ""


def test_what_cannot_be_used_is_named_in_one_line(
    train, untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"texts": "Hello"}\n')
    train("sft", "--model.path", untrained, "--data.path", file, status=2)
    assert capsys.readouterr().err.startswith(f"{file}:1: the columns ")


def example(prompt: list[int], action: list[int]) -> Example:
    return Example(prompt, action)


TALK = [example([1, 2], [3, 4]), example([1, 2, 3, 4, 5], [6, 7]), example([1, 2, 3, 4, 5, 6, 7, 8], [9])]
"""1 2 is the instruction; 3 4 is answered by 5, 6 7 by 8, and 9 is the last answer."""


@pytest.mark.parametrize(
    ("max_tokens", "left"),
    [
        (9, TALK),
        (8, [example([1, 2, 6, 7, 8], [9])]),  # 3 4 5 is gone; 6 7 answered it, so it is read and not learned
        (6, [example([1, 2, 6, 7, 8], [9])]),
        (5, [example([5, 6, 7, 8], [9])]),
        (2, [example([8], [9])]),
        (1, []),  # nothing would be seen before the answer
    ],
)
def test_what_is_cut_is_the_beginning_and_never_the_last_answer(max_tokens: int, left: list[Example]) -> None:
    assert shorten(TALK, max_tokens) == left
    assert all(len(last.prompt) + len(last.action) <= max_tokens for last in left)


def test_of_several_exchanges_the_latest_stay_and_are_learned() -> None:
    longer = [*TALK, example([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [11])]
    assert shorten(longer, 10) == [example([1, 2, 6, 7, 8], [9]), example([1, 2, 6, 7, 8, 9, 10], [11])]
    assert shorten(longer, 7) == [example([1, 2, 9, 10], [11])]


def test_the_token_that_opens_every_text_stays() -> None:
    assert shorten([example([1, 2, 3, 4], [5])], 3, bos=1) == [example([1, 4], [5])]
    assert shorten([example([1, 2, 3, 4], [5])], 3, bos=2) == [example([3, 4], [5])]
    assert shorten([example([1, 2, 3, 4], [5])], 2, bos=1) == []


LONG = conversation("Guess. " * 9, "1 2 3 4 " * 2)
TALKATIVE = conversation("Guess.", "1 2 3 4 " * 9)


@pytest.mark.parametrize(
    ("too_long", "rows", "note"),
    [
        ("drop", 1, "2 of 3 conversations are longer than max_tokens = 32: 0 were cut, 2 dropped"),
        ("cut", 2, "2 of 3 conversations are longer than max_tokens = 32: 1 were cut, 1 dropped"),
    ],
)
def test_what_is_done_with_long_conversations_is_said(
    train, untrained: Path, tmp_path: Path, capsys, too_long: str, rows: int, note: str
) -> None:
    data = written(tmp_path / "data.jsonl", LONG, conversation("Guess.", "2"), TALKATIVE)
    flags = ("--model.path", untrained, "--data.path", data, "--max-tokens", 32, "--too-long", too_long)
    run = train("sft", *flags, "--rows-per-step", 1)
    assert len(run.rows()) == rows
    assert note in capsys.readouterr().out.splitlines()
    train("sft", *flags, "--dry-run", name="dry")
    assert note in capsys.readouterr().out.splitlines()


def test_a_conversation_longer_than_a_row_is_refused_unless_it_may_go(
    train, untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(tmp_path / "data.jsonl", TALKATIVE)
    flags = ("--model.path", untrained, "--data.path", data, "--max-tokens", 32)
    many = f"{data}: 1 of 1 conversations are longer than max_tokens = 32"
    train("sft", *flags, status=2)
    assert capsys.readouterr().err == (
        f"{many}; the longest has 61 tokens. Raise max_tokens, or give too_long = drop or cut.\n"
    )
    train("sft", *flags, "--too-long", "drop", status=2)
    assert capsys.readouterr().err == f"{many}, so no row is left. Raise max_tokens.\n"


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
