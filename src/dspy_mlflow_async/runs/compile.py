"""One compile: its run, its own step counters, its score series, and its LM calls by role."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import dspy

from dspy_mlflow_async import export
from dspy_mlflow_async.context import frame as frames
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.runs import active_runs, artifacts, description, selection
from dspy_mlflow_async.runs.datasets import TRAINING, VALIDATION, is_at_hand
from dspy_mlflow_async.runs.feedback import metric_name
from dspy_mlflow_async.runs.handle import FINISHED, RunHandle
from dspy_mlflow_async.runs.lineage import Lineage, hash_of
from dspy_mlflow_async.runs.usage import add_up
from dspy_mlflow_async.seams.dspy import scores_by_program
from dspy_mlflow_async.seams.mlflow_autolog import FLAVOR
from dspy_mlflow_async.seams.mlflow_runs import MLFLOW_AUTOLOGGING, log_dummy_model
from dspy_mlflow_async.settings import Settings
from dspy_mlflow_async.spans.door import Door
from dspy_mlflow_async.spans.scopes import Region
from dspy_mlflow_async.spans.usage import Ledger

logger = logging.getLogger("dspy_mlflow_async")

TASK, METRIC, PROPOSAL, REFLECTION = "task", "metric", "proposal", "reflection"
# Where DSPy's optimizers keep an LM that does not run the program, or, by default, the same that does.
_USES = {"trainset": TRAINING, "valset": VALIDATION}
_ROLES_BY_ATTRIBUTE = {"prompt_model": PROPOSAL, "reflection_lm": REFLECTION}


class ScoreSeries:
    """Scores of the evaluations in a compile, by metric key and step. ``lock`` guards the counting of steps.

    Attributes:
        points: By key, each step with its score, in the order in which they came.
    """

    def __init__(self) -> None:
        self.points: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self._lock = threading.Lock()
        self._next_step: dict[str, int] = defaultdict(int)

    def next_step(self, key: str) -> int:
        """Return the step of the evaluation that begins: 0, 1, 2… for each key."""
        with self._lock:
            step = self._next_step[key]
            self._next_step[key] += 1
            return step

    def add(self, key: str, step: int, score: float) -> None:
        """Note the score of an evaluation."""
        with self._lock:
            self.points[key].append((step, score))

    def best(self) -> dict[str, tuple[int, float]]:
        """Return step and score of the best evaluation of each series, the first of equals."""
        return {key: max(points, key=lambda point: (point[1], -point[0])) for key, points in self.points.items()}


class CallsByRole:
    """LM calls of a compile, by the role in which its optimizer makes them."""

    def __init__(self, optimizer: Any, inputs: dict[str, Any]) -> None:
        self._optimizer = optimizer
        # MIPROv2 proposes with the LM that runs the program where it is given no other: then nobody can tell.
        self._task_lm = getattr(optimizer, "task_model", None) or dspy.settings.lm
        self._judges = _judges(optimizer, inputs)
        self._ledgers = {role: Ledger() for role in (TASK, METRIC, PROPOSAL, REFLECTION)}

    def ledger(self, lm: Any, *, in_example: bool, is_judging: bool) -> Ledger:
        """Return the ledger of an LM call that begins now; the arguments are those of ``Compile.ledger``."""
        if is_judging:
            return self._ledgers[METRIC]
        if not in_example and lm is not self._task_lm:
            # Some optimizers call their metric themselves, where nothing but its LM tells that it is at work.
            if any(lm is judge for judge in self._judges):
                return self._ledgers[METRIC]
            for attribute, role in _ROLES_BY_ATTRIBUTE.items():
                if getattr(self._optimizer, attribute, None) is lm:
                    return self._ledgers[role]
        return self._ledgers[TASK]

    def metrics(self) -> dict[str, float | None]:
        """Count LM calls, tokens and cost, in all and by role."""
        ledgers = {role: [ledger] for role, ledger in self._ledgers.items() if ledger.calls}
        metrics: dict[str, float | None] = {}
        for end, some in [("", list(self._ledgers.values())), *((f"/{role}", one) for role, one in ledgers.items())]:
            usage = add_up(some)
            metrics |= {f"{name}{end}": value for name, value in (usage._asdict()).items() if name != "calls"}
            metrics[f"lm_calls{end}"] = usage.calls
        return metrics


class Compile:
    """One outermost call of an optimizer's ``compile``, from its start to its end: its run, counters and series.

    Evaluations inside it may run at once, in threads of its own or of the user's.

    Args:
        optimizer: The ``dspy.teleprompt.Teleprompter``.
        inputs: The arguments of ``compile`` by name.
        settings: What is stored goes by these.

    Attributes:
        run: Its run, or None where compiles are not logged.
        lineage: The candidates that it tries, where it has a run.
    """

    def __init__(self, optimizer: Any, inputs: dict[str, Any], settings: Settings | None = None) -> None:
        self._door = Door.here(settings)
        self.run: RunHandle | None = None
        self.lineage: Lineage | None = None
        self._optimizer = optimizer
        self._inputs = inputs
        self._block: active_runs.Block | None = None
        self._is_shown = False
        self._arguments: dict[str, Any] = {}
        self._instructions: dict[str, str] = {}
        self._scores = ScoreSeries()
        self._lm_calls = CallsByRole(optimizer, inputs)

    @guarded
    def open(self) -> None:
        """Open the run, make it active, and log what is being compiled."""
        try:
            self.run = selection.open_run(
                type(self._optimizer).__name__,
                renames=False,  # a run of the user's has the user's name
                tags={MLFLOW_AUTOLOGGING: FLAVOR},
            )
        except Exception as error:  # noqa: BLE001 - the store may fail in any way; the compile goes on
            logger.warning("The compile of %s has no run (%s).", type(self._optimizer).__name__, error)
            return
        self.run.door = self._door
        self._block = active_runs.Block(self.run.run)
        self.lineage = Lineage(self._optimizer, self._inputs.get("student"))
        self._instructions = description.instructions_of(self._inputs.get("student"))
        self._arguments = artifacts.scalar_params(self._optimizer_params()) | artifacts.scalar_params(self._inputs)
        self.run.params(self._arguments)
        for name, dataset in self._datasets(is_read_before=False):
            self.run.dataset(name, _USES[name], dataset)
        self._show_in_ui(self.run)
        artifacts.look_for_fonts()

    def leave(self) -> None:
        """Make the run inactive here: what was active before is so again."""
        if self._block is not None:
            self._block.leave()

    def begin_evaluation(self, key: str) -> tuple[RunHandle | None, int]:
        """Return the run to put an evaluation under, and its step: 0, 1, 2… for each key."""
        return self.run, self._scores.next_step(key)

    def end_evaluation(self, parent: RunHandle | None, key: str, step: int, score: float) -> None:
        """Log the score of an evaluation as a metric of the run, at its step."""
        self._scores.add(key, step, score)
        if parent is not None:
            parent.metrics({key: score}, step)  # `close` waits for it
            return
        parent = active_run_handle()
        if parent is not None:
            parent.metrics({key: score}, step)
            parent.settle()

    @guarded
    def pool_ended(self, data: Any, results: Any) -> None:
        """Note the scores that the optimizer has taken in a pool of its own, without ``dspy.Evaluate``.

        They are percent, as ``Evaluate``'s, under the keys that MIPROv2 gives its evaluations.
        """
        by_program = scores_by_program(data, results)
        if self.run is None or not by_program:
            return
        trainset = self._inputs.get("trainset") or ()
        series = [scores for _, scores in by_program]
        if len(by_program) == len(data) > 1:  # a copy of some program for each example, all at once
            series = [[score for scores in series for score in scores]]
            key = "eval_sampling"
        else:
            key = "eval_full" if len(series[0]) == len(trainset) else "eval_minibatch"
        steps = []
        for scores in series:
            parent, step = self.begin_evaluation(key)
            self.end_evaluation(parent, key, step, round(100 * sum(scores) / len(scores), 2))
            steps.append(step)
        if self.lineage is not None:
            metric = metric_name(getattr(self._optimizer, "metric", None))
            self.lineage.sampled(by_program, key, metric, steps.__getitem__)

    def ledger(self, lm: Any, *, in_example: bool, is_judging: bool) -> Ledger:
        """Return the ledger of an LM call that begins now, by the role in which the optimizer calls it.

        Args:
            lm: The LM.
            in_example: Whether an evaluation works on an example here.
            is_judging: Whether its metric is at work.
        """
        if not in_example and self.lineage is not None:
            self.lineage.proposing()
        return self._lm_calls.ledger(lm, in_example=in_example, is_judging=is_judging)

    @guarded
    def close(self, program: Any, status: str) -> None:
        """Log the best program, the data sets and the score series, and end the run."""
        run = self.run
        if run is None:
            return
        try:
            # One by one: what cannot be logged does not take the rest along.
            if status == FINISHED:
                self._log(lambda: self._log_program(run, program))
                self._log(lambda: run.show_program(program))
            self._log(lambda: run.params(artifacts.lm_params(self._door)))
            self._log(lambda: run.tags(self._summary(program)))
            self._log(lambda: run.metrics(self._lm_calls.metrics()))
            self._log(lambda: run.describe(self._described(program)))
            self._log(lambda: self._log_lineage(run, program))
            for name, dataset in self._datasets(is_read_before=True):
                self._log(functools.partial(run.dataset, name, _USES[name], dataset))
            for name in _USES:
                self._log(functools.partial(self._log_dataset, run, name))
            self._log(lambda: self._log_plot(run))
        finally:
            selection.close(run, status)
            self._show_in_ui(run)
            if not run.is_complete:
                logger.warning(
                    "The run of the compile of %s could not be logged in full now; its scores: %s. What is in the "
                    "spool is sent later, or by `dspy-mlflow-async replay`.",
                    type(self._optimizer).__name__,
                    {key: [score for _, score in sorted(points)] for key, points in self._scores.points.items()},
                )

    @guarded
    def _log(self, step: Callable[[], None]) -> None:
        step()

    def _log_program(self, run: RunHandle, program: Any) -> None:
        state = artifacts.program_state(program)
        if state is not None:
            run.document("best_model.json", state)

    def _log_lineage(self, run: RunHandle, program: Any) -> None:
        if self.lineage is not None:
            document = self.lineage.document(type(self._optimizer).__name__, program, self._door)
            if document is not None:
                run.later("candidates.json", document)

    def _datasets(self, *, is_read_before: bool) -> list[tuple[str, Any]]:
        """Return the data sets, by name, that are noted before the optimizer reads them, or after."""
        given = [(name, self._inputs.get(name)) for name in _USES]
        return [(name, data) for name, data in given if data is not None and is_at_hand(data) is not is_read_before]

    def _log_dataset(self, run: RunHandle, name: str) -> None:
        dataset = self._inputs.get(name)
        if dataset is not None and len(dataset):
            run.table(f"{name}.json", artifacts.dataset_columns(dataset))

    def _log_plot(self, run: RunHandle) -> None:
        if self._scores.points:
            run.plot("scores.png", lambda: artifacts.plot_of_series(self._scores.points))

    def _summary(self, program: Any) -> dict[str, Any]:
        """Name the optimizer, the best scores, and the demos that it has made."""
        summary: dict[str, Any] = {
            "dspy.optimizer": type(self._optimizer).__name__,
            "dspy.program_hash": hash_of(program),
        }
        for key, (step, score) in self._scores.best().items():
            summary |= {f"dspy.best_score.{key}": score, f"dspy.best_step.{key}": step}
        if augmented := self._augmented_demos(program):
            summary["dspy.augmented_demos"] = augmented
        return summary

    def _described(self, program: Any) -> str:
        after = description.instructions_of(program)
        name = type(self._optimizer).__name__
        shown = {key: self._door.text(value, description.MAX_VALUE, name=key) for key, value in self._arguments.items()}
        return description.describe_compile(name, shown, self._scores.best(), self._instructions, after)

    @staticmethod
    def _augmented_demos(program: Any) -> int:
        """Number of the program's demos that were made by running a program, and accepted by the metric."""
        predictors = program.predictors() if isinstance(program, dspy.Module) else ()
        demos = (demo for predictor in predictors for demo in predictor.demos)
        return sum(isinstance(demo, dspy.Example) and demo.get("augmented") is True for demo in demos)

    def _optimizer_params(self) -> dict[str, Any]:
        try:
            params = self._optimizer.get_params()
        except Exception as error:  # noqa: BLE001 - get_params may be the user's
            logger.warning("Could not read the params of %s: %s", type(self._optimizer).__name__, error)
            return {}
        return dict(params) if isinstance(params, dict) else {}

    @guarded
    def _show_in_ui(self, run: RunHandle) -> None:
        if self._is_shown or run.is_pending:
            return
        self._is_shown = True
        with contextlib.suppress(Exception):  # the store may be away; MLflow says no word either
            export.ask(lambda: log_dummy_model(run.run_id, FLAVOR))


