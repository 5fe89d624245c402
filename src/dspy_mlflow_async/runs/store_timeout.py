"""Requests to MLflow's store with a timeout: an evaluation neither fails nor waits for a store that is away."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from dspy_mlflow_async import export

TIMEOUT = 10.0  # seconds: a busy machine must not be taken for a store that is away

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
        TimeoutError: When there is no answer in time, or the queue of this store knows that it gives none now.
        Exception: What ``question`` raised.
    """
    writer = export.run_writer(None)
    if not writer.may_ask():
        raise TimeoutError("the store is away")
    begun = time.monotonic()
    wait = _Wait(question, discard)
    # MLflow's own retries can take minutes; a daemon does not hold up the end of the process either.
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(wait.run,), name="dspy-mlflow-async-ask", daemon=True).start()
    try:
        return wait.result(timeout)
    except Exception as error:
        if not export.is_refusal(error):
            writer.note_wait(begun)
        raise


class _Wait(Generic[_Answer]):
    """One request to the store. ``lock`` guards whose the answer is: the caller's, or ``discard``'s."""

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
