"""Every command on the pages runs, block by block and in order, in the folder of a reader who has what a page assumes.

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
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from echelon import cli
from echelon.train.launcher import _parse
from echelon.train.on_ray import held_port
from tests.desk import RECIPES, fewer, lender, stages_here
from tests.sampling.test_vllm_server import _answers
from tests.test_blocks import ALL, Block
from tests.test_docs import ROOT
from tests.text.test_endpoint import Server, serve

__all__ = ["serve"]

SHELL = [block for block in ALL if block.language == "shell"]

Lend = Callable[[str, Path], None]

NOT_RUN = ("--model.quantization", "sbatch")
"""What is in a command that is not run. CONTRIBUTING.md says why."""
OTHERWISE = ("chromium", "make", "pip", "--download", "--sampling.ray.gpus")
"""What is in commands that are not run quite as they stand, listed there too."""
NEEDS = {
    r"--sampler (vllm|server)": "vllm",
    r"--(on|sampler) ray|ray\.address": "ray",
    r"launch --nproc|^torchrun|^accelerate": "dist",
    r"-m vllm\.entrypoints": "vllm",
    r"--expert ppo": "experts",
    r"-m peers": "peers",
    r"^chromium": "chromium",
}
"""What is in a command that needs more than this process → what it needs: the mark of its test."""

GIVEN = {
    "README.md": "runs/quickstart runs/archer DIR",
    "docs/adapters.md": "models/base chats.jsonl",
    "docs/algorithms/archer.md": "runs/twenty_questions/sft runs/sft",
    "docs/algorithms/dpo.md": "runs/sft data",
    "docs/algorithms/feedback.md": "data models/base meta-llama/Llama-3.2-1B-Instruct",
    "docs/algorithms/grpo.md": "runs/twenty_questions/sft DIR prompts.jsonl rewards.py",
    "docs/algorithms/merge.md": "runs/sft=runs/sft_lora runs/twenty_questions/sft_lora=runs/sft_lora",
    "docs/algorithms/ppo.md": "runs/twenty_questions/sft runs/sft prompts.jsonl runs/reward",
    "docs/algorithms/rank.md": "runs/best_language/sft tasks.yaml runs/sft",
    "docs/algorithms/responder.md": "meta-llama/Meta-Llama-3-8B-Instruct replies.jsonl data runs/reward "
    "runs/strategist runs/dialogue/sft",
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
    "docs/rewards.md": "runs/sft gsm8k-train.jsonl prompts.jsonl runs/reward file.py rows.jsonl "
    "problems.jsonl=programs.jsonl data/cartpole_expert data/cartpole_medium",
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
    "--nproc 8 --nnodes 2": "--nproc 1 --nnodes 2",
    "--nproc 8": "--nproc 2",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--num_processes 8": "--num_processes 2",
    "--rollout-workers 4": "--rollout-workers 2",
    "--rollout-workers 7": "--rollout-workers 2",
    "--rollout-workers 24": "--rollout-workers 2",
    "--sampling.ray.gpus 1": "--sampling.ray.gpus 0",
    "/shared/": "shared/",
    "../bench": "bench",
}
"""What is of another size here, or lies elsewhere."""
ENDPOINT = "http://localhost:8000/v1"
"""Where some server of a chat model is asked; here one that always answers the same."""
SMALLER = {
    "examples/arithmetic.py": "--hidden 32 --layers 1 --copying-steps 2 --sums 400 --remarks 400",
    "examples/dialogue.py": "--dialogues 24 --hidden 32 --layers 1 --copying-steps 2",
    "vllm.entrypoints": "--max-model-len 2048 --max-num-seqs 8 --enforce-eager",
    "benchmarks/feedback.py": "--quick --variants joint flat",
    "benchmarks/learning.py": "--quick --methods grpo --seeds 1",
    "benchmarks/rollout_multiturn.py": "--quick --peers generate --threads 1",
    "benchmarks/tosca.py": "--quick --variants joint alone",
    "--expert ppo": "--expert-steps 64",
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


def given(block: Block, shelf: Lend, desk: Path) -> None:
    """Put on the desk what the page takes for granted, but for what the block makes."""
    made = re.findall(r"--out (\S+)", block.text)
    for name in GIVEN.get(block.page, "").split():
        if name.partition("=")[0] not in made:
            shelf(name, desk)
    if block.page == "docs/data.md":  # so that there is nothing to be fetched
        shutil.copytree(
            desk / "data/pendulum/minari/Pendulum-v1-expert-v0", desk / "minari/mujoco/halfcheetah/expert-v0"
        )
    if "/report.html" in block.text:  # which the block before it has written
        assert cli.main(["report", "runs/archer"]) == 0
    if block.page == "docs/howto/reward.md":
        (function,) = (other.text for other in ALL if other.page == block.page and "def brief" in other.text)
        (desk / "rewards.py").write_text(function)


# How it is run


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Lend:
    return lender(tmp_path_factory.mktemp("shelf"))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder a reader works in, which is theirs alone; what they left running is ended after them."""
    for name in ("configs", "examples", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("docs/images", "home"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    places = {"HOME": "home", "PWD": ".", "MINARI_DATASETS_PATH": "minari", "TRACKIO_DIR": "trackio"}
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "VLLM_NO_USAGE_STATS": "1"}
    settings |= {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "VLLM_CPU_KVCACHE_SPACE": "1"}
    for name, value in {**settings, **{name: str(tmp_path / place) for name, place in places.items()}}.items():
        monkeypatch.setenv(name, value)
    stages_here(monkeypatch)
    yield tmp_path
    while SERVERS:
        SERVERS[-1].terminate()
        SERVERS.pop().wait(60)


def words_of(line: str, swapped: dict[str, str]) -> list[str]:
    """The words of a line as they are run: of sizes that fit, with `~`, `$PWD` and `*` put in full."""
    for here, there in {**SWAPPED, **swapped}.items():
        line = line.replace(here, there)
    words = [os.path.expandvars(os.path.expanduser(word)) for word in shlex.split(line)]
    words = [each for word in words for each in (sorted(glob.glob(word)) if "*" in word else [word])]
    return words + [word for said, flags in SMALLER.items() if said in line for word in flags.split()]


def run(line: str, desk: Path, swapped: dict[str, str]) -> None:
    """Run a line as a shell would, to its end, and see that it went well."""
    words, files = redirected(words_of(line, swapped))
    with pytest.MonkeyPatch.context() as patch, streams(files) as heard:
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            patch.setenv(*words.pop(0).split("="))
        program, *words = words
        if Path(program).name in ("echelon", "torchrun", "accelerate"):
            recipe = next((word for word in words if word in RECIPES), "")
            (desk / "settings.yaml").write_text(SETTINGS.get(recipe, PLAY))
            assert accepted(words) == 0, f"{line}\n{heard()}"
            words = fewer(words)
        status = RUNS[Path(program).name](words)
        assert status == 0, f"{line}\n{shlex.join([program, *words])}\nstatus {status}\n{heard()}"
    if "--out" in words and "--dry-run" not in words:
        assert Path(words[words.index("--out") + 1]).exists(), f"{line}: what it was to write is not there"


def accepted(words: list[str]) -> int:
    """The exit status of the command with the sizes of the page, which are read, if nothing came of it."""
    words = words[words.index("echelon") + 1 :] if "echelon" in words else words
    words = _parse(words[1:])[1] if words[0] == "launch" else words
    with pytest.MonkeyPatch.context() as patch:
        if words[0] in RECIPES and "--help" not in words:
            patch.setattr(f"echelon.recipes.{words[0].replace('-', '_')}.main", lambda config: None)
            return cli.main(words)
    return 0


def redirected(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words of the command, and from or to which files the shell would lead it."""
    files = {word: words[place + 1] for place, word in enumerate(words) if word in ("<", ">")}
    leave = {place + more for place, word in enumerate(words) if word in ("<", ">") for more in (0, 1)}
    return [word for place, word in enumerate(words) if place not in leave], files


@contextlib.contextmanager
def streams(files: dict[str, str]) -> Iterator[Callable[[], str]]:
    """Someone who says hello and leaves, or what is in a file; what is said is kept, or written to a file."""
    coming = Path(files["<"]).read_bytes() if "<" in files else b"Hello.\n"
    out, err = io.BytesIO(), io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(coming)))
        patch.setattr(sys, "stdout", io.TextIOWrapper(out, write_through=True))
        patch.setattr(sys, "stderr", io.TextIOWrapper(err, write_through=True))
        yield lambda: (out.getvalue()[-2000:] + err.getvalue()[-3000:]).decode(errors="replace")
        if ">" in files:
            assert out.getvalue(), "nothing was said"
            Path(files[">"]).write_bytes(out.getvalue())


def run_echelon(words: list[str]) -> int:
    """In this process, but for what starts others."""
    command = [sys.executable, "-m", "echelon", *words]
    if "--nnodes" in words:
        beside = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # as on the other machine
        return as_process(command) or beside.wait(300)
    if "auto" in words or "RAY_ADDRESS" in os.environ:  # where a cluster is
        with a_cluster():
            return as_process(command)
    if words[0] == "launch":
        return as_process(command)
    with pytest.MonkeyPatch.context() as patch:
        if words[0] == "watch":  # until somebody presses Ctrl-C
            patch.setattr(time, "sleep", interrupt)
        return cli.main(words)


def interrupt(seconds: float) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def a_cluster() -> Iterator[None]:
    """One of Ray, which others find as the one there is."""
    import ray

    found = ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", found.address_info["gcs_address"])
        yield
    ray.shutdown()


def as_process(command: list[str], **around: Any) -> int:
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False, **around)
    print(done.stdout, done.stderr)
    return done.returncode


def run_python(words: list[str]) -> int:
    """An example in this process, everything else in one of its own; tests where they are."""
    if "vllm.entrypoints.openai.api_server" in words:
        return serve_until_it_answers(words)
    if not words[0].startswith("examples"):
        return as_process([sys.executable, *words], cwd=ROOT if "pytest" in words else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


def run_make(words: list[str]) -> int:
    """That there are such targets."""
    known = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return 0 if {word for word in words if "=" not in word} <= set(known) else 2


def run_pip(words: list[str]) -> int:
    """That there are such extras."""
    extras = {extra for word in words for found in re.findall(r"\[([\w,]+)\]", word) for extra in found.split(",")}
    return 0 if words[0] in ("install", "uninstall") and extras <= cli.EXTRAS.keys() else 1


def run_chromium(words: list[str]) -> int:
    """That a picture is taken; root may not do that in a sandbox."""
    status = as_process(["chromium", "--no-sandbox", *words])
    picture = next(Path(word.partition("=")[2]) for word in words if word.startswith("--screenshot="))
    return status or int(not picture.is_file() or not picture.read_bytes().startswith(b"\x89PNG"))


def serve_until_it_answers(words: list[str]) -> int:
    """A server of vLLM, which goes on until the reader leaves."""
    url = f"http://127.0.0.1:{words[words.index('--port') + 1]}/health"
    with Path("server.log").open("w") as log:
        SERVERS.append(subprocess.Popen([sys.executable, *words], stdout=log, stderr=subprocess.STDOUT))
    until = time.monotonic() + 560
    while not _answers(url):
        if SERVERS[-1].poll() is not None or time.monotonic() > until:
            print(Path("server.log").read_text()[-3000:])
            return 1
        time.sleep(0.5)
    return 0


SERVERS: list[subprocess.Popen[bytes]] = []
"""What goes on while the next lines of a block run."""
RUNS: dict[str, Callable[[list[str]], int]] = {
    "echelon": run_echelon,
    "python": run_python,
    "chromium": run_chromium,
    "make": run_make,
    "pip": run_pip,
    "mkdir": lambda words: as_process(["mkdir", *words]),
    "torchrun": lambda words: as_process([sys.executable, "-m", "torch.distributed.run", *words]),
    "accelerate": lambda words: as_process([sys.executable, "-m", "accelerate.commands.accelerate_cli", *words]),
}
"""Program → what runs its words; it returns the exit status."""


# The tests


MARKS = {"": [], "vllm": [pytest.mark.vllm], "ray": [pytest.mark.ray], "dist": [pytest.mark.dist]}
MARKS |= {"experts": [], "peers": [pytest.mark.peers], "chromium": []}
MODULES = {"vllm": ["vllm"], "ray": ["ray"], "experts": ["stable_baselines3", "Box2D"], "peers": ["trl"]}
"""What is needed → modules without which there is nothing to run."""
SLOW = {
    ("CONTRIBUTING.md", ""),
    ("docs/learning-curves.md", ""),
    ("docs/engine.md", "ray"),
    *(("docs/scaling.md", name) for name in ("dist", "ray", "vllm")),
}
"""Page, and what is needed: where lines take minutes together, those of benchmarks and of many processes."""


def marks(block: Block, name: str) -> list[pytest.MarkDecorator]:
    lack = [module for module in MODULES.get(name, []) if importlib.util.find_spec(module) is None]
    lack += ["chromium"] if name == "chromium" and shutil.which("chromium") is None else []
    slow = [pytest.mark.slow] if (block.page, name) in SLOW and "make" not in block.text else []
    return [*MARKS[name], *slow, pytest.mark.skipif(bool(lack), reason=f"not installed: {', '.join(lack)}")]


CASES = [
    pytest.param(block, name, id=f"{block}{name and '-'}{name}", marks=marks(block, name))
    for block in SHELL
    for name in tried(block)
]


@pytest.mark.parametrize(("block", "needed"), CASES)
def test_commands_run(block: Block, needed: str, desk: Path, shelf: Lend, serve: Callable[..., Server]) -> None:
    given(block, shelf, desk)
    with held_port() as held:
        port = held.getsockname()[1]
        swapped = {"host:29500": f"localhost:{port}", "--host 10.0.0.3": f"--host 127.0.0.1 --port {port}"}
        swapped |= {"10.0.0.3:8000": f"127.0.0.1:{port}"}
        if ENDPOINT in block.text:
            swapped[ENDPOINT] = serve(answer="<action>1</action>").url
        for line in tried(block)[needed]:
            run(line, desk, swapped)


def test_every_block_is_run() -> None:
    assert len(SHELL) > 60
    assert all(tried(block) for block in SHELL)


every_block = pytest.mark.parametrize("block", SHELL, ids=map(str, SHELL))


@every_block
def test_a_block_that_needs_more_than_a_cpu_says_so(block: Block) -> None:
    lines = [line for line in block.text.splitlines() if "# on a GPU" not in line]
    needs = [line for line in lines if need(line) in ("vllm", "ray", "dist") or any(word in line for word in NOT_RUN)]
    assert block.marked or not needs, "put <!-- needs … --> before the block"


@every_block
def test_the_shell_can_read_it(block: Block) -> None:
    said = re.sub(r"<[\w ]+>", "PLACE", block.text)
    done = subprocess.run(["bash", "-n"], input=said, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("line", [line for block in SHELL for line in commands(block) if NOT_RUN[0] in line])
def test_settings_of_what_is_not_run_are_such(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, began = line.split()[1], list[object]()
    monkeypatch.setattr(f"echelon.recipes.{recipe}.main", began.append)
    monkeypatch.chdir(ROOT)
    assert cli.main(line.split()[1:]) == 0
    assert len(began) == 1


def test_what_no_test_does_is_listed() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \|", page.partition("| in a command |")[2], re.MULTILINE)
    assert rows[: len(NOT_RUN) + len(OTHERWISE)] == [*NOT_RUN, *OTHERWISE]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("echelon grpo settings.yaml --group-size 1 --out x", "siblings are compared"),
        ("torchrun --nproc-per-node 2 -m echelon grpo settings.yaml --out x --steps none", "--steps none"),
        ("echelon grppo settings.yaml", "unknown recipe 'grppo'"),
        ("echelon sft --model.path models/base --data.path chats.jsonl --epoch 3 --out x", "unknown flag '--epoch'"),
        ("echelon report runs/nothing", "runs/nothing"),
        ("make everything", "status 2"),
        ("pip install 'echelon[everything]'", "status 1"),
        ("python examples/nothing.py", "nothing.py"),
        ("python examples/arithmetic.py --speed 3", "--speed"),
    ],
)
def test_a_wrong_command_is_found(line: str, wrong: str, desk: Path, shelf: Lend) -> None:
    for name in ("models/base", "chats.jsonl"):
        shelf(name, desk)
    with pytest.raises((AssertionError, FileNotFoundError)) as found:
        run(line, desk, {})
    assert wrong in str(found.value)
