"""The documentation names files, functions, tests, settings and defaults: all of them exist, and are what it says."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from echelon import cli
from echelon.config.loading import EVERYWHERE, load, scalar, settings_of
from echelon.train.checkpoint import MAY_CHANGE
from echelon.train.launcher import _parse

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
ALGORITHMS = sorted((ROOT / "docs" / "algorithms").glob("*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
EXAMPLES = {"path.py", "path/to/file.py", "my_game.py", "file.py"}
"""File names that stand for a file of the reader's."""

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)

every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)
every_algorithm = pytest.mark.parametrize("page", ALGORITHMS, ids=[page.stem for page in ALGORITHMS])


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


@cache
def names_in(file: Path) -> frozenset[str]:
    """Every function, class and top-level name of a file; `Class.member` for what is in a class."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        for name in named(node):
            found.add(name)
            found |= {f"{name}.{inner}" for below in getattr(node, "body", []) for inner in named(below)}
    return frozenset(found)


def named(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def file_named(name: str) -> Path | None:
    """A file as the pages write it: from the repository, or from echelon/."""
    return next((path for path in (ROOT / name, ROOT / "echelon" / name) if path.is_file()), None)


def anchors(page: Path) -> set[str]:
    """What a link may point to within a page, as GitHub names it."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> Iterator[str]:
    for shown, target in LINK.findall(text):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        where, _, anchor = target.partition("#")
        path = (page.parent / where).resolve() if where else page
        name = shown.strip("`")
        if not path.exists():
            yield f"{target}: there is no such file"
        elif anchor and anchor not in anchors(path):
            yield f"{target}: there is no such heading"
        elif shown != name and path.suffix == ".py" and not name.endswith(".py") and name not in names_in(path):
            yield f"{target}: does not define {name}"


def broken_names(text: str) -> Iterator[str]:
    """`file.py:name` and `file.py` that do not exist."""
    for code in CODE.findall(text):
        match = re.fullmatch(r"([\w/.]+\.py)(?::([\w.]+))?", code)
        if match is None or match[1] in EXAMPLES:
            continue
        file = file_named(match[1])
        if file is None:
            if "/" in match[1] or match[2]:
                yield f"{code}: there is no such file"
        elif match[2] and match[2] not in names_in(file):
            yield f"{code}: there is no such name in it"


@cache
def classes() -> dict[str, Path]:
    """Class → its file, of all of echelon; those whose names are not unique are left out."""
    found: dict[str, list[Path]] = {}
    for file in (ROOT / "echelon").rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(file)
    return {name: files[0] for name, files in found.items() if len(files) == 1}


OPS = {file.stem: file for file in (ROOT / "echelon" / "ops").glob("*.py") if file.stem not in ("__init__", "sampling")}


@cache
def settings_of_all() -> frozenset[str]:
    """The dotted names of the settings of every recipe."""
    return frozenset(name for recipe in cli.recipes() for name in settings_of(config_of(recipe)))


def broken_members(text: str) -> Iterator[str]:
    """`Class.member` and `losses.function` that do not exist."""
    for code in CODE.findall(text):
        match = re.fullmatch(r"(\w+)\.(\w+)", code)
        if match and match[1] in OPS and match[2] not in names_in(OPS[match[1]]) and code not in settings_of_all():
            yield f"{code}: there is no such function"
        elif match and match[1] in classes() and code not in names_in(classes()[match[1]]):
            yield f"{code}: there is no such member"


@cache
def names_of_tests() -> frozenset[str]:
    files = (ROOT / "tests").rglob("test_*.py")
    return frozenset(name for file in files for name in names_in(file) if name.startswith("test_"))


@every_page
def test_relative_links_resolve_and_linked_names_are_defined_there(page: Path) -> None:
    assert list(broken_links(page, prose(page))) == []


@every_page
def test_files_functions_and_members_that_are_mentioned_exist(page: Path) -> None:
    assert list(broken_names(prose(page))) + list(broken_members(prose(page))) == []


