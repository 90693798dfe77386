"""The command line, over recipes made for the purpose: what it prints, where, and its exit status."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from echelon import __version__, cli

ROOT = Path(__file__).parents[2]

COUNT = '''\
"""Counts to a number. The first line is the summary.

And more is said below it.
"""
from dataclasses import dataclass
from echelon.config import OptimConfig, RunConfig, demand


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of counting."""

    to: int = 3
    """Where counting ends."""
    optim: OptimConfig = OptimConfig()
    """Optimizer."""

    def __post_init__(self):
        super().__post_init__()
        demand(self, "to", self.to < 100, "nobody counts that far. Give less than 100.")


def main(config):
    print("counted to", config.to, config.dry_run)
'''

BREAK = '''\
"""Breaks in the way it is told."""
from dataclasses import dataclass
from echelon.errors import DataError


@dataclass(frozen=True)
class Config:
    how: str = "explained"
    """How."""


def main(config):
    if config.how == "explained":
        raise DataError("x.jsonl is empty: nothing can be learned.\\n  Give another file.")
    if config.how == "interrupted":
        raise KeyboardInterrupt
    raise ZeroDivisionError("a defect")
'''


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A package with two recipes, and two modules that are none."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "some_recipes").mkdir()
    files = {
        "count_up": COUNT,
        "break": BREAK,
        "_shared": COUNT,
        "tables": '"""No recipe."""\nimport nowhere\n',
        "__init__": "",
    }
    for name, text in files.items():
        (folder / "some_recipes" / f"{name}.py").write_text(text)
    sys.path.insert(0, str(folder))
    yield "some_recipes"
    sys.path.remove(str(folder))


def test_recipes_are_modules_with_a_config_and_a_main(package: str) -> None:
    assert cli.recipes(package) == {
        "break": "Breaks in the way it is told.",
        "count-up": "Counts to a number. The first line is the summary.",
    }


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_recipes_and_commands(words: list[str], package: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words, package=package) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: echelon <recipe> [file.yaml ...] [--key value ...]\n")
    assert "  count-up  Counts to a number. The first line is the summary.\n" in out
    assert "echelon doctor" in out
    assert err == ""


def test_help_says_what_to_begin_with_and_tells_what_trains_from_what_looks(
    package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert out.index("to begin with\n  echelon quickstart") < out.index("recipes that train\n")
    trains, others = out.split("recipes that train\n")[1].split("commands that prepare, test, use and look at\n")
    assert [line.split()[0] for line in trains.splitlines() if line] == [
        *("archer", "control", "control-mlp", "control-reward", "dpo", "feedback", "grpo", "ppo", "rank"),
        *("responder", "reward", "sft", "strategist", "tosca"),
    ]
    listed = [line.split()[0] for line in others.split("\nalso\n")[0].splitlines() if line]
    assert listed == ["chat", "compare", "control-data", "evaluate", "merge", "quickstart", "report", "runs", "watch"]


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", ["doctor", "launch", "completion", "list"])
def test_commands_that_are_no_recipes_have_help_too(
    command: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, flag]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: echelon {command}")
    assert err == ""


def test_list_is_one_line_per_recipe(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"], package=package) == 0
    assert capsys.readouterr().out == (
        "  break     Breaks in the way it is told.\n  count-up  Counts to a number. The first line is the summary.\n"
    )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"echelon {__version__}\n"
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


def test_a_recipe_runs_with_files_and_flags(package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("to: 5\nout: runs/a")
    (tmp_path / "b.yaml").write_text("to: 6")
    files = [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    assert cli.main(["count_up", *files], package=package) == 0
    assert cli.main(["count-up", *files, "--to", "7", "--dry-run"], package=package) == 0
    assert capsys.readouterr().out == "counted to 6 False\ncounted to 7 True\n"


def test_help_of_a_recipe_shows_every_setting(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["count_up", "--to", "5", "--help"], package=package) == 0
    out = capsys.readouterr().out
    assert "usage: echelon count-up [file.yaml ...]" in out
    assert "Counts to a number." in out
    for words in ("--to INT", "Where counting ends. (default: 3)", "--optim.lr FLOAT", "Run directory", "(required)"):
        assert words in out


def test_help_ends_with_examples(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["count-up", "--help"], package=package) == 0
    assert capsys.readouterr().out.splitlines()[-5:-3] == [
        "examples",
        "  echelon count-up settings.yaml --out runs/count-up",
    ]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_recipes_and_settings(shell: str, package: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell], package=package) == 0
    out = capsys.readouterr().out
    for word in ("count-up", "break", "--optim.lr"):
        assert word in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["completion"], "completion of no shell: a script is for one shell. Give bash, zsh, tcsh, fish."),
        (["cuont_up"], "unknown recipe 'cuont-up'. Did you mean 'count-up'? There are: break, count-up."),
        (["sixty"], "unknown recipe 'sixty'. There are: break, count-up."),
        (["doctr"], "unknown recipe 'doctr'. Did you mean 'doctor'? There are: break, count-up."),
        (["tables"], "unknown recipe 'tables'. There are: break, count-up."),
        (["--to", "3"], "unknown flag '--to'. The recipe comes first: echelon <recipe> --to 3"),
        (["count_up", "no.yaml"], "no.yaml: no such file."),
        (["count_up"], "out is missing: nothing sets it. Put it in a settings file, or give --out."),
        (["count_up", "--ot", "x"], "unknown flag '--ot'. Did you mean '--out'?"),
        (["count_up", "--out", "x", "--to", "100"], "to = 100: nobody counts that far. Give less than 100."),
        (["count_up", "-o", "x"], "unexpected '-o'. Flags look like --key value."),
        (["break"], "x.jsonl is empty: nothing can be learned. Give another file."),
    ],
)
def test_an_explained_error_is_one_line_and_exit_status_2(
    words: list[str], message: str, package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words, package=package) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"{message}\n")


def test_traceback_shows_where_an_explained_error_was_raised(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["break", "--traceback"], package=package) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert "echelon.errors.DataError: x.jsonl is empty" in err


def test_an_interruption_is_one_line_and_exit_status_130(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["break", "--how", "interrupted"], package=package) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_defects_fly(package: str) -> None:
    with pytest.raises(ZeroDivisionError, match="a defect"):
        cli.main(["break", "--how", "defective"], package=package)


def test_doctor_names_versions_device_threads_and_extras(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    rows = dict(line.strip().split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["echelon"] == __version__
    assert rows["torch"] == metadata.version("torch")
    assert rows["threads"].startswith("1 of ")
    assert "device" in rows


def test_doctor_knows_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cli.EXTRAS.keys() == project["optional-dependencies"].keys()
    for extra, distribution in cli.EXTRAS.items():
        assert any(line.startswith(distribution) for line in project["optional-dependencies"][extra])


def shell(command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ECHELON": f"{sys.executable} -m echelon"}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], env=environment, capture_output=True, text=True, check=False
    )


def test_the_module_is_the_command() -> None:
    done = shell("$ECHELON --version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"echelon {__version__}\n", "")
    done = shell("$ECHELON nothing")
    assert done.returncode == 2
    assert done.stderr.startswith("unknown recipe 'nothing'.")


def test_a_reader_who_leaves_early_hears_nothing_more() -> None:
    done = shell("{ sleep 0.5; $ECHELON --help; } | true")
    assert done.stderr == ""
    assert done.returncode == 141
