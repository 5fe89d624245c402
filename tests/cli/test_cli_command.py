"""The command itself: help, version, and what it says to a command that it does not know."""

import os
import pty
import shutil
import subprocess
import sys

import pytest
import typer
from packaging.version import Version

from dspy_mlflow_async.cli import COMMANDS

# Typer 0.21 is the first that puts brackets and dots around the name that an argument is given.
SEVERAL_RUNS = "[OPTIONS] [RUN]..." if Version(typer.__version__) >= Version("0.21") else "[OPTIONS] RUN"


def test_help_names_every_command(command):
    """``--help`` has a line for each command."""
    done = command("--help")

    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)


def test_version(command):
    """``--version`` is the distribution's."""
    from importlib.metadata import version

    assert f"dspy-mlflow-async {version('dspy-mlflow-async')}\n" == command("--version").stdout


def test_help_imports_neither_dspy_nor_mlflow():
    """What only describes the command answers at once."""
    modules = "dspy_mlflow_async.cli.demo, dspy_mlflow_async.cli.doctor"
    code = f"import sys, {modules}; print({{'dspy', 'mlflow'}} & {{*sys.modules}})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout

    assert "set()\n" == said


def test_unknown_command_is_a_usage_error(command):
    """An unknown command ends with 2 and its name."""
    done = command("no-such-command")

    assert done.returncode == 2
    assert "no-such-command" in done.stderr


def test_shells_complete_commands_and_options(command):
    """The shell gets the commands and options that begin so, without anybody importing DSPy or MLflow for it."""

    def complete(words):
        line = {"COMP_WORDS": f"dspy-mlflow-async {words}", "COMP_CWORD": str(len(words.split()))}
        before = "import atexit\natexit.register(lambda: print({'dspy', 'mlflow'} & {*sys.modules}, file=sys.stderr))"
        return command(before=before, env={"_DSPY_MLFLOW_ASYNC_COMPLETE": "complete_bash", **line})

    assert ["doctor"] == complete("doc").stdout.split()
    assert "--tracking-uri" in complete("replay --tr").stdout.split()
    assert "set()\n" == complete("doc").stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_shell_is_told_how_to_complete():
    """By the shell that the command was called from."""
    code = "from dspy_mlflow_async.cli import main; main()"
    call = ["bash", "-c", '"$0" "$@"; exit $?', sys.executable, "-W", "ignore", "-c", code, "--show-completion"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=True)

    assert "dspy_mlflow_async" in done.stdout
    assert "complete_bash" in done.stdout


def test_placeholders_look_alike(command):
    """FOLDER, FILE, URI, NAME: what an option takes is named as a person names it, and never as ``<path>``.

    What is only switched on takes nothing, and nothing is said twice to be one of several.
    """
    shown = {name: command(name, "--help", env={"COLUMNS": "150"}).stdout for name in COMMANDS}
    shown[""] = command("--help").stdout

    assert {} == {name: text for name, text in shown.items() if "<" in text or "...]" in text or "...}" in text}
    assert f"{SEVERAL_RUNS}\n" in "".join(line.rstrip() + "\n" for line in shown["report"].splitlines())
    assert all(name in shown["replay"] for name in ("FOLDER", "URI", "TEXT"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_terminal_gets_colours():
    """On a terminal the same output is coloured."""
    main, second = pty.openpty()
    code = "from dspy_mlflow_async.cli.console import make_console; make_console().print('[red]words[/]')"
    env = {**os.environ, "TERM": "xterm-256color"}
    env.pop("NO_COLOR", None)
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], stdout=second, env=env, timeout=60, check=True)
    os.close(second)
    said = os.read(main, 1000)
    os.close(main)

    assert b"\x1b[31mwords" in said


def test_paragraphs_of_a_help_text_are_as_wide_as_the_terminal(command):
    """No line of a paragraph ends where that of the source does."""
    shown = command("gate", "--help", env={"COLUMNS": "100"}).stdout
    paragraph = shown.partition("It is 1 where")[2].partition("one by one.")[0]

    assert all(len(line.strip()) > 80 for line in paragraph.splitlines()[1:-1])
