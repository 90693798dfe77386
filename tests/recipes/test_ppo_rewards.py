"""One-turn PPO for language models: prompts, rewards from functions and models, KL in the reward, and all it keeps."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from echelon.config import DataConfig, ModelConfig
from echelon.errors import ConfigError
from echelon.models.lm import tiny
from echelon.models.reward import open_reward_module
from echelon.recipes.ppo import Config
from echelon.train.policy import PolicyConfig

SMALL = ("--steps", 3, "--episodes-per-step", 8, "--warmup-steps", 1, "--policy.epochs", 2, "--value-epochs", 2)
STILL = ("--value-optim.lr", 0, "--value-epochs", 1, "--steps", 1)


WORDS = "please tell me about the red blue green house tree dog cat thank you yes no"


@pytest.fixture(scope="session")
def polite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, prompts, answers, a reward function and a reward model, in one folder."""
    folder = tmp_path_factory.mktemp("polite")
    module, tokenizer = tiny([WORDS] * 4, vocab_size=320, hidden=32, layers=1, heads=2)
    module.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = WORDS.split()
    asked = [f"tell me about the {one} {other}" for one in words for other in words][:60]
    rows = [{"prompt": text, "answer": text.split()[-1]} for text in asked]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [{"prompt": text, "response": "thank you"} for text in asked]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (folder / "rules.py").write_text(
        "def share(prompts, completions, **columns):\n"
        "    return [text.count('e') / max(1, len(text)) for text in completions]\n\n\n"
        "def please(prompts, completions):\n"
        "    return [float('please' in text) for text in completions]\n"
    )
    scorer, tokenizer, _ = open_reward_module(ModelConfig(path=str(folder / "model"), device="cpu"))
    torch.nn.init.normal_(scorer.score.weight, std=0.1)
    scorer.save_pretrained(folder / "rm")
    tokenizer.save_pretrained(folder / "rm")
    return folder


@pytest.fixture
def rlhf(polite: Path) -> list[str]:
    """Flags of one-turn PPO: prompts, a function and a model for rewards, KL in the reward."""
    words = ["--model.path", f"{polite}/model", "--data.path", f"{polite}/prompts.jsonl"]
    words += ["--reward", f"{polite}/rules.py:share", f"{polite}/rm", "--reward-weights", "2", "0.5"]
    return [*words, "--sampling.max-tokens", "6", "--max-turns", "1", "--shaping.kl-coef", "0.1"]


def test_prompts_are_answered_once_and_judged_by_a_function_and_a_model(train, rlhf: list[str]) -> None:
    run = train("ppo", *rlhf, *SMALL, "--warmup-steps", 0)
    for row in run.rows():
        assert row["episode/turns"] == 1
        assert row["reward/mean"] == pytest.approx(2 * row["reward/share"] + 0.5 * row["reward/rm"], abs=1e-6)
        assert row["shaped/return"] == pytest.approx(row["reward/mean"] - 0.1 * row["shaped/kl"], abs=1e-6)
    assert {turn["index"] for row in run.rows("episodes") for turn in row["turns"]} == {0}


def test_at_the_first_step_the_ratio_is_1_and_kl_costs_nothing(train, rlhf: list[str]) -> None:
    first, *_, last = train("ppo", *rlhf, *SMALL, "--warmup-steps", 0, "--policy.epochs", 1).rows()
    assert first["policy/first_mismatch"] < 1e-4
    assert first["policy/ratio"] == pytest.approx(1, abs=1e-4)
    assert first["shaped/kl"] == pytest.approx(0, abs=1e-4)
    assert first["shaped/kl_reward"] == pytest.approx(0, abs=1e-5)
    assert abs(last["shaped/kl"]) > 1e-3  # it has moved


def test_trl_names_are_logged_beside_ours(train, rlhf: list[str]) -> None:
    row = train("ppo", *rlhf, *SMALL, "--warmup-steps", 0, "--value-clip", 0.2).rows()[-1]
    expected = "objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores"
    expected += " policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg loss/policy_avg loss/value_avg"
    expected += " val/clipfrac_avg val/ratio val/num_eos_tokens episode lr"
    assert set(expected.split()) <= row.keys()
    assert (row["episode"], row["lr"], row["loss/value_avg"]) == (24, row["policy/lr"], row["value/loss"])


