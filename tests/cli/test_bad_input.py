"""What people get wrong, through the command line: one line says what, why and what to do, and nothing is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from echelon.config import RunConfig
from echelon.envs import load_env
from echelon.models.lm import tiny
from echelon.train.checkpoint import Checkpoints
from echelon.train.learner import Learner
from tests.cli.conftest import Place, edit, says, without
from tests.recipes.conftest import GAME, made

ENV = '''\
from echelon.types import Step, Task

HELLO = [{"role": "user", "content": "Guess."}]


class Own:
    """Over after two turns; `WHAT` is what is wrong with it."""

    def __init__(self, task):
        self.task, self.turns = task, 0

    @classmethod
    def tasks(cls, split):
        return [Task(f"{split}/{number}") for number in range(9)]

    def start(self):
        return HELLO

    def step(self, action):
        self.turns += 1
        return Step(HELLO, reward=1.0, terminated=self.turns == 2)


'''


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the command lines below name."""
    folder = tmp_path_factory.mktemp("materials")
    made(load_env("guess_number", GAME), folder / "good", layers=1)
    prepare(folder)
    return folder


def smaller(folder: Path) -> None:
    """Put other weights in the folder, with fewer embeddings than the tokenizer has tokens."""
    module, _ = tiny(["a"], vocab_size=270, hidden=16, layers=1, heads=1)
    module.save_pretrained(folder)  # type: ignore[operator]


def prepare(folder: Path) -> None:
    def write(name: str, text: str) -> None:
        (folder / name).write_text(text)

    def model(name: str, change: Callable[[Path], object]) -> None:
        shutil.copytree(folder / "good", folder / name)
        change(folder / name)

    write("typo.yaml", "model:\n  path: good\nenv: guess_number\ngrop_size: 4\n")
    write("type.yaml", "model:\n  path: good\nenv: guess_number\ngroup_size: many\n")
    write("bad.yaml", "model: [good\nenv: x\n")
    write("good.yaml", "model:\n  path: good\nenv: guess_number\n")
    (folder / "empty").mkdir()
    model("no_config", without("config.json"))
    model("no_tokenizer", without("tokenizer.json", "tokenizer_config.json"))
    model("no_weights", without("model.safetensors"))
    model("half", lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 99))
    model("mute", without("chat_template.jinja"))
    model("small", smaller)
    model("no_pad", edit("tokenizer_config.json", pad_token=None))
    write("own.py", ENV)
    write("raises.py", "raise RuntimeError('not today')\n")
    write("lacks.py", "class Own:\n    pass\n")
    rules = {
        "NoTasks": "    @classmethod\n    def tasks(cls, split):\n        return []",
        "NotANumber": "    def step(self, action):\n        return Step(HELLO, reward=float('nan'), terminated=True)",
        "NoText": "    def start(self):\n        return 'Guess.'",
        "Endless": "    def step(self, action):\n        return Step(HELLO)",
        "Picky": "    def step(self, action):\n        return Step(HELLO, reward=int(action), terminated=True)",
        "Both": "    def step(self, action):\n        return Step(terminated=True, truncated=True)",
    }
    write("rules.py", ENV + "\n\n".join(f"class {name}(Own):\n{body}\n" for name, body in rules.items()))
    write("none.jsonl", "\n")
    write("torn.jsonl", '{"messages": [\n')
    write("silent.jsonl", '{"messages": [{"role": "user", "content": "Hello"}]}\n')
    write("keys.jsonl", '{"prompt": "Hello"}\n')
    long = [{"role": "user", "content": "Guess."}, {"role": "assistant", "content": "1 2 3 4 " * 99}]
    write("long.jsonl", json.dumps({"messages": long}) + "\n")


