"""Every command on the pages runs, block by block and in order, in the folder of a reader who has what the page assumes.

The words stay as they are written; flags behind them cut sizes alone (`tests/desk.py`), and what a page says of eight
ranks two do. A command runs in this process where it can, else as its launcher starts it. What a machine with a CPU
cannot do stands in `NOT_RUN`, and CONTRIBUTING.md lists the same.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import io
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from echelon import cli
from tests.desk import RECIPES, fewer, lender, stages_here
from tests.test_blocks import ALL, Block
from tests.test_docs import ROOT
from tests.text.test_endpoint import Server, serve

__all__ = ["serve"]

SHELL = [block for block in ALL if block.language == "shell"]

NOT_RUN = {
    "--model.quantization": "bitsandbytes holds weights in few bits on a GPU",
    "sbatch": "there is no Slurm",
}
"""What is in a command that is not run → why not."""
NEEDS = {
    r"--sampler (vllm|server)|^vllm|apart": "vllm",
    r"--on ray|ray\.address": "ray",
    r"launch --nproc|^torchrun|^accelerate": "dist",
    r"^chromium": "browser",
    r"--expert ppo": "experts",
    r"-m peers": "peers",
}
"""What is in a command that needs more than this process → what it needs: the mark of its test."""

GIVEN = {
    "README.md": "runs/quickstart DIR runs/archer",
    "docs/adapters.md": "models/base chats.jsonl",
    "docs/algorithms/archer.md": "runs/twenty_questions/sft runs/sft",
    "docs/algorithms/dpo.md": "runs/sft data",
    "docs/algorithms/feedback.md": "data models/base meta-llama/Llama-3.2-1B-Instruct",
    "docs/algorithms/grpo.md": "runs/twenty_questions/sft DIR prompts.jsonl rewards.py",
    "docs/algorithms/merge.md": "runs/sft=runs/sft_lora runs/twenty_questions/sft_lora=runs/sft_lora",
    "docs/algorithms/ppo.md": "runs/twenty_questions/sft runs/sft prompts.jsonl runs/reward",
    "docs/algorithms/rank.md": "runs/best_language/sft tasks.yaml runs/sft",
    "docs/algorithms/responder.md": "meta-llama/Meta-Llama-3-8B-Instruct replies.jsonl data runs/reward runs/dialogue/sft "
    "runs/strategist",
    "docs/algorithms/reward.md": "runs/sft data",
    "docs/algorithms/sft.md": "openai-community/gpt2 data runs/twenty_questions/untrained models/base",
    "docs/algorithms/strategist.md": "runs/tiny data base ESConv.json=data/ESConv.json turns.jsonl",
    "docs/algorithms/tosca.md": "base replies.jsonl transitions.jsonl",
    "docs/chat.md": "runs/sft runs/archer runs/rank runs/tosca runs/feedback Qwen/Qwen3-0.6B questions.txt",
    "docs/coming-from.md": "openai-community/gpt2 data",
    "docs/configuration.md": "DIR",
    "docs/control-evaluation.md": "runs/control",
    "docs/credit.md": "models/base runs/text_lock/sft",
    "docs/data.md": "base data chats.jsonl mathematics.jsonl gsm8k-train.jsonl pandalm-preferences.jsonl rewards.py "
    "HuggingFaceH4/ultrafeedback_binarized ESConv.json=data/ESConv.json data/cartpole_medium data/pendulum",
    "docs/doctor.md": "runs/twenty_questions/sft models/base",
    "docs/engine.md": "models/base",
    "docs/howto/environment.md": "DIR",
    "docs/howto/gpu.md": "Qwen/Qwen3-0.6B gsm8k-train.jsonl models/base",
    "docs/howto/reward.md": "DIR prompts.jsonl runs/reward",
    "docs/logging.md": "models/base",
    "docs/pipeline.md": "runs/tiny data",
    "docs/quickstart.md": "runs/quickstart DIR",
    "docs/report.md": "runs/archer runs/quickstart runs/seed_0 runs/seed_1",
    "docs/resume.md": "models/base",
    "docs/rewards.md": "runs/sft gsm8k-train.jsonl prompts.jsonl runs/reward file.py problems.jsonl=programs.jsonl rows.jsonl "
    "data/cartpole_expert data/cartpole_medium",
    "docs/rounds.md": "runs/feedback math500.jsonl=data/math500.jsonl runs/sft runs/other=runs/sft problems.jsonl",
    "docs/runs.md": "runs/grpo runs/archer sweep/maze",
    "docs/scaling.md": "models/base chats.jsonl",
}
"""Page → what it takes for granted: names of `tests/desk.py`. What a block writes itself is not given to it."""
PLAY = "model: {path: models/base}\nenv: twenty_questions\nenv_settings: {subset: true}\n"
SETTINGS = {
    "sft": "model: {path: models/base}\ndata: {path: [chats.jsonl]}\n",
    "tosca": "responder: {path: models/base}\nenv: dialogue\n",
}
"""Recipe → what stands in a settings.yaml of the reader's, where it is not `PLAY`."""
SWAPPED = {
    "--nproc 8": "--nproc 2",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--multi_gpu --num_processes 8": "--cpu --num_processes 2",
    "--rollout-workers 4": "--rollout-workers 2",
    "/shared/": "shared/",
    "../bench": "bench",
}
"""What is of another size here, or lies elsewhere."""
ENDPOINT = "http://localhost:8000/v1"
"""Where some server of a chat model is asked; here one that always answers the same."""
SMALLER = {
    "examples/arithmetic.py": "--hidden 32 --layers 1 --copying-steps 2 --sums 400 --remarks 400",
    "examples/dialogue.py": "--dialogues 24 --hidden 32 --layers 1 --copying-steps 2",
    "benchmarks/feedback.py": "--quick --variants joint flat",
    "benchmarks/learning.py": "--quick --methods grpo --seeds 1",
    "benchmarks/rollout_multiturn.py": "--quick --peers generate --threads 1",
    "benchmarks/tosca.py": "--quick --variants joint alone",
    "--warmup-steps 5": "--warmup-steps 1",
    "--label 400": "--label 1",
}
"""What is in a command → flags behind it that cut its size, besides those of its recipe."""

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(mlflow|wandb|trackio|tensorboard|google|alembic).*"),
    pytest.mark.filterwarnings("ignore:.*noload.*"),
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
]


