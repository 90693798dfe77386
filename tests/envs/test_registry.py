"""Finding environments, and one line for every way of not finding one."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from echelon.envs import EnvSpec, check_env, load_env
from echelon.envs.players import main, measure, parse_settings
from echelon.envs.registry import BUILT_IN
from echelon.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
EXAMPLE = f"{ROOT}/examples/own_env.py:CountDown"

GAME = """
from __future__ import annotations
import dataclasses
import helper
from echelon.types import Step, Task

@dataclasses.dataclass
class Note:
    text: str

class Game:
    def __init__(self, task, *, size: int = 2, hard: bool = False): self.size = size
    @classmethod
    def tasks(cls, split, *, size: int = 2, hard: bool = False): return [Task(f"{split}/{i}") for i in range(size)]
    def start(self): return [{"role": "user", "content": helper.WORD}]
    def step(self, action): return Step(terminated=True)

class Plain:
    def __init__(self, task): pass
    @classmethod
    def tasks(cls, split): return [Task(split)]
    start, step = Game.start, Game.step

class Needy(Plain):
    def __init__(self, task, *, colour): pass
    @classmethod
    def tasks(cls, split, *, colour): return [Task(split)]

class HalfDone(Plain):
    def __init__(self, task, *, size=2): pass

class Empty: pass

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "game.py").write_text(GAME)
    (tmp_path / "helper.py").write_text("WORD = 'Hello'")
    (tmp_path / "broken.py").write_text("import helper\n1 / 0\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("helper", "game", "broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["game.py:Game", "./game.py:Game", "game:Game"])
def test_a_class_in_a_file_or_module(folder, name):
    spec = load_env(name, {"size": 3})
    assert isinstance(spec, EnvSpec)
    assert (spec.name, spec.cls.__name__, spec.settings) == (name, "Game", {"size": 3})
    assert [task.id for task in spec.tasks("test")] == ["test/0", "test/1", "test/2"]
    assert spec.make(spec.tasks("train")[0]).size == 3
    assert str(folder) not in sys.path
    check_env(spec)


def test_a_class_without_settings(folder):
    assert check_env("game.py:Plain").settings == {}


@pytest.mark.parametrize(
    ("name", "settings", "kind", "message"),
    [
        ("guess_numbr", {}, ConfigError, "There is no environment 'guess_numbr'. Did you mean 'guess_number'? "
         "Built in: arithmetic, dialogue, guess_my_city, guess_number, maze, text_lock, twenty_questions, wordle. "
         "Your own: path/to/file.py:ClassName, package.module:ClassName or "
         "tasks.yaml."),
        ("game.py", {}, ConfigError, "There is no environment 'game.py'. "
         "Built in: arithmetic, dialogue, guess_my_city, guess_number, maze, text_lock, twenty_questions, wordle. "
         "Your own: path/to/file.py:ClassName, package.module:ClassName or tasks.yaml."),
        ("nowhere.py:Game", {}, DataError, "nowhere.py:Game: there is no file {folder}/nowhere.py."),
        ("broken.py:Game", {}, DataError,
         "broken.py:Game: {folder}/broken.py does not import: ZeroDivisionError: division by zero"),
        ("broken:Game", {}, DataError,
         "broken:Game: module broken does not import: ZeroDivisionError: division by zero"),
        ("no_such_module:Game", {}, DataError, "no_such_module:Game: module no_such_module does not "
         "import: ModuleNotFoundError: No module named 'no_such_module'"),
        ("game.py:Gane", {}, DataError, "game.py has no class 'Gane'. Did you mean 'Game'?"),
        ("game.py:number", {}, DataError, "game.py:number is not an environment: it has no tasks(), start(), step(). "
         "See docs/environments.md for the few methods it needs."),
        ("game.py:Empty", {}, DataError, "game.py:Empty is not an environment: it has no tasks(), start(), step(). "
         "See docs/environments.md for the few methods it needs."),
        ("game.py:Game", {"sise": 1}, ConfigError,
         "game.py:Game has no setting 'sise'. Did you mean 'size'? It takes hard, size."),
        ("game.py:Plain", {"size": 1}, ConfigError, "game.py:Plain has no setting 'size'. It takes none."),
        ("game.py:HalfDone", {"size": 1}, DataError, "game.py:HalfDone: its constructor takes the setting 'size' but "
         "tasks() does not. Both receive all of them."),
        ("game.py:Needy", {}, ConfigError,
         "game.py:Needy needs the setting 'colour'. Give it, or give the class a default."),
        ("game.py:Game", {"size": "3"}, ConfigError, "game.py:Game: size = '3' is not a whole number."),
        ("game.py:Game", {"size": True}, ConfigError, "game.py:Game: size = True is not a whole number."),
        ("game.py:Game", {"hard": 1}, ConfigError, "game.py:Game: hard = 1 is not true or false."),
        ("twenty_questions", {"subst": True}, ConfigError,
         "twenty_questions has no setting 'subst'. Did you mean 'subset'? It takes max_turns, subset."),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_says_so_in_one_line(folder, name, settings, kind, message):
    with pytest.raises(kind) as error:
        load_env(name, settings)
    assert str(error.value) == message.format(folder=folder)


def test_the_example_works_as_documented():
    spec = check_env(EXAMPLE, settings={"top": 5})
    best = measure(spec, "optimal")
    assert (best.reward, best.turns, best.wins) == (pytest.approx(1.0), 3.5, None)
    assert measure(spec, "random", rounds=20).reward < 0.2
    assert len((ROOT / "examples/own_env.py").read_text().splitlines()) <= 40


def test_the_command_prints_the_table(capsys):
    assert main(["guess_number", "high=3", "max_turns=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| player | return | turns | wins | episodes |"
    assert lines[-1] == "| optimal | -0.667 | 1.67 | 100.0% | 3 |"


def test_the_command_explains_what_it_cannot_do(capsys):
    assert main(["guess_number", "hihg=3"]) == 2
    error = "guess_number has no setting 'hihg'. Did you mean 'high'? It takes high, low, max_turns.\n"
    assert capsys.readouterr().err == error


def documented() -> list[tuple[str, float, float]]:
    """Environment with settings, return and turns of every optimal row in the documented table."""
    rows = re.findall(r"^\| `(.+?)` \| optimal \| (\S+) \| (\S+) \|", (ROOT / "docs/environments.md").read_text(), re.M)
    return [(command, float(reward), float(turns)) for command, reward, turns in rows]


@pytest.mark.parametrize(("command", "reward", "turns"), documented())
def test_the_documented_optimum_is_the_measured_one(command, reward, turns):
    name, *settings = command.split()
    got = measure(load_env(name, parse_settings(settings)), "optimal")
    assert (got.reward, got.turns) == (pytest.approx(reward, abs=5e-4), pytest.approx(turns, abs=5e-3))


def test_the_documented_table_covers_the_built_in_environments():
    assert {command.split()[0] for command, _, _ in documented()} == set(BUILT_IN)


def test_environments_are_checked_inside_a_running_event_loop():
    async def notebook() -> str:
        return check_env("guess_number", episodes=2).name

    assert asyncio.run(notebook()) == "guess_number"


def test_environments_import_without_torch():
    code = (
        "import sys, echelon.envs.players as p; p.measure('guess_number', 'optimal'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