GRPO = "grpo good.yaml --out r"
MISSING = "missing: nothing sets it. Put it in a settings file, or give"
ENVS = (
    "Built in: arithmetic, dialogue, guess_my_city, guess_number, maze, text_lock, twenty_questions, wordle. "
    "Your own: path/to/file.py:ClassName, package.module:ClassName or tasks.yaml."
)
MODEL = "Give a folder, a run directory or a hub id (name/model)."
TABLE = [
    # settings
    ("grpo typo.yaml --out r", "typo.yaml: unknown key 'grop_size'. Did you mean 'group_size'?"),
    (f"{GRPO} --grop-size 4", "unknown flag '--grop-size'. Did you mean '--group-size'?"),
    (f"{GRPO} --lr 1", "unknown flag '--lr'. Did you mean '--policy.optim.lr'?"),
    ("grpo type.yaml --out r", "type.yaml: group_size = many: expected a whole number."),
    (f"{GRPO} --group-size 2.5", "--group-size 2.5: expected a whole number."),
    (f"{GRPO} --scale stdd", "--scale stdd: expected one of none, std, batch_std. Did you mean 'std'?"),
    (f"{GRPO} --steps", "--steps: expected a whole number after it."),
    ("grpo goood.yaml --out r", "goood.yaml: no such file. Did you mean 'good.yaml'?"),
    ("grpo bad.yaml --out r", "bad.yaml: line 2: expected ',' or ']', but got ':'."),
    ("grpo good.yaml", f"out is {MISSING} --out."),
    ("grpo --out r --env guess_number", f"model.path is {MISSING} --model.path."),
    (
        f"{GRPO} --group-size 1",
        "group_size = 1: siblings are compared, so there must be at least 2. Raise it, or use ppo, which has a critic.",
    ),
    (
        f"{GRPO} --policy.loss reinforce --policy.epochs 2",
        "policy.epochs = 2: the plain policy gradient is on-policy, so it takes one step per batch. "
        "Use loss = clipped for more.",
    ),
    (
        "archer good.yaml --out r --tau 0",
        "tau = 0.0: the target would never move, or overshoot. Give a number in (0, 1].",
    ),
    (
        "archer good.yaml --out r --critic-body actor --critic-path good",
        "critic_path = good: critic_body = actor reads with the actor's body. Set critic_body = own.",
    ),
    (
        "ppo good.yaml --out r --sampling.temperature 0",
        "sampling.temperature = 0.0: training draws at random. Give 1, or near it.",
    ),
    # models
    (f"{GRPO} --model.path ./nowhere", f"there is no model folder './nowhere'. {MODEL}"),
    (f"{GRPO} --model.path nowhere", f"there is no model folder 'nowhere'. {MODEL}"),
    (
        f"{GRPO} --model.path empty",
        "'empty' is a folder without config.json, so it is not a Hugging Face model folder.",
    ),
    (
        f"{GRPO} --model.path no_config",
        "'no_config' is a folder without config.json, so it is not a Hugging Face model folder.",
    ),
    (f"{GRPO} --model.path no_tokenizer", "no tokenizer could be loaded from 'no_tokenizer': …"),
    (f"{GRPO} --model.path no_weights", "no causal language model could be loaded from 'no_weights': …"),
    (f"{GRPO} --model.path half", "no causal language model could be loaded from 'half': …"),
    (
        f"{GRPO} --model.path mute",
        "the tokenizer of 'mute' has no chat template, so messages cannot become tokens. Use an instruction-tuned "
        "model, or set tokenizer.chat_template and save the tokenizer again.",
    ),
    (f"{GRPO} --model.path small", "'small': the tokenizer has …"),
    # environments
    (f"{GRPO} --env gues_number", f"There is no environment 'gues_number'. Did you mean 'guess_number'? {ENVS}"),
    (f"{GRPO} --env nothing.py:Own", "nothing.py:Own: there is no file nothing.py."),
    (f"{GRPO} --env own.py:Owm", "own.py has no class 'Owm'. Did you mean 'Own'?"),
    (f"{GRPO} --env raises.py:Own", "raises.py:Own: raises.py does not import: RuntimeError: not today"),
    (
        f"{GRPO} --env lacks.py:Own",
        "lacks.py:Own is not an environment: it has no tasks(), start(), step(). See docs/environments.md for the few "
        "methods it needs.",
    ),
    (
        f"{GRPO} --env-settings hihg=4",
        "guess_number has no setting 'hihg'. Did you mean 'high'? It takes high, low, max_turns.",
    ),
    (f"{GRPO} --env-settings high=four", "guess_number: high = 'four' is not a whole number."),
    (
        f"{GRPO} --env rules.py:NoTasks",
        "rules.py:NoTasks: tasks('train') is empty. Both splits need at least one task.",
    ),
    (
        f"{GRPO} --env rules.py:NotANumber",
        "rules.py:NotANumber: step() gave the reward nan. It must be a finite number.",
    ),
    (
        f"{GRPO} --env rules.py:NoText",
        "rules.py:NoText: start() gave 'Guess.' for messages. It must be a list of role and content.",
    ),
    (f"{GRPO} --env rules.py:Endless", "rules.py:Endless: task 't…"),
    (f"{GRPO} --env rules.py:Picky", "rules.py:Picky: step(…"),
    (
        f"{GRPO} --env rules.py:Both",
        "rules.py:Both: step() is both terminated and truncated. It is one: over by the task's rules, or cut off from "
        "outside.",
    ),
    # data
    ("sft --model.path good --out r", "data.path is missing: nothing sets it. Put it in a settings file, or give …"),
    ("sft --model.path good --out r --data.path nothing.jsonl", "data.path = nothing.jsonl: there is no such file. …"),
    ("sft --model.path good --out r --data.path none.jsonl", "none.jsonl holds no row. …"),
    ("sft --model.path good --out r --data.path torn.jsonl", "torn.jsonl:1: not JSON: …"),
    ("sft --model.path good --out r --data.path keys.jsonl", "keys.jsonl:1: the columns prompt do not make rows …"),
    (
        "sft --model.path good --out r --data.path silent.jsonl",
        "silent.jsonl:1: no message is the assistant's, so there is nothing to learn from. Remove the line.",
    ),
    (
        "sft --model.path good --out r --data.path long.jsonl --max-tokens 64",
        "long.jsonl: 1 of 1 conversations are longer than max_tokens = 64; the longest has 601 tokens. Raise "
        "max_tokens, or give too_long = drop or cut.",
    ),
    # runs
    (
        f"{GRPO} --resume",
        "r: there is no checkpoint to resume from. Start without --resume, or name the directory of the run with "
        "--out.",
    ),
    (
        "grpo good.yaml --out good.yaml/r",
        "good.yaml/r: no run can be kept there (Not a directory). Choose another --out.",
    ),
]


