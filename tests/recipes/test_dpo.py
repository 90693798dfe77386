"""Direct preference optimisation: what is minimised, against which reference, and that samples follow the rule."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from echelon.config import DataConfig, ModelConfig
from echelon.data.datasets import load_rows
from echelon.data.pairs import Pair, Pairs, pack_pairs, render_pairs
from echelon.models.lm import load_lm, load_tokenizer
from echelon.recipes.dpo import Config, answer_logprobs, loss_fn
from echelon.text.chat import Renderer
from echelon.train.checkpoint import find_checkpoint
from tests.parity.architectures import plain_logprobs
from tests.recipes.preferences import POLITE, reader, write_pairs

FEW = ("--epochs", 1, "--rows-per-step", 16, "--optim.lr", 1e-3)
HELD_OUT = ("--data.eval-fraction", 0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model called `model`, another one called `other`, and files of pairs."""
    folder = tmp_path_factory.mktemp("preferences")
    reader(folder / "model")
    for rule in ("polite", "length"):
        write_pairs(folder / f"{rule}.jsonl", rule, 800)
    write_pairs(folder / "few.jsonl", "polite", 80)
    return folder


@pytest.fixture
def told(folder: Path) -> list[str]:
    return ["--model.path", str(folder / "model"), "--data.path", str(folder / "few.jsonl")]


def config(folder: Path, **settings: Any) -> Config:
    data = DataConfig(path=(str(folder / "few.jsonl"),))
    return Config(out="unused", model=ModelConfig(path=str(folder / "model")), data=data, **settings)


def rendered(folder: Path) -> tuple[Any, list[Pair]]:
    """The model and six pairs."""
    module, tokenizer = load_lm(str(folder / "model"), device="cpu"), load_tokenizer(str(folder / "model"))
    rows = load_rows(DataConfig(path=(str(folder / "few.jsonl"),)), "preference", seed=0).train[:6]
    return module, render_pairs(Renderer(tokenizer), rows, max_tokens=200)[0]


@torch.no_grad()
def alone(module: Any, pairs: list[Pair]) -> torch.Tensor:
    """log π of every answer, each in a row of its own."""
    return torch.tensor(
        [
            [plain_logprobs(module, pair.prompt, answer.ids).sum() for answer in (pair.chosen, pair.rejected)]
            for pair in pairs
        ]
    )


