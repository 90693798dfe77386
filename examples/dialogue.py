"""What the strategy level starts from, made in a minute: a tiny model, replies to imitate, and decisions to learn from.

python examples/dialogue.py --out runs/dialogue
echelon sft --model.path runs/dialogue/tiny --data.path runs/dialogue/replies.jsonl --out runs/dialogue/sft \\
    --epochs 4 --optim.lr 3e-3 --optim.warmup-steps 20 --optim.schedule cosine

The replies follow a strategy only partly, and name what the user talks of only partly: a responder that imitates
them has a good deal left to learn.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from echelon.envs import EnvSpec, load_env
from echelon.envs.dialogue import Dialogue, best
from echelon.envs.dialogue_words import say
from echelon.envs.players import corpus
from echelon.models.lm import count_parameters, tiny
from echelon.rollout.setup import set_threads
from echelon.seeds import derive_seed
from echelon.text.dialogue import DialogueState, Inventory, responder_prompt, strategist_prompt
from echelon.train.copying import learn_to_copy
from echelon.train.learner import save_module
from echelon.types import Step


def main(argv: list[str] | None = None) -> None:
    """Write `tiny/`, `replies.jsonl` and `transitions.jsonl`."""
    args = arguments().parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    set_threads(args.threads)
    spec = load_env("dialogue", {"strategies": args.strategies})
    inventory: Inventory = Dialogue.inventory(**spec.settings)
    told = list(dialogues(spec, inventory, args))
    replies = [row for number, turn in enumerate(told) for row in replies_to(turn, inventory, alone=number % 4 == 3)]
    write(out / "replies.jsonl", replies)
    write(out / "transitions.jsonl", [transition(turn) for turn in told])
    texts = corpus(spec, split="train") + [message["content"] for row in replies for message in row["messages"]]
    texts += [strategist_prompt(turn["state"], inventory)[0]["content"] for turn in told]
    module, tokenizer = tiny(
        texts, vocab_size=512, hidden=args.hidden, layers=args.layers, heads=args.hidden // 32, seed=args.seed
    )
    learn_to_copy(module, tokenizer, steps=args.copying_steps, seed=args.seed)
    save_module(module, out / "tiny", tokenizer)
    print(
        f"{out}: a model of {count_parameters(module):,} parameters, {len(replies):,} replies, {len(told):,} decisions"
    )


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/dialogue", help="folder to write to")
    parser.add_argument("--strategies", default="esconv", help="esconv (eight) or small (five)")
    parser.add_argument("--dialogues", type=int, default=1200, help="dialogues to record")
    parser.add_argument("--guided", type=float, default=0.25, help="how often the best strategy is taken, not any")
    parser.add_argument("--follows", type=float, default=0.7, help="how often a reply carries out its strategy")
    parser.add_argument("--sensitive", type=float, default=0.65, help="how often it names the topic or the feeling")
    parser.add_argument("--hidden", type=int, default=96, help="width of the model, a multiple of 32")
    parser.add_argument("--layers", type=int, default=2, help="its depth")
    parser.add_argument("--copying-steps", type=int, default=300, help="steps of learning to repeat random tokens")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def dialogues(spec: EnvSpec, inventory: Inventory, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Decision by decision: the state, the strategy, the scripted reply to it, and what came of that."""
    tasks, plan = spec.tasks("train"), best(inventory.strategies)
    for number in range(args.dialogues):
        draw = random.Random(derive_seed(args.seed, "dialogue", number))
        env = Dialogue(tasks[number % len(tasks)], **spec.settings)
        turns, ended = 0, False
        while not ended:
            state, strategy = env.state, draw.choice(inventory.strategies)
            if draw.random() < args.guided:
                strategy = plan.move((env.hidden,))[2]
            reply = say(strategy, state, draw, follows=args.follows, sensitive=args.sensitive)
            step = env.step(reply)
            assert isinstance(step, Step)
            ended = step.terminated
            yield {
                "id": f"{number}/{turns}",
                "dialogue_id": str(number),
                "state": state,
                "strategy": strategy,
                "reply": reply,
                "reward": step.reward,
                "next_state": None if ended else env.state,
            }
            turns += 1


def replies_to(turn: dict[str, Any], inventory: Inventory, *, alone: bool) -> list[dict[str, Any]]:
    """A reply as an example to imitate; `alone` adds it for a responder that is told no strategy."""
    labels = [inventory.label(inventory.strategies.index(turn["strategy"])), *([None] if alone else [])]
    answer = {"role": "assistant", "content": turn["reply"]}
    return [{"messages": [*responder_prompt(turn["state"], label), answer]} for label in labels]


def transition(turn: dict[str, Any]) -> dict[str, Any]:
    """A decision in the columns that `echelon strategist` reads."""
    following = turn["next_state"]
    return {
        **turn,
        "state": columns(turn["state"]),
        "next_state": None if following is None else columns(following),
        "terminated": following is None,
        "truncated": False,
    }


def columns(state: DialogueState) -> dict[str, Any]:
    """A state as an object of JSON."""
    history = [{"speaker": speaker, "text": text} for speaker, text in state.history]
    return {
        "emotion": state.emotion,
        "description": state.description,
        "history": history,
        "query": state.query,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