@every_page
def test_tests_that_are_mentioned_exist(page: Path) -> None:
    mentioned = {code for code in CODE.findall(prose(page)) if re.fullmatch(r"test_\w+", code)}
    assert mentioned - names_of_tests() == set()


def columns(text: str, heading: str) -> Iterator[tuple[dict[str, str], str]]:
    """The rows of every table with a column of this heading, as heading → cell."""
    heads: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] if line.startswith("|") else []
        if not cells:
            heads = []
        elif not heads:
            heads = cells
        elif heading in heads and set("".join(cells)) - set("-:"):
            yield dict(zip(heads, cells, strict=True)), line


def config_of(recipe: str) -> Any:
    return importlib.import_module(f"echelon.recipes.{recipe.replace('-', '_')}").Config


def defaults(recipe: str) -> Any:
    """The settings of a recipe to which only what has no default was given."""
    known = settings_of(config_of(recipe))
    needed = {"--out": "x", "--model.path": "x", "--adapter": "x", "--env" if "env" in known else "--data.path": "x"}
    needed |= {"--responder.path": "x", "--solver.model.path": "x"}
    return load(
        config_of(recipe), [], [word for flag in needed.items() if flag[0][2:] in known for word in map(str, flag)]
    )


def wrong_settings(recipe: str, text: str) -> Iterator[str]:
    """Settings in a "setting" column that the recipe does not have, and defaults beside them that are others."""
    known, config = settings_of(config_of(recipe)), defaults(recipe)
    for row, line in columns(text, "setting"):
        names = [re.split(r"[:= ]", code)[0] for code in CODE.findall(row["setting"])]
        yield from (f"{recipe} has no setting {name}" for name in names if name not in known)
        said = [value.strip('"') for value in row["default"].split(", ")] if "default" in row else []
        if said and len(said) != len(names):
            yield f"as many defaults as settings, please: {line}"
        for name, value in zip(names, said, strict=False):
            actual = attrgetter(name)(config) if name in known else None
            if actual != (None if value == "none" else scalar(value) if value else ""):
                yield f"the default of {name} is {actual}, not {value}"


@every_algorithm
def test_settings_and_defaults_of_an_algorithm_are_those_of_its_recipe(page: Path) -> None:
    assert page.stem in cli.recipes()
    assert list(columns(prose(page), "default")), "a page about an algorithm has a table of its defaults"
    assert list(wrong_settings(page.stem, prose(page))) == []


def commands(page: Path) -> list[list[str]]:
    """Every `echelon <recipe> …` line in the blocks of code of a page."""
    blocks = FENCE.findall(page.read_text(encoding="utf-8"))
    lines = [line.partition("#")[0].split() for block in blocks for line in block.splitlines()]
    found = [words[1:] for words in lines if words[:1] == ["echelon"] and len(words) > 1]
    return [_parse(words[1:])[1] if words[0] == "launch" else words for words in found]


@every_page
def test_commands_name_recipes_flags_and_settings_files_that_exist(page: Path) -> None:
    for recipe, *words in commands(page):
        if recipe.startswith(("-", "<")) or recipe in ("list", "doctor", "completion"):
            continue
        assert recipe in cli.recipes(), f"there is no recipe {recipe}"
        flags = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
        everywhere = {flag.removeprefix("--").replace("-", "_") for flag in EVERYWHERE}
        assert flags - settings_of(config_of(recipe)).keys() - everywhere - {"help", "traceback"} == set()
        assert [word for word in words if word.startswith("configs/") and not (ROOT / word).is_file()] == []


