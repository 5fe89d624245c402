"""Asks MLflow's store something, for a bounded time: an evaluation neither fails nor waits for a store that is away."""

from __future__ import annotations

import contextvars
import os
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from dspy_mlflow_async.seams import mlflow_runs as seam

TIMEOUT = 10.0  # seconds: a busy machine must not be taken for a store that is away
# Seconds in which a store that was away is not asked again: twice as long each time that it is away again.
FIRST_PAUSE = 5.0
LONGEST_PAUSE = 300.0

_Answer = TypeVar("_Answer")


def ask(
    question: Callable[[], _Answer], discard: Callable[[_Answer], None] | None = None, timeout: float = TIMEOUT
) -> _Answer:
    """Call ``question``, which talks to the store, in a thread of its own and a copy of this context.

    Args:
        question: What to call.
        discard: Called, in that thread, with an answer that came too late.
        timeout: Seconds to wait.

    Raises:
        TimeoutError: When there is no answer in time, or this store gave none a moment ago.
        Exception: What ``question`` raised.
    """
    uri = seam.tracking_uri()
    _away.check(uri)
    wait = _Wait(question, discard)
    # MLflow's own retries can take minutes; a daemon does not hold up the end of the process either.
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(wait.run,), name="dspy-mlflow-async-ask", daemon=True).start()
    try:
        answer = wait.result(timeout)
    except Exception as error:
        if seam.is_away(error):
            _away.note(uri)
        raise
    _away.forget(uri)
    return answer


class _Away:
    """Which stores were away, and until when they are not asked. ``lock`` guards that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pauses: dict[str, tuple[float, float]] = {}  # its end, by the monotonic clock, and its length

    def check(self, uri: str) -> None:
        with self._lock:
            end, _ = self._pauses.get(uri, (0.0, 0.0))
        if time.monotonic() < end:
            raise TimeoutError("the store was away a moment ago")

    def note(self, uri: str) -> None:
        with self._lock:
            _, earlier = self._pauses.get(uri, (0.0, 0.0))
            pause = min(max(2 * earlier, FIRST_PAUSE), LONGEST_PAUSE)
            self._pauses[uri] = (time.monotonic() + pause, pause)

    def forget(self, uri: str) -> None:
        with self._lock:
            self._pauses.pop(uri, None)


_away = _Away()
if hasattr(os, "register_at_fork"):
    # Nobody holds its lock there.
    os.register_at_fork(after_in_child=_away.__init__)  # type: ignore[misc]


class _Wait(Generic[_Answer]):
    """One question. ``lock`` guards whose the answer is: the asker's, or ``discard``'s."""

    def __init__(self, question: Callable[[], _Answer], discard: Callable[[_Answer], None] | None) -> None:
        self._question = question
        self._discard = discard
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._was_given_up = False
        self._answers: list[_Answer] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            answer = self._question()
            with self._lock:
                self._answers.append(answer)
                is_late = self._was_given_up
            if is_late and self._discard is not None:
                self._discard(answer)
        except BaseException as error:  # noqa: BLE001 - handed to the one who waits
            self._error = error
        finally:
            self._done.set()

    def result(self, seconds: float) -> _Answer:
        try:
            self._done.wait(seconds)
        except BaseException:  # interrupted: nobody takes the answer
            if not self._give_up() and self._discard is not None:
                self._discard(self._answers[0])
            raise
        if not self._done.is_set() and self._give_up():
            raise TimeoutError(f"the store did not answer within {seconds:g} s")
        if self._error is not None:
            raise self._error
        return self._answers[0]

    def _give_up(self) -> bool:
        """Leave the answer to ``discard``; False where it has just come."""
        with self._lock:
            self._was_given_up = not self._answers
            return self._was_given_up
