"""The tracing context as plain data, taken here with ``carry`` and put in force in another process with ``attached``.

``context.carrier.Carrier`` takes live context variables to other threads. This takes their values to other processes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import dspy

from dspy_mlflow_async import composition, export
from dspy_mlflow_async.context import frame as frames
from dspy_mlflow_async.context.carrier import Carrier
from dspy_mlflow_async.propagation import spans_go_elsewhere
from dspy_mlflow_async.remote import pickling
from dspy_mlflow_async.remote.pickling import Secrets
from dspy_mlflow_async.runs import active_runs
from dspy_mlflow_async.seams import mlflow_experiment, mlflow_runs, mlflow_spans, mlflow_store, mlflow_traces
from dspy_mlflow_async.seams.dspy import settings_here
from dspy_mlflow_async.seams.mlflow_client import is_tracking_uri_set
from dspy_mlflow_async.seams.mlflow_remote_traces import headers_of, mlflow_trace_id, remote_parent, remote_traces
from dspy_mlflow_async.seams.mlflow_suppression import DISABLED
from dspy_mlflow_async.seams.mlflow_trace_settings import DESTINATION, RATIO, destination
from dspy_mlflow_async.settings import OVERRIDE, Override, Settings
from dspy_mlflow_async.spans import tracer
from dspy_mlflow_async.spans.observer import LmCall, RequestObserver

logger = logging.getLogger("dspy_mlflow_async")

_ELSEWHERE = (0, None)  # the thread and task that have opened a run: none of this process


@dataclass(frozen=True, slots=True)
class PlainRun:
    """Run as plain data: who owns a trace, and where a metric goes.

    Attributes:
        run_id: MLflow's id, or the stand-in of a run that the store has yet to create.
        experiment_id: Its experiment.
        name: Its name.
        user_id: Its user.
        artifact_uri: Where its artifacts are.
        start_time: Milliseconds since the epoch.
    """

    run_id: str
    experiment_id: str
    name: str
    user_id: str
    artifact_uri: str
    start_time: int

    @classmethod
    def of(cls, run: Any) -> PlainRun:
        """Return a run of MLflow's as plain data."""
        info = run.info
        return cls(
            info.run_id, info.experiment_id, info.run_name, info.user_id, info.artifact_uri or "", info.start_time
        )

    def opened_elsewhere(self) -> Any:
        """Return it as a run that is active and was opened in another process: evaluations make children of it."""
        run = mlflow_runs.run_from(
            self.run_id, self.experiment_id, self.name, self.user_id, self.artifact_uri, self.start_time
        )
        active_runs.notes(run).opened_in = _ELSEWHERE
        return run


@dataclass(frozen=True, slots=True)
class Carried:
    """The tracing context of one place in one process, and DSPy's settings there. Pickles by the standard library.

    It may hold the keys of LMs, so that it belongs where these may be; its ``repr`` shows none of it.

    Attributes:
        tracking_uri: The store.
        host: The machine it was taken on.
        traceparent: W3C headers of the span that is current; empty for none.
        experiment_id: The experiment that traces go to: of the current trace, else the one in force.
        runs: The active runs, outermost first.
        trace_context: Metadata (session and user among them), tags and ``enabled`` of ``mlflow.tracing.context``.
        ratio: Share of the traces that are kept, or None.
        is_silent: Whether calls begin no spans.
        keeps: What decides on whole traces, pickled; None for nothing.
        autolog: The arguments of the tracer, pickled, since ``redact`` may be anything; None while it is off.
        request_redact: The redaction of the requests around, pickled.
        settings: DSPy's settings, pickled; None where they were to stay.
    """

    tracking_uri: str
    host: str
    traceparent: Mapping[str, str] = field(default_factory=dict)
    experiment_id: str | None = None
    runs: tuple[PlainRun, ...] = ()
    trace_context: tuple[Mapping[str, str], Mapping[str, str], bool | None] | None = None
    ratio: float | None = None
    is_silent: bool = False
    keeps: bytes | None = field(default=None, repr=False)
    autolog: bytes | None = field(default=None, repr=False)
    request_redact: bytes | None = field(default=None, repr=False)
    settings: bytes | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        parent = self.traceparent.get("traceparent", "no span")
        return f"<carried from {self.host}: {parent}, {len(self.runs)} runs>"


