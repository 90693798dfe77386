"""Every settings file in configs/ runs as it stands, on a tiny model with few rows: only the counts are cut."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from echelon import cli
from echelon.envs import load_env
from echelon.envs.players import corpus
from echelon.models.lm import tiny
from echelon.train.checkpoint import find_checkpoint
from tests.recipes.conftest import recorded
from tests.recipes.strategies import SAYS, lines, write_decisions, write_esconv
from tests.view.browser import USE, Elsewhere, Tab

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*/*.yaml"))
NAMES = [str(file.relative_to(ROOT / "configs")) for file in FILES]

PLAYS = ["--steps", "1", "--max-turns", "3", "--threads", "1"]
STAGE = ["--max-steps", "2", "--rows-per-step", "4", "--threads", "1"]
FEWER = {
    "control": [
        *(*PLAYS, "--tasks-per-step", "2", "--group-size", "2", "--warmup-steps", "0"),
        *("--sampling.max-prompt-tokens", "512"),
    ],
    "control_data": ["--episodes", "4"],
    "control_mlp": [
        *("--steps", "2", "--envs", "2", "--rollout", "16", "--groups", "1", "--group-size", "2"),
        *("--horizon", "16", "--eval-episodes", "2", "--threads", "1"),
    ],
    "control_reward": ["--max-steps", "2", "--rows-per-step", "32", "--threads", "1"],
    "archer": [*PLAYS, "--episodes-per-step", "4", "--warmup-steps", "0", "--critic-updates", "1"],
    "dpo": STAGE,
    "feedback": ["--steps", "3", "--tasks-per-step", "2", "--save-every", "0", "--threads", "1"],
    "evaluate": ["--episodes", "4", "--max-turns", "3", "--threads", "1"],
    "grpo": [*PLAYS, "--tasks-per-step", "2", "--group-size", "4"],
    "merge": [],
    "ppo": [*PLAYS, "--episodes-per-step", "4", "--warmup-steps", "0", "--value-epochs", "1"],
    "rank": [*PLAYS, "--episodes-per-step", "2", "--warmup-steps", "0"],
    "responder": [*PLAYS, "--episodes-per-step", "4", "--eval-every", "0", "--low.warmup-steps", "0"],
    "reward": STAGE,
    "sft": STAGE,
    "strategist": STAGE,
    "tosca": [*PLAYS, "--episodes-per-step", "4", "--high-updates", "1", "--high-batch", "4", "--eval-every", "0"],
}
"""What is cut, by recipe."""
WRITTEN = {"cartpole_bins": ["style=bins", "bins=29", "instruction="]}
"""Settings of environments that a flag would replace."""
TINY_LEVELS = [
    *("--solver.model.path", "models/base", "--solver.model.dtype", "float32", "--solver.sampling.max-tokens", "8"),
    *("--coach.model.dtype", "float32", "--coach.sampling.max-tokens", "8"),
]
ALSO = {
    "archer/paper.yaml": ["--critic-body", "own", "--critic-path", "models/base"],
    "grpo/control_zero3.yaml": ["--sampling.max-prompt-tokens", "2048", "--data.limit", "20"],
    "grpo/control.yaml": ["--sampling.max-prompt-tokens", "2048", "--data.limit", "20"],
    "sft/control.yaml": ["--max-tokens", "2048", "--data.limit", "20", "--data.eval-limit", "4"],
    "grpo/dapo.yaml": ["--replacements", "0"],
    "ppo/math.yaml": ["--sampling.max-tokens", "8"],
    "ppo/rlhf.yaml": ["--sampling.max-tokens", "8"],
    **{
        f"strategist/{name}.yaml": ["--model.path", "models/base", "--model.dtype", "float32"]
        for name in ("esconv", "daily_dialog", "imitation")
    },
    **{
        f"responder/{name}.yaml": ["--sampling.max-tokens", "8", "--model.dtype", "float32"]
        for name in ("esconv", "paper")
    },
    "rank/recurve.yaml": ["--sampling.max-tokens", "8", "--model.path", "models/base"],
    **{name: TINY_LEVELS for name in NAMES if name.startswith("feedback/") and name != "feedback/arithmetic.yaml"},
    "tosca/paper.yaml": [
        *("--strategist.path", "models/base", "--responder.path", "models/base", "--sampling.max-tokens", "8"),
        *("--strategist.dtype", "float32", "--responder.dtype", "float32"),
    ],
}
"""What is cut in one of them: a random model has no groups that differ, and talks to the end; and no hub is asked."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with everything the files name: data laid out as documented, models, runs."""
    folder = tmp_path_factory.mktemp("work")
    env = load_env("twenty_questions", {"subset": True})
    questions = [f"What is {left} + {right}?" for left in range(6) for right in range(4)]
    module, tokenizer = tiny([*corpus(env), *questions], vocab_size=400, hidden=32, layers=1, heads=2)
    for place in ("runs/tiny", "runs/sft", "runs/twenty_questions/untrained", "runs/twenty_questions/sft"):
        module.save_pretrained(folder / place)
        tokenizer.save_pretrained(folder / place)
    also = (
        "models/base",
        "runs/quickstart/warm",
        "runs/quickstart/tiny",
        "runs/best_language/sft",
        "runs/text_lock/sft",
        "runs/cartpole/sft",
        "runs/cartpole/medium",
        "runs/mountain_car/medium",
        "runs/pendulum/medium",
        "runs/dialogue/sft",
        "runs/arithmetic/solver",
        "runs/arithmetic/coach",
        "runs/dialogue/strategist",
    )
    for place in also:
        shutil.copytree(folder / "runs/tiny", folder / place)
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copytree(ROOT / "configs/models", folder / "configs/models")
    write_data(folder / "data", questions)
    write_strategies(folder / "data")
    recorded(env, ("random",), 12, folder / "data/twenty_questions.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("reward", ROOT / "configs/reward/tiny.yaml", "runs/reward")
        recorded_as = {"cartpole_expert": "cartpole_expert", "cartpole_medium": "cartpole_medium"}
        for name, place in (recorded_as | {"cartpole_bins": "cartpole/expert"}).items():
            words = ["control-data", str(ROOT / f"configs/control_data/{name}.yaml"), "--out", f"data/{place}"]
            assert cli.main([*words, "--episodes", "4", "--env-settings", *WRITTEN.get(name, []), "horizon=8"]) == 0
        words = ["sft", str(ROOT / "configs/sft/twenty_questions.yaml"), "--lora.rank", "4", *STAGE]
        assert cli.main([*words, "--out", "runs/twenty_questions/sft_lora"]) == 0
        words = ["evaluate", "--player", "random", "--env", "twenty_questions", "--env-settings", "subset=true"]
        words += ["--episodes", "8", "--transitions", "runs/random.jsonl", "--out", "runs/random"]
        assert cli.main(words) == 0
        yield folder


def write_data(data: Path, questions: list[str]) -> None:
    """Sums, right and wrong, in the schemas and places the files name."""
    draw = random.Random(0)
    sums = [(question, str(sum(map(int, question[8:-1].split(" + "))))) for question in questions]
    chats = [{"prompt": question, "response": answer} for question, answer in sums]
    pairs = [{"prompt": q, "chosen": a, "rejected": str(int(a) + draw.randint(1, 3))} for q, a in sums]
    solved = [{"question": question, "answer": f"It is {answer}.\n#### {answer}"} for question, answer in sums]
    for name, rows in (
        ("finetune/sums.jsonl", chats),
        ("reward/sums.jsonl", pairs),
        ("rl/sums.jsonl", [{"prompt": question} for question in questions]),
        ("preferences.jsonl", pairs),
        ("gsm8k-train.jsonl", solved[:20]),
        ("gsm8k-test.jsonl", solved[20:]),
        ("math-train.jsonl", [{"problem": q, "answer": a} for q, a in sums[:20]]),
        ("math500.jsonl", [{"problem": q, "answer": a} for q, a in sums[20:]]),
        ("mbpp.jsonl", [{"text": "Add two numbers.", "test_list": ["assert add(1, 2) == 3"], "task_id": 1}]),
    ):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_strategies(data: Path) -> None:
    """Conversations and decisions in the places the files name."""
    write_esconv(data / "ESConv.json", 20)
    write_decisions(data / "daily_dialog_decisions.jsonl", 20)
    decisions = [
        {"query": f"{said} {number}", "strategy": "Question", "reward": 3} for number, said in enumerate(SAYS * 5)
    ]
    lines(data / "esconv_decisions.jsonl", decisions)
    lines(data.parent / "runs/dialogue/transitions.jsonl", decisions)


def run(recipe: str, file: Path, out: str) -> None:
    name = f"{recipe}/{file.name}"
    flags = [*FEWER[recipe], *ALSO.get(name, [])]
    assert cli.main([recipe, str(file), "--out", out, *flags]) == 0, name


Ran = Callable[[Path], Path]


@pytest.fixture(scope="module")
def ran(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The run directory of a settings file, which runs when it is first asked for."""
    done: dict[Path, Path] = {}

    def once(file: Path) -> Path:
        if file not in done:
            done[file] = tmp_path_factory.mktemp("settings") / "run"
            run(file.parent.name, file, str(done[file]))
        return done[file]

    return once


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_a_settings_file_runs_as_it_stands(file: Path, ran: Ran) -> None:
    recipe, out = file.parent.name, ran(file)
    if recipe == "merge":
        assert (out / "model.safetensors").is_file()
    elif recipe in ("evaluate", "control_data"):
        assert (out / "summary.json").is_file()
    else:
        assert (out / "metrics.jsonl").read_text().count("\n") >= 1
        part = {"tosca": "responder", "feedback": "solver", "control_reward": "reward"}.get(recipe, recipe)
        assert find_checkpoint(out, part if part in ("reward", "strategist", "responder", "solver") else "actor")


@pytest.fixture(scope="module")
def browser() -> Iterator[Elsewhere]:
    """Chromium in a thread of its own; tests skip where there is none."""
    found = Elsewhere()
    yield found
    found.close()


ONE_EACH = {file.parent.name: file for file in FILES if file.parent.name not in ("merge", "control_data")}
"""Recipe → a settings file of its, of those that leave runs to look at."""


@pytest.mark.browser
@pytest.mark.parametrize("recipe", ONE_EACH)
def test_the_page_of_a_run_of_every_recipe_works(recipe: str, browser: Elsewhere, ran: Ran) -> None:
    out = ran(ONE_EACH[recipe])
    assert cli.main(["report", str(out)]) == 0

    def look(chromium: Any) -> list[str]:
        tab, used = Tab(chromium, out / "report.html", width=390), 0
        for view in tab.page.evaluate("[...document.querySelectorAll('#nav a')].map(link => link.hash.slice(1))"):
            tab.go(view)
            assert tab.text.strip(), view
            assert tab.fits(), view
            if view == "overview":
                tab.picture(f"of_{recipe}")
            used += tab.page.evaluate(USE)
            assert tab.fits(), view
        assert used > 10
        tab.context.close()
        return tab.complaints

    assert browser.look(look) == []


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("feedback/")])
def test_a_preset_says_how_large_a_run_will_be(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["feedback", str(ROOT / "configs" / name), "--out", "runs/none", *ALSO.get(name, []), "--dry-run"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "solver: " in said
    assert "parameters" in said
    assert "MiB of weights" in said
    assert "tokens per step: at most" in said
    assert not (folder / "runs/none").exists()


def test_the_launcher_for_a_cluster_is_a_script_whose_command_is_a_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = ROOT / "examples" / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    (tmp_path / "echelon").write_text('#!/bin/bash\nprintf "%s\\n" "$@" > "$TYPED"\n')
    (tmp_path / "echelon").chmod(0o755)
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TYPED": str(tmp_path / "typed"), "SLURM_CPUS_PER_TASK": "1"}
    settings, name = ROOT / "configs/feedback/HLT_LLT_RR_1_15.yaml", "feedback/HLT_LLT_RR_1_15.yaml"
    for resumed in (False, True):
        words = ["bash", str(script), str(settings), str(tmp_path / "run"), "--dry-run"]
        subprocess.run(words, check=True, env={**os.environ, **given}, cwd=folder)
        typed = (tmp_path / "typed").read_text().splitlines()
        assert typed[:6] == ["feedback", str(settings), "--out", str(tmp_path / "run"), "--threads", "1"]
        assert ("--resume" in typed) == resumed
        assert cli.main([*(word for word in typed if word != "--resume"), *ALSO[name]]) == 0
        assert "tokens per step" in capsys.readouterr().out
        (tmp_path / "run/checkpoints").mkdir(parents=True, exist_ok=True)
