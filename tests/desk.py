"""What the pages leave to their reader: models, rows, files and runs, tiny, each made when a page first asks for it.

Runs are made by the commands that make such runs, with the sizes of `FEWER`.
"""

from __future__ import annotations

import io
import json
import shlex
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from echelon import cli
from echelon.envs import load_env
from echelon.envs.players import corpus
from echelon.models.lm import tiny
from echelon.recipes import quickstart
from echelon.text.dialogue import DialogueState, responder_prompt, strategist_prompt
from tests.recipes.conftest import recorded
from tests.recipes.test_settings_files import FEWER as COUNTS
from tests.recipes.test_settings_files import write_data, write_strategies

ROOT = Path(__file__).parents[1]
RECIPES = cli.recipes()
PLAYER = "--sampling.max-tokens 8"
REPLIES = "--low.policy.minibatches 1 --low.value-minibatches 1"
ALSO = {
    "archer": f"{PLAYER} --critic-episodes 2 --actor-episodes 2",
    "chat": "--max-tokens 4 --threads 1",
    "control-reward": "--width 8",
    "evaluate": "--max-tokens 8",
    "feedback": "--solver.sampling.max-tokens 8 --coach.sampling.max-tokens 8",
    "grpo": PLAYER,
    "ppo": PLAYER,
    "quickstart": "--games 32 --copying-steps 2 --steps 2 --episodes-per-step 4 --eval-episodes 2 --hidden 32",
    "rank": f"{PLAYER} --ranker-updates 1 --ranker-batch 4",
    "responder": f"{PLAYER} {REPLIES}",
    "tosca": f"{PLAYER} {REPLIES}",
}
FEWER = {name.replace("_", "-"): words for name, words in COUNTS.items()}
FEWER = {name: [*FEWER.get(name, []), *ALSO.get(name, "").split()] for name in {*FEWER, *ALSO}}
"""Recipe → flags that make a run of it a matter of a second."""

