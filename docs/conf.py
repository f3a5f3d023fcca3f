"""Configuration of Sphinx; ``make docs`` builds."""

from __future__ import annotations

import chunkattn

project = "chunkattn"
author = "the chunkattn developers"
version = release = chunkattn.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "myst_parser", "numpydoc"]
exclude_patterns = ["_build"]
default_role = "literal"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings tell more than Array = Any
numpydoc_show_class_members = False

html_title = "chunkattn"
html_show_sourcelink = False
