"""How Sphinx makes the pages of this folder: `make docs`. Nothing is fetched, and warnings are errors."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

import keepless

project = "Keepless"
author = "The Keepless authors"
project_copyright = author
release = keepless.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["examples"]
default_role = "py:obj"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = "Keepless"
html_show_sphinx = False
html_copy_source = False

PAGE = re.compile(r"`docs/([a-z0-9-]+)\.md`")
"""Pages name each other as paths from the repository's root; here these are links."""


def link_pages(app: Sphinx, name: str, text: list[str]) -> None:
    """Makes links of the pages that a page names."""
    known = {path.stem for path in Path(app.srcdir).glob("*.md")}
    text[0] = PAGE.sub(lambda found: f"[{found[1]}]({found[1]}.md)" if found[1] in known else found[0], text[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", link_pages)
