"""Feedback for mathematics: a coach says where the mistake is, the solver tries again, and both learn from the verdict.

`python examples/math_feedback.py` makes two tiny levels for sums (arithmetic.py tells how) and trains them: four
minutes of a CPU, in which the attempts right after a remark went from 36 % in the first step to 67 % in the last (one
seed). With a model and problems of yours, both levels start as that model and math-verify is the judge:

    python examples/math_feedback.py --model Qwen/Qwen3-0.6B --problems gsm8k-train.jsonl --out runs/gsm8k
"""

import json
from pathlib import Path

import arithmetic  # its neighbour in this folder
import tyro

from echelon import cli


def main(
    out: str = "runs/arithmetic",
    model: str = "",
    problems: str = "",
    steps: int = 60,
    sums: int = 96000,
    remarks: int = 40000,
    copying_steps: int = 200,
) -> int:
    """Two levels from one model and a file of problems; or, without a model, from students who imitate."""
    common = [f"--out={out}/feedback", f"--steps={steps}"]
    if model:
        levels = [f"--{level}.model.path={model}" for level in ("solver", "coach")]
        levels += [f"--{level}.sampling.max-tokens={length}" for level, length in (("solver", 512), ("coach", 128))]
        return cli.main(["feedback", *common, *levels, f"--data.path={problems}", "--reward=math"])
    sizes = {"sums": sums, "remarks": remarks, "copying-steps": copying_steps}
    arithmetic.main(["--out", out, *(word for name, size in sizes.items() for word in (f"--{name}", str(size)))])
    levels = [f"--{level}.model.path={out}/{level}" for level in ("solver", "coach")]
    feedback = ["feedback", str(arithmetic.SETTINGS), *common, *levels, "--threads=1"]
    imitate = [["sft", f"{out}/{level}.yaml"] for level in ("solver", "coach")]
    if status := next(filter(None, map(cli.main, [*imitate, feedback])), 0):
        return status
    first, *_, last = map(json.loads, Path(f"{out}/feedback/metrics.jsonl").read_text().splitlines())
    print(f"right after a remark: {first['reward/mean']:.0%} in the first step, {last['reward/mean']:.0%} in the last")
    return 0


if __name__ == "__main__":
    raise SystemExit(tyro.cli(main))
