"""What a process has used so far: CPU, memory, time that the hypervisor gave to others."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Reading:
    """The clocks at one moment.

    Attributes:
        wall: Seconds, monotonic.
        cpu: CPU seconds of this process, all threads.
        cpu_children: CPU seconds of its child processes, those that have ended included.
        steal: CPU seconds that this machine wanted and its hypervisor gave to others.
    """

    wall: float
    cpu: float
    cpu_children: float
    steal: float


def read() -> Reading:
    """All clocks now."""
    return Reading(time.perf_counter(), time.process_time(), _cpu_children(), steal())


def _cpu_children() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = ended.ru_utime + ended.ru_stime
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                times = child.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
    return total


def cpu_of(pid: int) -> float:
    """CPU seconds of a process and all below it."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = one.cpu_times()
                total += times.user + times.system
    return total


def steal() -> float:
    """CPU seconds stolen since the machine started; 0 where the system does not say."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


def memory() -> int:
    """Resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def memory_of_children() -> int:
    """Bytes of the child processes of this one, of pages that several have a share each; 0 without any."""
    total = 0
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                own = child.memory_full_info()
                total += int(getattr(own, "pss", own.uss))
    return total


def forget_peak() -> None:
    """Let ``peak_memory`` begin anew; only Linux can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The most resident bytes since ``forget_peak``; elsewhere than on Linux, since the process began."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def file_system(folder: Path) -> str:
    """The type of file system that a folder is on."""
    best = ""
    name = "unknown"
    for partition in psutil.disk_partitions(all=True):
        mount = partition.mountpoint
        if os.path.commonpath([mount, str(folder.resolve())]) == mount and len(mount) >= len(best):
            best, name = mount, partition.fstype
    return name
