"""The site is built without a warning, and has what it promises: names, warnings, pages for machines."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dspy_mlflow_async

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "dspy_mlflow_async"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the folder of the site, built as ``python3 run.py docs`` builds it."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "-b", "html", "docs", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_every_public_name_is_in_the_reference(site):
    """Each name that the package exports has its entry on the page of the reference."""
    entries = set(re.findall(r'id="dspy_mlflow_async\.(\w+)"', (site / "api.html").read_text(encoding="utf-8")))

    assert set(dspy_mlflow_async.__all__) == entries & set(dspy_mlflow_async.__all__)


def test_machines_get_the_pages_as_text(site):
    """``llms.txt`` names the pages, and ``llms-full.txt`` has them whole."""
    names = (site / "llms.txt").read_text(encoding="utf-8")
    whole = (site / "llms-full.txt").read_text(encoding="utf-8")

    assert all(page in names for page in ("getting-started", "moving-from-mlflow", "troubleshooting"))
    assert "a drop-in for ``mlflow.dspy.autolog``" in whole or "autolog()  # in place of" in whole


def warnings_of(path):
    """Yield the constant text of each warning and error that a module logs, up to the first thing that differs."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func.value) == "logger"
            and node.func.attr in {"warning", "error", "exception"}
            and isinstance(node.args[0], ast.Constant)
        ):
            pieces = re.split(r"%[srd]", node.args[0].value.removeprefix("dspy-mlflow-async: "))
            yield max(pieces, key=len).strip()


def test_every_warning_has_its_words_on_the_page():
    """Whoever searches the page of troubles for a warning's words finds them, with the cause and what to do."""
    page = " ".join((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").replace("`", "").split())
    missing = {
        f"{path.relative_to(SOURCE)}: {text}"
        for path in SOURCE.rglob("*.py")
        for text in warnings_of(path)
        if " ".join(text.replace("`", "").split()) not in page
    }

    assert set() == missing
