"""Settings of the documentation's site; ``python3 run.py docs`` builds it, with warnings as errors."""

import importlib.metadata
import re

REPOSITORY = "https://github.com/dspy-mlflow-async/dspy-mlflow-async/blob/main/"

project = "dspy-mlflow-async"
author = "the authors of dspy-mlflow-async"
release = importlib.metadata.version("dspy-mlflow-async")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_llms_txt",
    "sphinxcontrib.mermaid",
]
html_theme = "furo"
html_title = project
html_static_path: list[str] = []

myst_enable_extensions = ["colon_fence", "deflist"]
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a page may go from its title to a third level

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_rtype = False
copybutton_prompt_text = "$ "
mermaid_init_js = ""

llms_txt_summary = (
    "MLflow tracing for DSPy programs that run concurrently: one whole trace per call, one right owner per run."
)


def link_to_repository(_app, _name: str, source: list[str]) -> None:
    """Turn a page's links to files outside of ``docs/``, which a code host follows, into addresses there."""
    source[0] = re.sub(r"]\(\.\./([^)]+)\)", rf"]({REPOSITORY}\1)", source[0])


def setup(app) -> None:
    """Register what reads the pages before Sphinx does."""
    app.connect("source-read", link_to_repository)
