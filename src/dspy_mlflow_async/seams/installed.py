"""MLflow distribution that is installed, whole or mlflow-tracing alone, and the sentences where it is not enough."""

from __future__ import annotations

from importlib.util import find_spec

import mlflow

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # mlflow.store.db.db_types


def has_runs() -> bool:
    """Return whether this MLflow has runs: ``mlflow`` or ``mlflow-skinny``, not ``mlflow-tracing`` alone."""
    return hasattr(mlflow, "start_run")


def needs_whole(what: str) -> str:
    """Say in one sentence that something is not to be had here, and which extra brings it."""
    return f'{what} needs the whole of MLflow, which is not installed: pip install "dspy-mlflow-async[mlflow]"'


def needs_extra(what: str, extra: str) -> str:
    """Say in one sentence that something needs a package which is not installed, and which extra brings it."""
    return f'{what} needs {extra.capitalize()}, which is not installed: pip install "dspy-mlflow-async[{extra}]"'


def missing_for(uri: str) -> str | None:
    """Say in one sentence why the store of a resolved URI cannot be opened by what is installed; None where it can."""
    scheme, has_scheme, _ = uri.partition(":")
    if scheme.partition("+")[0] in _DATABASES:
        package, kind = "sqlalchemy", f"An SQL store ({scheme})"
    elif scheme == "file" or not (has_scheme or uri.startswith("databricks")):
        package, kind = "sqlparse", "A store in files"
    else:
        return None
    return None if find_spec(package) else needs_whole(kind)


def require_for(uri: str) -> None:
    """Require that what is installed can open the store of a URI.

    Raises:
        ImportError: With a sentence that says what is missing.
    """
    if said := missing_for(uri):
        raise ImportError(said)
