"""``dspy-mlflow-async gate``: whether an evaluation keeps its bounds, for CI to go on by."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from dspy_mlflow_async.cli.options import Experiments, ReadTrackingUri

if TYPE_CHECKING:
    from dspy_mlflow_async.cli.gate.checks import Check, Rules

_Several = Optional[list[str]]  # noqa: UP045 - typer evaluates it


def gate(
    runs: Annotated[
        _Several, typer.Argument(metavar="RUN", help="A run's id or name, or RUN/CASE. By default the newest.")
    ] = None,
    min_: Annotated[
        _Several, typer.Option("--min", metavar="NAME=NUMBER", help="The least a metric may be: score=0.8, score=80%.")
    ] = None,
    max_: Annotated[
        _Several, typer.Option("--max", metavar="NAME=NUMBER", help="The most: cost=2, errors=5%, latency_p95=3.")
    ] = None,
    not_worse_than: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="RUN", help="Compare the scores with a run, a case, or 'previous': the one before."),
    ] = None,
    tolerance: Annotated[
        str, typer.Option(metavar="NUMBER", help="How far the score may fall below that: 0.02, or 2%.")
    ] = "0",
    certain: Annotated[
        bool, typer.Option("--certain", help="Fail, too, where chance may hide that it falls further.")
    ] = False,
    case: Annotated[
        _Several,
        typer.Option("--case", metavar="NAME", help="Only this case of evaluate_all; may be given several times."),
    ] = None,
    experiment: Experiments = None,
    allow_unfinished: Annotated[
        bool,
        typer.Option("--allow-unfinished", help="Judge what there is of a run that has not ended or was stopped."),
    ] = False,
    junit: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Write JUnit's XML, too."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="How long to wait for the store, in all.")
    ] = 120,
    tracking_uri: ReadTrackingUri = None,
) -> None:
    """Check that an evaluation keeps its bounds; the exit code is 0 if it does.

    It is 1 where a bound does not hold, and 2 where that cannot be told: no such run or metric, a store that is away.
    Metrics are score, cost (US dollars), tokens, errors, examples, seconds, latency_p50 and other percentiles, and each
    that the run has in MLflow. The cases of evaluate_all are checked one by one.
    """
    begun = time.monotonic()
    from dspy_mlflow_async.cli.console import complain, make_console
    from dspy_mlflow_async.cli.gate import showing
    from dspy_mlflow_async.cli.gate.checks import FAILED, HELD, UNKNOWN, Check
    from dspy_mlflow_async.printable import mask_uris

    rules = _rules(min_, max_, tolerance, certain, allow_unfinished)
    if not rules.bounds and not_worse_than is None:
        raise typer.BadParameter("there is nothing to check; for example --min score=0.8", param_hint="--min, --max")
    try:
        checks = _judge(runs or [], rules, not_worse_than, case or [], experiment or [], tracking_uri, timeout)
    except Exception as error:  # noqa: BLE001 - a store fails in many ways, and CI wants a sentence for each
        said = mask_uris(error)
        complain("gate", said)
        checks = [Check(", ".join(runs or ["the newest run"]), "found", "a run to judge", "-", UNKNOWN, said)]
    else:
        if markdown:
            typer.echo(showing.markdown(checks))
        else:
            console = make_console()
            console.print(showing.table(checks))
            for reason in showing.reasons(checks):
                console.print(reason, markup=False, highlight=False, soft_wrap=True)
    if junit is not None:
        _write(junit, checks, time.monotonic() - begun)
    verdicts = {check.verdict for check in checks}
    raise typer.Exit(0 if verdicts == {HELD} else 1 if FAILED in verdicts else 2)


def _rules(
    minima: list[str] | None, maxima: list[str] | None, tolerance: str, is_certain: bool, allow_unfinished: bool
) -> Rules:
    from dspy_mlflow_async.cli.gate.checks import Rules

    def pairs(given: list[str] | None, option: str) -> list[tuple[str, str]]:
        split = [each.rpartition("=") for each in given or ()]
        if wrong := [value for name, is_there, value in split if not (name and is_there)]:
            raise typer.BadParameter(f"{wrong[0]!r} is not like score=0.8", param_hint=option)
        return [(name.strip(), value) for name, _, value in split]

    bounds = pairs(minima, "--min"), pairs(maxima, "--max")
    try:
        return Rules.of(*bounds, tolerance, is_certain=is_certain, allow_unfinished=allow_unfinished)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--min, --max, --tolerance") from None


def _judge(
    names: list[str],
    rules: Rules,
    not_worse_than: str | None,
    cases: list[str],
    experiments: list[str],
    tracking_uri: str | None,
    timeout: float,
) -> list[Check]:
    """Find the runs and judge them, within a time.

    Raises:
        ValueError: Where they are not to be found.
        ConnectionError: Where the store does not answer.
    """
    import mlflow

    from dspy_mlflow_async.cli.report import say_what_waits
    from dspy_mlflow_async.printable import mask_uris
    from dspy_mlflow_async.reachability import look
    from dspy_mlflow_async.workers import call_with_timeout

    if tracking_uri is not None:
        mlflow.set_tracking_uri(tracking_uri)
    uri = mlflow.get_tracking_uri()
    if problem := look(uri).problem:
        raise ConnectionError(problem)

    def judge() -> list[Check]:
        from dspy_mlflow_async.cli.gate import choosing
        from dspy_mlflow_async.cli.gate.checks import Check

        runs, checks = choosing.Runs(experiments), list[Check]()
        for node in [runs.find(name) for name in names] or [runs.newest()]:
            baseline = None if not_worse_than is None else runs.baseline(not_worse_than, node)
            checks += choosing.judge(node, rules, cases, baseline)
        return checks

    try:
        return call_with_timeout(judge, timeout)
    except TimeoutError:
        said = f"{mask_uris(uri)} has not answered within {timeout:g} s; --timeout says how long to wait"
        raise ConnectionError(said) from None
    finally:
        say_what_waits("gate")


def _write(junit: Path, checks: list[Check], seconds: float) -> None:
    from dspy_mlflow_async.cli.console import complain
    from dspy_mlflow_async.cli.gate import showing

    try:
        showing.junit(checks, seconds).write(junit, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        complain("gate", f"cannot write {junit}: {error.strerror}")
        raise typer.Exit(2) from None
