"""The runs of an ``evaluate_all`` in the store: one parent, a child per case, and what a resume reads back."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dspy_mlflow_async import export
from dspy_mlflow_async.evaluate import fingerprint, journal
from dspy_mlflow_async.evaluate.case import Case
from dspy_mlflow_async.evaluate.journal import Stored
from dspy_mlflow_async.printable import mask_uris, split_credentials
from dspy_mlflow_async.runs import active_runs, selection
from dspy_mlflow_async.runs.handle import MAX_TAG_LENGTH, RunHandle
from dspy_mlflow_async.seams.mlflow_runs import MLFLOW_AUTOLOGGING, MLFLOW_PARENT_RUN_ID, ActiveRun, PendingRun
from dspy_mlflow_async.spans.door import Door

logger = logging.getLogger("dspy_mlflow_async")

KIND_TAG, KIND = "dspy_mlflow_async.kind", "evaluate_all"
CASE_TAG = "dspy_mlflow_async.case"
STOPPED_TAG = "dspy_mlflow_async.stopped_by"  # which budget ended it, in words; empty where a resume went past it
NOT_RUN_TAG = "dspy_mlflow_async.not_run"  # how many examples that left out
PLAN_TAG = "dspy_mlflow_async.plan."  # and a number: a tag per case, there as soon as the run is
LM_ARGUMENTS = "lm arguments"  # a digest of each, so that the one that differs can be named
RUNNING = "RUNNING"
NO_SECONDS = 0.001  # where the store is known to be away
CREATION_SECONDS = 30.0  # longer than what a tracer may wait: without its run, a case cannot be resumed


class CaseRun(ActiveRun):
    """Run of a case. What a resumed evaluation logs into it replaces what the interrupted one had logged."""

    replaces_tables = True


@dataclass(frozen=True, slots=True)
class Plan:
    """Plan of an ``evaluate_all``, in fingerprints: a resume can tell by it whether it evaluates the same.

    Attributes:
        keys: By case, the fingerprint of each example of its devset.
        texts: By case, what must not have changed: devset, metric, program, LM, adapter and settings.
    """

    keys: Mapping[str, Sequence[str]]
    texts: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(cls, cases: Sequence[Case]) -> Plan:
        """Return the plan of these cases."""
        known: dict[int, list[str]] = {}  # cases share devsets as a rule
        keys = {}
        for case in cases:
            devset = case.devset or ()
            if id(devset) not in known:
                known[id(devset)] = [fingerprint.fingerprint(example) for example in devset]
            keys[case.name] = known[id(devset)]
        texts = {
            case.name: {
                "devset": fingerprint.digest(keys[case.name]),
                "metric": fingerprint.text_of_function(case.metric),
                "program": fingerprint.text_of_program(case.program),
                "lm": fingerprint.text_of_lm(_in_force(case, "lm"), case.program),
                LM_ARGUMENTS: json.dumps(fingerprint.arguments_of_lm(_in_force(case, "lm")), sort_keys=True),
                "adapter": fingerprint.text_of_adapter(_in_force(case, "adapter")),
                "settings": fingerprint.text_of_settings(case.settings),
            }
            for case in cases
        }
        return cls(keys, texts)

    def stored(self, door: Door) -> dict[str, dict[str, str]]:
        """Return the texts by case as they are stored."""
        return {
            shown_name(name, door): {what: door.text(text, MAX_TAG_LENGTH) for what, text in texts.items()}
            for name, texts in self.texts.items()
        }

    def check(self, earlier: Mapping[str, Mapping[str, str]], run_id: str, door: Door) -> None:
        """Refuse to go on with something else than was begun.

        Raises:
            ValueError: With the cases and what of them has changed.
        """
        stored = self.stored(door)
        if earlier.keys() != stored.keys():
            raise ValueError(
                f"run {run_id} evaluates the cases {', '.join(sorted(earlier))}, not {', '.join(sorted(stored))}"
            )
        for name, texts in stored.items():
            changed = [
                _difference(what, before, text)
                for what, text in texts.items()
                if (before := earlier[name].get(what)) != text and what != LM_ARGUMENTS
            ]
            if (arguments := _changed_arguments(earlier[name], texts)) and not any("lm" in each for each in changed):
                changed.append("lm")  # the names are alike
            if changed:
                named = f"; of the LM's arguments, {arguments} differ" if arguments else ""
                raise ValueError(
                    f"run {run_id} cannot be resumed: case {name!r} has another {', '.join(changed)}{named}. Give what "
                    "was given then, or begin a new evaluation without resume=."
                )


def _difference(what: str, before: str | None, now: str) -> str:
    return f"{what} ({before} then, {now} now)"


def _changed_arguments(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Name the arguments of the LM that differ; empty where none does, or they were not noted."""
    texts = before.get(LM_ARGUMENTS), now.get(LM_ARGUMENTS)
    if None in texts:
        return ""
    try:
        then, here = (json.loads(text or "{}") for text in texts)
    except ValueError:  # cut
        return ""
    return ", ".join(sorted(key for key in then.keys() | here.keys() if then.get(key) != here.get(key)))


