"""Look at whether a store's server is there and lets us in, with one sentence for each way in which it is not."""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import socket
import sqlite3
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dspy_mlflow_async.printable import mask_uris, split_credentials

TIMEOUT = 5.0  # seconds
_UNAUTHORIZED = frozenset({401, 403})
_START = "start it with `mlflow server`, or correct MLFLOW_TRACKING_URI"


@dataclass(frozen=True, slots=True)
class Reached:
    """Result of a look at a store.

    Attributes:
        problem: Why nothing can be stored there now, in a sentence without its full stop; None where it answers.
        version: MLflow's version there, where it tells.
    """

    problem: str | None = None
    version: str = ""


def sqlite_path(uri: str) -> Path:
    """Return the file of a SQLite store."""
    return Path(unquote(uri.partition(":///")[2].partition("?")[0]))


def folder_path(uri: str) -> Path:
    """Return the folder of a store of files."""
    return Path(unquote(urlsplit(uri).path) if uri.startswith("file:") else uri)


def missing_store(uri: str) -> str | None:
    """Return why there is nothing to read in a file or a folder: MLflow would make a store there, and an empty one.

    Servers and other databases are not looked at.
    """
    if uri.startswith("sqlite"):
        if ":memory:" in uri or "file:" in uri or not sqlite_path(uri).name:
            return None
        is_there, is_one = sqlite_path(uri).exists(), _has_experiments(sqlite_path(uri))
    elif uri.startswith("file:") or not ("://" in uri or uri.startswith("databricks")):
        is_there = is_one = folder_path(uri).exists()
    else:
        return None
    if is_one:
        return None
    said = f"{uri} is no store of MLflow" if is_there else f"there is no store in {uri}"
    return f"{said}; run this where the program ran, or name its store with --tracking-uri"


def _has_experiments(path: Path) -> bool:
    """Return whether a SQLite file has MLflow's tables, or cannot be read now, which MLflow says better."""
    if not path.exists():
        return False
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            tables = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'experiments'").fetchone()
    except sqlite3.DatabaseError as error:
        return "not a database" not in str(error)
    return bool(tables[0])


def look(uri: str, timeout: float = TIMEOUT) -> Reached:
    """Ask a server for its version; a store that is no server is not looked at.

    Args:
        uri: A tracking URI.
        timeout: Seconds, at most.
    """
    if urlsplit(uri).scheme not in {"http", "https"}:
        return Reached()
    shown = mask_uris(uri)
    try:
        request, context = _version_request(uri), _tls() if urlsplit(uri).scheme == "https" else None
        with urllib.request.urlopen(request, timeout=timeout, context=context) as response:  # noqa: S310 - http(s)
            said = response.read(100).decode("utf-8", "replace").strip()
    except urllib.error.HTTPError as error:
        with error:
            return Reached(_refused(shown, error.code))
    except FileNotFoundError:
        certificate = _from_environment("SERVER_CERT_PATH")
        return Reached(
            f"MLFLOW_TRACKING_SERVER_CERT_PATH names {mask_uris(certificate)}, which cannot be read: correct it"
        )
    except (OSError, ValueError, http.client.HTTPException) as error:
        return Reached(_unreachable(shown, getattr(error, "reason", error), timeout))
    if not said[:1].isdigit():  # MLflow's own answer says that it is HTML
        return Reached(f"{shown} answers, but not as an MLflow server does: correct MLFLOW_TRACKING_URI")
    return Reached(version=said)


def _refused(shown: str, status: int) -> str:
    if status in _UNAUTHORIZED:
        return (
            f"{shown} answers, but refuses us (HTTP {status}): "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    return f"{shown} answers HTTP {status} to /version: is it an MLflow server?"


def _unreachable(shown: str, reason: object, timeout: float) -> str:
    host = urlsplit(shown).hostname
    if isinstance(reason, ConnectionRefusedError):
        return f"{shown} cannot be reached: nothing listens there (connection refused); {_START}"
    if isinstance(reason, socket.gaierror):
        return f"{shown} cannot be reached: there is no host {host} ({reason}); correct MLFLOW_TRACKING_URI"
    if isinstance(reason, ssl.SSLError):
        return (
            f"{shown} cannot be reached: TLS failed ({reason}); correct the scheme (http or https), "
            "or name the certificate by MLFLOW_TRACKING_SERVER_CERT_PATH"
        )
    if isinstance(reason, http.client.BadStatusLine):  # a hang-up, too: a server with TLS does that to plain HTTP
        return (
            f"{shown} does not answer in HTTP ({mask_uris(reason)}); "
            "correct the scheme (http or https), or MLFLOW_TRACKING_URI"
        )
    if isinstance(reason, TimeoutError):
        return f"{shown} cannot be reached: no answer within {timeout:g} s; {_START}"
    return f"{shown} cannot be reached ({reason}); {_START}"


def _version_request(uri: str) -> urllib.request.Request:
    """Make the request for a server's version, as who MLflow would be there: by the URI, else by the environment."""
    address, credentials = split_credentials(uri)
    request = urllib.request.Request(f"{address.rstrip('/')}/version")  # noqa: S310 - http(s)
    user, password = credentials or (os.environ.get("MLFLOW_TRACKING_USERNAME"), _from_environment("PASSWORD"))
    if user:
        basic = base64.b64encode(f"{user}:{password}".encode()).decode()
        request.add_header("Authorization", f"Basic {basic}")
    elif token := _from_environment("TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    return request


def _tls() -> ssl.SSLContext:
    """Trust whom MLflow is told to trust."""
    context = ssl.create_default_context(cafile=_from_environment("SERVER_CERT_PATH") or None)
    if _from_environment("INSECURE_TLS").lower() in {"true", "1"}:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _from_environment(what: str) -> str:
    return os.environ.get(f"MLFLOW_TRACKING_{what}", "")
