"""A language model as a controller in Gymnasium: it imitates a mediocre player, then learns from the return.

Every step is a prompt of numbers, every answer an action. `python examples/gymnasium_controller.py` took twelve minutes
of a CPU: CartPole in whole numbers from 0 to 29, for a model that begins with random weights. The player it imitates
has a mean return of 106; in 100 test episodes each it had 94 (82 to 108) after imitation and 499.9 of 500 after PPO
(one seed). Another environment needs another `env_id`, and data: of a scripted or learned expert, or of a Minari data
set (docs/data.md).
"""

import json
from pathlib import Path

import tyro
import yaml

from echelon import cli

SHAPE = Path(__file__).parents[1] / "configs/models/tiny"
"""A config.json: the shape of the model. Any causal model's folder or hub id will do, without `untrained`."""


def run(recipe: str, settings: dict[str, object], out: Path) -> None:
    """One command, with its settings in a file beside what it writes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    if status := cli.main([recipe, str(file), "--out", str(out), "--threads", "1"]):
        raise SystemExit(status)


def main(
    out: str = "runs/cartpole",
    env_id: str = "CartPole-v1",
    episodes: int = 300,
    imitate: int = 1500,
    steps: int = 30,
    tests: int = 100,
) -> None:
    """Record episodes, imitate them, learn from the return by PPO with a critic of numbers, test before and after."""
    folder, short = Path(out), {"max_tokens": 8, "max_prompt_tokens": 64}
    written = {"style": "bins", "bins": 29, "instruction": ""}
    player = {"policy": "medium", "expert_share": 0.4}
    record = {"env_id": env_id, "env_settings": written, "ranges": "data", **player, "episodes": episodes}
    run("control-data", record, folder / "data")

    imitation = {"model": {"path": str(SHAPE)}, "untrained": True, "data": {"path": [f"{out}/data/train.jsonl"]}}
    imitation |= {"max_tokens": 64, "rows_per_step": 64, "max_steps": imitate}
    run("sft", {**imitation, "optim": {"lr": 3e-3, "schedule": "cosine"}}, folder / "sft")

    settings = {"model": {"path": f"{out}/sft"}, "env": f"gymnasium:{env_id}", "sampling": short, "steps": steps}
    settings |= {"tasks_per_step": 16, "group_size": 1, "warmup_steps": min(2, steps - 1), "most_decisions": 2048}
    policy = {"optim": {"lr": 3e-4}, "epochs": 2, "minibatches": 8}
    run("control", {**settings, "env_settings": {"codec": f"{out}/data/codec.json"}, "policy": policy}, folder / "ppo")

    for name in ("sft", "ppo"):
        test = {"model": {"path": f"{out}/{name}"}, "env_id": env_id, "episodes": tests, "max_tokens": 8}
        run("evaluate", test, folder / f"test_{name}")
        print(name, json.dumps(json.loads((folder / f"test_{name}/summary.json").read_text())["estimates"]["return"]))


if __name__ == "__main__":
    tyro.cli(main)