MODELS = (
    *("DIR", "base", "models/base", "runs/tiny", "runs/twenty_questions/untrained", "runs/twenty_questions/sft"),
    *("runs/best_language/sft", "runs/text_lock/sft", "runs/cartpole/medium", "runs/dialogue/sft"),
    *("openai-community/gpt2", "meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
    *("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B"),
)
"""Folders with the tiny model in them; what is a hub id to others is a folder here."""
GAME = "--env twenty_questions --env-settings subset=true"
START = "--model.path models/base"
RUNS: dict[str, str] = {
    "runs/sft": f"echelon sft {START} --data.path chats.jsonl --data.eval-fraction 0.2 --eval-every 1",
    "runs/sft_lora": f"echelon sft {START} --data.path chats.jsonl --lora.rank 4",
    "runs/reward": f"echelon reward {START} --data.path data/preferences.jsonl",
    "runs/grpo": f"echelon grpo {START} {GAME}",
    "sweep/maze": f"echelon grpo {START} --env maze",
    "runs/archer": f"echelon archer {START} {GAME}",
    "runs/seed_0": f"echelon archer {START} {GAME}",
    "runs/seed_1": f"echelon archer {START} {GAME} --seed 1",
    "runs/rank": f"echelon rank {START} {GAME} --candidates 2",
    "runs/strategist": f"echelon strategist {START} --data.path data/ESConv.json --reward imitation",
    "runs/tosca": "echelon tosca --env dialogue --responder.path models/base",
    "runs/feedback": "echelon feedback --env arithmetic --solver.model.path models/base",
    "runs/control": f"echelon control {START} --env gymnasium:CartPole-v1",
    "runs/quickstart": "echelon quickstart",
    "data/cartpole_expert": "echelon control-data configs/control_data/cartpole_expert.yaml",
    "data/pendulum": "echelon control-data --env-id Pendulum-v1",
    "data/cartpole_medium": "echelon control-data configs/control_data/cartpole_medium.yaml",
}
"""Runs, and data that a command makes: by which; `--out` is the name."""


def rows(*cells: object) -> str:
    return "".join(json.dumps(cell) + "\n" for cell in cells)


SUMS = [(f"What is {left} + {right}?", str(left + right)) for left in range(6) for right in range(4)]
CHATS = rows(*({"prompt": asked, "response": answer} for asked, answer in SUMS))
PAIRS = rows(*({"prompt": asked, "chosen": answer, "rejected": f"{answer}0"} for asked, answer in SUMS))
TURNS = [
    {"current_prompt": f"It rains, {day}.", "strategy": name, "reward": 1.0}
    for day in range(12)
    for name in ("inform", "question", "directive", "commissive")
]
DECISIONS = [{"query": f"It rains, {day}.", "strategy": "Question", "reward": 3, "done": True} for day in range(24)]
PYTHON = "def score_fn(text, answer):\n    return answer in text\n"
TASKS = {"items": [{"prompt": "Name a language.", "answer": "Rust"}], "done_fn": "contains:.", "split_fn": "newline"}
FILES = {
    "chats.jsonl": CHATS,
    "mathematics.jsonl": CHATS,
    "replies.jsonl": CHATS,
    "rows.jsonl": CHATS,
    "prompts.jsonl": rows(*({"prompt": asked, "answer": answer, "limit": 6} for asked, answer in SUMS)),
    "problems.jsonl": rows(*({"problem": asked, "answer": answer} for asked, answer in SUMS)),
    "programs.jsonl": rows({"text": "Add two numbers.", "test_list": ["assert add(1, 2) == 3"], "task_id": 1}),
    "gsm8k-train.jsonl": rows(*({"question": asked, "answer": f"It is {n}.\n#### {n}"} for asked, n in SUMS)),
    "pandalm-preferences.jsonl": PAIRS,
    "HuggingFaceH4/ultrafeedback_binarized/train_prefs.jsonl": PAIRS,
    "HuggingFaceH4/ultrafeedback_binarized/test_prefs.jsonl": PAIRS.replace("What is", "Say what is"),
    "turns.jsonl": rows(*TURNS),
    "transitions.jsonl": rows(*DECISIONS),
    "rewards.py": "def correct(completions, answer):\n    return [float(a in c) for a, c in zip(answer, completions)]",
    "file.py": "def short(completions):\n    return [float(len(text) < 9) for text in completions]\n\npolite = short\n",
    "tasks.yaml": yaml.safe_dump({**TASKS, "score_fn": PYTHON}),
    "questions.txt": "What is 1 + 2?\nAnd now?\n",
}
"""Files that a reader writes or has."""


class Here:
    """A stage of the quickstart, which runs in this process when it is started."""

    def __init__(self, command: list[str], stdout: Any, **_: object) -> None:
        words = command[command.index("echelon") + 1 :]
        said = io.StringIO()
        with redirect_stdout(said):
            self.status = cli.main(words)
        stdout.write(said.getvalue().encode())

    def poll(self) -> int:
        return self.status


def fewer(words: list[str]) -> list[str]:
    """The words of a command of echelon with the flags behind them that make it small."""
    recipe = next((word for word in words if word in RECIPES), "")
    return [*words, *FEWER.get(recipe, []), *(["--steps", "2"] if "--resume" in words else [])]


def laid_out(shelf: Path) -> None:
    """Everything that takes no run: a model and rows."""
    for name in ("configs", "examples"):
        (shelf / name).symlink_to(ROOT / name)
    game, menu = load_env("twenty_questions", {"subset": True}), load_env("dialogue").cls.inventory()
    state = DialogueState("I lost my job.", (("User", "Hello."), ("Assistant", "How are you?")), "sad", "work")
    prompts = [*strategist_prompt(state, menu), *responder_prompt(state, menu.label(0))]
    texts = [*corpus(game), *(asked for asked, _ in SUMS), *(message["content"] for message in prompts)]
    for part in tiny(texts, vocab_size=400, hidden=64, layers=1, heads=2, max_positions=4096):
        part.save_pretrained(shelf / "models/base")
    write_data(shelf / "data", [asked for asked, _ in SUMS])
    (shelf / "runs/dialogue").mkdir(parents=True)
    write_strategies(shelf / "data")
    recorded(game, ("random",), 12, shelf / "data/twenty_questions.jsonl")
    for name, text in FILES.items():
        (shelf / name).parent.mkdir(parents=True, exist_ok=True)
        (shelf / name).write_text(text)


def lender(shelf: Path) -> Callable[[str, Path], None]:
    """Puts what has this name on a desk; `runs/a=runs/b` puts b there under the name a."""
    laid_out(shelf)

    def lend(name: str, desk: Path) -> None:
        there, _, kind = name.partition("=")
        source = shelf / (kind or there)
        if (kind or there) in MODELS:
            source = shelf / "models/base"
        elif not source.exists():
            make(shelf, kind or there)
        (desk / there).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, desk / there, dirs_exist_ok=True)
        else:
            shutil.copy(source, desk / there)

    return lend


def stages_here(patch: pytest.MonkeyPatch) -> None:
    """Have the quickstart run its stages in this process, which has everything imported, and fewer updates in them."""
    patch.setattr(quickstart, "subprocess", SimpleNamespace(Popen=Here, STDOUT=0, DEVNULL=0))
    patch.setattr(quickstart, "POLL_SECONDS", 0.0)
    patch.setattr(quickstart, "GROUPS", 8)
    few_updates(patch)


def few_updates(patch: pytest.MonkeyPatch) -> None:
    """Have the stages of the quickstart learn for a moment."""
    patch.setitem(quickstart.GRPO["policy"], "epochs", 1)
    for name in ("critic_updates", "critic_episodes", "actor_episodes"):
        patch.setitem(quickstart.ARCHER, name, 2)


def make(shelf: Path, name: str) -> None:
    """Make a run as its command does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shelf)
        stages_here(patch)
        assert cli.main(fewer([*shlex.split(RUNS[name])[1:], "--out", name])) == 0, name
