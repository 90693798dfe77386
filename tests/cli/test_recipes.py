"""What holds for every recipe and every settings file there is."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
from pathlib import Path
from typing import Any

import pytest

from echelon import cli
from echelon.config import CommandConfig, RunConfig
from echelon.config.loading import flag_of, load, settings_of, to_yaml
from echelon.errors import ConfigError

ROOT = Path(__file__).parents[2]
RECIPES = list(cli.recipes())
FILES = sorted((ROOT / "configs").glob("*/*.yaml"))
NAMES = [str(file.relative_to(ROOT / "configs")) for file in FILES]


def config_of(recipe: str) -> Any:
    return importlib.import_module(f"echelon.recipes.{recipe.replace('-', '_')}").Config


def explained(config: type) -> set[str]:
    """The fields of a dataclass, its own and inherited, that have a string under them."""
    names: set[str] = set()
    for base in config.__mro__[:-1]:
        body = ast.parse(inspect.cleandoc(inspect.getsource(base))).body[0].body
        for field, below in itertools.pairwise(body):
            said = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and said and isinstance(below.value.value, str):
                names.add(field.target.id)
    return names


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_what_it_is_and_what_every_setting_means(recipe: str) -> None:
    config = config_of(recipe)
    assert issubclass(config, CommandConfig)
    assert config.__dataclass_params__.frozen
    assert 0 < len(cli.recipes()[recipe]) <= 120
    assert {field.name for field in dataclasses.fields(config)} - explained(config) == set()


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_of_every_recipe(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([recipe, "--help"]) == 0
    out = capsys.readouterr().out
    for field in dataclasses.fields(config_of(recipe)):
        assert field.name.replace("_", "-") in out


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_of_every_recipe_ends_with_commands_that_have_settings_of_it(recipe: str) -> None:
    examples = cli._examples(recipe, importlib.import_module(f"echelon.recipes.{recipe.replace('-', '_')}"))
    assert f"echelon {recipe} " in examples
    for line in examples.splitlines():
        program, name, *words = line.partition("   ")[0].split()
        assert program == "echelon"
        flags = {word for word in words if word.startswith("--")}
        assert flags <= {flag_of(setting) for setting in settings_of(config_of(name))}, line


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_every_settings_file_needs_a_run_directory_at_most(file: Path, tmp_path: Path) -> None:
    config = load(config_of(file.parent.name), [file], ["--out", "runs/x"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(type(config), [tmp_path / "config.yaml"]) == config


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_the_rules_of_every_run_hold_in_every_recipe(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"^seed = -1: "):
        load(config_of(file.parent.name), [file], ["--out", "runs/x", "--seed", "-1"])


def test_the_documented_fields_are_found() -> None:
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    assert explained(RunConfig) == fields > {field.name for field in dataclasses.fields(CommandConfig)}
