"""The command: ``python tests/faults``. It prints a table, and ends with 1 if a row does not balance."""

import argparse
import contextlib
import json
import os
import queue
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # the package, not its modules one by one
os.environ.pop("DSPY_MLFLOW_ASYNC_SPOOL", None)  # it would win over the spool of each case when that is read

from rich.console import Console  # noqa: E402 - the path first
from rich.live import Live  # noqa: E402

from faults import cases_kills, cases_loads, cases_stores  # noqa: E402, F401 - they register their cases
from faults.audit import Row  # noqa: E402
from faults.harness import CASES, SPOILS, Bench, Options, SkippedError, World  # noqa: E402
from faults.report import as_json, code_of, table, write_docs  # noqa: E402


def main(arguments):
    """Run the cases, print the table, and return the exit code: 1 if a row does not balance, 2 for a wrong name."""
    options = _options(arguments)
    console = Console(width=None if sys.stdout.isatty() else 170)
    if options.list:
        for name, function in CASES.items():
            console.print(
                f"{name:<14} {function.__doc__.splitlines()[0]}", markup=False, highlight=False, soft_wrap=True
            )
        return 0
    names = [name for name in CASES if not options.only or name in options.only]
    if unknown := set(options.only) - set(CASES):
        console.print(f"no such case: {', '.join(sorted(unknown))}; --list names them", markup=False)
        return 2
    how_much = Options(options.long, options.rounds, options.calls, options.soak, options.spoil)
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o711)  # PostgreSQL's user must reach its own folder
        runner = Runner(names, how_much, Path(folder), options.jobs)
        rows = runner.run()
    console.print(table(rows))
    wrong = [row for row in rows if row.skipped is None and not row.is_balanced]
    for row in wrong:
        for problem in row.problems[:10]:
            console.print(f"{row.case}: {problem}", markup=False, highlight=False, soft_wrap=True)
    skipped = sum(row.skipped is not None for row in rows)
    console.print(
        f"{len(rows)} rows, {len(wrong)} not balanced, {skipped} skipped, {runner.seconds:.0f} s.", highlight=False
    )
    measured = as_json(rows, " ".join(["python3 run.py faults", *arguments]))
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.docs:
        write_docs(options.docs, measured)
    return code_of(rows)


def _options(arguments):
    parser = argparse.ArgumentParser(prog="python3 run.py faults", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="about two minutes, as in CI; the default")
    size.add_argument("--long", action="store_true", help="200 kills a row, 20,000 calls, a soak of two hours")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often something is killed")
    parser.add_argument("--calls", type=int, metavar="N", help="how many calls are made under load")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="how long the soak takes")
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="these cases alone")
    parser.add_argument("--jobs", type=int, default=3, metavar="N", help="cases at a time (3)")
    parser.add_argument("--json", type=Path, default=Path("faults.json"), metavar="FILE", help="the rows (faults.json)")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="put the table into this page, docs/faults.md")
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument(
        "--spoil",
        choices=SPOILS,
        help="lose or double a stored trace before each audit: every row must be found wrong",
    )
    return parser.parse_args(arguments)


class Runner:
    """Runs cases, some at a time, and shows how far they are."""

    def __init__(self, names, options, folder, jobs):
        self._options = options
        self._folder = folder
        self._jobs = jobs
        self._waiting = queue.SimpleQueue()
        for name in names:
            self._waiting.put(name)
        self._console = Console(stderr=True)
        self._running = {}  # name: how far it is
        self._rows = {name: [] for name in names}
        self.seconds = 0.0

    def run(self):
        """The rows of all cases, in the order of the cases."""
        began = time.monotonic()
        with contextlib.closing(World(self._folder)) as world:
            threads = [threading.Thread(target=self._work, args=(world,)) for _ in range(self._jobs)]
            for thread in threads:
                thread.start()
            try:
                self._show(threads, began)
            except BaseException:
                with contextlib.suppress(queue.Empty):
                    while True:
                        self._waiting.get_nowait()
                raise
            finally:
                for thread in threads:
                    thread.join()
        self.seconds = time.monotonic() - began
        return [row for rows in self._rows.values() for row in rows]

    def _work(self, world):
        with contextlib.suppress(queue.Empty):
            while True:
                self._run_one(self._waiting.get_nowait(), world)

    def _run_one(self, name, world):
        folder = self._folder / f"case-{name}"
        folder.mkdir(mode=0o711)
        self._running[name] = "begins"
        bench = Bench(self._options, world, folder, lambda text: self._running.__setitem__(name, text))
        began = time.monotonic()
        try:
            with contextlib.closing(bench):
                for row in CASES[name](bench):
                    self._add(name, row)
        except SkippedError as reason:
            self._add(name, Row(name, skipped=str(reason)))
        except Exception as error:  # noqa: BLE001 - a case that breaks is a row, not the end of the table
            self._console.print(traceback.format_exc(), markup=False, highlight=False)
            fault = f"{type(error).__name__}: {error}"
            self._add(name, Row(name, faults=(fault[:1500],), seconds=time.monotonic() - began))
        del self._running[name]

    def _add(self, name, row):
        self._rows[name].append(row)
        verdict = f"skipped: {row.skipped}" if row.skipped else "balanced" if row.is_balanced else "NOT BALANCED"
        self._console.print(f"{row.seconds:>6.1f} s  {row.case}: {verdict}", markup=False, highlight=False)
        if row.skipped is None and not row.is_balanced:
            self._console.print("  " + "; ".join(row.problems[:5]), markup=False, highlight=False)

    def _show(self, threads, began):
        with Live(console=self._console, transient=True, auto_refresh=False) as live:
            while any(thread.is_alive() for thread in threads):
                if self._console.is_terminal:
                    head = f"{sum(map(bool, self._rows.values()))} of {len(self._rows)} cases, "
                    lines = [f"  {name}: {said}" for name, said in list(self._running.items())]
                    live.update("\n".join([f"{head}{time.monotonic() - began:.0f} s", *lines]), refresh=True)
                for thread in threads:
                    thread.join(0.1)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
