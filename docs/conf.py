"""Sphinx configuration; `make docs` builds with warnings as errors."""

import re
from importlib.metadata import version as installed_version

project = "skode"
author = "The skode developers"
copyright = f"2026, {author}"
release = installed_version("skode")
version = release

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_default_options = {
    # Metadata routing and `set_output`, which scikit-learn's own pages describe.
    "exclude-members": ", ".join(
        [
            "get_metadata_routing",
            "set_fit_request",
            "set_inverse_transform_request",
            "set_output",
            "set_partial_fit_request",
            "set_predict_request",
            "set_predict_proba_request",
            "set_score_request",
            "set_transform_request",
        ]
    ),
}
numpydoc_show_class_members = False  # the template of a class lists its members

html_theme = "pydata_sphinx_theme"
html_title = "skode"
html_theme_options = {
    "show_prev_next": False,
    "show_toc_level": 2,
}

LABELLED = re.compile(r":ref:`([^<`]+?)(?:\s*<[^>]+>)?`", re.DOTALL)

# A word that ends in "_", as fitted attributes do, is a link to reStructuredText.
FITTED = re.compile(r"(?<![`\w])([a-z]\w*)_(?=[,)])")


def escape_fitted(app, what, name, obj, options, lines):
    """Let shapes such as (n_samples, state_size_) stand without backticks."""
    lines[:] = [FITTED.sub(r"\1\_", line) for line in lines]


def unlink_inherited(app, what, name, obj, options, lines):
    """Keep the words of scikit-learn's references, whose labels are not ours."""
    if (getattr(obj, "__module__", None) or "").startswith("sklearn"):
        lines[:] = LABELLED.sub(r"\1", "\n".join(lines)).split("\n")


def setup(app):
    app.connect("autodoc-process-docstring", unlink_inherited)
    app.connect("autodoc-process-docstring", escape_fitted)
