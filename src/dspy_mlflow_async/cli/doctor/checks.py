"""Checks of the doctor that run no program: versions, seams, the store, the spool, the tracer, known holes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dspy_mlflow_async.cli.doctor.findings import Finding, Level
from dspy_mlflow_async.printable import counted, mask_uris
from dspy_mlflow_async.reachability import folder_path, look, missing_store, sqlite_path
from dspy_mlflow_async.workers import call_with_timeout

_SECONDS = 5.0
_SQL = ("sqlite", "postgresql", "mysql", "mssql")


def versions() -> Iterator[Finding]:
    """Check the versions of Python, this package and its dependencies against what the metadata ask for."""
    from packaging.requirements import Requirement

    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding(Level.OK, "versions", f"Python {python}, dspy-mlflow-async {version('dspy-mlflow-async')}")
    wanted = {
        requirement.name: requirement.specifier for requirement in map(Requirement, requires("dspy-mlflow-async") or ())
    }
    for name in ("dspy", "mlflow"):
        try:
            found = version(name)
        except PackageNotFoundError:
            if name == "mlflow" and (light := _light_mlflow()) is not None:
                yield light
                continue
            yield Finding(Level.PROBLEM, "versions", f"{name} is not installed: pip install '{name}{wanted[name]}'")
            continue
        if wanted[name].contains(found, prereleases=True):
            yield Finding(Level.OK, "versions", f"{name} {found} ({wanted[name]} is needed)")
        else:
            yield Finding(
                Level.PROBLEM,
                "versions",
                f"{name} {found} is too old: pip install --upgrade '{name}{wanted[name]}'",
            )


def _light_mlflow() -> Finding | None:
    """Return which part of MLflow stands in its place, and what that leaves out; None where there is none."""
    for name in ("mlflow-skinny", "mlflow-tracing"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        without = "SQL stores" if name == "mlflow-skinny" else "runs, evaluations and SQL stores"
        return Finding(
            Level.NOTE,
            "versions",
            f'{name} {found}, without the whole of MLflow; {without} need pip install "dspy-mlflow-async[mlflow]"',
        )
    return None


def seams() -> Iterator[Finding]:
    """Check that DSPy and MLflow still have all that we touch without their having promised it."""
    from dspy_mlflow_async.seams.check import faults
    from dspy_mlflow_async.seams.listed import SEAMS

    present = {seam.path: seam.is_present for seam in SEAMS}
    details = tuple(f"{'present' if present[seam.path] else 'absent ':<7} {seam.path}: {seam.reason}" for seam in SEAMS)
    absent = [seam for seam in SEAMS if not present[seam.path]]
    needs = {seam.path: seam.needs for seam in absent}
    for package, module in sorted({(needs[seam.path] or "", seam.path.partition(":")[0]) for seam in absent}):
        if package:
            yield Finding(
                Level.NOTE,
                "seam",
                f"{module} needs {package}, which is not installed; where you want what it is for: "
                f"pip install {package}",
            )
    for fault in faults(SEAMS):
        yield Finding(
            Level.PROBLEM,
            "seam",
            f"{fault.seam.path} {fault.text}, so what it is for no longer works: it {fault.seam.reason}. "
            "Look for a newer dspy-mlflow-async, or go back to the DSPy and MLflow that worked.",
        )
    optional = [seam.path for seam in absent if seam.is_optional or needs[seam.path]]
    without = f"; these versions lack {len(optional)} that we can do without" if optional else ""
    yield Finding(Level.OK, "seams", f"{sum(present.values())} of {len(SEAMS)} names are present{without}", details)


def store(tracking_uri: str | None = None) -> Iterator[Finding]:
    """Check that the store that traces go to is there. Looks only: it makes no file and changes no schema."""
    from dspy_mlflow_async.seams.installed import missing_for

    uri = _uri(tracking_uri)
    scheme = urlsplit(uri).scheme
    if said := missing_for(uri):
        yield Finding(Level.PROBLEM, "store", f"{said}, or name a server in MLFLOW_TRACKING_URI.")
    elif scheme == "sqlite":
        yield _sqlite(uri)
    elif scheme in {"http", "https"}:
        yield _server(uri)
    elif scheme in {"", "file"} or (len(scheme) == 1 and os.name == "nt"):
        yield _folder(uri)
    else:
        yield _other(uri)


def rows(tracking_uri: str | None = None, traces: Sequence[Any] = ()) -> Iterator[Finding]:
    """Say how traces get into a SQL store that is there.

    Args:
        tracking_uri: The store; by default MLflow's current one.
        traces: Traces to try it with, in transactions that are undone; without any, what this process has found.
    """
    from dspy_mlflow_async import export
    from dspy_mlflow_async.seams.installed import missing_for

    uri = _uri(tracking_uri)
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme not in _SQL or missing_for(uri) or missing_store(uri):
        return
    are_rows, text = export.explain_rows(uri, traces)
    yield Finding(Level.OK if are_rows else Level.NOTE, "store", text)


def spool() -> Iterator[Finding]:
    """Check for traces on disk that their store has not got yet."""
    from dspy_mlflow_async import export

    found = [info for info in export.spools() if not info.is_empty]
    for info in found:
        target = info.tracking_uri or "an unknown store"
        if info.refused:
            yield Finding(
                Level.NOTE,
                "spool",
                f"{info.folder} is not used, since {info.refused}; where it is yours, chown and chmod 700 it.",
            )
        if info.records and info.in_use:
            yield Finding(
                Level.NOTE,
                "spool",
                f"{info.folder} holds {counted(info.records, 'record')} for {target}, on their way.",
            )
        elif info.records:
            yield Finding(
                Level.PROBLEM,
                "spool",
                f"{info.folder} holds {counted(info.records, 'record')} ({counted(info.traces, 'trace')}) that "
                f"{target} has not got; send them with: dspy-mlflow-async replay",
            )
        if info.dead:
            yield Finding(
                Level.NOTE,
                "spool",
                f"{target} has refused {counted(info.dead, 'record')} for good; {info.folder} keeps them. See why, and "
                "send them again, with: dspy-mlflow-async replay --dead-letters --dry-run. Or delete the folder.",
            )
        if info.damaged:
            yield Finding(
                Level.NOTE,
                "spool",
                f"{info.folder} has {counted(info.damaged, 'stretch', 'stretches')} that cannot be read.",
            )
    if not found:
        yield Finding(Level.OK, "spool", "nothing waits on disk")


def tracer() -> Iterator[Finding]:
    """Check that the tracer of this process is on, and that DSPy still knows it."""
    import dspy

    from dspy_mlflow_async.seams.listed import lost_ground

    if lost_ground():
        yield Finding(
            Level.PROBLEM,
            "tracer",
            "without these names nothing of ours can be traced: mlflow.dspy.autolog() traces in its place.",
        )
        return
    from dspy_mlflow_async import composition, stats

    if composition.current_settings() is None:
        yield Finding(Level.NOTE, "tracer", "off in this process; dspy_mlflow_async.autolog() switches it on.")
        return
    if not composition.is_installed():
        yield Finding(
            Level.PROBLEM,
            "tracer",
            "autolog() was called, but DSPy has lost it: a later dspy.configure(callbacks=[...]) has replaced the "
            "list. Call dspy_mlflow_async.autolog() after it, or leave the callbacks out of it.",
        )
        return
    if not any(isinstance(callback, composition.AutologCallback) for callback in dspy.settings.callbacks):
        yield Finding(
            Level.PROBLEM,
            "tracer",
            "on, but not here: a dspy.context(callbacks=[...]) around this code hides it. "
            "Put a TracingCallback into that list, or leave the callbacks out of it.",
        )
        return
    yield Finding(Level.OK, "tracer", "on, and DSPy knows it")
    if errors := stats().internal_errors:
        yield Finding(
            Level.PROBLEM, "tracer", f"it has failed {errors} times inside; the log tells where, please report."
        )


def holes() -> Iterator[Finding]:
    """Find places in DSPy itself that start threads of their own, which no tracing context reaches."""
    yield Finding(
        Level.NOTE,
        "known hole",
        "dspy.utils.Unbatchify serves many callers from one thread, so what it calls is under none of them.",
    )


# --- the store ------------------------------------------------------------------------------------------------------


def _uri(tracking_uri: str | None) -> str:
    import mlflow

    from dspy_mlflow_async.seams.mlflow_client import name_default_store

    unname = name_default_store()
    try:
        return tracking_uri or str(mlflow.get_tracking_uri())
    finally:
        unname()


def _sqlite(uri: str) -> Finding:
    path = sqlite_path(uri)
    if not path.exists():
        return _will_be_made(uri, path.parent)
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            connection.execute("SELECT count(*) FROM experiments").fetchone()
    except sqlite3.Error as error:
        return Finding(
            Level.PROBLEM,
            "store",
            f"{path} cannot be read as an MLflow store ({error}). Name another file with MLFLOW_TRACKING_URI, or bring "
            f"an older one up to date with: mlflow db upgrade {uri}",
        )
    if not os.access(path, os.W_OK):
        return Finding(
            Level.PROBLEM, "store", f"{path} may be read but not written by this user: mend its permissions."
        )
    return Finding(Level.OK, "store", f"{uri} is there and can be written")


def _folder(uri: str) -> Finding:
    path = folder_path(uri)
    if not path.exists():
        return _will_be_made(uri, path.parent)
    if not os.access(path, os.W_OK):
        return Finding(Level.PROBLEM, "store", f"{path} may not be written by this user: mend its permissions.")
    return Finding(Level.OK, "store", f"{uri} is there and can be written")


def _will_be_made(uri: str, parent: Path) -> Finding:
    above = next((folder for folder in (parent, *parent.absolute().parents) if folder.exists()), Path())
    if parent.exists() and os.access(parent, os.W_OK):
        return Finding(Level.OK, "store", f"{uri} is not there yet; MLflow makes it with the first trace")
    return Finding(
        Level.PROBLEM,
        "store",
        f"{uri} cannot be made: "
        + (f"{parent} does not exist; make it." if above != parent else f"{parent} may not be written by this user."),
    )


def _server(uri: str) -> Finding:
    found = look(uri, _SECONDS)
    if found.problem is not None:
        waits = " Traces wait on disk until then." if "cannot be reached" in found.problem else ""
        end = "" if found.problem.endswith("?") else "."
        return Finding(Level.PROBLEM, "store", f"{found.problem}{end}{waits}")
    return Finding(Level.OK, "store", f"{mask_uris(uri)} answers, MLflow {found.version}")


def _other(uri: str) -> Finding:
    """Ask through MLflow's client, which may take long to give up, in a thread that may be left behind."""
    from mlflow import MlflowClient

    try:
        call_with_timeout(lambda: MlflowClient(tracking_uri=uri).search_experiments(max_results=1), _SECONDS)
    except TimeoutError:
        return Finding(Level.PROBLEM, "store", f"{uri} has not answered for {_SECONDS:.0f} seconds.")
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        reason = str(error).partition("\n")[0]
        return Finding(Level.PROBLEM, "store", f"{uri} cannot be used: {reason}")
    return Finding(Level.OK, "store", f"{uri} answers")
