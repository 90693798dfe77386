"""Whole runs of `sft`, `reward`, `dpo` and `grpo` beside TRL's trainers: the same rows in the same order, or the same
answers, and 20 optimizer steps. Losses, gradient norms and final weights agree far within a thousandth.

Both sides run unmodified, ours by its command line. What differs by design is set to the same on both sides, or left
out; docs/parity.md lists it:

- AdamW: no weight decay on norms and biases in TRL, on all weights here (optim.decay). The same betas and epsilon.
- The first step of a warm-up has a learning rate of zero in TRL, one part of the peak here.
- Completion losses are means over the tokens of an optimizer step in both; TRL's `bnpo` over those of a micro-batch,
  and its SFT loss within DPO too, so neither is compared.
- TRL adds 1e-4 to the deviation that divides advantages, ours 1e-6; it weighs KL by the ratio of probabilities unless
  told otherwise; its default loss weighs tokens alike, ours episodes.
- TRL's defaults (bf16, gradient checkpointing, a linear schedule, rows cut at 1024 tokens) are switched off.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from echelon import cli
from echelon.models.lm import TINY_CHAT_TEMPLATE, load_lm, tiny
from echelon.recipes import grpo
from echelon.train.checkpoint import find_checkpoint
from echelon.train.fit import step_rows
from echelon.types import Episode
from tests.parity import trl_side
from tests.parity.trl_side import Trajectory

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed: it comes with the extra bench"),
]

STEPS, ROWS_PER_STEP, RATE, POLICY_RATE = 20, 8, 1e-3, 5e-4
APART, MOVED = 1e-4, 1e-3
"""How far losses and gradient norms may be apart at any step, relative; and final weights, relative to how far they
have come. Rounding alone is 1e-7, and what an optimizer makes of it in 20 steps 1e-5."""

WORDS = ["the", "red", "old", "small", "cat", "dog", "bird", "child", "runs", "sees", "finds", "sleeps", "today"]

WORTH = """
def letters(prompts, completions, letter):
    return [float(said.count(sought)) for said, sought in zip(completions, letter, strict=True)]
"""
"""A reward function: how often the letter that is asked for occurs in an answer."""

LONGEST = 8
"""Tokens of an answer."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One comparison: our flags, and the settings of TRL that mean the same."""

    flags: str = ""
    theirs: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    """Of the reward. At 100 the 1e-4 that TRL adds to deviations is no more than rounding."""


