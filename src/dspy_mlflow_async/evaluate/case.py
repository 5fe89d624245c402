"""Case of an ``evaluate_all``: a name, a program, and its own devset, metric and settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dspy

from dspy_mlflow_async.callback import TracingCallback
from dspy_mlflow_async.evaluate import calling


@dataclass(frozen=True, slots=True)
class Case:
    """One evaluation of ``evaluate_all``. Its hash is that of its name: the rest need have none.

    Attributes:
        name: What the run, the progress and the comparison call it.
        program: A module, or another callable that takes the examples' inputs by name. Cases may share one.
        devset: Its examples; by default ``evaluate_all``'s.
        metric: Its metric; by default ``evaluate_all``'s.
        lm: Its LM, for ``dspy.context(lm=...)``; by default the one in force.
        adapter: Its adapter, for ``dspy.context(adapter=...)``.
        settings: Further settings of DSPy's for ``dspy.context``, by name.
    """

    name: str
    program: Any = field(hash=False)
    devset: Sequence[Any] | None = field(default=None, hash=False)
    metric: Callable[..., Any] | None = field(default=None, hash=False)
    lm: Any = field(default=None, hash=False)
    adapter: Any = field(default=None, hash=False)
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Refuse a name that is none, and what cannot be evaluated.

        Raises:
            ValueError: For a name that is no text or blank.
            TypeError: For what is no program, no mapping of settings, or has one of them twice.
        """
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"a case needs a name, not {self.name!r}")
        calling.check_program(self.program, f"the program of case {self.name!r}")
        if self.lm is not None and not isinstance(self.lm, dspy.BaseLM):
            raise TypeError(f"case {self.name!r}: lm must be a dspy.LM or another dspy.BaseLM, not {self.lm!r}")
        if not isinstance(self.settings, Mapping):
            raise TypeError(f"case {self.name!r}: settings must be a mapping, not {self.settings!r}")
        if unknown := sorted(str(name) for name in self.settings if name not in dspy.settings):
            raise TypeError(f"case {self.name!r}: dspy.settings has no {', '.join(unknown)}")
        if twice := [name for name in ("lm", "adapter") if getattr(self, name) is not None and name in self.settings]:
            raise TypeError(f"case {self.name!r} has {' and '.join(twice)} of its own, and another in its settings")

    def context(self) -> Any:
        """Return ``dspy.context`` with the case's own LM, adapter and settings.

        Callbacks of its own stand beside the tracer in force: without that, neither a run nor a token would be noted.
        """
        own = {key: value for key, value in (("lm", self.lm), ("adapter", self.adapter)) if value is not None}
        if "callbacks" in self.settings:
            given = list(self.settings["callbacks"] or ())
            tracers = [each for each in dspy.settings.callbacks if isinstance(each, TracingCallback)]
            own["callbacks"] = [*given, *(each for each in tracers if each not in given)]
        return dspy.context(**{**self.settings, **own})


def cases_of(
    programs: Mapping[str, Any] | Iterable[Case],
    devset: Sequence[Any] | None,
    metric: Callable[..., Any] | None,
) -> list[Case]:
    """Return the cases with devset and metric filled in, all checked.

    Raises:
        TypeError: For what is no program, metric, devset or setting.
        ValueError: For no case, two of one name, an empty devset, or no metric.
    """
    if isinstance(programs, Mapping):
        cases = [Case(name, program) for name, program in programs.items()]
    elif isinstance(programs, (Case, dspy.Module)) or not isinstance(programs, Iterable):
        raise TypeError(
            f"programs must be a mapping of name to program, or a list of Case, not a {type(programs).__name__}"
        )
    else:
        cases = list(programs)
    if not cases:
        raise ValueError("there is nothing to evaluate: programs is empty")
    devsets: dict[int, list[Any]] = {}
    checked = [_checked(case, devset, metric, devsets) for case in cases]
    names = [case.name for case in checked]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"case names must differ; there is more than one {', '.join(map(repr, twice))}")
    return checked


def _checked(
    case: Any, devset: Sequence[Any] | None, metric: Callable[..., Any] | None, devsets: dict[int, list[Any]]
) -> Case:
    """Check one case. ``devsets`` has those already read, by identity: an iterator that cases share is read once."""
    if not isinstance(case, Case):
        raise TypeError(f"each of a list of cases must be a Case, not a {type(case).__name__}")
    try:
        given = devset if case.devset is None else case.devset
        if id(given) not in devsets:
            devsets[id(given)] = calling.check_devset(given)
        own_devset = devsets[id(given)]
        own_metric = metric if case.metric is None else case.metric
        calling.check_metric(own_metric)
    except (TypeError, ValueError) as error:
        raise type(error)(f"case {case.name!r}: {error}") from None
    return Case(case.name, case.program, own_devset, own_metric, case.lm, case.adapter, case.settings)
