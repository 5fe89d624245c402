"""Progress of many evaluations at once, in terminals and logs."""

import asyncio
import io
import sys
import threading

import dspy
import pytest
import rich
import tqdm
from rich.console import Console
from rich.progress import Progress
from small import examples, is_right

from dspy_mlflow_async import AsyncEvaluate, aevaluate_all
from dspy_mlflow_async.evaluate import progress
from dspy_mlflow_async.evaluate.example_result import Outcome
from dspy_mlflow_async.evaluate.progress import BOARD
from echo import Chain


@pytest.fixture
def console(monkeypatch):
    """A function that makes rich's console a log or a terminal, and gives what is written there."""

    def make(*, is_terminal):
        text = io.StringIO()
        made = Console(file=text, force_terminal=is_terminal, width=110, legacy_windows=False)
        monkeypatch.setattr(rich, "_console", made)
        monkeypatch.setenv("TERM", "xterm-256color")
        return text

    return make


async def test_log(console):
    """In a log: the run at the start, a line for each evaluation when it is over, and a total."""
    text = console(is_terminal=False)
    comparison = await aevaluate_all({"one": Chain(), "two": Chain()}, devset=examples(size=3), metric=is_right)
    first, *lines = text.getvalue().splitlines()

    assert f"evaluate_all: run {comparison.run_id}" == first

    assert ["one: 3/3, score 100.0,", "total: 6/6", "two: 3/3, score 100.0,"] == sorted(
        line.rpartition(" ")[0].rpartition(" ")[0] if "total" not in line else line for line in lines
    )


def test_now_and_then(console, monkeypatch):
    """In a log, a line for all that is open, every so many seconds and not for each example."""
    text = console(is_terminal=False)
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with BOARD.line("one", 100, 0.0, is_shown=True) as line:
        for number in range(60):
            clock[0] += 0.5
            line.advance(Outcome(number, score=1.0) if number % 2 else Outcome(number, error="bad"))

    assert [
        "one: the first error: bad",
        "one: 20/100, score 50.0, 10 errors, 10 s",
        "one: 40/100, score 50.0, 20 errors, 20 s",
    ] == text.getvalue().splitlines()[:3]
    assert 5 == len(text.getvalue().splitlines())


async def test_now_and_then_without_an_end(console, monkeypatch):
    """In a log, a line is written also while no example ends."""
    text = console(is_terminal=False)
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.01)
    written = threading.Event()
    monkeypatch.setattr(text, "write", lambda said: written.set() or io.StringIO.write(text, said))

    class Waits(dspy.Module):
        async def aforward(self, question):
            assert await asyncio.to_thread(written.wait, 30)
            return dspy.Prediction(answer=question)

    await AsyncEvaluate(devset=examples(size=1), metric=is_right, display_progress=True).acall(Waits())

    assert text.getvalue().startswith("Waits: 0/1, score -,")


async def test_terminal(console):
    """In a terminal: a bar for each, and one for all."""
    text = console(is_terminal=True)
    await aevaluate_all({"one": Chain(), "two": Chain()}, devset=examples(size=3), metric=is_right)
    last = text.getvalue().rpartition("\x1b[2K")[2]

    assert all(word in text.getvalue() for word in ("one", "two", "total", "3/3", "6/6"))
    assert "6/6" in last or "3/3" in last


async def test_notebook_without_widgets(monkeypatch, capsys, recwarn):
    """A notebook that lacks ipywidgets gets the lines of a log as the cell's output: no warning, and no empty box."""
    monkeypatch.setattr(rich, "_console", Console(force_jupyter=True))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # not installed
    comparison = await aevaluate_all({"one": Chain(), "two": Chain()}, devset=examples(size=3), metric=is_right)
    printed = capsys.readouterr()
    first, *lines = printed.out.splitlines()

    assert f"evaluate_all: run {comparison.run_id}" == first
    assert ["one: 3/3, score 100.0", "total: 6/6", "two: 3/3, score 100.0"] == sorted(
        line.rpartition(",")[0] or line for line in lines
    )
    assert "3/3" not in printed.err
    assert not [each for each in recwarn if "ipywidgets" in str(each.message)]


@pytest.mark.parametrize(("count", "shown"), [(2, ["host:0", "host:1"]), (9, ["9 workers"])])
def test_workers_have_lines(console, count, shown):
    """In a terminal each worker process has a line of its own, and one that is lost says so; of many one tells."""
    text = console(is_terminal=True)
    with BOARD.line("one", 100, 0.0, is_shown=True) as line:
        for number in range(count):
            BOARD.worker(f"host:{number}", 10 * (number + 1))
        BOARD.worker("host:0", 10, is_gone=True)
        line.advance(Outcome(0, score=1.0))
    last = text.getvalue().rpartition("one ")[2]

    together = sum(10 * (number + 1) for number in range(count))
    assert all(each in last for each in shown)
    assert f"{together}/{together}" in last if count > 8 else f"10/{together}" in last
    assert "lost" in last
    assert ("host:1" in last) == (count == 2)


def test_a_log_has_no_lines_of_workers(console):
    """In a log workers have none: only what is lost is worth a line there."""
    text = console(is_terminal=False)
    with BOARD.line("one", 1, 0.0, is_shown=True):
        BOARD.worker("host:0", 1)

    assert "host" not in text.getvalue()


async def test_off(console):
    """Nothing is shown with ``display_progress=False``, which is ``AsyncEvaluate``'s default."""
    text = console(is_terminal=True)
    await AsyncEvaluate(devset=examples(), metric=is_right).acall(Chain())
    await aevaluate_all({"one": Chain()}, devset=examples(), metric=is_right, display_progress=False)

    assert "" == text.getvalue()


async def test_beside_the_users_display(console):
    """A display of the user's goes on, and nothing fails."""
    console(is_terminal=True)
    with Progress(console=rich.get_console()):
        result = await AsyncEvaluate(devset=examples(), metric=is_right, display_progress=True).acall(Chain())

    assert 100.0 == result.score


async def test_tqdm_is_left_alone():
    """DSPy's bars, and the user's, stay registered with tqdm."""
    with tqdm.tqdm(total=3, disable=False, file=io.StringIO()) as bar:
        await AsyncEvaluate(devset=examples(), metric=is_right, display_progress=True).acall(Chain())
        assert bar in tqdm.tqdm._instances


def test_many_threads(console):
    """Evaluations in several threads share the board."""
    import asyncio

    text = console(is_terminal=True)
    failures = []

    def evaluate(number):
        try:
            with dspy.context():
                asyncio.run(
                    AsyncEvaluate(devset=examples(size=5), metric=is_right, display_progress=True).acall(Chain())
                )
        except BaseException as error:  # noqa: BLE001 - shown by the assert
            failures.append(error)

    threads = [threading.Thread(target=evaluate, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert [] == failures
    assert "5/5" in text.getvalue()