@pytest.mark.parametrize(("line", "message"), TABLE, ids=[line.replace("/", "|") for line, _ in TABLE])
def test_one_line_says_what_is_wrong_and_nothing_is_written(place: Place, line: str, message: str) -> None:
    """`…` at the end of a message stands for any end of the line."""
    status, said = place.run(line)
    assert status == 2
    assert says(said, message), said
    assert not (place / "r").exists()


QUICK = "grpo good.yaml --out r --threads 1 --steps 2 --tasks-per-step 2 --group-size 4 --sampling.max-tokens 2"
QUICK += " --env-settings high=4 max_turns=3 --save-every 1"


def test_an_instruction_that_cannot_fit_is_named_before_the_first_step(place: Place) -> None:
    status, said = place.run(f"{QUICK} --sampling.max-prompt-tokens 3")
    assert status == 2
    assert said.startswith("the instruction and the latest observation alone take ")
    assert said.endswith(
        "more than the budget of 3. Raise max_prompt_tokens or shorten them: neither can be dropped.\n"
    )


OWN = QUICK.replace("--env-settings high=4 max_turns=3", "--env fails.py:Fails")
FAILS = """\
class Fails(Own):
    def step(self, action):
        if self.task.id in ("train/3", "train/5") and action != "1":
            {}
        return super().step(action)
"""


def failing(place: Place, how: str) -> None:
    # The check, which plays two tasks, meets neither of these.
    (place / "fails.py").write_text(ENV + FAILS.format(how))


def test_an_environment_that_raises_costs_its_episode_until_there_are_too_many(place: Place) -> None:
    failing(place, "raise ZeroDivisionError('a defect')")
    status, said = place.run(OWN + " --steps 5 --error-budget 0.9")
    assert (status, said) == (0, "")
    counts = [json.loads(row)["episode/failed"] for row in (place / "r/metrics.jsonl").read_text().splitlines()]
    assert len(counts) == 5
    assert sorted(set(counts)) == [0, 4]
    status, said = place.run(OWN.replace("--out r", "--out s") + " --steps 5")
    assert status == 2
    assert said.startswith("4 of 8 episodes failed, more than the error budget of 10%. The first, on task 'train/")
    assert said.endswith("': ZeroDivisionError: a defect\n")


@pytest.mark.parametrize("reward", ["nan", "inf"])
def test_a_reward_that_is_no_number_is_named_with_its_environment_and_task(place: Place, reward: str) -> None:
    failing(place, f"return Step(HELLO, reward=float('{reward}'), terminated=True)")
    status, said = place.run(OWN + " --steps 5")
    assert status == 2
    assert said.count("\n") == 1
    assert said.startswith("Fails: task 'train/")
    assert said.endswith(f"': step() gave the reward {reward}. It must be a finite number.\n")