# What a block says


def commands(block: Block) -> list[str]:
    """Its lines, each a command: continued ones joined, loops unrolled, without comments."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    loop = r"^for (\w+) in ([\w ]+); do\n(.*?)^done$"
    unroll = lambda found: "".join(found[3].replace(f"${found[1]}", each) for each in found[2].split())  # noqa: E731
    lines = re.sub(loop, unroll, text, flags=re.MULTILINE | re.DOTALL).splitlines()
    return [line for line in (re.sub(r"\s#\s.*", "", line).strip() for line in lines) if line]


def need(line: str) -> str:
    return next((name for pattern, name in NEEDS.items() if re.search(pattern, line)), "")


def tried(block: Block) -> dict[str, list[str]]:
    """What is needed → the lines of a block that need it."""
    lines = [line for line in commands(block) if not any(word in line for word in NOT_RUN)]
    return {name: [line for line in lines if need(line) == name] for name in dict.fromkeys(map(need, lines))}


def given(block: Block, shelf: Callable[[str, Path], None], desk: Path) -> None:
    """Put on the desk what the page takes for granted, but for what the block makes."""
    made = re.findall(r"--out (\S+)", block.text)
    for name in GIVEN.get(block.page, "").split():
        if name.partition("=")[0] not in made:
            shelf(name, desk)
    if block.page == "docs/data.md":  # so that there is nothing to be fetched
        shutil.copytree(desk / "data/pendulum/minari/Pendulum-v1-expert-v0", desk / "minari/mujoco/halfcheetah/expert-v0")
    if block.page == "docs/howto/reward.md":
        (function,) = (other.text for other in ALL if other.page == block.page and "def brief" in other.text)
        (desk / "rewards.py").write_text(function)


# How it is run


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], None]:
    return lender(tmp_path_factory.mktemp("shelf"))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder a reader works in, a home, and no way out."""
    for name in ("configs", "examples", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("docs/images", "home"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    stages_here(monkeypatch)
    return tmp_path


def words_of(line: str, swapped: dict[str, str]) -> list[str]:
    """The words of a line as they are run: of sizes that fit, with `~` and `*` put in full."""
    for here, there in swapped.items():
        line = line.replace(here, there)
    words = [os.path.expanduser(word) for word in shlex.split(line)]
    return [each for word in words for each in (sorted(glob.glob(word)) if "*" in word else [word])]


def run(line: str, desk: Path, swapped: dict[str, str]) -> None:
    """Run a line as a shell would, to its end, and see that it went well."""
    words, files = redirected(words_of(line, SWAPPED | swapped))
    words += [word for said, flags in SMALLER.items() if said in line for word in flags.split()]
    program, *rest = words
    kind = Path(program).name
    if kind in ("echelon", "torchrun", "accelerate"):
        write_settings(rest, desk)
        rest = fewer(rest)
    with streams(files) as heard:
        status = RUNS[kind](rest)
    assert status == 0, f"{line}\n{shlex.join([program, *rest])}\nstatus {status}\n{heard()}"
    if "--out" in rest and "--dry-run" not in rest:
        assert Path(rest[rest.index("--out") + 1]).exists(), f"{line}: what it was to write is not there"


def redirected(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words of the command, and from or to which files the shell would lead it."""
    files = {word: words[place + 1] for place, word in enumerate(words) if word in ("<", ">")}
    leave = {place + more for place, word in enumerate(words) if word in ("<", ">") for more in (0, 1)}
    return [word for place, word in enumerate(words) if place not in leave], files


@contextlib.contextmanager
def streams(files: dict[str, str]) -> Iterator[Callable[[], str]]:
    """Someone who says hello and leaves, or what is in a file; what is said is kept, or written to a file."""
    coming = Path(files["<"]).read_bytes() if "<" in files else b"Hello.\n"
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(coming)))
        yield lambda: said(out)[-2000:] + said(err)[-3000:]
    if ">" in files:
        assert said(out), "nothing was said"
        Path(files[">"]).write_text(said(out))


def said(stream: io.TextIOWrapper) -> str:
    return stream.buffer.getvalue().decode()  # type: ignore[attr-defined,no-any-return]


def write_settings(words: list[str], desk: Path) -> None:
    recipe = next((word for word in words if word in RECIPES), "")
    (desk / "settings.yaml").write_text(SETTINGS.get(recipe, PLAY))


def run_echelon(words: list[str]) -> int:
    if words[0] == "launch":
        return as_process([sys.executable, "-m", "echelon", *words])
    with pytest.MonkeyPatch.context() as patch:
        if words[0] == "watch":  # until somebody presses Ctrl-C
            patch.setattr(time, "sleep", interrupt)
        return cli.main(words)


def interrupt(seconds: float) -> None:
    raise KeyboardInterrupt


def as_process(command: list[str]) -> int:
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    print(done.stdout, done.stderr)
    return done.returncode


def run_python(words: list[str]) -> int:
    """An example in this process, everything else in one of its own."""
    if not words[0].startswith("examples"):
        return as_process([sys.executable, *words])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        runpy.run_path(words[0], run_name="__main__")
    return 0


def run_make(words: list[str]) -> int:
    """That there are such targets; what they do, the commands of the pipeline that checks a change do."""
    known = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return 0 if {word for word in words if "=" not in word} <= set(known) else 2


def run_pip(words: list[str]) -> int:
    """That there are such extras."""
    extras = {extra for word in words for found in re.findall(r"\[([\w,]+)\]", word) for extra in found.split(",")}
    return 0 if words[0] in ("install", "uninstall") and extras <= cli.EXTRAS.keys() else 1


def run_mkdir(words: list[str]) -> int:
    return subprocess.run(["mkdir", *words], check=False).returncode


RUNS: dict[str, Callable[[list[str]], int]] = {
    "echelon": run_echelon,
    "python": run_python,
    "make": run_make,
    "pip": run_pip,
    "mkdir": run_mkdir,
    "torchrun": lambda words: as_process([sys.executable, "-m", "torch.distributed.run", *words]),
    "accelerate": lambda words: as_process([sys.executable, "-m", "accelerate.commands.accelerate_cli", *words]),
}
"""Program → what runs its words; it returns the exit status."""

MARKS = {"": [], "vllm": [pytest.mark.vllm], "ray": [pytest.mark.ray], "dist": [pytest.mark.dist]}
MARKS |= {"browser": [pytest.mark.browser], "experts": [], "peers": [pytest.mark.peers]}
MODULES = {"vllm": ["vllm"], "ray": ["ray"], "experts": ["stable_baselines3", "Box2D"], "peers": ["trl"]}
"""What is needed → modules without which there is nothing to run."""
SLOW = ("CONTRIBUTING.md:5", "docs/learning-curves.md")
"""Blocks that take minutes: those of benchmarks."""


def marks(block: Block, name: str) -> list[pytest.MarkDecorator]:
    lack = [module for module in MODULES.get(name, []) if importlib.util.find_spec(module) is None]
    slow = [pytest.mark.slow] if str(block).startswith(SLOW) and "benchmarks" in block.text else []
    return [*MARKS[name], *slow, pytest.mark.skipif(bool(lack), reason=f"not installed: {', '.join(lack)}")]



CASES = [
    pytest.param(block, name, id=f"{block}{name and '-'}{name}", marks=marks(block, name))
    for block in SHELL
    for name in tried(block)
]


@pytest.mark.parametrize(("block", "needed"), CASES)
def test_commands_run(
    block: Block, needed: str, desk: Path, shelf: Callable[[str, Path], None], serve: Callable[..., Server]
) -> None:
    given(block, shelf, desk)
    swapped = {ENDPOINT: serve(answer="<action>1</action>").url} if ENDPOINT in block.text else {}
    for line in tried(block)[needed]:
        run(line, desk, swapped)
