"""Recipes with adapters: a run on top of another's adapter, KL to where it began, and what is left of a killed one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from echelon.models import lora
from echelon.models.lm import load_lm
from echelon.rollout.setup import model_path

IDS = torch.arange(5, 37).reshape(2, 16)
FEW = ("--steps", 4, "--save-every", 2, "--policy.optim.lr", 1e-2)
GRPO = (*FEW, "--policy.epochs", 1, "--tasks-per-step", 2, "--group-size", 4, "--policy.kl-coef", 0.1)
ARCHER = (*FEW, "--episodes-per-step", 8, "--warmup-steps", 1, "--critic-updates", 3, "--critic-episodes", 4)
ARCHER += ("--actor-episodes", 8, "--policy.kl-coef", 0.1)


@pytest.fixture(scope="module")
def below(start: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that left an adapter of rank 3."""
    from echelon import cli

    out = tmp_path_factory.mktemp("adapter") / "sft"
    words = ["sft", "--model.path", start, "--data.path", conversations, "--out", out, "--threads", 1]
    words += ["--lora.rank", 3, "--max-steps", 4, "--rows-per-step", 8, "--optim.lr", 1e-2]
    assert cli.main([str(word) for word in words]) == 0
    return out


@torch.no_grad()
def said(folder: str) -> Tensor:
    """Logits of what is in a folder, by peft alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice
        logits: Tensor = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()(input_ids=IDS).logits
    return logits


def settings(folder: str) -> dict[str, object]:
    return json.loads((Path(folder) / lora.CONFIG).read_text())


RUNS = {
    "a new adapter": ("grpo", (*GRPO, "--lora.rank", 2)),
    "a new adapter on another": ("grpo", (*GRPO, "--lora.rank", 2)),
    "another's adapter goes on": ("grpo", GRPO),
    "actor and critic": ("archer", (*ARCHER, "--lora.rank", 2)),
    "actor and critic on another's": ("archer", ARCHER),
    "critic on the actor's body": ("archer", (*ARCHER, "--lora.rank", 2, "--critic-body", "actor")),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_killed_run_with_an_adapter_equals_an_uninterrupted_one(
    train, game: list[str], below: Path, killed_at, kind: str
) -> None:
    recipe, flags = RUNS[kind]
    path = ("--model.path", below) if "another" in kind else ()
    whole = train(recipe, *game, *flags, *path, name="whole")
    killed_at(3)
    train(recipe, *game, *flags, *path, name="killed", status=130)
    killed_at(-1)
    resumed = train(recipe, *game, *flags, *path, "--resume", name="killed")
    assert resumed.rows() == whole.rows()
    assert resumed.rows("episodes") == whole.rows("episodes")
    one, other = (run.out / "checkpoints" / "step_000004" for run in (whole, resumed))
    files = sorted(str(file.relative_to(one)) for file in one.rglob("*.safetensors"))
    assert [name for name in files if (one / name).read_bytes() != (other / name).read_bytes()] in (
        [],
        ["rng.safetensors"],
    )
    assert "actor/adapter_model.safetensors" in files
    assert "actor/model.safetensors" not in files

    learned = [row for row in whole.rows() if "policy/kl_to_start" in row]
    assert all(row["policy/first_mismatch"] < 1e-4 for row in learned)
    assert learned[0]["policy/kl_to_start"] == pytest.approx(0, abs=1e-6), "it begins where it begins"
    assert learned[-1]["policy/kl_to_start"] > 1e-6


def test_an_adapter_that_goes_on_is_compared_with_what_it_was_not_with_the_base(
    train, game: list[str], below: Path, start: Path
) -> None:
    run = train("grpo", *game, *GRPO, "--model.path", below)
    actor = model_path(str(run.out))
    assert said(f"{actor}/{lora.START}").equal(said(model_path(str(below))))
    with lora.off(module := load_lm(actor, device="cpu").eval()), torch.no_grad():
        without: Tensor = module(input_ids=IDS).logits
    assert without.equal(load_lm(str(start), device="cpu").eval()(input_ids=IDS).logits.detach())
    assert (without - said(model_path(str(below)))).abs().max() > 1e-2, "the two references differ"
    assert settings(actor)["r"] == 3


def test_an_adapter_on_an_adapter_is_one_of_the_first_base(train, game: list[str], below: Path, start: Path) -> None:
    run = train("grpo", *game, *GRPO, "--model.path", below, "--lora.rank", 2)
    actor = model_path(str(run.out))
    assert settings(actor)["r"] == 5
    assert settings(actor)["base_model_name_or_path"] == str(start)
    with torch.no_grad():
        assert said(actor).equal(load_lm(actor, device="cpu").eval()(input_ids=IDS).logits)
    assert (said(actor) - said(model_path(str(below)))).abs().max() > 1e-3

    again = train("grpo", *game, *GRPO, "--model.path", actor, "--lora.rank", 1, name="third")
    third = model_path(str(again.out))
    assert settings(third)["r"] == 6
    assert settings(third)["base_model_name_or_path"] == str(start)
    with torch.no_grad():
        assert said(third).equal(load_lm(third, device="cpu").eval()(input_ids=IDS).logits)


def test_a_critic_of_its_own_learns_an_adapter_and_heads_and_the_copy_of_the_base_stays(
    train, game: list[str], start: Path
) -> None:
    run = train("archer", *game, *ARCHER, "--lora.rank", 2)
    newest = run.out / "checkpoints" / "step_000004"
    critic, base = load_file(newest / "critic" / "model.safetensors"), load_file(start / "model.safetensors")
    key = "layers.0.self_attn.q_proj"
    assert critic[f"body.{key}.base_layer.weight"].equal(base[f"model.{key}.weight"])
    assert critic[f"body.{key}.lora_B.default.weight"].any()
    assert len(json.loads((newest / "critic" / "optimizer.json").read_text())["shapes"]) == 2 * 7 + 16


def test_a_run_whose_base_is_gone_says_which(train, game: list[str], below: Path, capsys, tmp_path: Path) -> None:
    moved = tmp_path / "adapter"
    moved.mkdir()
    for file in Path(model_path(str(below))).iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    stored = settings(str(moved)) | {"base_model_name_or_path": str(tmp_path / "gone")}
    (moved / lora.CONFIG).write_text(json.dumps(stored))
    train("grpo", *game, *GRPO, "--model.path", moved, status=2)
    told = capsys.readouterr().err
    assert f"'{moved}' is an adapter of the model '{tmp_path / 'gone'}', which is not there. Put it back" in told
    assert told.count("\n") == 1
