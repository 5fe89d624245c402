"""Functions bound to the tracing context of here: in threads by live variables, in other processes by plain data."""

from __future__ import annotations

import inspect
import itertools
import os
import socket
import threading
import time
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.dummy import DummyProcess
from typing import Any, TypeVar, cast

from dspy_mlflow_async.callback import ledgers_of
from dspy_mlflow_async.context import frame as frames
from dspy_mlflow_async.context.carrier import Carrier
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.propagation import capture
from dspy_mlflow_async.remote import dask_events, pickling
from dspy_mlflow_async.remote.carried import Carried, attached_as, carry
from dspy_mlflow_async.runs.usage import restore
from dspy_mlflow_async.seams.dspy import settings_here
from dspy_mlflow_async.spans.observer import LmCall

_Result = TypeVar("_Result")
_Origin = tuple[str, int, int]  # machine, process, number of the binding there


def propagate(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Bind ``function`` to the tracing context of here and now.

    For threads that a program starts itself, which inherit nothing in Python, and for other processes::

        with concurrent.futures.ThreadPoolExecutor() as pool:
            pool.submit(propagate(program), question="...")

        with concurrent.futures.ProcessPoolExecutor() as pool:
            pool.submit(propagate(program), question="...")

        ray.remote(propagate(program)).remote(question="...")

    Its pickle takes along what ``carry`` takes, DSPy's settings and LMs with their keys among it, and makes a
    ``ProcessPoolExecutor`` accept what the standard library's ``pickle`` refuses: programs, and their predictions. What
    the LM calls over there use comes home with the result, into the trace, the request, the evaluation and the
    compile that they were made for.

    Args:
        function: Any callable; a coroutine function stays one, and what it returns to be awaited or iterated over
            later runs here, too.

    Returns:
        A function that may be called any number of times, at once and anywhere, each time under the span that is
        current now, with its session, user, tags and metadata.

    Raises:
        TypeError: For what cannot be called.
    """
    if not callable(function):
        raise TypeError(f"propagate takes a function that can be called, not {function!r}")
    return cast("Callable[..., _Result]", _Function(_Binding(function)))


class _Function:
    """Function that the standard library's ``pickle`` asks how it is pickled, which it never does of functions.

    For everybody else it is one: ``isinstance``, ``inspect``, decorators and cloudpickle see the plain function that it
    stands for, which knows its binding alone.

    Args:
        binding: What is called.
    """

    __slots__ = ("__weakref__", "_binding", "_shell")
    _binding: Any
    _shell: types.FunctionType

    def __init__(self, binding: _Binding | _Arrived) -> None:
        object.__setattr__(self, "_binding", binding)
        object.__setattr__(self, "_shell", _shell_of(binding))

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the function in the context that it is bound to."""
        return object.__getattribute__(self, "_binding")(*args, **kwargs)

    def __getattribute__(self, name: str) -> Any:
        if name in _OWN:
            return object.__getattribute__(self, name)
        if name == "__wrapped__":
            return object.__getattribute__(self, "_binding").__wrapped__
        return getattr(object.__getattribute__(self, "_shell"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(object.__getattribute__(self, "_shell"), name, value)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __repr__(self) -> str:
        return f"<{object.__getattribute__(self, '_shell').__qualname__} propagated>"

    def __copy__(self) -> _Function:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Function:
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _Function, (object.__getattribute__(self, "_binding"),)


_OWN = frozenset({"__copy__", "__deepcopy__", "__reduce_ex__", "_binding", "_shell"})


def _shell_of(binding: _Binding | _Arrived) -> types.FunctionType:
    """Return a plain function that calls a binding, and says what it is of itself; it holds nothing else."""

    def shell(*args: Any, **kwargs: Any) -> Any:
        return binding(*args, **kwargs)

    async def async_shell(*args: Any, **kwargs: Any) -> Any:
        return await binding(*args, **kwargs)

    chosen: Any = async_shell if binding.is_async else shell
    for name, value in binding.names.items():
        setattr(chosen, name, value)
    return cast("types.FunctionType", chosen)


def _names_of(function: Any) -> dict[str, str]:
    """Return what a function is called, by the attributes that say so."""
    name = getattr(function, "__name__", None) or type(function).__name__
    found = {"__name__": name, "__qualname__": getattr(function, "__qualname__", name)}
    for attribute in ("__module__", "__doc__"):
        if isinstance(value := getattr(function, attribute, None), str):
            found[attribute] = value
    return {name: value for name, value in found.items() if isinstance(value, str)}


# --- here -------------------------------------------------------------------------------------------------------------

_numbers = itertools.count(1)
_bindings: weakref.WeakValueDictionary[int, _Binding] = weakref.WeakValueDictionary()
# Those that were sent away last, by their numbers: their results may be on the way when nobody holds the function.
_homes: OrderedDict[int, _Home] = OrderedDict()
_MOST_HOMES = 1_000


class _Binding:
    """A function with the live context that it is bound to.

    Args:
        function: The function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__wrapped__ = function
        self.names = _names_of(function)
        self.is_async = inspect.iscoroutinefunction(function)
        self._carrier: Carrier = capture()
        self._bound = self._carrier.bind(function)
        self._settings = settings_here()
        self._number = next(_numbers)
        self._pid = os.getpid()
        self._home = _Home(self._carrier)
        _bindings[self._number] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._bound(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        carried = self._carrier.run(carry, settings=False)
        settings = pickling.dump_settings(self._settings)
        name = self.names["__name__"]
        function = pickling.dumps(f"the function {name!r}", self.__wrapped__)
        origin = (socket.gethostname(), self._pid, self._number)
        _homes[self._number] = self._home
        while len(_homes) > _MOST_HOMES:
            _homes.popitem(last=False)
        dask_events.subscribe(_topic(origin), _came_by_event)
        return _arrive, (pickling.dumps("the context", carried), settings, function, self.names, self.is_async, origin)


class _Home:
    """Place that LM calls made elsewhere are counted at.

    Args:
        carrier: The context there.
    """

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._homed: set[Any] = set()  # results that have come home: one may be delivered twice

    def came_home(self, number: Any, calls: Iterable[Sequence[Any]]) -> None:
        """Count LM calls that were made elsewhere, once, as if they had been made where the function was bound."""
        if number in self._homed:
            return
        self._homed.add(number)
        self._carrier.run(_count, calls)


def _came_home(origin: Sequence[Any], number: Any, calls: Iterable[Sequence[Any]]) -> None:
    """Count LM calls where their function was bound, if that was in this process."""
    host, pid, binding = origin
    home = _homes.get(binding) if (host, pid) == (socket.gethostname(), os.getpid()) else None
    if home is not None:
        home.came_home(number, calls)


@guarded
def _came_by_event(message: Any) -> None:
    origin, number, calls = message
    _came_home(origin, tuple(number), calls)


def _topic(origin: _Origin) -> str:
    return f"dspy-mlflow-async-{origin[0]}-{origin[1]}"


@guarded
def _count(calls: Iterable[Sequence[Any]]) -> None:
    frame = frames.current()
    ledgers = ledgers_of(object())  # an LM that is nobody's here: the compile takes it for the program's
    for fields in calls:
        call = LmCall(*fields)
        call = call._replace(began=call.began - time.time() + time.perf_counter())
        for ledger in ledgers:
            ledger.begin()
            if call.tokens:
                restore(ledger, {call.model: call.tokens})
            ledger.end()
        if frame is not None and frame.request is not None:
            frame.request.lm_call_ended(call)


# --- there ------------------------------------------------------------------------------------------------------------


def _arrive(
    carried: bytes, settings: bytes, function: bytes, names: dict[str, str], is_async: bool, origin: _Origin
) -> _Binding | _Arrived:
    here = _bindings.get(origin[2]) if origin[:2] == (socket.gethostname(), os.getpid()) else None
    return _Arrived(carried, settings, function, names, is_async, origin) if here is None else here


class _Arrived:
    """A function that was bound in another process. What it needs is unpickled with the first call.

    Args:
        carried: The context that it is bound to, pickled.
        settings: DSPy's settings there, pickled.
        function: The function, pickled.
        names: What it is called.
        is_async: Whether it is a coroutine function.
        origin: Where it was bound.
    """

    def __init__(
        self, carried: bytes, settings: bytes, function: bytes, names: dict[str, str], is_async: bool, origin: _Origin
    ) -> None:
        self.names, self.is_async = names, is_async
        self._parts = carried, settings, function
        self._origin = origin
        self._unpickled: tuple[Carried, dict[str, Any], Any] | None = None

    @property
    def __wrapped__(self) -> Any:
        return self._unpack()[2]

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (*self._parts, self.names, self.is_async, self._origin)

    def _unpack(self) -> tuple[Carried, dict[str, Any], Any]:
        if self._unpickled is None:
            carried: Carried = pickling.loads(self._parts[0])
            with attached_as(carried):  # the tracer first: what is unpickled next may look for it
                settings = pickling.load_settings(self._parts[1])
                self._unpickled = carried, settings, pickling.loads(self._parts[2])
        return self._unpickled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        sends_home = self._way_home(inspect.currentframe())
        if self.is_async:
            return self._acall(sends_home, args, kwargs)
        carried, settings, function = self._unpack()
        with attached_as(carried, settings) as homework:
            bound = capture().bind(function)  # what it returns to be iterated over later runs here, too
            try:
                result = bound(*args, **kwargs)
            except BaseException:
                sends_home(None, homework.lm_calls)
                raise
        return sends_home(result, homework.lm_calls)

    async def _acall(self, sends_home: _WayHome, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        carried, settings, function = self._unpack()
        with attached_as(carried, settings) as homework:
            try:
                result = await function(*args, **kwargs)
            except BaseException:
                sends_home(None, homework.lm_calls)
                raise
        return sends_home(result, homework.lm_calls)

    def _way_home(self, frame: types.FrameType | None) -> _WayHome:
        """Return what takes a result and the LM calls that it took, sends the calls home, and returns the result."""
        origin = self._origin
        if _calls_for_another_process(frame):
            return lambda result, calls: _Delivery(result, calls, origin)
        worker = dask_events.worker_here()
        if worker is None:
            return lambda result, _: result

        def send(result: Any, calls: list[LmCall]) -> Any:
            if calls:
                message = [list(origin), list(_number_of(calls)), [list(each) for each in _by_wall_clock(calls)]]
                dask_events.send_home(worker, _topic(origin), message)
            return result

        return send


_WayHome = Callable[[Any, list[LmCall]], Any]

# Where these modules call a function, they pickle its result at once for another process: nobody sees what it is
# wrapped in. Their packages have others, which call it for somebody in this process.
_FOR_ANOTHER_PROCESS = frozenset(
    {
        "billiard.pool",
        "concurrent.futures.process",
        "joblib.externals.loky.process_executor",
        "loky.process_executor",
        "multiprocess.pool",
        "multiprocessing.pool",
        "ray._private.worker",
        "ray.util.multiprocessing.pool",
    }
)
_BETWEEN = frozenset({"joblib", "mpi4py"})  # packages that call through several functions of theirs


def _calls_for_another_process(frame: types.FrameType | None) -> bool:
    """Return whether an engine that sends results to another process has called, and not the user's code."""
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if name in _FOR_ANOTHER_PROCESS:
            # `multiprocessing.pool` has threads, too, which it takes for processes.
            return not isinstance(threading.current_thread(), DummyProcess)
        package = name.partition(".")[0]
        if package == "mpi4py":
            return True
        if package not in _BETWEEN:
            return False
        frame = frame.f_back
    return False


def _by_wall_clock(calls: Iterable[LmCall]) -> list[tuple[Any, ...]]:
    """Return calls with the time at which they began by the wall clock: other processes have another perf_counter."""
    return [tuple(call._replace(began=call.began - time.perf_counter() + time.time())) for call in calls]


def _number_of(owner: object) -> tuple[int, int, int]:
    return os.getpid(), id(owner), time.time_ns()


class _Delivery:
    """A result on its way to where its function was bound: unpickled it is the result, and its usage is counted.

    Args:
        result: The result.
        calls: The LM calls that it took.
        origin: Where the function was bound.
    """

    def __init__(self, result: Any, calls: list[LmCall], origin: _Origin) -> None:
        self._result = result
        self._calls = _by_wall_clock(calls)
        self._origin = origin
        self._number = _number_of(self)

    def __reduce__(self) -> tuple[Any, ...]:
        result = pickling.dumps("the result", self._result)
        return _deliver, (result, self._calls, self._origin, self._number)


def _deliver(result: bytes, calls: list[tuple[Any, ...]], origin: _Origin, number: Any) -> Any:
    _came_home(origin, number, calls)
    return pickling.loads(result)
