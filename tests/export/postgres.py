"""A real PostgreSQL of a test's own, on loopback, that can be stopped without warning and started again."""

import os
import shutil
import subprocess
from pathlib import Path

from mlflow_server import free_port

PACKAGE = "postgresql"


def programs():
    """The folder with ``initdb`` and ``pg_ctl``, or None where there is no PostgreSQL server."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return None if on_path is None else Path(on_path).resolve().parent


def install():
    """Install Debian's package, where we may; gives the folder of its programs, or None."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return None
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", PACKAGE]):
        subprocess.run(["apt-get", *command], env=environment, check=True, timeout=300, capture_output=True)  # noqa: S607
    return programs()


class Postgres:
    """One cluster in an empty folder.

    PostgreSQL refuses to run as root: then it runs as the user that Debian has for it, which must be able to reach
    the folder. pytest's folders are root's alone.
    """

    def __init__(self, folder, bin_folder):
        self._folder = Path(folder)
        self._bin = bin_folder
        self._user = None
        self._port = free_port()
        if os.geteuid() == 0:
            self._user = "postgres"
            shutil.chown(folder, self._user)
        self._run("initdb", "--auth=trust", "--username=mlflow", "--no-sync", "--encoding=UTF8", "--locale=C")
        self.uri = f"postgresql+psycopg2://mlflow@127.0.0.1:{self._port}/postgres"

    def start(self):
        options = f"-h 127.0.0.1 -p {self._port} -k '' -c fsync=off"
        self._run("pg_ctl", "start", "--wait", "--timeout=60", f"--log={self._folder / 'log'}", f"--options={options}")

    def stop(self):
        """Without warning: connections are cut, and the next start recovers from the log."""
        self._run("pg_ctl", "stop", "--mode=immediate", "--wait")

    def _run(self, program, *arguments):
        subprocess.run(
            [self._bin / program, "--pgdata", self._folder, *arguments],
            user=self._user,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            cwd="/",
            check=True,
            timeout=120,
            stdout=subprocess.DEVNULL,  # a pipe would stay open as long as the server that `pg_ctl` starts
        )
