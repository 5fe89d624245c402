"""Progress of any number of evaluations at once: one line each and one total, in terminals, notebooks and logs.

DSPy's tqdm bars clear each other's class-wide set of instances when evaluations run at once. Here the process has
one board, and each evaluation a line on it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dspy_mlflow_async.evaluate.example_result import Outcome, number_of
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.printable import counted, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

PLAIN_SECONDS = 10.0  # between two lines in a log
_TOTAL = "total"
_NARROW = 100  # columns
_MAX_NAME = 24  # columns of a name in a narrow terminal
_MAX_ERROR = 160  # characters
_MOST_WORKERS = 8  # with a line each; of more of them one line tells


class Line:
    """Progress of one evaluation. One task or thread advances it; others read."""

    def __init__(self, board: Board, name: str, size: int, failure_score: float) -> None:
        self.name = printable(name, one_line=True)
        self.size = size
        self.done = 0
        self.errors = 0
        self.begun = time.monotonic()
        self.board = board
        self._failure_score = failure_score
        self._sum = 0.0

    @guarded
    def advance(self, outcome: Outcome) -> None:
        """Count one more example that has ended."""
        self.done += 1
        self.errors += outcome.has_failed
        if outcome.has_failed and self.errors == 1:
            self.board.say(f"{self.name}: the first error: {_shortened(outcome.error)}")
        self._sum += self._failure_score if outcome.has_failed else number_of(outcome.score) or 0.0
        self.board.changed(self)

    @property
    def score(self) -> str:
        """Average score so far, in percent."""
        return f"{100 * self._sum / self.done:.1f}" if self.done else "-"

    @property
    def error_text(self) -> str:
        """Number of examples that have failed, in words; empty for none."""
        return counted(self.errors, "error") if self.errors else ""


class Board:
    """Board with the lines of all evaluations of this process that show any. ``lock`` guards them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: dict[Line, Any] = {}  # each with its task of rich's
        self._ended: list[Line] = []
        self._live: Progress | None = None
        self._total: Any = None
        self._workers = _WorkerLines()
        self._last_plain = 0.0
        self._ticker: _Ticker | None = None

    @contextlib.contextmanager
    def line(self, name: str, size: int, failure_score: float, *, is_shown: bool) -> Iterator[Line]:
        """Show a line for one evaluation, for the time of a block.

        Args:
            name: What the line begins with.
            size: How many examples there are.
            failure_score: The score of a failed one.
            is_shown: Whether there is a line at all.
        """
        board = self if is_shown else NO_BOARD
        line = Line(board, name, size, failure_score)
        board.begin(line)
        try:
            yield line
        finally:
            board.end(line)

    @guarded
    def begin(self, line: Line) -> None:
        """Show a line."""
        with self._lock:
            if not self._lines:
                self._live, self._total, self._ended = _live(), None, []
                self._workers = _WorkerLines()
                self._last_plain = time.monotonic()
                if self._live is None:
                    self._ticker = _Ticker(self._tick)
            self._lines[line] = None
            if self._live is not None:
                self._lines[line] = self._live.add_task(line.name, total=line.size, score="", errors="")
                if len(self._lines) + len(self._ended) > 1:
                    self._put_total_last(self._live)
                self._update(line)

    @guarded
    def say(self, text: str) -> None:
        """Write a line of its own, above what is shown."""
        console = console_here() if self._live is None else self._live.console
        console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    @guarded
    def worker(self, process: str, examples: int, *, is_gone: bool = False) -> None:
        """Show what a worker process has brought home, beside the others, where there are lines that move.

        Args:
            process: What it is called, ``host:pid``.
            examples: How many examples.
            is_gone: Whether it is lost.
        """
        with self._lock:
            if self._live is None or not self._lines:
                return
            if self._workers.show(self._live, process, examples, is_gone=is_gone) and self._total is not None:
                self._put_total_last(self._live)
                self._show_total(self._live)

    @guarded
    def changed(self, line: Line) -> None:
        """Show what a line says now."""
        with self._lock:
            if line not in self._lines:
                return
            if self._live is not None:
                self._update(line)
            else:
                self._print_if_due()

    @guarded
    def end(self, line: Line) -> None:
        """Leave a line as it is; with the last one, take the board away."""
        with self._lock:
            if line not in self._lines:
                return
            if self._live is not None:
                self._update(line)
            else:
                self._print([line])
            del self._lines[line]
            self._ended.append(line)
            if not self._lines:
                live, self._live = self._live, None
                if self._ticker is not None:
                    self._ticker.stop()
                    self._ticker = None
                if live is not None:
                    live.stop()
                elif len(self._ended) > 1:
                    self._print([])

    @guarded
    def _tick(self) -> None:
        with self._lock:
            if self._lines and self._live is None:
                self._print_if_due()

    def _print_if_due(self) -> None:
        if time.monotonic() - self._last_plain >= PLAIN_SECONDS:
            self._last_plain = time.monotonic()
            self._print([*self._lines])

    def _update(self, line: Line) -> None:
        live = self._live
        assert live is not None  # noqa: S101 - the caller has looked
        live.update(self._lines[line], completed=line.done, score=line.score, errors=line.error_text)
        if self._total is not None:
            self._show_total(live)

    def _put_total_last(self, live: Progress) -> None:
        if self._total is not None:
            live.remove_task(self._total)
        self._total = live.add_task(_TOTAL, total=0, score="", errors="")

    def _show_total(self, live: Progress) -> None:
        done, size, errors = self._sums()
        live.update(self._total, completed=done, total=size, errors=counted(errors, "error") if errors else "")

    def _sums(self) -> tuple[int, int, int]:
        lines = [*self._ended, *self._lines]
        return sum(x.done for x in lines), sum(x.size for x in lines), sum(x.errors for x in lines)

    def _print(self, lines: list[Line]) -> None:
        console = console_here()
        for line in lines:
            seconds = time.monotonic() - line.begun
            parts = (f"{line.done}/{line.size}", f"score {line.score}", line.error_text, f"{seconds:.0f} s")
            text = f"{line.name}: {', '.join(filter(None, parts))}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        if len(lines) != 1 and len(self._lines) + len(self._ended) > 1:
            done, size, _ = self._sums()
            console.print(f"{_TOTAL}: {done}/{size}", markup=False, highlight=False)