def test_a_run_with_everything_on_is_resumed_bit_for_bit(train, rlhf: list[str], polite: Path, killed_at) -> None:
    flags = (*rlhf, *SMALL, "--steps", 4, "--save-every", 2, "--shaping.kl-target", 0.01, "--shaping.kl-horizon", 20)
    flags += ("--shaping.normalize", "standard", "--shaping.clip", 2, "--shaping.missing-end-penalty", 0.5)
    flags += ("--shaping.whiten", "--ema-decay", 0.9, "--value-clip", 0.5, "--policy.entropy-coef", 0.01)
    flags += ("--ptx.path", polite / "texts.jsonl", "--policy.ptx-coef", 0.1, "--ptx-rows", 3)
    flags += ("--value-path", polite / "rm", "--policy.minibatches", 2, "--policy.kl-coef", 0.01)
    whole = train("ppo", *flags, name="whole")
    killed_at(3)
    train("ppo", *flags, name="killed", status=130)
    killed_at(-1)
    resumed = train("ppo", *flags, "--resume", name="killed")
    assert resumed.rows() == whole.rows()
    assert resumed.rows("episodes") == whole.rows("episodes")
    for part in ("actor", "value", "reference", "ema"):
        torch.testing.assert_close(resumed.weights(part), whole.weights(part), rtol=0, atol=0)
    coefs = [row["shaped/kl_coef"] for row in whole.rows()]
    assert coefs[0] == coefs[1] == 0.1  # the first step does not train the policy
    assert len(set(coefs[1:])) == 3
    assert all(row["policy/ptx_loss"] > 0 for row in whole.rows()[1:])


def test_the_average_is_a_model_that_loads_anywhere_between_start_and_end(train, rlhf: list[str], polite: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = train("ppo", *rlhf, *SMALL, "--steps", 2, "--warmup-steps", 0, "--ema-decay", 0.5, "--save-every", 1)
    home = run.out / "checkpoints"
    begun, once = load_file(polite / "model/model.safetensors"), load_file(home / "step_000001/actor/model.safetensors")
    for name, mean in run.weights("ema").items():
        expected = (0.5 * begun[name] + 0.5 * once[name]) * 0.5 + 0.5 * run.weights()[name]
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-7)
    folder = home / "step_000002/ema"
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], mean) for name, mean in run.weights("ema").items())
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_the_value_model_may_start_as_a_reward_model_head_included(train, rlhf: list[str], polite: Path) -> None:
    flags = (*rlhf, *SMALL, *STILL, "--value-path", polite / "rm")
    run = train("ppo", *flags)
    started = load_file(polite / "rm/model.safetensors")
    found = run.weights("value")
    assert torch.equal(found["head.weight"], started["score.weight"])
    assert found["head.bias"].item() == 0.0  # it is not moved to the mean return: it knows something already
    assert torch.equal(found["body.norm.weight"], started["model.norm.weight"])
    values = [turn["value"] for row in run.rows("episodes") for turn in row["turns"]]
    assert len(set(values)) > 1


def test_the_value_model_may_start_as_a_language_model(train, rlhf: list[str], polite: Path) -> None:
    (row,) = train("ppo", *rlhf, *SMALL, *STILL, "--lam", 1, "--value-path", polite / "model").rows()
    assert row["value/mean"] == pytest.approx(row["value/return"], rel=1e-4)


