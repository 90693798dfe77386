"""What the feedback level starts from, made in seconds: a tiny model, and texts for a solver and a coach to imitate.

python examples/arithmetic.py --out runs/arithmetic
echelon sft runs/arithmetic/solver.yaml
echelon sft runs/arithmetic/coach.yaml
echelon feedback configs/feedback/arithmetic.yaml

What there is to know about sums is divided. The solver imitates a student who adds the digits of each place and carries
where told to, mostly; told nothing, the student carries here and there by chance. The coach imitates somebody who sees
where carries belong, and is wrong about each place now and then. So first attempts are rarely right, remarks about
every other time, and nobody has ever seen a verdict.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from echelon.config import loading
from echelon.envs.arithmetic import PLACES, carried, column_sum, question, spell
from echelon.models.lm import count_parameters, tiny
from echelon.recipes import feedback
from echelon.rollout.setup import set_threads
from echelon.train.copying import learn_to_copy
from echelon.train.learner import save_module

SETTINGS = Path(__file__).parents[1] / "configs/feedback/arithmetic.yaml"
WARM: dict[str, Any] = {"max_tokens": 64, "save_every": 0}
LEVELS: dict[str, dict[str, Any]] = {
    "solver": {"epochs": 1, "rows_per_step": 128, "optim": {"lr": 5e-3, "betas": [0.9, 0.95]}},
    "coach": {"epochs": 2, "rows_per_step": 32, "optim": {"lr": 3e-3, "betas": [0.9, 0.95]}},
}
"""How both levels imitate, and each of them."""


def main(argv: list[str] | None = None) -> None:
    """Write `tiny/`, and of each level the texts and the settings it imitates them with."""
    args = arguments().parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    set_threads(args.threads)
    cfg = loading.load(feedback.Config, [args.settings], [])
    draw = random.Random(args.seed)
    solver = [row for _ in range(args.sums) for row in student_says(cfg, draw, args)]
    coach = [coach_says(cfg, draw, args) for _ in range(args.remarks)]
    for level, rows in (("solver", solver), ("coach", coach)):
        write(out / f"{level}.jsonl", rows)
        settings = {**WARM, **LEVELS[level], "out": str(out / level), "threads": args.threads, "seed": args.seed}
        settings["optim"] = {**LEVELS[level]["optim"], "warmup_steps": 30, "schedule": "cosine"}
        settings |= {"model": {"path": str(out / "tiny")}, "data": {"path": [str(out / f"{level}.jsonl")]}}
        (out / f"{level}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    texts = [message["content"] for row in [*solver[:2000], *coach[:2000]] for message in row["messages"]]
    module, tokenizer = tiny(
        texts, vocab_size=512, hidden=args.hidden, layers=args.layers, heads=args.hidden // 32, seed=args.seed
    )
    learn_to_copy(module, tokenizer, steps=args.copying_steps, seed=args.seed)
    save_module(module, out / "tiny", tokenizer)
    print(f"{out}: a model of {count_parameters(module):,} parameters, {len(solver):,} answers, {len(coach):,} remarks")


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/arithmetic", help="folder to write to")
    parser.add_argument("--settings", default=str(SETTINGS), help="whose templates and digits the texts have")
    parser.add_argument("--sums", type=int, default=96000, help="sums the student does, each told something or not")
    parser.add_argument("--remarks", type=int, default=40000, help="remarks of the coach")
    parser.add_argument("--guess", type=float, default=0.15, help="how often a place gets a carry that nobody named")
    parser.add_argument("--knows", type=float, default=0.0, help="how often a carry is made unasked where one belongs")
    parser.add_argument("--obeys", type=float, default=0.9, help="how often the student carries exactly as told")
    parser.add_argument("--wrong", type=float, default=0.1, help="how often the coach is wrong about a place")
    parser.add_argument("--hidden", type=int, default=64, help="width of the model, a multiple of 32")
    parser.add_argument("--layers", type=int, default=2, help="its depth")
    parser.add_argument("--copying-steps", type=int, default=200, help="steps of learning to repeat random tokens")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def student_says(cfg: feedback.Config, draw: random.Random, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A sum as the student does it at first; told to try again; or told where to carry."""
    one, other, digits, base = a_sum(cfg, draw)
    asked = question(one, other, digits, True, base)

    def added(carries: Collection[int]) -> str:
        return spell(column_sum(one, other, digits, carries, base), digits + 1, True, base)

    def unasked() -> str:
        belongs = carried(one, other, digits, base)
        often = {place: args.knows if place in belongs and args.knows else args.guess for place in range(1, digits + 1)}
        return added([place for place, chance in often.items() if draw.random() < chance])

    first = unasked()
    kind = draw.random()
    if kind < 0.3:
        yield row(cfg.templates.solve.format(question=asked), first)
    elif kind < 0.5:
        yield row(cfg.templates.retry.format(question=asked, attempt=first), unasked())
    else:
        told = [place for place in range(1, digits + 1) if draw.random() < 0.5]
        answer = added(told) if draw.random() < args.obeys else unasked()
        yield row(cfg.templates.refine.format(question=asked, attempt=first, feedback=remark(told)), answer)


def coach_says(cfg: feedback.Config, draw: random.Random, args: argparse.Namespace) -> dict[str, Any]:
    """What the coach says about an attempt: where carries belong, but for some places."""
    one, other, digits, base = a_sum(cfg, draw)
    belongs = carried(one, other, digits, base)
    guessed = [p for p in range(1, digits + 1) if draw.random() < args.guess]
    attempt = spell(column_sum(one, other, digits, guessed, base), digits + 1, True, base)
    named = [p for p in range(1, digits + 1) if (p in belongs) != (draw.random() < args.wrong)]
    prompt = cfg.templates.feedback.format(question=question(one, other, digits, True, base), attempt=attempt)
    return row(prompt, remark(named))


def a_sum(cfg: feedback.Config, draw: random.Random) -> tuple[int, int, int, int]:
    """Two numbers, how many digits they have, and their base. Sums of training are among them: no text says what is
    right."""
    digits, base = int(cfg.env_settings.get("digits", 3)), int(cfg.env_settings.get("base", 10))
    return draw.randrange(base**digits), draw.randrange(base**digits), digits, base


def remark(places: Collection[int]) -> str:
    """Where to carry, in words."""
    return " ".join(["carry", *([PLACES[place] for place in sorted(places)] or ["nothing"])])


def row(prompt: str, answer: str) -> dict[str, Any]:
    """A conversation to imitate."""
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """One row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