SFT = {
    "as it is": Case(),
    "linear decay": Case("--optim.schedule linear", {"lr_scheduler_type": "linear"}),
    "cosine, clipped at times": Case(
        "--optim.schedule cosine --optim.max-grad-norm 1.8", {"lr_scheduler_type": "cosine", "max_grad_norm": 1.8}
    ),
    "other AdamW": Case(
        "--optim.betas 0.8 0.95 --optim.eps 1e-5 --optim.weight-decay 0.3 --optim.decay matrices",
        {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "weight_decay": 0.3},
    ),
    "every token": Case("--learn everything", {"completion_only_loss": False}),
    "packed here": Case("--packing --max-tokens 64"),
}
REWARD = {
    "as it is": Case(),
    "centred": Case("--center 0.05", {"center_rewards_coefficient": 0.05}),
}
DPO = {
    "sigmoid": Case("--beta 0.3", {"beta": 0.3}),
    "ipo": Case("--loss ipo --beta 0.5", {"loss_type": ["ipo"], "beta": 0.5}),
    "hinge": Case("--loss hinge --beta 0.5", {"loss_type": ["hinge"], "beta": 0.5}),
    "per token": Case("--length-normalised --beta 2", {"loss_type": ["sigmoid_norm"], "beta": 2.0}),
}
GRPO = {
    "on-policy, GRPO": Case("--policy.epochs 1", {"loss_type": "grpo"}, weight=100),
    "on-policy, TRL's default": Case("--policy.epochs 1 --weigh tokens", {"loss_type": "dapo"}, weight=100),
    "Dr. GRPO": Case(
        "--policy.epochs 1 --weigh constant --scale none", {"loss_type": "dr_grpo", "scale_rewards": "none"}
    ),
    "two steps, clipped": Case(
        "--policy.epochs 2 --weigh tokens --scale none --policy.clip-low 0.02 --policy.clip-high 0.03",
        {"scale_rewards": "none", "iterations": 2, "epsilon": 0.02, "epsilon_high": 0.03},
    ),
    "DAPO": Case(
        "--policy.epochs 4 --weigh tokens --scale none --policy.clip-low 0.02 --policy.clip-high 0.03 --mask-cut-off",
        {
            "scale_rewards": "none",
            "iterations": 4,
            "epsilon": 0.02,
            "epsilon_high": 0.03,
            "mask_truncated_completions": True,
        },
    ),
    "KL": Case(
        "--policy.epochs 2 --scale none --policy.kl-coef 0.3",
        {"loss_type": "grpo", "scale_rewards": "none", "iterations": 2, "beta": 0.3, "use_bias_correction_kl": False},
    ),
    "GSPO": Case(
        "--policy.epochs 2 --scale none --policy.loss gspo --policy.clip-low 0.004 --policy.clip-high 0.006",
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "scale_rewards": "none",
            "iterations": 2,
            "epsilon": 0.004,
            "epsilon_high": 0.006,
        },
    ),
    "CISPO": Case(
        "--policy.epochs 2 --weigh tokens --scale none --policy.loss cispo --policy.clip-low 1 --policy.clip-high 0.02",
        {"loss_type": "cispo", "scale_rewards": "none", "iterations": 2, "epsilon_high": 1.02},
    ),
    "scaled by the batch, warmer": Case(
        "--policy.epochs 2 --weigh tokens --scale batch_std --sampling.temperature 1.3",
        {"scale_rewards": "batch", "iterations": 2, "temperature": 1.3},
        weight=100,
    ),
    "entropy": Case(
        "--policy.epochs 1 --weigh tokens --scale none --policy.entropy-coef 0.1",
        {"scale_rewards": "none", "entropy_coef": 0.1, "passes": 1},
    ),
}


SHARED = Path(__file__).parents[3] / "shared" / "data"
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"there is no folder {SHARED} with real data")


def cases(table: dict[str, Case]) -> Any:
    return pytest.mark.parametrize("case", table.values(), ids=table)


@cases(SFT)
def test_sft_takes_the_steps_of_trl(case: Case, start: Path, tmp_path: Path) -> None:
    draw = random.Random(1)
    rows = [{"prompt": sentence(draw, 2, 9), "response": sentence(draw, 1, 14)} for _ in range(STEPS * ROWS_PER_STEP)]
    follow_trl("sft", trl_side.sft, case, start, tmp_path, rows)


def test_sft_learns_every_answer_of_a_conversation_as_trl_does(start: Path, tmp_path: Path) -> None:
    draw = random.Random(2)
    rows = [{"messages": conversation(draw, draw.randint(1, 3))} for _ in range(STEPS * ROWS_PER_STEP)]
    marked = TINY_CHAT_TEMPLATE.replace(
        "{{ message['content'] }}<|end|>",
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
        "{% else %}{{ message['content'] }}<|end|>{% endif %}",
    )
    case = Case("", {"assistant_only_loss": True, "template": marked})
    follow_trl("sft", trl_side.sft, case, start, tmp_path, rows)


def test_an_adapter_goes_on_learning_as_in_trl(start: Path, tmp_path: Path) -> None:
    draw, tokenizer = random.Random(8), AutoTokenizer.from_pretrained(start)
    shape = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapter = saved((peft.get_peft_model(load_lm(str(start)), shape), tokenizer), tmp_path / "adapter")
    rows = [{"prompt": sentence(draw, 2, 9), "response": sentence(draw, 1, 14)} for _ in range(STEPS * ROWS_PER_STEP)]
    follow_trl("sft", trl_side.sft, Case(), adapter, tmp_path, rows)


