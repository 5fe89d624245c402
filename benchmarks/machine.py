"""What machine the figures come from, without which they say nothing."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from benchmarks import meters

_PACKAGES = (
    "dspy",
    "mlflow",
    "dspy-mlflow-async",
    "openinference-instrumentation-dspy",
    "opentelemetry-sdk",
    "sqlalchemy",
    "orjson",
    "litellm",
    "pydantic",
)
_BUSY_LOAD = 0.3  # for each core, of the minute before the run: somebody else was at work
MOST_STOLEN = 0.02  # of a sample: with more, its times are those of the hypervisor
_ROOT = Path(__file__).parent.parent


def describe() -> dict[str, Any]:
    """The machine, the interpreter and the versions of what takes part."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "is_virtual": _is_virtual(),
        "file_system": meters.file_system(Path(tempfile.gettempdir())),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "gil": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "commit": _git("rev-parse", "HEAD"),
        "is_modified": bool(_git("status", "--porcelain", "--", "src")),
    }


def in_words(machine: dict[str, Any]) -> str:
    """One sentence of it."""
    versions = machine["versions"]
    return (
        f"{machine['cores']} cores of {machine['cpu']}{' (virtual)' if machine['is_virtual'] else ''}, "
        f"{machine['memory_gib']} GiB, {machine['file_system']}, {machine['system']}, "
        f"{machine['implementation']} {machine['python']}{'' if machine['gil'] else ' without GIL'}, "
        f"dspy {versions.get('dspy')}, mlflow {versions.get('mlflow')}, "
        f"openinference-instrumentation-dspy {versions.get('openinference-instrumentation-dspy')}, "
        f"commit {(machine['commit'] or 'unknown')[:12]}{' with changes' if machine['is_modified'] else ''}"
    )


def is_busy(said: dict[str, Any]) -> bool:
    """Return whether a machine had something else to do before a run, by what that says of it."""
    return bool(said["load_before"] > _BUSY_LOAD * (said["cores"] or 1))


def is_disturbed(sample: dict[str, Any]) -> bool:
    """Return whether the hypervisor has given so much time to others during a sample that its times say nothing."""
    return bool(sample["steal"] > MOST_STOLEN)


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _is_virtual() -> bool | None:
    with contextlib.suppress(OSError):
        return " hypervisor" in Path("/proc/cpuinfo").read_text()
    return None


def _version(name: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(name)
    return None


def _git(*arguments: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    return None