def excerpts(page: Path) -> Iterator[tuple[Path, list[str]]]:
    """Blocks of Python introduced by "From [`file.py`](…)": the file, and the lines shown, without elisions."""
    pattern = re.compile(r"^From \[`[\w.]+`\]\(([^)]+)\)[^`]*\n\n```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
    for target, block in pattern.findall(page.read_text(encoding="utf-8")):
        lines = [line.strip() for line in block.splitlines()]
        yield (page.parent / target).resolve(), [line for line in lines if line not in ("", "...")]


@every_page
def test_code_that_is_quoted_stands_in_its_file_in_this_order(page: Path) -> None:
    for file, lines in excerpts(page):
        source = iter([line.strip() for line in file.read_text(encoding="utf-8").splitlines()])
        missing = next((line for line in lines if line not in source), None)
        assert missing is None, f"{file.name} does not say, after the lines before: {missing}"


def test_the_steps_in_the_architecture_are_quoted() -> None:
    assert [file.name for file, _ in excerpts(ROOT / "docs" / "architecture.md")] == ["grpo.py", "archer.py"]


def test_the_architecture_names_every_module_in_its_layer() -> None:
    from tests.test_layering import layer

    page = ROOT / "docs" / "architecture.md"
    listed = {
        (page.parent / target).resolve(): int(row["layer"])
        for row, _ in columns(prose(page), "layer")
        for _, target in LINK.findall(row["file"])
    }
    there = {file for file in (ROOT / "echelon").rglob("*.py") if names_in(file) - {"__all__"}}
    there -= {ROOT / "echelon" / "__init__.py"}  # of all of them
    assert {str(file.relative_to(ROOT)) for file in there ^ listed.keys()} == set()
    for file, number in listed.items():
        assert layer(".".join(file.relative_to(ROOT).with_suffix("").parts)) == number, file.name


def test_what_may_change_within_a_run_is_what_the_page_says() -> None:
    said = {
        code
        for row, _ in columns(prose(ROOT / "docs" / "resume.md"), "effect")
        for code in CODE.findall(row["setting"])
    }
    some_recipe_has = {name for recipe in cli.recipes() for name in settings_of(config_of(recipe))}
    assert said == MAY_CHANGE & some_recipe_has


def test_every_page_can_be_reached_from_the_index() -> None:
    reached, new = set[Path](), {ROOT / "docs" / "index.md"}
    while new:
        reached |= new
        links = {(page.parent / t.partition("#")[0]).resolve() for page in new for _, t in LINK.findall(prose(page))}
        new = {link for link in links if link.suffix == ".md"} - reached
    assert {str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")} <= {
        str(page.relative_to(ROOT)) for page in reached
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[gone](nowhere.md)", "nowhere.md: there is no such file"),
        ("[there](docs/engine.md#nothing)", "docs/engine.md#nothing: there is no such heading"),
        ("[`los_fn`](echelon/recipes/sft.py)", "echelon/recipes/sft.py: does not define los_fn"),
        ("[`pakc`](echelon/data/packing.py)", "echelon/data/packing.py: does not define pakc"),
        ("`recipes/sft.py:los_fn`", "recipes/sft.py:los_fn: there is no such name in it"),
        ("`recipes/stf.py`", "recipes/stf.py: there is no such file"),
        ("`losses.nl`", "losses.nl: there is no such function"),
        ("`Episode.rewards`", "Episode.rewards: there is no such member"),
    ],
)
def test_a_name_that_does_not_exist_is_found(text: str, expected: str) -> None:
    assert [*broken_links(ROOT / "README.md", text), *broken_names(text), *broken_members(text)] == [expected]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("| `group_sise` | 8 |", ["grpo has no setting group_sise", "the default of group_sise is None, not 8"]),
        ("| `group_size` | 9 |", ["the default of group_size is 8, not 9"]),
        ("| `group_size`, `policy.dual_clip` | 8, none |", []),
        ("| `group_size`, `scale` | 8 |", ["as many defaults as settings, please: | `group_size`, `scale` | 8 |"]),
    ],
)
def test_a_wrong_default_is_found(row: str, expected: list[str]) -> None:
    assert list(wrong_settings("grpo", f"| setting | default |\n|---|---|\n{row}")) == expected
