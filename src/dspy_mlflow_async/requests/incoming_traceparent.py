"""Trust in incoming ``traceparent`` headers, and counters of those that were followed and ignored."""

from __future__ import annotations

import ipaddress
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from dspy_mlflow_async.requests.options import call, refuse_async
from dspy_mlflow_async.seams.mlflow_remote_traces import remote_parent

AsgiScope = Any
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
# True for everybody, or a function of the ASGI scope, or the networks from which callers connect.
Trust = bool | Callable[[AsgiScope], Any] | Iterable[str | Network]


class Callers:
    """Decide which callers of one service may continue their trace in it.

    Args:
        trust: As for ``TracingMiddleware``'s ``traceparent``.

    Raises:
        TypeError: For anything but a bool, a function, or a list of networks.
        ValueError: For a text that names no network.
    """

    def __init__(self, trust: Trust) -> None:
        self._function: Callable[[AsgiScope], Any] | None = None
        self._networks: tuple[Network, ...] = ()
        self._trusts_all = trust is True
        if callable(trust):
            refuse_async("traceparent", trust)
            self._function = trust
        elif not isinstance(trust, bool):
            self._networks = _networks(trust)

    def parent(self, asgi: AsgiScope) -> Any | None:
        """Return the caller's span by the request's headers; None where there is none that is believed."""
        headers = _trace_headers(asgi)
        if not any(name == "traceparent" for name, _ in headers):
            return None
        span = remote_parent(headers) if self._trusts(asgi) else None
        if span is None:
            _count("ignored")
        elif span.get_span_context().trace_flags.sampled:
            _count("followed")
        else:
            _count("unsampled")
        return span

    def _trusts(self, asgi: AsgiScope) -> bool:
        if self._function is not None:
            return bool(call(self._function, (asgi,), {}))
        return self._trusts_all or (bool(self._networks) and self._is_near(asgi.get("client")))

    def _is_near(self, client: Any) -> bool:
        try:
            address = ipaddress.ip_address(str(client[0]).partition("%")[0])
        except (TypeError, IndexError, ValueError):  # a Unix socket, or a server that does not say
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self._networks)


def _networks(trust: Any) -> tuple[Network, ...]:
    if isinstance(trust, (str, bytes)) or not isinstance(trust, Iterable):
        raise TypeError(
            "traceparent must be True, False, a function of the ASGI scope, or a list of networks such as "
            f"['10.0.0.0/8'], not {trust!r}"
        )
    try:
        return tuple(ipaddress.ip_network(network, strict=False) for network in trust)
    except ValueError as error:
        raise ValueError(f"traceparent: {error}") from None


def _trace_headers(asgi: AsgiScope) -> list[tuple[str, str]]:
    return [
        (name.decode("latin-1").lower(), value.decode("latin-1"))
        for name, value in asgi.get("headers") or ()
        if name.lower() in {b"traceparent", b"tracestate"}
    ]


# --- the counts of this process -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CallerCounts:
    """Requests of this process that came with a ``traceparent`` header.

    Attributes:
        followed: Became part of the caller's trace.
        unsampled: Were believed to come from a caller that does not sample, and so made no trace.
        ignored: Were not believed, or malformed, and made traces of their own.
    """

    followed: int = 0
    unsampled: int = 0
    ignored: int = 0


_lock = threading.Lock()
_counts: Counter[str] = Counter()


def caller_counts() -> CallerCounts:
    """Return the counts so far."""
    with _lock:
        return CallerCounts(**_counts)


def _count(fate: Literal["followed", "unsampled", "ignored"]) -> None:
    with _lock:
        _counts[fate] += 1
