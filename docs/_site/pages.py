"""Pages made from the code: every setting of every recipe, every public module, and the files that pages link to.

They are written into `reference/`, which nobody edits and git does not keep.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_origin

from _site.docstrings import to_rst
from _site.links import ROOT, ROOT_PAGES, is_module, module_name, rewritten, shown_files
from echelon import cli
from echelon.config import loading

LANGUAGES = {".py": "python", ".yaml": "yaml", ".sbatch": "bash"}


def write(docs: Path) -> None:
    """Write all of them, and remove those that nothing asks for any more."""
    wanted = {docs / "reference" / name: text for name, text in everything()}
    for old in (docs / "reference").rglob("*.*"):
        if old.is_file() and old not in wanted:
            old.unlink()
    for path, text in wanted.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def everything() -> Iterator[tuple[str, str]]:
    """(path below reference/, text) of every page."""
    for name, stem in ROOT_PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        linked = rewritten(text, page=ROOT / name, docname=f"reference/{stem}")
        yield f"{stem}.markdown", f"---\norphan: true\n---\n\n{linked}"
    for recipe, summary in cli.recipes().items():
        yield f"settings/{recipe}.rst", settings_page(recipe, summary)
    for file in sorted((ROOT / "echelon").rglob("*.py")):
        if is_module(file):
            yield f"api/{module_name(file)}.rst", api_page(module_name(file))
    for file in shown_files():
        yield f"files/{file.relative_to(ROOT).as_posix()}.rst", file_page(file)


def heading(title: str, mark: str = "=") -> str:
    """A title with its line."""
    return f"{title}\n{mark * len(title)}\n\n"


def api_page(module: str) -> str:
    """A module, from its docstrings."""
    return f":orphan:\n\n{heading(f'``{module}``')}.. automodule:: {module}\n"


def file_page(file: Path) -> str:
    """A file, as it is."""
    name = file.relative_to(ROOT).as_posix()
    up = "../" * (name.count("/") + 3)
    language = LANGUAGES.get(file.suffix, "text")
    return f":orphan:\n\n{heading(f'``{name}``')}.. literalinclude:: {up}{name}\n   :language: {language}\n"


def settings_page(recipe: str, summary: str) -> str:
    """Every setting of a recipe: its flag, what it takes, its default, and the text under the field."""
    kind = importlib.import_module(f"echelon.recipes.{recipe.replace('-', '_')}").Config
    named = f"``echelon {recipe}``: {to_rst(summary)}\n\n.. program:: echelon {recipe}\n\n"
    return f":orphan:\n\n{heading(recipe)}{named}" + "".join(_block(kind, loading.settings_of(kind)))


def _block(kind: type, settings: dict[str, Any], prefix: str = "", values: Any = None) -> Iterator[str]:
    """The settings of a block, then those of the blocks in it, each under its own heading."""
    inner, own = [], _strings(kind)
    for entry in sorted(dataclasses.fields(kind), key=lambda entry: entry.name not in own):  # what all have comes last
        default = loading.class_default(entry) if values is None else getattr(values, entry.name)
        if dataclasses.is_dataclass(settings[name := prefix + entry.name]):
            inner.append((entry.name, settings[name], default))
        else:
            yield _setting(name, settings[name], default, said_under(kind, entry.name))
    for field, block, default in inner:
        yield heading(f"``{prefix}{field}``", "-")
        yield _paragraphs(said_under(kind, field), summary_of(block))
        given = None if default is dataclasses.MISSING else default
        yield from _block(block, settings, f"{prefix}{field}.", given)


def summary_of(block: type) -> str:
    """The first paragraph of a block's docstring."""
    return inspect.cleandoc(block.__doc__ or "").partition("\n\n")[0]


def _paragraphs(*texts: str) -> str:
    return "".join(f"{to_rst(text)}\n\n" for text in texts if text)


def _setting(name: str, kind: Any, default: Any, said: str) -> str:
    worth = "It has to be given" if default is dataclasses.MISSING else f"Default: ``{shown(default)}``"
    takes = "keys and values" if get_origin(kind) is dict else to_rst(loading.expected(kind))
    body = f"{to_rst(said)}\n\nTakes {takes}. {worth}. In a file: ``{name}``.\n\n"
    return f".. option:: {loading.flag_of(name)}\n\n{textwrap.indent(body, '   ')}"


def shown(value: Any) -> str:
    """A default as a file of settings has it; nothing is shown as empty."""
    return "empty" if value in ("", (), {}) else "none" if value is None else loading.show(value)


@cache
def said_under(kind: type, name: str) -> str:
    """The string under a field, in the class that declares it last."""
    for owner in kind.__mro__:
        if dataclasses.is_dataclass(owner) and (said := _strings(owner).get(name)):
            return said
    return ""


@cache
def _strings(owner: type) -> dict[str, str]:
    """Field → the string under it, for the fields that a class itself declares."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    found, field = {}, ""
    for line in getattr(node, "body", ()):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            field = line.target.id
            continue
        if field and isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
            found[field] = inspect.cleandoc(str(line.value.value))
        field = ""
    return found