def carry(*, settings: bool = True, secrets: Secrets = "carried") -> Carried:
    """Return the tracing context of here and now as data that another process can be given, in any way.

    For what brings its own transport: Celery, Spark, a queue. There, ``attached`` puts it in force::

        here = carry()
        queue.put((here, question))

        here, question = queue.get()      # in another process
        with attached(here):
            program(question=question)    # below the span, in the run and by the rules of where it was carried from
        flush()

    Args:
        settings: Whether DSPy's settings go along: the LM, the adapter and the rest. LMs leave their history behind.
        secrets: ``"carried"`` sends the LMs with their keys, so that what carries them must be trusted with these;
            ``"environment"`` without, for workers that have them in their environment (``OPENAI_API_KEY``).

    Returns:
        Plain data, which pickles by the standard library's ``pickle``.

    Raises:
        NotCarriedError: Where a setting of DSPy's, or the tracer's ``redact``, cannot be pickled; says which.
        ValueError: For another ``secrets``.
    """
    secrets = pickling.check_secrets(secrets)
    uri = mlflow_store.absolute_uri(mlflow_store.resolve_tracking_uri())
    _warn_of_file(uri.partition(":")[0])
    span = tracer.parent_here()
    is_silent = not tracer.is_recording() or bool(DISABLED.get())
    headers = {} if is_silent else headers_of(span)
    context = mlflow_spans.plain_context()
    keeps = export.KEEPS.get()
    arguments = composition.arguments_here()
    frame = frames.current()
    redact = None if frame is None or frame.request is None else frame.request.adapt(Settings()).redact
    return Carried(
        tracking_uri=uri,
        host=socket.gethostname(),
        traceparent=headers,
        experiment_id=_experiment_of(span) if headers else _experiment_here(),
        runs=tuple(map(PlainRun.of, active_runs.stack())),
        trace_context=context,
        ratio=RATIO.get(),
        is_silent=is_silent,
        keeps=None if keeps is None else pickling.dumps("the rule of sample", keeps),
        autolog=None if arguments is None else pickling.dumps("autolog's redact", arguments),
        request_redact=None if redact is None else pickling.dumps("the request's redact", redact),
        settings=pickling.dump_settings(settings_here(), secrets) if settings else None,
    )


@functools.cache  # once a process
def _warn_of_file(scheme: str) -> None:
    if scheme in {"sqlite", "file"}:
        logger.warning(
            "several processes write into one file, and wait for each other: what took 53 s on a server took 143 s on "
            "a file. Start `mlflow server` and set it as the tracking URI where that matters"
        )


def _experiment_of(span: Any) -> str | None:
    """Return the experiment of the trace that a span is in, which is kept from now on: it has parts elsewhere."""
    trace_id = mlflow_trace_id(span.get_span_context().trace_id)
    spans_go_elsewhere(trace_id, is_kept=True)
    trace = mlflow_traces.peek_trace(trace_id)
    found = None if trace is None else mlflow_traces.experiment_of(trace)
    return found or _experiment_here()


def _experiment_here() -> str | None:
    return mlflow_experiment.experiment_in_force(mlflow_store.resolve_tracking_uri())


# --- over there -----------------------------------------------------------------------------------------------------


class _Process:
    """State of a process that traces for others. ``lock`` guards it."""

    def __init__(self) -> None:
        self.start_afresh()

    def start_afresh(self) -> None:
        """Begin with nothing, as a forked child does, where nobody holds the lock."""
        self.lock = threading.Lock()
        self.uri: str | None = None  # of the tracer that was installed here for others
        self.users = 0  # blocks of ``attached`` that are open

    def enter(self, carried: Carried, arguments: dict[str, Any] | None) -> None:
        """Let this process trace into the carried store, unless it has another one."""
        uri = carried.tracking_uri
        with self.lock:
            if self.uri != uri:
                self._refuse_other_store(uri)
                _refuse_foreign_file(carried)
                if not is_tracking_uri_set() or self.uri is not None:
                    mlflow_runs.mlflow.set_tracking_uri(uri)
                self.uri = uri
            if arguments is not None and not composition.is_installed():
                # A worker may be killed at any time, by whoever runs it: what has ended is on its disk by then.
                composition.autolog(**{**arguments, "durable": True, "silent": True})
            self.users += 1

    def _refuse_other_store(self, uri: str) -> None:
        mine = self.uri
        if mine is None and is_tracking_uri_set():
            mine = mlflow_store.absolute_uri(mlflow_store.resolve_tracking_uri())
        if mine is not None and mine != uri and (self.uri is None or self.users):
            raise RuntimeError(
                f"this process traces into {_shown(mine)}, and what was carried here belongs to {_shown(uri)}: a "
                "process serves one store. Set the same tracking URI on both sides, or use other workers"
            )

    def leave(self) -> None:
        with self.lock:
            self.users -= 1


