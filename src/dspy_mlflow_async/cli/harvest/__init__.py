"""``dspy-mlflow-async harvest``: examples for a devset or a compile, made of what a store has recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dspy_mlflow_async.cli.options import Experiments, ReadTrackingUri, Run, Since, since_ms

if TYPE_CHECKING:
    from dspy_mlflow_async.cli.harvest.harvesting import aexamples_from_traces, examples_from_traces

__all__ = ["aexamples_from_traces", "examples_from_traces", "harvest"]


def __getattr__(name: str) -> Any:
    """Import the functions when somebody asks, which need DSPy and MLflow."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dspy_mlflow_async.cli.harvest import harvesting

    return getattr(harvesting, name)


def harvest(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the examples, a line of JSON each.")],
    experiment: Experiments = None,
    since: Since = None,
    run: Run = None,
    signature: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="'A -> B'", help="The calls of predictors with these fields, inner ones too."),
    ] = None,
    program: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="CLASS", help="The calls of modules of this class; by default the outermost calls."),
    ] = None,
    program_hash: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="HASH", help="Only calls with a predictor of this hash."),
    ] = None,
    weight_by: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FEEDBACK", help="The name of the feedback whose value is an example's weight."),
    ] = None,
    min_weight: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="WEIGHT", help="Leave out what has a lower weight, or none."),
    ] = None,
    include_cut: Annotated[bool, typer.Option("--include-cut", help="Keep values that were cut.")] = False,
    include_masked: Annotated[bool, typer.Option("--include-masked", help="Keep values that were masked.")] = False,
    duplicates: Annotated[
        bool, typer.Option("--duplicates", help="Keep all calls with equal inputs, not the newest alone.")
    ] = False,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", min=1, help="How many examples at most."),
    ] = None,
    tracking_uri: ReadTrackingUri = None,
) -> None:
    """Write what a program was asked and answered, as examples to evaluate or to compile with.

    Calls that failed, judges' calls, and values that were cut or masked are left out; of equal inputs one is kept.
    """
    from mlflow.exceptions import MlflowException

    from dspy_mlflow_async.cli.console import complain, make_console
    from dspy_mlflow_async.cli.harvest import harvesting

    try:
        found = harvesting.harvest(
            signature,
            program=program,
            experiment=experiment,
            run=run,
            since_ms=since_ms(since),
            program_hash=program_hash,
            where=None,
            weight_by=weight_by,
            min_weight=min_weight,
            include_cut=include_cut,
            include_masked=include_masked,
            deduplicate=not duplicates,
            tracking_uri=tracking_uri,
        )[:limit]
        lines = [json.dumps(_as_dict(each), ensure_ascii=False) for each in found]
        out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except (ValueError, MlflowException, OSError) as error:
        complain("harvest", error)
        raise typer.Exit(2) from None
    make_console().print(f"{len(found)} examples written to {out}", markup=False, soft_wrap=True)


def _as_dict(each: Any) -> dict[str, Any]:
    fields = {"inputs": each.inputs, "labels": each.labels, "weight": each.weight, "trace_id": each.trace_id}
    return {key: value for key, value in fields.items() if value is not None}
