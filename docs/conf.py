"""How `make docs` turns these pages into a site: Sphinx, MyST for the Markdown, furo for the looks.

The pages stay plain Markdown that a code host shows. What a site needs besides lies in `_site/`: pages made from the
code, and links to source files, which become links to those pages.
"""

import functools
import inspect
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from _site import docstrings, links, output, pages  # noqa: E402

import echelon  # noqa: E402

project = "echelon"
copyright = "the echelon authors"
release = version = echelon.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown", ".markdown": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_site"]
root_doc = "index"
myst_heading_anchors = 4
suppress_warnings = ["myst.header", "ref.python"]  # the second: a name in an annotation that several classes have
highlight_language = "text"
default_role = "code"
nitpicky = True
# Annotations are shown as they are written; most of what they name is another library's, or a type variable.
nitpick_ignore_regex = [
    ("py:(class|data|exc|meth|func|attr)", ".*"),
    ("py:obj", r"(?!echelon\.).*"),
    ("py:obj", r"echelon\.rollout\.ahead\.Found"),
]

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": True, "ignore-module-all": True}
autodoc_preserve_defaults = True
autodoc_use_type_comments = False
# Asked for again and again of the same things; where a class stands is found by parsing its whole file.
inspect.findsource = functools.cache(inspect.findsource)
python_use_unqualified_type_names = True
toc_object_entries = False
add_module_names = False

html_theme = "furo"
html_title = "echelon"
html_static_path = ["_site/static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False


def setup(app):
    """Write the pages that come from code, then hook into how pages are read and what is written."""
    pages.write(HERE)
    app.connect("source-read", links.on_page)
    app.connect("autodoc-process-docstring", docstrings.on_docstring)
    app.connect("autodoc-skip-member", docstrings.on_member)
    app.connect("env-updated", docstrings.on_read, priority=900)
    app.connect("build-finished", output.check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