def test_warming_up_begins_one_step_further_along_than_in_trl(start: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a cat", "response": "runs"}] * 8
    flags = ["--model.path", start, "--rows-per-step", 1, "--optim.lr", RATE, "--optim.warmup-steps", 4]
    rates = ours("sft", tmp_path / "ours", rows, *flags).rates
    settings = {"learning_rate": RATE, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4}
    theirs = trl_side.sft(start, tmp_path / "trl", theirs_of(rows), rows_per_pass=1, passes=1, **settings).rates
    assert theirs[:5] == pytest.approx([0, RATE / 4, RATE / 2, RATE * 3 / 4, RATE])
    assert rates[:5] == pytest.approx([RATE / 4, RATE / 2, RATE * 3 / 4, RATE, RATE])


@cases(REWARD)
def test_a_reward_model_takes_the_steps_of_trl(case: Case, judge: Path, tmp_path: Path) -> None:
    follow_trl("reward", trl_side.reward, case, judge, tmp_path, pairs(random.Random(3)))


def test_a_reward_model_reads_margins_as_trl_does(judge: Path, tmp_path: Path) -> None:
    draw = random.Random(4)
    rows = [{**row, "margin": draw.uniform(0, 3)} for row in pairs(draw)]
    follow_trl("reward", trl_side.reward, Case(), judge, tmp_path, rows)


@cases(DPO)
def test_dpo_takes_the_steps_of_trl(case: Case, start: Path, tmp_path: Path) -> None:
    follow_trl("dpo", trl_side.dpo, case, start, tmp_path, pairs(random.Random(5)))


@cases(GRPO)
def test_grpo_takes_the_steps_of_trl(case: Case, talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow_trl_with_its_answers(case, talker, tmp_path, monkeypatch)


def test_rloo_moves_the_weights_as_trl_does(talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The loss is another number with the same gradient: there, a ratio of sequences; here, log-probabilities.
    flags = "--policy.epochs 1 --policy.loss reinforce --baseline leave_one_out --scale none --weigh constant"
    flags += " --loss-length 1 --kl-in episodes --policy.kl-coef 0.05"
    case = Case(flags, {"trainer": "RLOO", "beta": 0.05})
    follow_trl_with_its_answers(case, talker, tmp_path, monkeypatch, same_loss=False)


def test_kl_as_trl_weighs_it_unless_told_otherwise_has_the_gradient_of_k2(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # There, k3 times the ratio of new to old probability: on-policy, another number with the same gradient.
    flags = "--policy.epochs 1 --weigh tokens --scale none --policy.kl-coef 0.3 --policy.kl-loss k2"
    case = Case(flags, {"scale_rewards": "none", "beta": 0.3})
    follow_trl_with_its_answers(case, talker, tmp_path, monkeypatch, same_loss=False)


@real_data
def test_sft_takes_the_steps_of_trl_on_word_problems(tmp_path: Path) -> None:
    rows = [{"prompt": row["question"], "response": row["answer"]} for row in real("gsm8k-train.jsonl")]
    start = saved(tiny([f"{row['prompt']} {row['response']}" for row in rows], hidden=64, layers=2), tmp_path / "start")
    follow_trl("sft", trl_side.sft, Case("--tokens-per-pass 2048"), start, tmp_path, rows)


@real_data
@pytest.mark.parametrize("recipe", ["reward", "dpo"])
def test_preferences_of_people_are_learned_as_trl_does(recipe: str, tmp_path: Path) -> None:
    pairs = real("pandalm-preferences.jsonl")  # an answer may be true or false
    rows = [{name: str(row[name]) for name in ("prompt", "chosen", "rejected")} for row in pairs]
    start = saved(tiny([" ".join(row.values()) for row in rows], hidden=64, layers=2), tmp_path / "start")
    start = with_a_head(start, tmp_path / "judge") if recipe == "reward" else start
    follow_trl(recipe, getattr(trl_side, recipe), Case("--tokens-per-pass 2048"), start, tmp_path, rows)


def follow_trl(
    recipe: str, theirs: Callable[..., Trajectory], case: Case, start: Path, out: Path, rows: list[Row]
) -> None:
    """Run both and compare. Micro-batches are cut differently: what is in one must not matter."""
    steps = len(rows) // ROWS_PER_STEP
    flags = f"--rows-per-step {ROWS_PER_STEP} --optim.lr {RATE} --tokens-per-pass 100"
    mine = ours(recipe, out / "ours", rows, "--model.path", start, *flags.split(), *case.flags.split())
    order = [row for step in range(steps) for row in step_rows(rows, step, ROWS_PER_STEP, seed=0)]
    settings = {"learning_rate": RATE, "lr_scheduler_type": "constant", **case.theirs}
    other = theirs(start, out / "trl", theirs_of(order), rows_per_pass=2, passes=ROWS_PER_STEP // 2, **settings)
    agree(mine, other, start)


def follow_trl_with_its_answers(
    case: Case, start: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *, same_loss: bool = True
) -> None:
    """Run ours, then TRL's with the prompts ours has drawn and the tokens it has sampled; and compare."""
    common = {"learning_rate": POLICY_RATE, "lr_scheduler_type": "constant", "max_completion_length": LONGEST}
    settings = {**common, "iterations": 1, "passes": 4, "reward_weights": [case.weight], **case.theirs}
    tasks, siblings, iterations = 4, 4, settings["iterations"]
    draw, played = random.Random(6), recorded(monkeypatch)
    rows = [{"prompt": sentence(draw, 2, 9), "letter": draw.choice("aeiou")} for _ in range(16)]
    (out / "worth.py").write_text(WORTH)
    flags = f"--steps {STEPS // iterations} --tasks-per-step {tasks} --group-size {siblings} --tokens-per-pass 100"
    flags += f" --sampling.max-tokens {LONGEST} --policy.optim.lr {POLICY_RATE} {case.flags}"
    words = ["--model.path", start, "--reward", f"{out}/worth.py:letters", "--reward-weights", case.weight]
    mine = ours("grpo", out / "ours", rows, *words, *flags.split(), prefix="policy/")

    def answers(prompts: list[list[int]], taken: int) -> list[list[int]]:
        turns = [episode.turns[0] for episode in played[taken // iterations]]
        assert prompts == [turn.prompt for turn in turns], "the prompts are not the same tokens"
        return [turn.action for turn in turns]

    def worth(completions: list[Any], letter: list[str], **_: Any) -> list[float]:
        return [float(said[0]["content"].count(sought)) for said, sought in zip(completions, letter, strict=True)]

    asked = [episode.data for episodes in played for episode in episodes[::siblings]]
    data = [{"prompt": task["messages"], "letter": task["letter"]} for task in asked]
    settings["rows_per_pass"] = tasks * siblings // settings["passes"]
    other = trl_side.grpo(start, out / "trl", data, answers=answers, worth=worth, siblings=siblings, **settings)
    agree(mine, other.every(iterations), start, same_loss=same_loss)


def agree(mine: Trajectory, other: Trajectory, start: Path, *, same_loss: bool = True) -> None:
    """The same number of steps, and the same numbers at each; `pytest -rP` shows how far they are apart."""
    loss, norm = apart(mine.losses, other.losses), apart(mine.grad_norms, other.grad_norms)
    before = weights_of(start)
    assert mine.weights.keys() == other.weights.keys() == before.keys()
    distance = sum((mine.weights[name] - weight).double().square().sum() for name, weight in other.weights.items())
    way = sum((weight - before[name]).double().square().sum() for name, weight in other.weights.items())
    moved = float((distance / way).sqrt())
    print(f"apart: loss {loss:.1e}, gradient norm {norm:.1e}, weights {moved:.1e}; the last loss is {other.losses[-1]}")
    assert mine.rates == pytest.approx(other.rates, rel=1e-6)
    assert loss < APART or not same_loss
    assert norm < APART
    assert moved < MOVED


def apart(mine: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference at a step, relative to the number there, or to a tenth of their mean if that is more."""
    assert len(mine) == len(other)
    least = max(0.01, sum(map(abs, other)) / len(other) / 10)
    return max(abs(a - b) / max(abs(b), least) for a, b in zip(mine, other, strict=True))


def ours(recipe: str, out: Path, data: Sequence[Row], *flags: object, prefix: str = "") -> Trajectory:
    """A recipe as the command line runs it, and what its run directory says."""
    file = out.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in data))
    assert cli.main([recipe, "--out", str(out), "--data.path", str(file), "--threads", "1", *map(str, flags)]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses, norms, rates = ([row[prefix + name] for row in rows] for name in ("loss", "grad_norm", "lr"))
    trained = find_checkpoint(out, role="reward" if recipe == "reward" else "actor")
    return Trajectory(losses, norms, rates, weights_of(trained))


def weights_of(folder: Path) -> dict[str, Tensor]:
    """What learns: the model of a folder, or its adapter."""
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else folder / "model.safetensors")


def theirs_of(rows: Sequence[Row]) -> list[Row]:
    """The same rows as TRL wants them: messages in place of text."""

    def messages(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    names = {"prompt": "user", "response": "assistant", "chosen": "assistant", "rejected": "assistant"}
    renamed = {"response": "completion"}
    return [
        {renamed.get(name, name): messages(names[name], said) if name in names else said for name, said in row.items()}
        for row in rows
    ]


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[list[Episode]]:
    """What our policy plays from now on, step by step."""
    played: list[list[Episode]] = []
    collect = grpo.collect

    async def collect_and_keep(*args: Any, **settings: Any) -> list[Episode]:
        played.append(await collect(*args, **settings))
        return played[-1]

    monkeypatch.setattr(grpo, "collect", collect_and_keep)
    return played


def sentence(draw: random.Random, shortest: int, longest: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(shortest, longest)))


def conversation(draw: random.Random, answers: int) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * answers
    return [{"role": role, "content": sentence(draw, 1, 8)} for role in roles]


def pairs(draw: random.Random) -> list[Row]:
    """Preferences for the longer answer, mostly."""
    return [
        {"prompt": sentence(draw, 2, 9), "chosen": sentence(draw, 4, 12), "rejected": sentence(draw, 1, 6)}
        for _ in range(STEPS * ROWS_PER_STEP)
    ]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose attention is far from uniform, so that a wrong mask or position shows in the loss."""
    draw = random.Random(0)
    module, tokenizer = tiny([sentence(draw, 5, 20) for _ in range(200)], vocab_size=320, hidden=32, layers=2, heads=2)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:
                weight.mul_(3)
    return saved((module, tokenizer), tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def judge(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a head of one number, which does not start at zero."""
    return with_a_head(start, tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def talker(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model once it has learned to answer in words, and that answers end."""
    folder: Path = tmp_path_factory.mktemp("talker")
    draw = random.Random(7)
    rows = [{"prompt": sentence(draw, 2, 9), "response": sentence(draw, 1, 6)} for _ in range(480)]
    flags = ["--model.path", start, "--rows-per-step", 8, "--optim.lr", 1e-2]
    ours("sft", folder / "run", rows, *flags)
    return find_checkpoint(folder / "run")


def saved(made: tuple[nn.Module, Any], folder: Path) -> Path:
    """A model and its tokenizer as a folder."""
    for part in made:
        part.save_pretrained(folder)
    return folder


def with_a_head(start: Path, folder: Path) -> Path:
    """The model of a folder with a new, random head for scores."""
    from transformers import AutoModelForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(start)
    torch.manual_seed(0)
    module = AutoModelForSequenceClassification.from_pretrained(
        start, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    torch.nn.init.normal_(module.score.weight, std=0.3)
    return saved((module, tokenizer), folder)


def real(name: str) -> list[Row]:
    """The first rows of a file of real data."""
    lines = (SHARED / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[: STEPS * ROWS_PER_STEP]]