@pytest.mark.learning
@pytest.mark.seeds(0, 1)
@pytest.mark.parametrize("rule", ["polite", "length"])
def test_held_out_pairs_are_told_apart_by_the_implicit_reward(train, folder: Path, rule: str, seed: int) -> None:
    """600 pairs, three epochs: from half to 0.97 and more of about 200 held-out pairs, with these seeds."""
    data = ("--model.path", folder / "model", "--data.path", folder / f"{rule}.jsonl", *HELD_OUT)
    run = train("dpo", *data, *FEW, "--epochs", 3, "--eval-first", "--eval-every", 0, "--seed", seed)
    rows = run.rows()
    assert rows[0]["eval/accuracy"] == 0.5
    assert rows[0]["eval/loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert rows[-1]["eval/accuracy"] > 0.9
    assert rows[-1]["eval/rewards/margin"] > 0.5


@pytest.mark.learning
def test_samples_follow_the_rule_of_the_pairs(train, folder: Path, tmp_path: Path) -> None:
    """A policy that has learned to say either kind of answer becomes polite: from 0.4 to 0.9 of its samples."""
    rows = [json.loads(line) for line in (folder / "polite.jsonl").read_text().splitlines()]
    both = [{"prompt": row["prompt"], "response": row[kind]} for row in rows for kind in ("chosen", "rejected")]
    (tmp_path / "sft.jsonl").write_text("\n".join(map(json.dumps, both)))
    data = ("--data.path", tmp_path / "sft.jsonl", "--rows-per-step", 16)
    tuned = train("sft", "--model.path", folder / "model", *data, "--epochs", 4, "--optim.lr", 1e-2, name="sft")
    start = find_checkpoint(tuned.out)
    pairs = ("--data.path", folder / "polite.jsonl", "--rows-per-step", 16)
    run = train("dpo", "--model.path", start, *pairs, "--epochs", 2, "--optim.lr", 2e-4)
    before, after = polite(start), polite(find_checkpoint(run.out))
    assert 0.3 < before < 0.6
    assert after > before + 0.35


def polite(folder: Path) -> float:
    """How many of 200 samples have a word of politeness."""
    module: Any = load_lm(str(folder), device="cpu").eval()
    tokenizer = load_tokenizer(str(folder))
    prompt = Renderer(tokenizer).render([{"role": "user", "content": "Say something about a river and a door."}])
    torch.manual_seed(0)
    told = torch.tensor([prompt] * 200)
    tokens = module.generate(
        told,
        attention_mask=torch.ones_like(told),
        do_sample=True,
        max_new_tokens=16,
        top_k=0,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(tokens[:, len(prompt) :], skip_special_tokens=True)
    return sum(any(word in text.split() for word in POLITE) for text in texts) / 200


@pytest.mark.parametrize("share", [False, True])
def test_log_probs_are_sums_over_the_answer_and_its_end(folder: Path, share: bool) -> None:
    module, pairs = rendered(folder)
    packed = pack_pairs(pairs, share=share)
    found, tokens = answer_logprobs(module, packed)
    torch.testing.assert_close(found, alone(module, pairs), atol=1e-4, rtol=0)
    assert tokens.tolist() == [[len(pair.chosen.ids), len(pair.rejected.ids)] for pair in pairs]
    (first, *_) = packed.split(1)
    part, _ = answer_logprobs(module, first)
    number = int(first.batch.index_N[0]) // 2
    torch.testing.assert_close(part, found[number : number + 1], atol=1e-4, rtol=0)


def referred(folder: Path, shift: float) -> tuple[Any, Pairs, torch.Tensor, torch.Tensor]:
    """Pairs whose reference says of a rejected answer what the model says, and of a chosen one `shift` less."""
    module, pairs = rendered(folder)
    logprobs = alone(module, pairs)
    packed = pack_pairs(pairs, share=False, reference_P2=logprobs - torch.tensor([shift, 0.0]))
    lengths = torch.tensor([[len(pair.chosen.ids), len(pair.rejected.ids)] for pair in pairs])
    return module, packed, logprobs, lengths


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, -math.log(sigmoid(0.2))),  # β·Δ = 0.1 · 2
        ({"beta": 0.5}, -math.log(sigmoid(1.0))),
        ({"label_smoothing": 0.1}, -0.9 * math.log(sigmoid(0.2)) - 0.1 * math.log(sigmoid(-0.2))),
        ({"loss": "hinge", "beta": 0.2}, 0.6),
    ],
)
def test_each_loss_is_its_formula_of_summed_log_ratios(folder: Path, settings: dict[str, Any], expected: float) -> None:
    module, packed, logprobs, _ = referred(folder, shift=2.0)
    loss, stats = loss_fn(module, packed, cfg=config(folder, **settings))
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    beta = settings.get("beta", 0.1)
    assert stats["rewards/margin"] == pytest.approx(2 * beta, rel=1e-3)
    assert stats["rewards/chosen"] == pytest.approx(2 * beta, rel=1e-3)
    assert stats["rewards/rejected"] == pytest.approx(0, abs=1e-5)
    assert stats["accuracy"] == 1.0
    assert stats["logps/chosen"] == pytest.approx(logprobs[:, 0].mean().item(), rel=1e-5)
    assert stats["logps/rejected"] == pytest.approx(logprobs[:, 1].mean().item(), rel=1e-5)


def test_ipo_and_length_normalisation_average_over_each_answers_tokens(folder: Path) -> None:
    module, packed, _, lengths = referred(folder, shift=2.0)
    per_token = 2.0 / lengths[:, 0].double()
    loss, _ = loss_fn(module, packed, cfg=config(folder, loss="ipo", beta=0.5))
    assert loss.item() == pytest.approx((per_token - 1).square().mean().item(), rel=1e-3)
    loss, _ = loss_fn(module, packed, cfg=config(folder, beta=2.0, length_normalised=True))
    assert loss.item() == pytest.approx(-torch.nn.functional.logsigmoid(2 * per_token).mean().item(), rel=1e-3)


def test_rpo_adds_the_likelihood_of_the_chosen_answer_per_token(folder: Path) -> None:
    module, packed, logprobs, lengths = referred(folder, shift=2.0)
    nll = (-logprobs[:, 0] / lengths[:, 0]).mean().item()
    loss, stats = loss_fn(module, packed, cfg=config(folder, rpo_alpha=0.5))
    assert loss.item() == pytest.approx(-math.log(sigmoid(0.2)) + 0.5 * nll, rel=1e-4)
    assert stats["nll"] == pytest.approx(nll, rel=1e-4)


def test_at_the_reference_the_gradient_is_half_of_beta_times_that_of_the_difference(folder: Path) -> None:
    module, packed, _, _ = referred(folder, shift=0.0)
    loss, _ = loss_fn(module, packed, cfg=config(folder))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)
    loss.backward()
    found = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    module.zero_grad()
    logprob_P2, _ = answer_logprobs(module, packed)
    (0.05 * (logprob_P2[:, 1] - logprob_P2[:, 0]).mean()).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)
    assert found.norm() > 1e-3


def test_splitting_a_step_and_sharing_rows_change_no_gradient(folder: Path) -> None:
    module, pairs = rendered(folder)
    reference = alone(module, pairs) + torch.arange(12.0).view(6, 2)
    found = []
    for share, budget in ((False, 10_000), (False, 1), (True, 10_000), (True, 1)):
        module.zero_grad()
        packed = pack_pairs(pairs, share=share, reference_P2=reference)
        for part in packed.split(budget):
            loss_fn(module, part, cfg=config(folder, rpo_alpha=0.1))[0].backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in module.parameters()]))
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], atol=1e-5, rtol=1e-3)