@dataclass(frozen=True, slots=True)
class StoredCase:
    """Case of an earlier process, as stored.

    Attributes:
        run: MLflow's run.
        journal: What is kept of its examples.
    """

    run: Any
    journal: Stored


def page_of(handle: RunHandle) -> str:
    """Return the address of a run's page, where the store is a server."""
    return page_of_run(handle.run)


def page_of_run(run: Any) -> str:
    """Return the same of a run of MLflow's."""
    uri = mlflow.get_tracking_uri()
    if not uri.startswith(("http://", "https://")):
        return ""
    address, _ = split_credentials(uri)
    return f"{address.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def open_parent(name: str, plan: Plan, *, may_wait: bool = True) -> RunHandle | None:
    """Create the parent run, under the one that is active here, and note the plan in it.

    Args:
        name: Its name.
        plan: What is evaluated.
        may_wait: Whether the store is there, as far as is known.

    Returns:
        Its handle, or None where the store does not create it within a bound: the evaluations go on without.
    """
    door = Door.here()
    texts = [json.dumps({"case": case, **text}) for case, text in plan.stored(door).items()]
    tags = {f"{PLAN_TAG}{number}": text for number, text in enumerate(texts)}
    seconds = CREATION_SECONDS if may_wait else NO_SECONDS
    return _created(shown_name(name, door), active_runs.innermost(), {KIND_TAG: KIND, **tags}, seconds)


def reopen_parent(run_id: str, plan: Plan) -> tuple[RunHandle, dict[str, StoredCase]]:
    """Take up the parent run of an earlier process.

    Returns:
        Its handle, and what is stored of its cases.

    Raises:
        TypeError: Where ``run_id`` is no text.
        ValueError: Where there is no such run, it is another kind of run, or it has evaluated something else.
    """
    run = find_run(run_id)
    if run.data.tags.get(KIND_TAG) != KIND:
        raise ValueError(f"run {run_id} is not one of evaluate_all, so it cannot be resumed")
    texts = [json.loads(text) for key, text in run.data.tags.items() if key.startswith(PLAN_TAG)]
    door = Door.here()
    plan.check({text.pop("case"): text for text in texts}, run_id, door)
    names = {shown_name(name, door): name for name in plan.keys}
    stored = {}
    for child in children(run):
        name = names.get(child.data.tags.get(CASE_TAG))
        if name is not None:
            stored[name] = StoredCase(child, journal.read(child, plan.keys[name]))
    return _taken_up(ActiveRun(run)), stored


def shown_name(name: str, door: Door) -> str:
    """Return the name of a run or a case as it is stored."""
    return door.text(name, MAX_TAG_LENGTH)


def find_run(run_id: Any) -> Any:
    """Return MLflow's run with this id.

    Raises:
        TypeError: Where it is no text.
        ValueError: Where there is none.
    """
    if not isinstance(run_id, str):
        raise TypeError(f"a run id is a text, not {run_id!r}")
    try:
        return MlflowClient().get_run(export.real_id(run_id))
    except (MlflowException, LookupError) as error:
        raise ValueError(mask_uris(f"there is no run {run_id!r} in {mlflow.get_tracking_uri()}: {error}")) from error


