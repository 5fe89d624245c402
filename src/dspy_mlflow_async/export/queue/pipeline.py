"""Export pipeline as a whole: assembler, one queue per store, one thread that looks after what is overdue."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from dspy_mlflow_async.export.assemble import gc_deferred
from dspy_mlflow_async.export.assemble.assembler import TraceAssembler
from dspy_mlflow_async.export.counters import TraceCounters
from dspy_mlflow_async.export.operations import Operation, Reference
from dspy_mlflow_async.export.options import ExportOptions, spool_root
from dspy_mlflow_async.export.queue.export_process import ProcessQueue
from dspy_mlflow_async.export.queue.store_queue import StoreQueue
from dspy_mlflow_async.export.spool.follower import SegmentFollower
from dspy_mlflow_async.export.spool.paths import folder_of
from dspy_mlflow_async.export.spool.quota import Quota
from dspy_mlflow_async.export.spool.segments import Spool
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.seams import mlflow_store


class Pipeline:
    """Pipeline from ended spans to stored traces. Threads start when there is something to do."""

    def __init__(
        self,
        options: ExportOptions,
        counters: TraceCounters | None = None,
        housekeeping: Callable[[], None] | None = None,
    ) -> None:
        self.options = options
        self.counters = counters or TraceCounters()
        self.assembler = TraceAssembler(options, self.counters, self)
        self.queues: dict[str, StoreQueue] = {}
        self.is_closed = False
        self.has_forked = False  # whether there are, or were, children that may leave something behind
        self._is_ending = False
        self._successor: Pipeline | None = None
        self._housekeeping = guarded(housekeeping) if housekeeping else None
        self._lock = threading.Lock()
        self._ticker: threading.Thread | None = None
        self._stop = threading.Event()

    def current(self) -> Pipeline:
        """Return this pipeline, or the one that has replaced it."""
        pipeline = self
        while pipeline._successor is not None:
            pipeline = pipeline._successor
        return pipeline

    def queue(self, uri: str) -> StoreQueue:
        """Return the queue of a (resolved) tracking URI."""
        if queue := self.queues.get(uri):
            return queue
        with self._lock:
            successor = self._successor
            if successor is None:
                if uri not in self.queues:
                    self.queues[uri] = self._make_queue(uri)
                return self.queues[uri]
        return successor.queue(uri)

    def _make_queue(self, uri: str) -> StoreQueue:
        stable_uri = mlflow_store.absolute_uri(uri)  # what lies on disk may be sent from another working directory
        folder = folder_of(spool_root(self.options.spool_dir), stable_uri)
        quota = Quota(folder, self.options.max_spool_bytes)
        queue: StoreQueue
        if self.options.mode == "process":
            spool = Spool(folder, stable_uri, is_shared=True, quota=quota)
            queue = ProcessQueue(self.options, self.counters, stable_uri, spool)
        else:
            follower = SegmentFollower(folder, counts=False, follows_living=False)
            spool = Spool(folder, stable_uri, follower=follower, quota=quota)
            queue = StoreQueue(self.options, self.counters, uri, spool)
        if self._is_ending:
            queue.prepare_for_end()
        return queue

    def emit(self, uri: str, operation: Operation, is_sync: bool) -> None:
        """Bring an operation on its way; with ``is_sync``, to the store before returning."""
        queue = self.queue(uri)
        if is_sync:
            queue.synchronous.write_now(operation)
        else:
            queue.put(operation)

    def writes_ahead(self, uri: str) -> bool:
        """Return whether what has ended goes to the disk before anything else."""
        return self.queue(uri).ahead.is_wanted

    def write_ahead(self, uri: str, operation: Operation) -> Reference | None:
        """Keep a copy of an operation on disk until the operation itself comes."""
        return self.queue(uri).ahead.copy(operation)

    def discard_copy(self, uri: str, reference: Reference) -> None:
        """Forget a copy that nothing supersedes any more."""
        self.queue(uri).ahead.discard(reference)

    def store(self, trace_id: str, timeout: float = 10.0) -> None:
        """Bring a trace that has ended to the store now, whoever holds it; what is there already costs nothing.

        Args:
            trace_id: MLflow's id.
            timeout: Seconds to wait for a batch that it is in.
        """
        self.assembler.hand_on(trace_id)
        for queue in list(self.queues.values()):
            if queue.pending.has(trace_id):
                queue.synchronous.write_waiting(trace_id, timeout)

    def store_waiting(self, uri: str, timeout: float = 10.0) -> None:
        """Bring what waits for a store there now, for somebody who is about to search it.

        Args:
            uri: The tracking URI.
            timeout: Seconds to wait for it; no longer than the store proves to be away.
        """
        queue = self.queues.get(uri)
        if queue is not None and queue.availability.lets_wait and not queue.is_empty():
            queue.flush(time.monotonic() + timeout)

    # --- what is overdue ---

    def start(self) -> None:
        """Look after open traces from now on."""
        with self._lock:
            if self._ticker is None and not self.is_closed:
                ticker = threading.Thread(target=self._tick, name="dspy-mlflow-async-ticker", daemon=True)
                ticker.start()
                self._ticker = ticker

    def _tick(self) -> None:
        shortest = min(self.options.visible_after, self.options.children_timeout)
        interval = max(0.05, min(1.0, shortest / 4))
        next_housekeeping = time.monotonic() + 1.0
        while not self._stop.wait(interval):
            if time.monotonic() >= next_housekeeping:
                next_housekeeping = time.monotonic() + 1.0
                self.keep_house()
                self.take_over()
            self.look_after()

    @guarded
    def look_after(self) -> None:
        """Look after whatever is overdue."""
        self.assembler.tick()

    def keep_house(self) -> None:
        """End the spans deferred from garbage collection, and do the caller's own chores, which may end spans."""
        gc_deferred.take_up()
        if self._housekeeping is not None:
            self._housekeeping()

    @guarded
    def take_over(self, *, of_all: bool = False) -> None:
        """Bring to the store what forked children of this process have left on the disk when they ended.

        Args:
            of_all: Whether what any process has left that is gone.
        """
        if not (self.has_forked or of_all) or self.is_closed:
            return
        for uri in {mlflow_store.resolve_tracking_uri(), *self.queues}:
            if not mlflow_store.is_databricks_uri(uri):
                self.queue(uri).take_over()

    # --- the end ---

    def flush(self, timeout: float | None) -> bool:
        """Write everything that has ended, held or not, and what ended children have left, and wait for it.

        Traces that are still open are shown with what has ended of them.

        Returns:
            Whether all of it is stored.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self.keep_house()
        self.take_over()
        self.assembler.hand_on_everything()
        self.assembler.show_open(is_end=self._is_ending)
        results = [queue.flush(deadline) for queue in list(self.queues.values())]
        return all(results) and not self.assembler.is_any_unshown()

    def has_open(self) -> bool:
        """Return whether a trace is open here that began here."""
        return any(entry.inherited is None for entry in list(self.assembler.entries.values()))

    def is_empty(self) -> bool:
        """Return whether nothing waits here, in memory or on disk."""
        return all(queue.is_empty() for queue in list(self.queues.values()))

    def save_everything(self) -> dict[str, int]:
        """Bring what is left to the disk, and stop. For the end of the process.

        Returns:
            How many operations were left, by spool folder.
        """
        self.stop_ticking()
        gc_deferred.take_up()
        self.assembler.hand_on_everything()
        left = {}
        for queue in list(self.queues.values()):
            if count := queue.save_everything():
                left[str(queue.spool.folder)] = count
        return left

    def prepare_for_end(self) -> None:
        """Let nobody wait for the store any more, and let what is shown of open traces count as the last of them."""
        self._is_ending = True
        for queue in list(self.queues.values()):
            queue.prepare_for_end()

    def stop_ticking(self) -> None:
        """End the thread of this object; the queues' threads end by themselves."""
        self._stop.set()

    def close(self, successor: Pipeline | None = None) -> threading.Thread:
        """Stop taking spans; what is on its way goes on in the background.

        Args:
            successor: Takes over what is in flight, and the queues, as far as its options allow.

        Returns:
            The thread that brings the rest to the store, or to the disk, and then stops all others.
        """
        if successor is not None:
            successor.assembler.adopt(self.assembler)
            successor.has_forked = self.has_forked
            with self._lock:
                self._successor = successor
                self._bequeath(successor)
            self.assembler.entries = {}
        else:
            self.counters.forget(self.assembler.forget_open())
            self.assembler.hand_on_everything()
        self.is_closed = True
        self.stop_ticking()

        queues = list(self.queues.values())

        def finish() -> None:
            for queue in queues:
                queue.flush(time.monotonic() + self.options.exit_timeout)
                queue.save_everything()

        thread = threading.Thread(target=finish, name="dspy-mlflow-async-close", daemon=True)
        thread.start()
        return thread

    def _bequeath(self, successor: Pipeline) -> None:
        """Hand over queues that would be made alike, so that what follows in them keeps its order."""
        if self.options.mode != successor.options.mode:
            return
        root = spool_root(successor.options.spool_dir)
        for uri, queue in self.queues.copy().items():
            if queue.spool.folder.parent == root:
                queue.renew(successor.options)
                successor.queues[uri] = self.queues.pop(uri)

    def after_fork(self) -> None:
        """Begin anew in a forked child: no threads, nothing waiting, and the parent's traces are the parent's."""
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._ticker = None
        self.has_forked = False
        self.counters.reset()
        self.assembler.after_fork()
        for queue in self.queues.values():
            queue.after_fork()
        self.queues = {}