class _WorkerLines:
    """Lines of worker processes: how many of the examples each has brought home. The board's lock guards it."""

    def __init__(self) -> None:
        self._examples: dict[str, int] = {}
        self._gone: set[str] = set()
        self._tasks: dict[str, Any] = {}

    def show(self, live: Progress, process: str, examples: int, *, is_gone: bool) -> bool:
        """Show a worker's line, or the one of all; return whether a line was added."""
        self._examples[process] = examples
        if is_gone:
            self._gone.add(process)
        if len(self._examples) > _MOST_WORKERS:
            for task in [self._tasks.pop(name) for name in list(self._tasks) if name]:
                live.remove_task(task)
            lines = {"": f"  {len(self._examples)} workers"}
        else:
            lines = {name: f"  {name}" for name in self._examples}
        added = [name for name in lines if name not in self._tasks]
        for name in added:
            self._tasks[name] = live.add_task(lines[name], total=0, score="", errors="")
        together = sum(self._examples.values())
        for name, text in lines.items():
            is_lost = f"{len(self._gone)} lost" if not name and self._gone else "lost" if name in self._gone else ""
            own = self._examples.get(name, together)
            live.update(self._tasks[name], description=text, completed=own, total=together, errors=is_lost)
        return bool(added)


class _Ticker:
    """Call a function now and then, from a thread of its own: an example may take longer than that, or block the loop.

    Args:
        tick: The function.
    """

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._is_over = threading.Event()
        threading.Thread(target=self._run, name="dspy-mlflow-async-progress", daemon=True).start()

    def stop(self) -> None:
        """Stop calling it."""
        self._is_over.set()

    def _run(self) -> None:
        while not self._is_over.wait(PLAIN_SECONDS):
            self._tick()


class _NoBoard(Board):
    """Board that shows nothing."""

    def begin(self, line: Line) -> None:
        pass

    def changed(self, line: Line) -> None:
        pass

    def worker(self, process: str, examples: int, *, is_gone: bool = False) -> None:
        pass

    def end(self, line: Line) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def _shortened(error: str | None) -> str:
    said = " ".join((error or "").split())
    return said if len(said) <= _MAX_ERROR else f"{said[: _MAX_ERROR - 1]}…"


def console_here() -> Console:
    """Return rich's console, on standard error where it would write to standard output, which is the program's.

    In a notebook without ipywidgets, plain lines go below the cell as its output: standard error is red there.
    """
    from rich import get_console
    from rich.console import Console

    console = get_console()
    if console.is_jupyter:
        return console if _has_widgets() else Console(force_jupyter=False, force_terminal=False)
    return console if console.file is not sys.stdout else Console(stderr=True)


def _has_widgets() -> bool:
    """Return whether rich can show a display in a notebook; without, it warns each time and shows an empty box."""
    try:
        return importlib.util.find_spec("ipywidgets") is not None
    except ValueError:  # somebody has put None in its place
        return False


def _live() -> Progress | None:
    """Return rich's display, or None where lines now and then do better: in a log, or while the user has a display."""
    from rich import get_console
    from rich.errors import LiveError
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    if any(getattr(get_console(), name, None) for name in ("_live", "_live_stack")):  # a display of the user's
        return None
    console = console_here()
    if not (console.is_terminal or console.is_jupyter) or console.is_dumb_terminal:
        return None
    is_narrow = console.width < _NARROW
    name = Column(no_wrap=True, overflow="ellipsis", max_width=_MAX_NAME if is_narrow else None)
    live = Progress(
        TextColumn("{task.description}", markup=False, table_column=name),
        BarColumn(bar_width=10 if is_narrow else 40),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[score]}", markup=False, table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[errors]}", style="red", markup=False),
        TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        console=console,
    )
    try:
        live.start()
    except LiveError:
        return None
    return live


NO_BOARD = _NoBoard()
BOARD = Board()