def _shown(uri: str) -> str:
    """Return a tracking URI without the password that it may have."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _refuse_foreign_file(carried: Carried) -> None:
    uri = carried.tracking_uri
    if uri.startswith(("sqlite:", "file:")) and carried.host != socket.gethostname():
        raise RuntimeError(
            f"the store {_shown(uri)} is a file on {carried.host}, which workers on {socket.gethostname()} cannot "
            "write. Start `mlflow server` there, and mlflow.set_tracking_uri('http://...') before anything is sent"
        )


_process = _Process()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_process.start_afresh)


@contextlib.contextmanager
def attached(carried: Carried) -> Iterator[None]:
    """Let the block run as if it were where ``carried`` was taken: under that span, in those runs, by those rules.

    Where no tracer is on in this process it is installed, with the arguments of the one that carried, and with
    ``durable=True``. It stays: call ``flush`` before the process ends or is given away.

    Args:
        carried: What ``carry`` has returned, in this process or another.

    Raises:
        TypeError: For anything else.
        RuntimeError: Where this process traces into another store, or cannot reach the one that was carried.
    """
    if not isinstance(carried, Carried):
        raise TypeError(f"attached takes what carry() has returned, not {carried!r}")
    with attached_as(carried):
        yield


@contextlib.contextmanager
def attached_as(carried: Carried, settings: Mapping[str, Any] | None = None) -> Iterator[Homework]:
    """Do as ``attached`` does, with these settings of DSPy's, unpickled before, in place of the carried ones.

    Yields:
        What notes the LM calls of the block, for the way home.
    """
    arguments = None if carried.autolog is None else pickling.loads(carried.autolog)
    _process.enter(carried, arguments)
    try:
        homework = Homework(None if carried.request_redact is None else pickling.loads(carried.request_redact))
        if carried.ratio is not None:
            composition.ensure_sampler()
        with contextlib.ExitStack() as stack:
            stack.enter_context(Carrier(_values(carried, arguments, homework)).carried())
            stack.enter_context(_under(carried))
            if settings is None and carried.settings is not None:
                settings = pickling.load_settings(carried.settings)
            if settings is not None:
                stack.enter_context(dspy.context(**settings))
            yield homework
    finally:
        _process.leave()


def _values(carried: Carried, arguments: dict[str, Any] | None, homework: Homework) -> dict[Any, Any]:
    """Return the context variables to set, with their values."""
    observer: RequestObserver = homework
    context = carried.trace_context or ({}, {}, None)
    if carried.is_silent:
        context = (context[0], context[1], False)
    values: dict[Any, Any] = {
        frames.VARIABLE: frames.Frame("carried", None, request=observer, is_carried=True),
        active_runs.VARIABLE: tuple(run.opened_elsewhere() for run in carried.runs) or None,
        export.KEEPS: None if carried.keeps is None else pickling.loads(carried.keeps),
        OVERRIDE: _override(arguments),
        RATIO: carried.ratio,
        mlflow_spans.TRACE_CONTEXT: mlflow_spans.context_of(*context),
    }
    if carried.experiment_id is not None:
        values[DESTINATION] = destination(carried.experiment_id)
    return values


def _override(arguments: dict[str, Any] | None) -> Override | None:
    """Return the carried settings where the process has others, or None."""
    if arguments is None:
        return Override(None) if composition.is_installed() else None
    names = Settings.__dataclass_fields__
    settings = Settings(**{name: value for name, value in arguments.items() if name in names})
    return None if settings == composition.current_settings() else Override(settings)


@contextlib.contextmanager
def _under(carried: Carried) -> Iterator[None]:
    """Make the carried span current in a block, or none where there is none."""
    remote = remote_parent(list(carried.traceparent.items()))
    before = mlflow_spans.current_context()
    mlflow_spans.attach(mlflow_spans.INVALID_SPAN if remote is None else remote, before)
    adopted = None
    try:
        if remote is not None:
            adopted = remote_traces.adopt(remote.get_span_context().trace_id, carried.experiment_id)
        yield
    finally:
        mlflow_spans.reattach(before)
        if adopted is not None:
            remote_traces.release(adopted)


class Homework:
    """Record of the LM calls of a block of ``attached``, and the redaction of the requests that were around it there.

    It is told of the calls by whichever threads and tasks they run in. Those only append, and share no lock.

    Args:
        redact: The requests' redaction, or None.

    Attributes:
        lm_calls: The calls that have ended.
    """

    def __init__(self, redact: Any = None) -> None:
        self.lm_calls: list[LmCall] = []
        self._redact = redact
        self._adapted: tuple[Settings, Settings] | None = None

    def on_span_start(self, span: Any) -> None:
        """Take no note of a span."""

    def call_started(self, span: Any, inputs: str | None) -> None:
        """Take no note of a call: its root is elsewhere."""

    def call_ended(self, span: Any, outputs: str | None) -> None:
        """Take no note of its end."""

    def lm_call_ended(self, call: LmCall) -> None:
        """Note that an LM call has ended."""
        self.lm_calls.append(call)

    def adapt(self, settings: Settings) -> Settings:
        """Return the settings with the requests' redaction before the tracer's."""
        if self._redact is None:
            return settings
        known = self._adapted
        if known is None or known[0] is not settings:
            known = self._adapted = (settings, settings.with_redact(self._redact))
        return known[1]
