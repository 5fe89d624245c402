"""Takes a name of DSPy or MLflow away from us, or gives it another signature, while they themselves go on with it.

That is what a new version of theirs does: they rename something, and all of their own code follows.

* A name of a module is gone, or another, for those who ask from inside our package; all others find it as ever.
* An attribute of a class is renamed in the code of all their functions. So a method of ours that overrides it is not
  called any more.
"""

from __future__ import annotations

import builtins
import functools
import gc
import importlib
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

US = "dspy_mlflow_async"
ROOTS = ("mlflow", "dspy", "opentelemetry")
REMOVED, CHANGED = "removed", "changed"


class NotPossibleError(Exception):
    """A name that cannot be taken away in a process that runs."""


class Foreign:
    """An object that has nothing of what was there."""


def distort(path: str, way: str) -> None:
    """Take the name away, or put something else in its place.

    Args:
        path: As ``Seam.path``.
        way: REMOVED or CHANGED.

    Raises:
        NotPossibleError: For a name of Python's own.
    """
    home, _, names = path.partition(":")
    root = home.partition(".")[0]
    if root in sys.stdlib_module_names or names.endswith("__code__"):
        raise NotPossibleError("it is Python's own")
    try:
        module = importlib.import_module(home)
    except ImportError as error:
        raise NotPossibleError(f"it is not there: {error}") from error
    if "." not in names:
        if isinstance(getattr(module, names, None), ModuleType) and f"{home}.{names}" in sys.modules:
            _hide_module(f"{home}.{names}")
        _hide_name(module, names, way)
        return
    *above, last = names.split(".")
    owner = functools.reduce(getattr, above, module)
    cls = owner if inspect.isclass(owner) else type(owner)
    if cls.__module__.partition(".")[0] not in {*ROOTS, root}:
        raise NotPossibleError("it is Python's own")
    _rename_attribute(cls, last, way)


# --- names of modules -----------------------------------------------------------------------------------------------


def _is_ours(depth: int) -> bool:
    return str(sys._getframe(depth + 1).f_globals.get("__name__", "")).startswith(US)


def _hide_name(module: ModuleType, name: str, way: str) -> None:
    other = _other(vars(module)[name]) if name in vars(module) and way == CHANGED else None

    class View(type(module)):  # type: ignore[misc]
        def __getattribute__(self, asked: str) -> Any:
            if asked == name and _is_ours(1):
                if way == REMOVED:
                    raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
                return other
            if asked == "__dict__" and way == REMOVED and _is_ours(1):
                return {key: value for key, value in super().__getattribute__("__dict__").items() if key != name}
            return super().__getattribute__(asked)

    if name not in vars(module) and not hasattr(module, name):
        raise NotPossibleError("it is not there")
    module.__class__ = View


def _hide_module(gone: str) -> None:
    import_, import_module = builtins.__import__, importlib.import_module

    def refuse(name: str) -> None:
        if name == gone or name.startswith(f"{gone}."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def guarded(name: str, globals_: Any = None, *args: Any, **kwargs: Any) -> Any:
        if str((globals_ or {}).get("__name__", "")).startswith(US):
            refuse(name)
        return import_(name, globals_, *args, **kwargs)

    def guarded_module(name: str, package: str | None = None) -> Any:
        if _is_ours(1):
            refuse(name)
        return import_module(name, package)

    builtins.__import__ = guarded
    importlib.import_module = guarded_module


def _other(value: Any) -> Any:
    """Something of the same kind that cannot be used as that."""
    if inspect.isclass(value):

        def __init__(self: Any, *, drill_required: Any) -> None:  # noqa: N807
            pass

        return type(value.__name__, (), {"__init__": __init__, "__module__": value.__module__})
    if callable(value):

        @functools.wraps(value, assigned=("__module__", "__name__", "__qualname__", "__doc__"), updated=())
        def other(*args: Any, drill_required: Any, **kwargs: Any) -> Any:
            return value(*args, **kwargs)

        del other.__wrapped__
        return other
    return Foreign()


# --- attributes of classes ------------------------------------------------------------------------------------------


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _is_of(module: Any, roots: tuple[str, ...]) -> bool:
    return str(module).partition(".")[0] in roots


@functools.cache
def functions_by_name() -> dict[str, list[FunctionType]]:
    """All functions of theirs by the names that their code asks for; looked up once, before the processes fork."""
    found: dict[str, list[FunctionType]] = defaultdict(list)
    for function in gc.get_objects():
        if type(function) is FunctionType and _is_of(function.__module__, ROOTS):
            for name in {name for code in _codes(function.__code__) for name in code.co_names}:
                found[name].append(function)
    return found


def classes_of(roots: tuple[str, ...]) -> list[type]:
    """All classes of these packages. No object is asked for its class: a lazy one would load what it stands for."""
    return [each for each in gc.get_objects() if issubclass(type(each), type) and _is_of(each.__module__, roots)]


def _renamed(code: CodeType, old: str, new: str) -> CodeType:
    return code.replace(
        co_names=tuple(new if name == old else name for name in code.co_names),
        co_consts=tuple(_renamed_constant(each, old, new) for each in code.co_consts),
    )


def _renamed_constant(constant: Any, old: str, new: str) -> Any:
    if isinstance(constant, CodeType):
        return _renamed(constant, old, new)
    return new if constant == old and isinstance(constant, str) and old.startswith("_") else constant


def _rename_attribute(cls: type, old: str, way: str) -> None:
    new = f"{old}_drill"
    # What is not private may be the name of much else.
    roots = ROOTS if old.startswith("_") else (cls.__module__.partition(".")[0],)
    definer = next((base for base in cls.__mro__ if old in vars(base)), None)
    original = vars(definer)[old] if definer is not None else None
    for function in functions_by_name().get(old, ()):
        if _is_of(function.__module__, roots):
            function.__code__ = _renamed(function.__code__, old, new)
    _rename_in_late_modules(old, new, roots)
    for each in classes_of(roots):
        if old in vars(each):
            _set(each, new, vars(each)[old])
    for each in cls.__mro__:
        if old in vars(each):
            delattr(each, old)
    for each in gc.get_objects():
        state = getattr(each, "__dict__", None) if _is_of(type(each).__module__, roots) else None
        if type(state) is dict and old in state:
            state[new] = state.pop(old)
    if way == CHANGED:
        _put_changed(definer or cls, old, new, original)


def _set(owner: type, name: str, value: Any) -> None:
    try:
        setattr(owner, name, value)
    except (TypeError, AttributeError) as error:
        raise NotPossibleError(str(error)) from error


def _put_changed(owner: type, old: str, new: str, original: Any) -> None:
    if not isinstance(original, FunctionType):
        _set(owner, old, Foreign())
        return

    # As a new version would have it: their callers pass more, and so must ours.
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, old)(*args, drill_required=True, **kwargs)

    def changed(self: Any, *args: Any, drill_required: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    _set(owner, old, changed)
    _set(owner, new, called)


def _rename_in_late_modules(old: str, new: str, roots: tuple[str, ...]) -> None:
    from importlib.machinery import SourceFileLoader

    get_code: Callable[..., Any] = SourceFileLoader.get_code

    def renaming(self: Any, fullname: str) -> Any:
        code = get_code(self, fullname)
        return _renamed(code, old, new) if code is not None and _is_of(fullname, roots) else code

    SourceFileLoader.get_code = renaming  # type: ignore[method-assign]