def test_a_value_model_with_other_tokens_is_refused(
    train, rlhf: list[str], untrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("ppo", *rlhf, *SMALL, "--value-path", untrained, status=2)
    assert f"value_path = {untrained}: its tokenizer is not that of the policy" in capsys.readouterr().err


def test_with_an_adapter_the_reference_is_the_model_without_it(train, rlhf: list[str], polite: Path) -> None:
    flags = (*rlhf, *SMALL, "--warmup-steps", 0, "--lora.rank", 4, "--policy.optim.lr", 1e-2, "--ema-decay", 0.5)
    run = train("ppo", *flags)
    first, *_, last = run.rows()
    assert first["shaped/kl"] == pytest.approx(0, abs=1e-4)
    assert abs(last["shaped/kl"]) > 1e-3
    newest = run.out / "checkpoints/step_000003"
    assert {path.name for path in newest.iterdir() if path.is_dir()} == {"actor", "value", "ema"}
    for part in ("actor", "ema"):
        assert (newest / part / "adapter_model.safetensors").is_file()
        assert not (newest / part / "model.safetensors").exists()


def test_an_adapter_is_resumed_bit_for_bit(train, rlhf: list[str], killed_at) -> None:
    flags = (
        *rlhf,
        *SMALL,
        "--steps",
        4,
        "--save-every",
        2,
        "--lora.rank",
        2,
        "--lora.dropout",
        0.2,
        "--ema-decay",
        0.5,
    )
    whole = train("ppo", *flags, name="whole")
    killed_at(3)
    train("ppo", *flags, name="killed", status=130)
    killed_at(-1)
    assert train("ppo", *flags, "--resume", name="killed").rows() == whole.rows()


def test_a_reward_that_goes_wrong_ends_the_run_in_one_line(
    train, rlhf: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.py").write_text("def fn(prompts, completions): return [float('nan')] * len(completions)")
    train("ppo", *rlhf[:4], "--reward", f"{tmp_path}/bad.py:fn", *SMALL, status=2)
    told = capsys.readouterr().err.strip()
    assert "bad.py:fn: gave nan on task 'train/" in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema_decay": 1.0}, r"^ema_decay = 1.0: an average moves"),
        ({"ptx": DataConfig(path=("x",))}, r"^ptx.path = \[x\]: these rows would count nothing"),
        ({"policy": PolicyConfig(ptx_coef=0.1)}, r"^policy.ptx_coef = 0.1: there is nothing to weigh"),
        ({"ptx_rows": 0}, r"^ptx_rows = 0: it counts something"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(out="x", env="x", model=ModelConfig("x"), **settings)


@pytest.mark.learning
def test_it_learns_a_rule_from_a_function_and_adaptive_kl_keeps_it_near_the_start(train, polite: Path) -> None:
    """Seed 0; the share of the letter e is 0.066 at the start. Seeds 0 to 2 end at 0.29 to 0.35 with 4 to 7 nats of
    KL, where without KL everything is e. About 10 s."""
    flags = ["--model.path", f"{polite}/model", "--data.path", f"{polite}/prompts.jsonl", "--max-turns", 1]
    flags += ["--reward", f"{polite}/rules.py:share", "--sampling.max-tokens", 8, "--episodes-per-step", 32]
    flags += ["--steps", 50, "--warmup-steps", 2, "--policy.optim.lr", 3e-3]
    near = ("--shaping.kl-coef", 0.05, "--shaping.kl-target", 6, "--shaping.kl-horizon", 100)
    free, kept = train("ppo", *flags, name="free").rows(), train("ppo", *flags, *near, name="kept").rows()
    assert free[0]["reward/share"] < 0.1
    assert ending(free, "reward/share") > 0.9
    assert ending(kept, "reward/share") > 0.2
    assert 3 < ending(kept, "shaped/kl") < 10


@pytest.mark.learning
def test_it_raises_the_score_of_a_reward_model_that_has_learned_a_rule(train, polite: Path) -> None:
    """Seed 0: from politeness pairs a reward model, from that a policy that is polite. Its share of polite answers
    rises from 0.2 to 0.81 (seed 1) to 0.98 (seed 0), the score by 2.6 (seed 2) to 3.7, at 3 to 4 nats of KL. About
    10 s."""
    rows, said = polite_pairs(polite)
    start = ("--model.path", polite / "model", "--rows-per-step", 16)
    train("sft", *start, "--data.path", said, "--epochs", 6, "--optim.lr", 1e-2, name="sft")
    four = ("--data.eval-fraction", 0.2, "--epochs", 4, "--optim.lr", 3e-3)
    judge = train("reward", *start, "--data.path", rows, *four, name="rm")
    measured = [row["eval/accuracy"] for row in judge.rows() if "eval/accuracy" in row]
    assert measured[-1] >= 0.95

    flags = ["--model.path", judge.out.parent / "sft", "--data.path", polite / "prompts.jsonl", "--max-turns", 1]
    flags += ["--reward", judge.out, polite / "rules.py:please", "--reward-weights", 1, 0, "--value-path", judge.out]
    flags += ["--sampling.max-tokens", 8, "--episodes-per-step", 32, "--steps", 25, "--warmup-steps", 2]
    flags += ["--policy.optim.lr", 3e-3, "--shaping.kl-coef", 0.05, "--shaping.kl-target", 4]
    run = train("ppo", *flags, "--shaping.kl-horizon", 200).rows()
    assert run[0]["reward/please"] < 0.35
    assert ending(run, "reward/please") > 0.7
    assert ending(run, "reward/rm") > run[0]["reward/rm"] + 2
    assert ending(run, "shaped/kl") < 8


def ending(rows: list[dict[str, float]], name: str) -> float:
    """The mean of the last five steps."""
    return sum(row[name] for row in rows[-5:]) / 5


def polite_pairs(folder: Path) -> tuple[Path, Path]:
    """Pairs of which the chosen answer says please, and answers of which one in eight does."""
    draw, words = random.Random(0), ["red", "blue", "green", "house", "tree", "dog", "cat", "yes", "no"]
    asked = [f"tell me about the {one} {other}" for one in words for other in words]

    def answer(polite: bool) -> str:
        said = draw.choices(words, k=4)
        if polite:
            said[draw.randrange(4)] = "please"
        return " ".join(said)

    pairs = [{"prompt": draw.choice(asked), "chosen": answer(True), "rejected": answer(False)} for _ in range(400)]
    said = [{"prompt": draw.choice(asked), "response": answer(number % 8 == 0)} for number in range(400)]
    for name, rows in (("pairs", pairs), ("said", said)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "pairs.jsonl", folder / "said.jsonl"
