"""Machines of a test's own: network namespaces on one switch, each with a host name and an address of its own."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# /dev/shm has Ray's objects, /tmp/ray its sockets: nothing of one machine's may be seen on another.
_BEGIN = """
mkdir -p /tmp/ray
mount --bind "$1/ray" /tmp/ray
mount -t tmpfs tmpfs /dev/shm
hostname "$2"
shift 2
exec "$@"
"""
_IP = shutil.which("ip")
_ISOLATED = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]


class Machine:
    """A namespace of the network, and processes in it with their own host name, process ids, shared memory and HOME.

    Python and its packages are those of this machine, as on machines with the same image.
    """

    def __init__(self, name, namespace, address, folder):
        self.name, self.namespace, self.address = name, namespace, address
        self.home = folder / name
        for part in ("ray", "tmp", "work"):
            (self.home / part).mkdir(parents=True)
        self._started = []

    @property
    def log(self):
        return self.home / "log.txt"

    def start(self, *command, **environment):
        """Run a command, with no variable but these and what every login has, in a folder of its own.

        Its standard output is a pipe; what it says otherwise is in ``log``. All that it begins ends with it.
        """
        own = {
            "HOME": str(self.home),
            "TMPDIR": str(self.home / "tmp"),
            "RAY_TMPDIR": "/tmp",  # noqa: S108 - the path of a socket has at most 107 bytes; /tmp/ray is its own
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/sbin", "/usr/bin", "/sbin", "/bin"]),
            "LANG": "C.UTF-8",
        }
        begin = ["sh", "-ec", _BEGIN, "sh", str(self.home), self.name]
        with self.log.open("ab") as log:
            started = subprocess.Popen(
                [_IP, "netns", "exec", self.namespace, *_ISOLATED, *begin, *map(str, command)],
                env={**own, **environment},
                cwd=self.home / "work",
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._started.append(started)
        return started

    def end(self):
        """Kill what runs, with all that it has begun."""
        for process in self._started:
            process.kill()
            process.wait(30)
            process.stdout.close()


@contextlib.contextmanager
def machines(folder, *names):
    """Make machines of these names, with addresses from 10.77.0.1; nothing is left of them afterwards.

    The first has the switch: a bridge to which each of the others has a pair of virtual network cards.
    """
    if None in (_IP, shutil.which("unshare")):
        pytest.skip("needs network namespaces: `ip` (Debian: apt-get install iproute2) and `unshare`")
    with contextlib.ExitStack() as after:
        made = []
        for number, name in enumerate(names):
            namespace = f"dma-{os.getpid()}-{name}"
            said = _ip("netns", "add", namespace)
            if said.returncode != 0:
                pytest.skip(f"network namespaces cannot be made here: {said.stderr.strip()}")
            after.callback(_ip, "netns", "del", namespace)
            machine = Machine(name, namespace, f"10.77.0.{number + 1}", folder)
            made.append(machine)
            after.callback(machine.end)
        for line in _wires(made):
            said = _ip(*line.split())
            if said.returncode != 0:
                pytest.skip(f"`ip {line}` fails here: {said.stderr.strip()}")
        yield made


def _wires(made):
    """The arguments of `ip` that connect machines."""
    first, *others = made
    yield f"-n {first.namespace} link add switch type bridge"
    yield f"-n {first.namespace} addr add {first.address}/24 dev switch"
    yield f"-n {first.namespace} link set switch up"
    for number, other in enumerate(others):
        yield f"-n {first.namespace} link add port{number} type veth peer name card netns {other.namespace}"
        yield f"-n {first.namespace} link set port{number} master switch up"
        yield f"-n {other.namespace} addr add {other.address}/24 dev card"
        yield f"-n {other.namespace} link set card up"
    for each in made:
        yield f"-n {each.namespace} link set lo up"


def _ip(*arguments):
    return subprocess.run([_IP, *arguments], capture_output=True, text=True, check=False)
