"""``dspy-mlflow-async which``: the compile, step and scores that a program came from, and the traces it has made."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspy_mlflow_async.cli.options import Experiments, ReadTrackingUri, Since, since_ms

if TYPE_CHECKING:
    from dspy_mlflow_async.cli.lineage.origins import Origin, aorigin_of, origin_of

__all__ = ["aorigin_of", "origin_of", "which"]


def __getattr__(name: str) -> Any:
    """Import the functions when somebody asks, which need DSPy and MLflow."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dspy_mlflow_async.cli.lineage import origins

    return getattr(origins, name)


def which(
    programs: Annotated[
        list[str],
        typer.Argument(
            metavar="HASH|FILE|TRACE",
            help="A program_hash, a program saved as JSON, a trace's id, or a logged model (models:/m-…).",
        ),
    ],
    experiment: Experiments = None,
    since: Since = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    tracking_uri: ReadTrackingUri = None,
) -> None:
    """Say which compile, step and scores a program came from, and which traces it has made since.

    The exit code is 1 where no compile and no evaluation has one of them, 2 where it is no program.
    """
    from mlflow.exceptions import MlflowException

    from dspy_mlflow_async.cli.console import complain, make_console
    from dspy_mlflow_async.cli.lineage import origins
    from dspy_mlflow_async.cli.lineage.showing import lines_of

    found = []
    for program in programs:
        try:
            found.append(
                origins.origin_of(program, experiment=experiment, since_ms=since_ms(since), tracking_uri=tracking_uri)
            )
        except (ValueError, MlflowException) as error:  # noqa: PERF203 - what is wrong with one of them
            complain("which", error)
            raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps([_record(origin) for origin in found], indent=2))
    else:
        console = make_console()
        for origin in found:
            for line in lines_of(origin):
                console.print(line, markup=False, soft_wrap=True)
    raise typer.Exit(0 if all(origin.candidates or origin.evaluations for origin in found) else 1)


def _record(origin: Origin) -> dict[str, Any]:
    return {
        "hash": origin.hash,
        "hashes": sorted(origin.hashes),
        "candidates": [
            {
                "run_id": each.run_id,
                "optimizer": each.lineage.optimizer,
                "hash": each.candidate.hash,
                "is_result": each.candidate.hash == each.lineage.result,
                "parents": list(each.candidate.parents),
                "parents_by": each.candidate.parents_by,
                "changes": each.lineage.changes(each.candidate),
                "scores": [dataclasses.asdict(score) for score in each.candidate.scores],
            }
            for each in origin.candidates
        ],
        "evaluations": [dataclasses.asdict(each) for each in origin.evaluations],
        "traces": [dataclasses.asdict(each) for each in origin.traces],
        "models": list(origin.models),
        "prompts": list(origin.prompts),
    }
