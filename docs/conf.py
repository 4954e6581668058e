"""Sphinx configuration: `make docs` builds these pages into build/docs."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import generate  # noqa: E402

import llamax  # noqa: E402

generate.generate(DOCS / "generated")

project = "llamax"
author = "the llamax authors"
release = version = llamax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["drawings/*.md"]
highlight_language = "none"  # blocks in docstrings are drawings more often than code
html_theme = "furo"
html_title = f"llamax {release}"
html_static_path = ["_static"]
html_css_files = ["llamax.css"]
html_copy_source = False
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True, "ignore-module-all": True}
autodoc_preserve_defaults = True
toc_object_entries = False  # thousands: each page of each module would copy them for its sidebar
autodoc_mock_imports = ["lm_eval"]  # an optional package
# Several classes share a member's name; a page links to modules, not to every such name.
suppress_warnings = ["ref.python"]
