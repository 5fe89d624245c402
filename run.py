"""Runs the demo, the tests or any other tox environment on a machine that has nothing but Python and pip.

    python3 run.py demo
    python3 run.py test

Everything it needs goes into .tox/ beside this file, tox first. The system's Python is left as it is, so it works
where pip may not touch that (PEP 668). Arguments after the name are passed on: python3 run.py test -k parallel
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOX = "tox>=4.24,<5"
OLDEST, NEWEST = (3, 10), (3, 13)
NAMES = {
    "demo": "trace a DSPy program under concurrency and check every span (about half a minute, once installed)",
    "test": "run the tests against the built wheel",
    "quick": "run the heart's tests and a few of each room, in about a minute",
    "lint": "check style and format",
    "typing": "check types",
    "lowest": "run the tests on the lowest supported versions of DSPy and MLflow",
    "clean": "try a clean install: doctor, an evaluation, its report, the demo",
    "light": "run what applies with mlflow-tracing alone, against a server of another environment",
    "ray": "evaluate on a local Ray cluster and over two machines, which are network namespaces (Linux, as root)",
    "dask": "evaluate on a local Dask cluster",
    "newest": "run the tests on the newest DSPy and MLflow, pre-releases too",
    "drill": "take the private names of DSPy and MLflow away, one by one, and see that a program runs on",
    "docs": "build the documentation's site, with warnings as errors",
    "bench": "measure what tracing costs",
    "audit": "measure what an audit of a store of many traces costs (--traces 100000)",
    "faults": "try what may go wrong, and show where every trace is (two to three minutes; --long for hours)",
    "ui": "look at MLflow's pages in a headless Chromium, and save the pictures of the docs",
    "tour": "execute the notebook of the examples in a kernel, and keep its outputs (a minute)",
    "rows": "compare stores written as rows with stores written by MLflow, for each version of it (--postgres)",
    "upstream": "run the tests of DSPy and MLflow in a folder with tracing on and off, and compare",
}
CHECKS = {"ui": "tests/ui/chromium.py"}  # what pip cannot install, asked for before minutes of installing
NO_PIP = """\
This Python has no pip: {python}
Give it one, then run the same command again:
  Debian, Ubuntu:  apt-get install python3-pip     (as root)
  Fedora:          dnf install python3-pip         (as root)
  elsewhere:       {python} -m ensurepip --user, or a Python from https://www.python.org/downloads/"""
TOO_OLD = """\
This is Python {version}, and Python 3.10 to 3.13 is needed; none is on the PATH.
Install one (Debian, Ubuntu: apt-get install python3; elsewhere: https://www.python.org/downloads/), then run the
same command with it, for example: python3.12 {command}"""


def main(arguments: list[str]) -> int:
    """Set up what is missing, run the tox environment, and return its exit code."""
    if not arguments or arguments[0] in {"-h", "--help"} or arguments[0].startswith("-"):
        print(f"usage: python3 run.py NAME [arguments passed on]\n\n{_names()}")
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    python = _python()
    if python is None:
        version = ".".join(map(str, sys.version_info[:3]))
        return _fail(TOO_OLD.format(version=version, command=" ".join(["run.py", *arguments])))
    if python != sys.executable:
        _say(f"This is Python {sys.version_info[0]}.{sys.version_info[1]}; going on with {python}.")
        return subprocess.call([python, str(Path(__file__).resolve()), *arguments])
    name, rest = arguments[0], arguments[1:]
    if name in CHECKS and subprocess.call([python, str(HERE / CHECKS[name])]) != 0:
        return 1
    tox = _tox()
    if tox is None:
        return 1
    return _run(tox, name, rest[1:] if rest[:1] == ["--"] else rest)


def _names() -> str:
    return "\n".join(f"  {name:<8} {text}" for name, text in NAMES.items()) + "\n  ...      any environment of tox.ini"


