"""What is shown in terminals and logs: no control characters, no passwords."""

import io
import logging
import time

import pytest
from rich.console import Console
from rich.table import Table

from dspy_mlflow_async.cli.console import make_console
from dspy_mlflow_async.evaluate.comparison import CaseResult, Comparison, ExampleCounts
from dspy_mlflow_async.evaluate.progress import Board
from dspy_mlflow_async.printable import mask_uris, printable, split_credentials

HOSTILE = "\x1b]0;owned\x07\x1b[31mred\x9b2J\rover\u202egnp\x00\u2028"
SHOWN = "\\x1b]0;owned\\x07\\x1b[31mred\\x9b2J\\rover\\u202egnp\\x00\\u2028"
# Whatever a terminal obeys: C0 but tab and newline, DEL, C1, bidirectional controls, line separators.
CONTROLS = {*map(chr, [*range(32), *range(0x7F, 0xA0)]), *"\u061c\u200e\u200f\u2028\u2029"} - {"\t", "\n"}
CONTROLS |= {*map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)])}


def test_each_control_character_is_shown_as_what_it_is():
    """C0, DEL, C1 and bidirectional controls are escaped, each; tabs, newlines and all other text stay."""
    harmless = "".join(chr(code) for code in range(0x3000) if chr(code) not in CONTROLS)

    assert SHOWN == printable(HOSTILE)
    assert all(printable(control).isprintable() for control in CONTROLS)
    assert harmless == printable(harmless)
    assert "a\\nb\tc" == printable("a\nb\tc", one_line=True)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://host:5000", "http://host:5000"),
        ("https://ada:s3cret@host/ml", "https://ada:***@host/ml"),
        ("https://dapi0123456789@host", "https://***@host"),
        ("postgresql+psycopg2://me:p@ss:w@[::1]:5432/db", "postgresql+psycopg2://me:***@[::1]:5432/db"),
        (
            "postgresql://me@host/db?sslmode=require&password=x&a=b",
            "postgresql://me@host/db?sslmode=require&password=***&a=b",
        ),
        ("wasbs://container?sas_token=sv=1", "wasbs://container?sas_token=***"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("file:///C:/a:b@c/d", "file:///C:/a:b@c/d"),
        ("databricks://profile", "databricks://profile"),
        ("failed: http://u:p@a/x, then http://u:q@b/y\n", "failed: http://u:***@a/x, then http://u:***@b/y\\n"),
    ],
)
def test_uris_are_shown_without_passwords(uri, shown):
    """Passwords and tokens are masked wherever a URI has them; the rest of it stays, as it is typed."""
    assert shown == mask_uris(uri)


def test_credentials_are_parted_from_a_server():
    """User and password are decoded as a server wants them, and the rest is a URI without them."""
    assert ("http://host:5/x", ("a@b", "c:d")) == split_credentials("http://a%40b:c%3Ad@host:5/x")
    assert ("http://host", None) == split_credentials("http://host")


def test_masking_is_linear():
    """A hostile text of twice the length takes no more than about twice as long."""
    for unit in ("a://", "://:", "?token=", "x:y@", "a.token", "&" + "k" * 41):
        seconds = []
        for size in (20_000, 160_000):
            begun = time.process_time()
            mask_uris(unit * (size // len(unit)))
            seconds.append(time.process_time() - begun)

        assert seconds[1] < 8 * 4 * seconds[0] + 0.02, unit


def test_log_lines_hold_no_controls_and_no_passwords(caplog):
    """Arguments and tracebacks of the tracer's log lines are made printable; a newline cannot feign a line."""
    logger = logging.getLogger("dspy_mlflow_async")
    error = RuntimeError(f"API request to http://u:s3cret@host failed{HOSTILE}\nERROR feigned")
    try:
        raise error
    except RuntimeError:
        logger.exception("away (%s: %s) %d", "RuntimeError", error, 7)
    text = logging.Formatter().format(caplog.records[-1])
    lines = text.splitlines()

    assert f"away (RuntimeError: API request to http://u:***@host failed{SHOWN}\\nERROR feigned) 7" == lines[0]
    assert "s3cret" not in text
    assert not CONTROLS & set(text)


def test_log_lines_that_are_harmless_stay_as_they_are(caplog):
    """A log record keeps its arguments and its traceback where there is nothing to hide."""
    error = ValueError("plain")
    try:
        raise error
    except ValueError:
        logging.getLogger("dspy_mlflow_async").exception("kept: %s", error)
    record = caplog.records[-1]

    assert record.args == (error,)
    assert "ValueError: plain" in logging.Formatter().format(record)


def test_console_obeys_rich_alone():
    """Names in tables and texts cannot send control sequences; rich's own colours still do."""
    output = io.StringIO()
    console = make_console(output)
    table = Table("run")
    table.add_row(HOSTILE)
    console.print(table)
    console.print(f"Written: {HOSTILE}", markup=False)

    assert not CONTROLS & set(output.getvalue())
    assert "\\x1b]0;owned" in output.getvalue()


def test_console_keeps_its_own_colours():
    """Colours of ours reach a terminal."""
    console = make_console(io.StringIO())
    console._color_system = Console(force_terminal=True, color_system="standard")._color_system
    with console.capture() as captured:
        console.print("red", style="red")

    assert "\x1b[31m" in captured.get()


def test_comparison_prints_no_controls():
    """Names of cases and errors in a printed comparison are escaped, and no newline makes a row of its own."""
    case = CaseResult(f"a\n{HOSTILE}", "failed", error=ValueError(HOSTILE), counts=ExampleCounts(1, 1, HOSTILE))
    shown = str(Comparison((case,), case.name))

    assert not CONTROLS & set(shown)
    assert f"a\\n{SHOWN} failed: ValueError: {SHOWN}" in shown


def test_progress_shows_no_controls(capsys):
    """A line of progress names its evaluation without control characters."""
    with Board().line(f"a\n{HOSTILE}", 1, 0.0, is_shown=True):
        pass
    shown = capsys.readouterr().err

    assert f"a\\n{SHOWN}: 0/1" in "".join(shown.splitlines())
    assert not CONTROLS & set(shown)
