"""Short curves of every recipe, from fixed seeds on a tiny model: what a change that is no change of math reproduces.

    python tests/golden/regenerate.py            # writes a JSON file per recipe beside this one
    python tests/golden/regenerate.py ppo grpo   # of these recipes

Only this script writes those files. When they change, the change is of math: show the old curves beside the new ones.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from echelon import cli
from echelon.models.lm import tiny

HERE = Path(__file__).parent
WORDS = ["the", "red", "old", "small", "cat", "dog", "bird", "child", "runs", "sees", "finds", "sleeps", "today"]

Curves = dict[str, list[float]]


@dataclass(frozen=True)
class Golden:
    """A run: its flags (FOLDER stands for where data and model lie) and which of its metrics are kept."""

    flags: str
    metrics: Sequence[str]


STAGE = "--rows-per-step 8 --tokens-per-pass 128 --data.eval-fraction 0.2 --eval-every 4 --max-steps 8"
SAYS = "--sampling.max-tokens 6 --sampling.stop e --tokens-per-pass 256"
PLAYS = f"--env {HERE}/letters.py:Letters --max-turns 2 {SAYS}"
POLICY = ("policy/loss", "policy/grad_norm", "policy/entropy", "policy/advantage_std")

RUNS = {
    "sft": Golden(
        f"{STAGE} --data.path FOLDER/answers.jsonl --optim.lr 3e-3 --optim.schedule cosine --optim.warmup-steps 2",
        ("loss", "grad_norm", "lr", "eval/loss"),
    ),
    "reward": Golden(
        f"{STAGE} --data.path FOLDER/pairs.jsonl --optim.lr 1e-3 --center 0.01",
        ("loss", "grad_norm", "accuracy", "reward/chosen", "reward/rejected", "eval/loss", "eval/margin"),
    ),
    "dpo": Golden(
        f"{STAGE} --data.path FOLDER/pairs.jsonl --optim.lr 1e-3 --label-smoothing 0.1",
        ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "eval/loss", "eval/rewards/margin"),
    ),
    "ppo": Golden(
        f"{SAYS} --data.path FOLDER/prompts.jsonl --reward {HERE}/letters.py:use_of_letter --max-turns 1 --steps 8 "
        "--episodes-per-step 16 --warmup-steps 2 --shaping.kl-coef 0.05 --policy.optim.lr 1e-3 --policy.epochs 2 "
        "--policy.clip-low 0.03 --policy.clip-high 0.05",
        ("reward/mean", "shaped/return", "value/loss", "value/mean", *POLICY, "policy/clipped", "policy/kl"),
    ),
    "grpo": Golden(
        f"{PLAYS} --steps 8 --tasks-per-step 4 --group-size 4 --policy.epochs 2 --policy.kl-coef 0.1 "
        "--policy.optim.lr 1e-3 --policy.clip-low 0.03 --policy.clip-high 0.05",
        ("reward/mean", "turn/tokens", *POLICY, "policy/clipped", "policy/kl_to_start"),
    ),
    "archer": Golden(
        f"{PLAYS} --steps 8 --episodes-per-step 8 --warmup-steps 2 --critic-updates 4 --fresh-updates 2 "
        "--critic-episodes 4 --actor-episodes 8 --critic-optim.lr 3e-3 --policy.optim.lr 1e-3",
        ("reward/mean", "critic/q_loss", "critic/v_loss", "critic/grad_norm", *POLICY),
    ),
    "rank": Golden(
        f"{PLAYS} --steps 8 --episodes-per-step 8 --candidates 4 --warmup-steps 2 --ranker-updates 4 --ranker-batch 8 "
        "--target-every 6 --ranker-optim.lr 3e-3 --policy.optim.lr 1e-3 --policy.kl-coef 0.1",
        ("reward/mean", "candidates/explored", "candidates/spread", "ranker/loss", "ranker/q_mean", *POLICY),
    ),
}


def curves(recipe: str, folder: Path) -> Curves:
    """What a run of the recipe logs, step by step; what is measured at some steps only is shorter."""
    prepare(folder)
    run, out = RUNS[recipe], folder / "run"
    words = run.flags.replace("FOLDER", str(folder)).split()
    assert cli.main([recipe, "--model.path", str(folder / "model"), "--out", str(out), "--threads", "1", *words]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {name: [row[name] for row in rows if name in row] for name in run.metrics}


def prepare(folder: Path) -> None:
    """A model with random weights, and data to learn from."""
    draw = random.Random(0)

    def say(shortest: int, longest: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(shortest, longest)))

    module, tokenizer = tiny([say(5, 20) for _ in range(200)], vocab_size=320, hidden=32, layers=2, heads=2)
    for part in (module, tokenizer):
        part.save_pretrained(folder / "model")  # type: ignore[operator, union-attr]
    write(folder / "answers.jsonl", [{"prompt": say(2, 9), "response": say(1, 9)} for _ in range(64)])
    pairs = [{"prompt": say(2, 9), "chosen": say(3, 9), "rejected": say(1, 5)} for _ in range(64)]
    write(folder / "pairs.jsonl", pairs)
    write(folder / "prompts.jsonl", [{"prompt": say(2, 9), "letter": draw.choice("aiou")} for _ in range(32)])


def write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def file_of(recipe: str) -> Path:
    """Where its curves are kept."""
    return HERE / f"{recipe}.json"


def main(recipes: Sequence[str]) -> None:
    """Run the recipes and write their curves."""
    torch.set_num_threads(1)
    for recipe in recipes or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            found = curves(recipe, Path(folder))
        lines = [f"  {json.dumps(name)}: {json.dumps([float(f'{x:.7g}') for x in xs])}" for name, xs in found.items()]
        file_of(recipe).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
