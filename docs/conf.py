"""How the documentation is built: Sphinx, Markdown by MyST, docstrings by autodoc. scripts/docs runs it."""

from __future__ import annotations

from importlib.metadata import version as version_of
from typing import Any

from mshare.cli.explain import MEANINGS

project = "msharefs"
version = release = version_of("msharefs")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click"]
html_theme = "furo"
html_title = f"msharefs {version}"
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
default_role = "code"
toc_object_entries = False
nitpicky = False
suppress_warnings = ["myst.xref_missing", "myst.header"]
"""Parts of the READMEs link to files beside them."""


def put_errors(_app: object, document: str, source: list[str]) -> None:
    """The table of errors has what ``mshare explain`` says."""
    if document == "reference/errors":
        rows = "".join(f"## {m.name}\n\n{m.means}\n\n**Cure:** {m.cure}\n\n" for m in MEANINGS.values())
        source[0] = source[0].replace("@ERRORS@", rows)


def setup(app: Any) -> None:  # noqa: ANN401 - Sphinx's own object
    """Called by Sphinx."""
    app.connect("source-read", put_errors)
