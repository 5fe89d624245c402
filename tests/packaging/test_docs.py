"""The words that users read are true: code in the docs runs, links lead somewhere, CI runs the README's command."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint, text_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("celery", "commands", "concurrency", "getting-started", "langgraph", "testing")
    ),
]
# Run in one process, the second on what the first has left in the store.
AFTER = {"lineage": "harvest"}
FIELD = re.compile(r"\[\[ ## (\w+) ## ]]")


def code_of(page):
    """The Python of a page, all blocks one after the other."""
    return "\n\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))


def answer(body):
    """Fills every field that the prompt asks for."""
    fields = dict.fromkeys(FIELD.findall(text_of(body).rpartition("Respond with")[2]))
    return "\n\n".join(f"[[ ## {name} ## ]]\nan answer" for name in fields)


@pytest.mark.parametrize("page", [*RUN, *(ROOT / "docs" / f"{name}.md" for name in AFTER)], ids=lambda page: page.stem)
def test_code_runs(page, tmp_path):
    """The page's code runs as it stands, against an endpoint that answers everything."""
    code = code_of(page)
    if page.stem in AFTER:
        code += "\n\n" + code_of(ROOT / "docs" / f"{AFTER[page.stem]}.md")
    with LocalEndpoint(answer) as endpoint:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            cwd=tmp_path,
            env={
                **os.environ,
                "OPENAI_API_KEY": "none",
                "OPENAI_API_BASE": endpoint.api_base,
                "OPENAI_BASE_URL": endpoint.api_base,
                "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
                "DSPY_MLFLOW_ASYNC_SPOOL": str(tmp_path / "spool"),
                "DSPY_CACHEDIR": str(tmp_path / "cache"),
            },
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )

    assert done.returncode == 0, done.stderr[-3000:]


def test_links_lead_somewhere():
    """A link to a file of this repository leads to a file that is there."""
    links = {
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    }

    assert set() == links


def test_first_screen_has_two_commands_and_ci_runs_the_second():
    """The README begins with the demo's command and the tests', and ``.ci/run`` runs the latter to the letter."""
    first = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Quick start")[0]

    assert ["python3 run.py demo", "python3 run.py test"] == re.findall(
        r"^```console\n\$ (.*)\n```$", first, re.MULTILINE
    )
    assert "step python3 run.py test\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert len(first.splitlines()) <= 32


def test_run_py_explains_itself():
    """``run.py`` without a name, and with a name that tox does not know, says what there is."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py")], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 2
    assert all(name in done.stdout for name in ("demo", "test", "lint", "typing", "lowest", "bench"))


def test_run_py_asks_for_chromium_before_it_installs_anything(tmp_path):
    """``run.py ui`` on a machine without a browser says so at once, in one sentence."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "ui"], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PATH": str(tmp_path), "DSPY_MLFLOW_ASYNC_CHROMIUM": str(tmp_path / "chromium")},
    )  # fmt: skip

    assert (1, "") == (done.returncode, done.stdout)
    assert re.fullmatch(r"There is no Chromium: install it .*apt-get install -y chromium.*\.\n", done.stderr)


def test_run_py_may_begin_twice_at_once(monkeypatch, tmp_path):
    """Two of them that install tox do not write into one folder: the second takes what the first has made."""
    run_py = load_run_py()
    monkeypatch.setattr(run_py, "HERE", tmp_path)
    monkeypatch.setattr(run_py.os, "getpid", lambda: len(made))
    made = []

    def pip(command, **_):
        if "--target" in command:
            target = Path(command[command.index("--target") + 1])
            made.append(target)
            if len(made) == 1:
                assert run_py._tox() is not None  # the other one, which is faster
            target.mkdir(parents=True)
        return 0

    monkeypatch.setattr(run_py.subprocess, "call", pip)
    folder = run_py._tox()

    assert run_py.TOX == (folder / "complete.txt").read_text(encoding="utf-8")
    assert folder not in made
    assert [folder] == list(folder.parent.iterdir())


def load_run_py():
    spec = importlib.util.spec_from_file_location("run_py", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_run_py_keeps_out_of_the_way_of_tox(monkeypatch):
    """``run.py`` and a ``tox run`` beside it, of another Python perhaps, have environments of their own."""
    run_py = load_run_py()
    called = []
    monkeypatch.setattr(run_py.subprocess, "call", lambda command, **_: called.append(command) or 0)
    run_py._run(Path("tox"), "lint", ["src"])

    assert [str(ROOT / ".tox" / "run")] * 2 == [command[command.index("--workdir") + 1] for command in called]
    assert ["--", "src"] == called[1][-2:]
