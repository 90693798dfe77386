"""The site: what its hooks make of the pages, that nothing is left out, and (slow) that it builds without a warning."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import echelon
from echelon import cli
from echelon.config.loading import settings_of
from tests.test_docs import CODE, ROOT, columns, config_of

DOCS = ROOT / "docs"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of docs/_site."""
    monkeypatch.syspath_prepend(str(DOCS))
    return lambda name: importlib.import_module(f"_site.{name}")


def test_every_page_stands_once_in_the_contents(site: Any) -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^(?!:)[\w/-]+$", site("links").contents(index), re.MULTILINE)
    there = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")} - {"index"}
    assert sorted(listed) == sorted(there | {"reference/contributing", "reference/changes"})


@pytest.mark.parametrize(
    ("link", "becomes"),
    [
        ("[credit](credit.md#numbers)", "[credit](credit.md#numbers)"),
        ("[x](https://example.org/a.py)", "[x](https://example.org/a.py)"),
        ("[`gae`](../echelon/ops/credit.py)", "{py:obj}`gae <echelon.ops.credit.gae>`"),
        (
            "[`Learner.update`](../echelon/train/learner.py)",
            "{py:obj}`Learner.update <echelon.train.learner.Learner.update>`",
        ),
        ("[`credit.py`](../echelon/ops/credit.py)", "[`credit.py`](reference/api/echelon.ops.credit.rst)"),
        ("[file](../configs/grpo/gigpo.yaml)", "[file](reference/files/configs/grpo/gigpo.yaml.rst)"),
        ("[rules](../CONTRIBUTING.md#commits)", "[rules](reference/contributing.markdown#commits)"),
        ("```\n[`gae`](../echelon/ops/credit.py)\n```", "```\n[`gae`](../echelon/ops/credit.py)\n```"),
    ],
)
def test_links_to_source_become_links_to_the_reference(link: str, becomes: str, site: Any) -> None:
    assert site("links").rewritten(link, page=DOCS / "page.md", docname="page") == becomes


def test_links_of_a_page_in_a_folder_go_up_first(site: Any) -> None:
    link = "[`gae`](../../echelon/ops/credit.py) [yaml](../../configs/grpo/gigpo.yaml)"
    said = site("links").rewritten(link, page=DOCS / "howto" / "page.md", docname="howto/page")
    assert said.endswith("[yaml](../reference/files/configs/grpo/gigpo.yaml.rst)")


def test_the_page_about_python_lists_the_public_names() -> None:
    rows = columns((DOCS / "api.md").read_text(encoding="utf-8"), "what it is")
    assert {name for row, _ in rows for name in CODE.findall(row["name"])} == set(echelon.__all__) - {"__version__"}


@pytest.mark.parametrize("recipe", cli.recipes())
def test_every_setting_has_its_default_and_its_text_on_the_page_of_its_recipe(recipe: str, site: Any) -> None:
    pages, kind = site("pages"), config_of(recipe)
    page = pages.settings_page(recipe, "")
    options = re.findall(r"^\.\. option:: --(\S+)\n\n   (.+)$", page, re.MULTILINE)
    values = {name for name, type_ in settings_of(kind).items() if not dataclasses.is_dataclass(type_)}
    assert {flag.replace("-", "_") for flag, _ in options} == values
    assert [flag for flag, text in options if text.lstrip().startswith("Takes")] == [], "no text"


def test_a_default_that_a_recipe_sets_in_a_block_is_shown(site: Any) -> None:
    page = site("pages").settings_page("control", "")
    (said,) = re.findall(
        r"^\.\. option:: --sampling.max-tokens\n\n(?:   .*\n|\n)*?   .*(Default: \S+)\. ", page, re.MULTILINE
    )
    assert said == "Default: ``16``"


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("What `x` is: a_b* |c|.", "What \\ ``x``\\  is: a_b\\* \\|c\\|."),
        ("One\nline.\n\nTwo.", "One line.\n\nTwo."),
        ("the *next* one, 2 * 3 * 4", "the *next* one, 2 \\* 3 \\* 4"),
        ("- a\n- b\n  c", "- a\n\n- b c"),
        ("    tree\n      leaf", "::\n\n    tree\n      leaf"),
    ],
)
def test_docstrings_mean_what_they_say(text: str, becomes: str, site: Any) -> None:
    assert site("docstrings").to_rst(text) == becomes


def test_broken_links_and_things_from_outside_are_found(site: Any, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="b.html#there"></a><a href="b.html#gone"></a><a href="c.html"></a>')
    (tmp_path / "b.html").write_text(
        '<p id="there"><script src="https://cdn.example/x.js"></script><a href="https://x"></a>'
    )
    assert list(site("output").wrong(tmp_path)) == [
        "a.html: b.html#gone: there is no such place",
        "a.html: c.html: there is no such file",
        "b.html: loads https://cdn.example/x.js",
    ]


@pytest.mark.parametrize("kind", [echelon.Learner, echelon.Episode, echelon.config.RunConfig, Path, dict])
def test_a_class_is_found_where_the_standard_library_finds_it(kind: type, site: Any) -> None:
    def found(findsource: Any) -> Any:
        try:
            lines, place = findsource(kind)
        except (OSError, TypeError) as error:
            return type(error)
        return lines[place : place + 3]

    assert found(site("source").quick(inspect.findsource)) == found(inspect.findsource)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", str(DOCS), str(tmp_path / "site")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "site" / "reference" / "settings" / "archer.html").is_file()