def _python() -> str | None:
    """This Python if its version will do, else the newest on the PATH that will, else this one if it is newer."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return sys.executable
    names = (f"python3.{minor}" for minor in range(NEWEST[1], OLDEST[1] - 1, -1))
    found = next(filter(None, map(shutil.which, names)), None)
    return found or (sys.executable if sys.version_info >= OLDEST else None)


def _tox() -> Path | None:
    """The folder with tox in it, which pip fills the first time; None where pip failed."""
    folder = HERE / ".tox" / "run-py{}{}".format(*sys.version_info[:2])
    stamp = folder / "complete.txt"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == TOX:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    pip = _pip()
    if pip is None:
        _fail(NO_PIP.format(python=sys.executable))
        return None
    _say(f"Installing tox into {folder.relative_to(HERE)} ...")
    # --target touches neither the system's packages nor the user's, so PEP 668 has no objection.
    # Into a folder of its own, which is whole when it gets its name: another run.py may be doing the same.
    new = folder.with_name(f"{folder.name}-{os.getpid()}")
    command = [*pip, "install", "--quiet", "--disable-pip-version-check", "--target", str(new), TOX]
    if subprocess.call(command, env=_environment()) != 0:
        shutil.rmtree(new, ignore_errors=True)
        _fail(
            "pip could not install tox; its own words are above. Most often the package index cannot be reached:\n"
            "check the network, or point pip to your mirror with PIP_INDEX_URL=https://.../simple, and run again."
        )
        return None
    (new / stamp.name).write_text(TOX, encoding="utf-8")
    try:
        new.rename(folder)
    except OSError:  # the other one was faster
        shutil.rmtree(new, ignore_errors=True)
    return folder


def _pip() -> list[str] | None:
    """How to call pip: this Python's own, or one that the standard library brings."""
    if subprocess.call([sys.executable, "-m", "pip", "--version"], stdout=-3, stderr=-3) == 0:
        return [sys.executable, "-m", "pip"]
    venv = HERE / ".tox" / "run-pip"
    if subprocess.call([sys.executable, "-m", "venv", "--clear", str(venv)], stdout=-3, stderr=-3) != 0:
        return None
    return [str(venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")), "-m", "pip"]


def _environment() -> dict[str, str]:
    """Ours, less what the user may have told pip for the system's sake and would stop it here.

    Pip compiles nothing, which takes as long as all else of an installation: Python does when it imports.
    """
    ours = {"PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0", "PIP_ROOT_USER_ACTION": "ignore", "PIP_COMPILE": "0"}
    return {**os.environ, **ours}


def _run(tox: Path, name: str, rest: list[str]) -> int:
    # tox is started by path, not PYTHONPATH, which its environments would inherit.
    start = "import sys; sys.path.insert(0, sys.argv.pop(1)); from tox.run import run; run()"
    # In a folder of its own: a `tox run` at the same time, of another Python perhaps, has other environments.
    work = HERE / ".tox" / "run"
    command = [sys.executable, "-c", start, str(tox), "run", "--workdir", str(work), "-e", name]
    is_new = not (work / name).is_dir()
    if is_new:
        _say(f"Setting up the environment {name} with all that it needs: one to four minutes, the first time.")
    over = threading.Event()
    threading.Thread(target=_show_progress, args=(over,), daemon=True).start()
    code = subprocess.call([*command, "--notest"], cwd=HERE, env=_environment())
    over.set()
    if code != 0:
        if is_new:
            shutil.rmtree(work / name, ignore_errors=True)
        return _fail(
            f"The environment {name} could not be set up; the reason is above. Most often the package index\n"
            "cannot be reached, or the disk is full (1.5 GB are needed). Mend that, and run the same command again."
        )
    command.append("--skip-pkg-install")
    return subprocess.call([*command, *(["--", *rest] if rest else [])], cwd=HERE, env=_environment())


def _show_progress(over: threading.Event) -> None:
    started = time.monotonic()
    while not over.wait(10):
        _say(f"... still at it, {time.monotonic() - started:.0f} s")


def _say(text: str) -> None:
    print(f"run.py: {text}", flush=True)


def _fail(text: str) -> int:
    print(text, file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