def pool_ended(data: Any, results: Any) -> None:
    """Report the results of a worker pool to the compile that ran it itself, not in its program or metric."""
    frame = frames.current()
    if frame is None or frame.compile is None or frame.is_carried or not isinstance(frame.scope, Region):
        return
    if frame.evaluation is not (None if frame.parent is None else frame.parent.evaluation):
        return  # an evaluation's
    frame.compile.pool_ended(data, results)


def _judges(optimizer: Any, inputs: dict[str, Any]) -> list[Any]:
    """The LMs that the modules of an optimizer's metric alone have: it is one, or its function refers to some."""
    try:
        metric = optimizer.metric
        while isinstance(metric, functools.partial):
            metric = metric.func
        owners = [metric, getattr(metric, "__self__", None)]
        if inspect.isfunction(metric):
            variables = inspect.getclosurevars(metric)
            owners += [*variables.nonlocals.values(), *variables.globals.values()]
        programs = [lm for name in ("student", "teacher") for lm in _lms_of(inputs.get(name))]
        judges = [lm for owner in owners for lm in _lms_of(owner)]
        return [judge for judge in judges if all(judge is not lm for lm in programs)]
    except Exception:  # noqa: BLE001 - the optimizer and its metric may be the user's, and refuse to be looked at
        return []


def _lms_of(module: Any) -> list[Any]:
    """The LMs of a module's own."""
    predictors = module.predictors() if isinstance(module, dspy.Module) else ()
    return [predictor.lm for predictor in predictors if predictor.lm is not None]


def active_run_handle() -> RunHandle | None:
    """Return a handle of the run that is active here, as somebody else's, or None."""
    run = active_runs.innermost()
    return None if run is None else RunHandle(run, is_own=False)
