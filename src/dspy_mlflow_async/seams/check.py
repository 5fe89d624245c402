"""The list of all names of DSPy and MLflow that this package touches and that they do not document, with the reasons.

``dspy-mlflow-async doctor`` shows which of them the installed versions have. It imports the standard library alone,
so that it can still speak where a name has gone.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from types import CodeType
from typing import Any


@dataclass(frozen=True, slots=True)
class Seam:
    """A name that is not ours, and why we need it.

    Attributes:
        path: ``module:name`` or ``module:Class.attribute``.
        reason: What it is used for.
        is_optional: Whether everything works without it, because some supported version lacks it.
    """

    path: str
    reason: str
    is_optional: bool = False

    @property
    def is_present(self) -> bool:
        """Whether the installed version has it."""
        return _exists(self.path)

    @property
    def needs(self) -> str | None:
        """Return the package whose absence keeps the module from being imported, so that nobody can say what is in it.

        MLflow imports some packages only for what they are for, such as psutil. None where the module can be imported,
        or is itself what is missing.
        """
        module = self.path.partition(":")[0]
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing_root = (error.name or "").partition(".")[0]
            return missing_root if missing_root != module.partition(".")[0] else None
        except ImportError:
            return None
        return None


def missing(seams: Iterable[Seam]) -> list[Seam]:
    """Those of the seams that the installed DSPy and MLflow do not have."""
    return [seam for seam in seams if not seam.is_present and seam.needs is None]


def _exists(path: str) -> bool:
    module, _, names = path.partition(":")
    try:
        owner = importlib.import_module(module)
    except ImportError:
        return False
    *above, last = names.split(".")
    for name in above:
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return has_attribute(owner, last) or _is_module(f"{module}.{names}")


def has_attribute(owner: Any, name: str) -> bool:
    """Whether a module, a class or the instances of a class have an attribute."""
    return hasattr(owner, name) or (inspect.isclass(owner) and _uses(owner, name))


def _is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _uses(owner: type, name: str) -> bool:
    """Whether the methods of a class or of its bases speak of an attribute that only its instances have."""
    functions = (value for base in owner.__mro__ for value in vars(base).values())
    return any(name in _names(code) for code in map(_code, functions) if code is not None)


def _code(value: Any) -> CodeType | None:
    return getattr(inspect.unwrap(getattr(value, "__func__", getattr(value, "fget", value))), "__code__", None)


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))