def test_a_tokenizer_without_a_padding_token_is_as_good_as_any(place: Place) -> None:
    assert place.run(f"{QUICK} --model.path no_pad") == (0, "")
    assert place.run(QUICK.replace("--out r", "--out s")) == (0, "")
    one, other = ((place / name / "episodes.jsonl").read_text() for name in "rs")
    assert one == other


@pytest.fixture
def run(place: Place) -> Place:
    """A run of two steps with three checkpoints kept."""
    assert place.run(f"{QUICK} --keep-last 3") == (0, "")
    return place


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


MORE = f"{QUICK} --keep-last 3 --resume --steps 3"


def test_a_checkpoint_that_was_damaged_is_skipped_with_a_notice(run: Place) -> None:
    flip(run / "r/checkpoints/step_000002/actor/model.safetensors")
    status, said = run.run(MORE)
    assert status == 0
    assert said == ("r/checkpoints/step_000002 is skipped: actor/model.safetensors does not match its checksum\n")
    steps = [json.loads(row)["step"] for row in (run / "r/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]


def test_no_whole_checkpoint_is_one_line_after_the_notices(run: Place) -> None:
    for step in range(3):
        flip(run / f"r/checkpoints/step_00000{step}/actor/model.safetensors")
    before = run.files()
    status, said = run.run(MORE)
    assert status == 2
    assert said.splitlines()[-1] == "r/checkpoints: none of its checkpoints is whole. Start a new run."
    assert run.files() == before


RUNS = [
    (
        QUICK,
        "r: there is a run already, and it is never overwritten. Continue it with --resume, or choose another --out.",
    ),
    (
        f"{MORE} --policy.optim.lr 0.5",
        "r/checkpoints/step_000002: it was written with other settings: policy.optim.lr (0.0003 → 0.5). A run keeps "
        "its settings. Set them back, or start a new run with another --out.",
    ),
    (f"ppo {MORE[5:]}".replace("--tasks-per-step 2 --group-size 4", ""), "r/checkpoints/step_000002: "),
]


@pytest.mark.parametrize(("line", "message"), RUNS, ids=["again", "other settings", "other recipe"])
def test_a_run_keeps_its_directory_and_its_settings(run: Place, line: str, message: str) -> None:
    before = run.files()
    status, said = run.run(line)
    assert status == 2
    assert said.count("\n") == 1
    assert said.startswith(message)
    assert run.files() == before


def test_a_run_that_somebody_writes_to_is_left_alone(run: Place) -> None:
    before = run.files()
    with Checkpoints(run / "r", config=RunConfig(out="r"), resume=True):
        for line in (QUICK, MORE):
            assert run.run(line) == (
                2,
                f"r: process {os.getpid()} is writing to this run. Wait for it or stop it, or choose another --out.\n",
            )
    assert run.files() == before


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_the_run_and_the_checkpoint_before_survives(
    run: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: content for name, content in run.files().items() if "step_00000" in name}
    save = Learner.save

    def full(learner: Learner, folder: Path) -> None:
        save(learner, folder)
        raise FULL

    monkeypatch.setattr(Learner, "save", full)
    assert run.run(MORE) == (
        2,
        "r/checkpoints/step_000003: step 3 could not be saved (No space left on device). Checkpoints still there: 0, "
        "1, 2. Make room or choose another disk, then continue with --resume.\n",
    )
    assert {name: content for name, content in run.files().items() if "step_00000" in name} == before
    monkeypatch.undo()
    monkeypatch.chdir(run.folder)
    assert run.run(MORE) == (0, "")


def test_a_disk_too_full_for_a_row_of_the_log_is_one_line(run: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        name = "r/metrics.jsonl"

        def write(self, text: str) -> None:
            raise FULL

        def close(self) -> None:
            pass

    monkeypatch.setattr("echelon.train.log._append_to", lambda path: Full())
    assert run.run(MORE) == (
        2,
        "r/metrics.jsonl: cannot be written (No space left on device). Make room there, then continue with --resume.\n",
    )


def test_traceback_shows_the_place(place: Place) -> None:
    status, said = place.run(f"{GRPO} --env rules.py:NoTasks --traceback")
    assert status == 2
    assert said.startswith("Traceback")
    assert said.rstrip().endswith("Both splits need at least one task.")
