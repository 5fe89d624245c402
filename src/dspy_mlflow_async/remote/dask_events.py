"""Usage on its way home from Dask's workers: as events, since results stay there as what they are.

Dask is looked up, never imported: where nobody has imported it, nobody calls from it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

from dspy_mlflow_async.guard import guarded

_subscribed: weakref.WeakSet[Any] = weakref.WeakSet()


@guarded
def subscribe(topic: str, came_home: Callable[[Any], None]) -> None:
    """Let this process's current client, if there is one, hear of what workers send to a topic.

    Args:
        topic: The topic, this process's own.
        came_home: Called with each message, in the client's event loop, before the task that sent it is done here.
    """
    distributed = sys.modules.get("distributed")
    if distributed is None or not hasattr(distributed, "default_client"):
        return
    try:
        client = distributed.default_client()
    except ValueError:  # none has been started
        return
    if client not in _subscribed:
        _subscribed.add(client)
        client.subscribe_topic(topic, lambda event: came_home(event[1]))


def worker_here() -> Any | None:
    """Return the worker that runs this task, or None outside of Dask."""
    distributed = sys.modules.get("distributed")
    if distributed is None or not hasattr(distributed, "get_worker"):
        return None
    try:
        return distributed.get_worker()
    except ValueError:
        return None


@guarded
def send_home(worker: Any, topic: str, message: Any) -> None:
    """Send a message to whoever has subscribed to a topic. It arrives before the task is done.

    Args:
        worker: The worker.
        topic: The topic.
        message: Lists, texts and numbers.
    """
    worker.log_event(topic, message)
