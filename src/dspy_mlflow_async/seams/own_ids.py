"""Ids of spans and calls from random numbers of our own, also of the spans by which an SDK is tried.

OpenTelemetry makes ids from those of ``random``. A program that seeds these would draw others while it is traced, and
overwrite its traces when it is run again. To ask the system for each would let go of the interpreter each time, and a
caller then waits until the writer lets go of it.
"""

from __future__ import annotations

import os
from random import Random
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator

_random = Random()  # noqa: S311 - ids are no secrets
random_bits = _random.getrandbits
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_random.seed)


class OwnIds(IdGenerator):
    """Ids from random numbers of our own, which the system has seeded."""

    def generate_span_id(self) -> int:
        """Return a span's id."""
        return random_bits(64) or self.generate_span_id()

    def generate_trace_id(self) -> int:
        """Return a trace's id."""
        return random_bits(128) or self.generate_trace_id()


def provider_of_probes() -> TracerProvider:
    """Return a provider of the SDK to try things with, which nobody knows and which needs no end."""
    return TracerProvider(resource=Resource({}), shutdown_on_exit=False, id_generator=OwnIds())


def probe_span() -> Any:
    """Begin a span of the SDK to look at."""
    return provider_of_probes().get_tracer(__name__).start_span("probe")
