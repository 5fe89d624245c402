"""The command: ``python tests/rows``. It compares stores for versions of MLflow, and ends with 1 where they differ."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # the package, not its modules one by one
sys.path.insert(1, str(HERE.parent / "parity"))
sys.path.insert(2, str(HERE.parent / "export"))

# One of each minor version from the lowest that is supported; those in between have the same tables.
VERSIONS = ("3.11.1", "3.12.0", "3.13.0", "3.14.0", "3.15.2", "3.16.1", "3.17.2", "3.18.0")


def main(arguments):
    """Print a line for each version and each store, and return the exit code."""
    options = _options(arguments)
    if options.here:
        print(json.dumps(dataclasses.asdict(_compare_here(Path(options.here), options.uris))))
        return 0
    code = 0
    with tempfile.TemporaryDirectory(prefix="rows-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        folder.chmod(0o711)  # PostgreSQL's user must reach its own folder
        with _postgres(folder, options.postgres) as databases:
            for number, wanted in enumerate(options.versions or VERSIONS):
                path = _installed(wanted, folder / f"mlflow-{wanted}")
                for name in ("sqlite", *(("postgresql",) if databases else ())):
                    uris = databases(number) if name == "postgresql" else []
                    code |= _say(wanted, name, _child(path, folder / f"{number}-{name}", uris), options.verbose)
    return code


def _say(wanted, name, told, verbose):
    if "failed" in told:
        print(f"mlflow {wanted:<8} {name:<11} FAILED: {told['failed']}", flush=True)
        return 1
    count = len(told["differences"])
    outcome = f"{told['as_rows']} of {told['traces']} traces as rows, {count or 'no'} differences"
    print(f"mlflow {wanted:<8} {name:<11} {outcome}", end="", flush=True)
    print(f"; no rows: {told['reason']}" if told["reason"] else "", flush=True)
    for kind, reason in told["refused"].items():
        print(f"    left to MLflow: {kind}: {reason}")
    if verbose:
        print(f"    the same: {', '.join(told['proved'])}")
    for line in told["differences"][:10]:
        print(f"    {line}")
    return 1 if count else 0


def _installed(wanted, target):
    """A folder with this version of MLflow, for the path; None where it is the one that is installed."""
    if wanted == version("mlflow"):
        return None
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    done = subprocess.run([*command, f"mlflow=={wanted}"], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"mlflow {wanted} cannot be installed: {done.stderr.strip().splitlines()[-1:]}", flush=True)
    return target


def _child(path, folder, uris):
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment |= {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "MLFLOW_MODEL_CATALOG_URI": "",  # its prices are asked of nobody
        "DSPY_MLFLOW_ASYNC_SPOOL": str(folder / "spool"),
    }
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-W", "ignore", str(HERE), "--here", str(folder), *uris]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550, check=False)
    if done.returncode:
        return {"failed": "\n".join(done.stderr.strip().splitlines()[-12:])}
    return json.loads(done.stdout.splitlines()[-1])


def _compare_here(folder, uris):
    """Collect the traces with this version of MLflow, and write them to two stores of its own or to those given."""
    warnings.simplefilter("ignore")
    import mlflow
    from test_side_by_side import PROGRAMS

    from rows.compare import compare, make_empty, two_files
    from rows.corpus import MORE, collect

    empty = make_empty(folder)
    mlflow.set_tracking_uri(f"sqlite:///{empty}")
    mlflow.set_experiment("rows")
    items = collect([*PROGRAMS, *MORE])
    if not uris:
        return compare(items, *two_files(empty, folder))
    for uri in uris:
        client = mlflow.MlflowClient(uri)
        assert client.create_experiment("rows", artifact_location=str(folder)) == items[0].experiment_id
    return compare(items, *uris)


class _postgres:  # noqa: N801 - a context, called like a function
    """A cluster with two empty databases for each version, where one is wanted; gives None where none is."""

    def __init__(self, folder, is_wanted):
        self._folder = folder / "postgres" if is_wanted else None
        self._server = None

    def __enter__(self):
        from postgres import Postgres, programs

        if self._folder is None:
            return None
        if programs() is None:
            print("no PostgreSQL server on this machine: only sqlite is compared", flush=True)
            return None
        self._folder.mkdir()
        self._server = Postgres(self._folder, programs())
        self._server.start()
        return self._databases

    def __exit__(self, *_):
        if self._server is not None:
            self._server.stop()

    def _databases(self, number):
        import sqlalchemy

        engine = sqlalchemy.create_engine(self._server.uri, isolation_level="AUTOCOMMIT")
        names = [f"by_mlflow_{number}", f"by_rows_{number}"]
        with engine.connect() as connection:
            for name in names:
                connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return [self._server.uri.replace("/postgres", f"/{name}") for name in names]


def _options(arguments):
    parser = argparse.ArgumentParser(prog="python3 run.py rows", description=__doc__)
    parser.add_argument("versions", nargs="*", help=f"versions of MLflow; by default {', '.join(VERSIONS)}")
    parser.add_argument("--postgres", action="store_true", help="compare stores in PostgreSQL as well")
    parser.add_argument("--verbose", "-v", action="store_true", help="name the kinds of traces that are the same")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.uris = options.versions if options.here else []
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