def test_the_reference_is_the_model_before_the_first_step_computed_once(train, told: list[str], folder: Path) -> None:
    run = train("dpo", *told, *HELD_OUT, *FEW, "--save-every", 1, "--keep-last", 100)
    saved = [load_file(path / "reference/logprobs.safetensors") for path in sorted((run.out / "checkpoints").iterdir())]
    assert len(saved) > 2
    for later in saved[1:]:
        torch.testing.assert_close(later, saved[0], rtol=0, atol=0)
    module, tokenizer = load_lm(str(folder / "model"), device="cpu"), load_tokenizer(str(folder / "model"))
    data = DataConfig(path=(str(folder / "few.jsonl"),), eval_fraction=0.25)
    split = load_rows(data, "preference", seed=0)
    for name, rows in (("train", split.train), ("held_out", split.held_out)):
        pairs, _ = render_pairs(Renderer(tokenizer), rows, max_tokens=1024)
        torch.testing.assert_close(saved[0][name], alone(module, pairs), atol=1e-4, rtol=0)


def test_another_model_can_be_the_reference(train, told: list[str], folder: Path) -> None:
    first = train("dpo", *told, *HELD_OUT, *FEW, "--epochs", 2, "--eval-every", 0, name="first")
    start = ("--model.path", find_checkpoint(first.out), *told[2:], *HELD_OUT, "--eval-first", "--max-steps", 1)
    again = train("dpo", *start, "--reference", folder / "model", name="again").rows()[0]
    assert again["eval/loss"] == pytest.approx(first.rows()[-1]["eval/loss"], rel=1e-4)
    fresh = train("dpo", *start, name="fresh").rows()[0]
    assert fresh["eval/loss"] == pytest.approx(math.log(2), rel=1e-5)
    free = train("dpo", *start, "--reference-free", "--beta", 1.0, name="free").rows()[0]
    assert free["eval/rewards/chosen"] == pytest.approx(free["eval/logps/chosen"])


def test_a_reference_with_another_tokenizer_is_refused(
    train, told: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from echelon.models.lm import tiny

    module, tokenizer = tiny(["other words"], vocab_size=300, hidden=16, layers=1, heads=2)
    module.save_pretrained(tmp_path / "other")  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path / "other")
    train("dpo", *told, *FEW, "--reference", tmp_path / "other", status=2)
    assert "so their log-probabilities are of different tokens" in capsys.readouterr().err


def test_the_size_of_a_pass_does_not_change_the_update(train, told: list[str]) -> None:
    whole = train("dpo", *told, *FEW, name="whole")
    parts = train("dpo", *told, *FEW, "--tokens-per-pass", 64, name="parts")
    for one, other in zip(whole.rows(), parts.rows(), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("lora", [(), ("--lora.rank", 4, "--lora.dropout", 0.1)])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(train, told: list[str], killed_at, lora) -> None:
    flags = (*told, *HELD_OUT, *FEW, *lora, "--epochs", 2, "--save-every", 2, "--eval-every", 3)
    whole = train("dpo", *flags, name="whole")
    killed_at(5)
    train("dpo", *flags, name="killed", status=130)
    killed_at(-1)
    resumed = train("dpo", *flags, "--resume", name="killed")
    assert len(whole.rows()) == 10
    assert resumed.rows() == whole.rows()
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    newest = [sorted((run.out / "checkpoints").iterdir())[-1] / "actor" / file for run in (whole, resumed)]
    torch.testing.assert_close(load_file(newest[1]), load_file(newest[0]), rtol=0, atol=0)
    assert whole.rows()[0]["loss"] == pytest.approx(math.log(2), abs=1e-2)


def test_a_dry_run_prints_sizes_and_writes_nothing(train, told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = train("dpo", *told, "--dry-run")
    assert "actor: LlamaForCausalLM" in capsys.readouterr().out
    assert not run.out.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta = 0.0: without it nothing is learned. Give 0.1, or near it."),
        ({"label_smoothing": 0.5}, "label_smoothing = 0.5: more would mean the opposite. Give 0 to 0.4."),
        (
            {"label_smoothing": 0.1, "loss": "ipo"},
            "label_smoothing = 0.1: loss = ipo knows no probabilities. Give 0, or use sigmoid.",
        ),
        (
            {"length_normalised": True, "loss": "ipo"},
            "length_normalised = true: loss = ipo is always per token. Leave it out.",
        ),
        (
            {"reference": "a", "reference_free": True},
            "reference = a: reference_free compares with no model. Leave one of the two out.",
        ),
        ({"rpo_alpha": -1.0}, "rpo_alpha = -1.0: it is a weight. Give 0 or a little more."),
    ],
)
def test_settings_that_cannot_work_are_named_in_one_line(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        replace(config(folder), **settings)
    assert str(caught.value) == message
