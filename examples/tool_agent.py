"""An agent that uses a tool: it looks a price up before it says it. Try it: `python examples/tool_agent.py`.

With a model of yours: echelon grpo --env examples/tool_agent.py:Shop --model.path ... --out runs/shop
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import tyro

from echelon import cli
from echelon.envs import load_env
from echelon.envs.players import Player, corpus, make_player, play
from echelon.models.lm import tiny
from echelon.train.copying import learn_to_copy
from echelon.train.learner import save_module
from echelon.types import Message, Step, Task

THINGS = ("apple", "pear", "plum", "bread", "milk", "tea")


class Shop:
    """Say what a thing costs: 1 for the right price. `look <thing>` is the tool; any other text is the answer."""

    def __init__(self, task: Task) -> None:
        self.thing, self.prices, self.turns = task.data["thing"], task.data["prices"], 0

    @classmethod
    def tasks(cls, split: str) -> list[Task]:
        draws = [(f"{split}/{number}", random.Random(f"{split}/{number}")) for number in range(64)]
        prices = {name: {thing: draw.randint(1, 9) for thing in THINGS} for name, draw in draws}
        return [Task(id=name, data={"thing": draw.choice(THINGS), "prices": prices[name]}) for name, draw in draws]

    def start(self) -> list[Message]:
        return [Message(role="user", content=f"Price of {self.thing}?")]

    def step(self, action: str) -> Step:
        self.turns += 1
        verb, _, thing = action.strip().partition(" ")
        if verb == "look" and self.turns < 4:  # the tool: what it answers is the next message
            answer = f"{thing} costs {self.prices[thing]}" if thing in self.prices else "no such thing"
            return Step([Message(role="user", content=answer)])
        return Step(reward=float(verb == str(self.prices[self.thing])), terminated=True)

    @classmethod
    def utterances(cls) -> list[str]:
        return [*(f"look {thing}" for thing in THINGS), *map(str, range(1, 10))]

    @classmethod
    def player(cls, kind: str, seed: int = 0) -> Player:
        def say(messages: Sequence[Message]) -> str:
            draw, last = random.Random(f"{seed}/{len(messages)}"), messages[-1]["content"]
            if kind != "optimal":
                return draw.choice(cls.utterances())
            return last.split()[-1] if " costs " in last else f"look {last.split()[-1].strip('?')}"

        return say


def main(out: str = "runs/tool_agent", games: int = 2000, copying_steps: int = 400, steps: int = 60) -> int:
    """Make a tiny model, show it games of which half are played well, then let it learn from the reward."""
    spec, folder = load_env(f"{__file__}:Shop"), Path(out)
    module, tokenizer = tiny(corpus(spec), vocab_size=320, hidden=64, layers=2, heads=2)
    learn_to_copy(module, tokenizer, steps=copying_steps, seed=0)
    save_module(module, folder / "tiny", tokenizer)
    tasks, kinds = spec.tasks("train"), ("random", "optimal")
    shown = [play(spec, tasks[n % len(tasks)], make_player(spec, kinds[n % 2], seed=n)).messages for n in range(games)]
    (folder / "games.jsonl").write_text("".join(json.dumps({"messages": game}) + "\n" for game in shown))
    words = ["--threads=1", f"--out={out}/sft", f"--model.path={out}/tiny", f"--data.path={out}/games.jsonl"]
    words += ["--epochs=3", "--optim.lr=5e-3", "--optim.schedule=cosine", "--optim.warmup-steps=20"]
    learns = ["--threads=1", f"--out={out}/grpo", f"--model.path={out}/sft", f"--env={spec.name}", f"--steps={steps}"]
    learns += ["--sampling.max-tokens=8", "--policy.optim.lr=3e-4"]
    return cli.main(["sft", *words]) or cli.main(["grpo", *learns])


if __name__ == "__main__":
    raise SystemExit(tyro.cli(main))