def case_order(run: Any) -> list[str]:
    """Return the names of an ``evaluate_all``'s cases as they are stored, in the order in which they were given."""
    plans = sorted(
        (int(key.removeprefix(PLAN_TAG)), text)
        for key, text in run.data.tags.items()
        if key.startswith(PLAN_TAG) and key.removeprefix(PLAN_TAG).isdigit()
    )
    names = []
    for _, text in plans:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            names.append(str(json.loads(text)["case"]))
    return names


def stopped_tag(stopped_by: str | None, *, is_resumed: bool) -> str | None:
    """Return the tag that says what has stopped a run; None for no tag, empty where an earlier one has to go."""
    return stopped_by or ("" if is_resumed else None)


def newest(count: int, experiments: Sequence[str] | None = None) -> list[Any]:
    """Return the newest runs of evaluations and compiles that are below no other of them, the newest first.

    Args:
        count: How many, at most.
        experiments: The ids of the experiments to look in; by default all.
    """
    client, found = MlflowClient(), list[Any]()
    experiments = [*experiments] if experiments else [each.experiment_id for each in client.search_experiments()]
    token = None
    while len(found) < count and experiments:
        page = client.search_runs(experiments, order_by=["attributes.start_time DESC"], page_token=token)
        found += [run for run in page if _is_ours(run) and not _is_below_ours(client, run)]
        token = page.token
        if not token:
            break
    return found[:count]


def _is_ours(run: Any) -> bool:
    return bool({KIND_TAG, "dspy.optimizer", "dspy.metric", MLFLOW_AUTOLOGGING} & run.data.tags.keys())


def _is_below_ours(client: MlflowClient, run: Any) -> bool:
    parent = run.data.tags.get(MLFLOW_PARENT_RUN_ID)
    if CASE_TAG in run.data.tags or parent is None:
        return CASE_TAG in run.data.tags
    try:
        return _is_ours(client.get_run(parent))
    except MlflowException:  # deleted
        return False


def children(run: Any) -> list[Any]:
    """Return the runs directly below ``run``, oldest first."""
    found: list[Any] = []
    token = None
    while True:
        page = MlflowClient().search_runs(
            [run.info.experiment_id],
            f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run.info.run_id}'",
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        found += page
        token = page.token
        if not token:
            return found


def open_case(parent: RunHandle | None, name: str, stored: StoredCase | None) -> RunHandle | None:
    """Create the run of a case, or take up that of an earlier process."""
    if stored is not None:
        return _taken_up(CaseRun(stored.run))
    if parent is None:
        return None
    name = shown_name(name, parent.door)
    handle = _created(name, parent.run, {CASE_TAG: name})
    if handle is not None and not isinstance(handle.run, PendingRun):
        handle.run = CaseRun(handle.run)
    return handle


def end(handle: RunHandle | None, status: str) -> None:
    """End a run of ``open_parent``, ``reopen_parent`` or ``open_case``."""
    if handle is not None:
        selection.unregister(handle)
        handle.end(status)


@contextlib.contextmanager
def entered(handle: RunHandle | None) -> Iterator[None]:
    """Make a run active for a block, as one that was opened here and that nobody is in."""
    if handle is None:
        yield
        return
    active_runs.mark_opened_here(handle.run)
    block = active_runs.Block(handle.run, needs_stack=True)
    try:
        yield
    finally:
        block.leave()


def _created(
    name: str, parent: Any | None, tags: Mapping[str, str], seconds: float = CREATION_SECONDS
) -> RunHandle | None:
    door = Door.here()
    try:
        handle = selection.create_or_queue(name, parent=parent, tags=tags, timeout=seconds)
        handle.door = door
    except Exception as error:  # noqa: BLE001 - the store may fail in any way; the evaluation goes on
        logger.warning("Could not create the run %r (%s); what it would hold is not logged.", name, error)
        return None
    selection.register(handle)
    return handle


def _taken_up(run: Any) -> RunHandle:
    MlflowClient().update_run(run.info.run_id, status=RUNNING)
    handle = RunHandle(run, is_own=True)
    selection.register(handle, is_resumed=True)
    return handle


def _in_force(case: Case, name: str) -> Any:
    """Return the LM or the adapter that a case runs with."""
    own = getattr(case, name)
    return case.settings.get(name, dspy.settings.get(name)) if own is None else own
