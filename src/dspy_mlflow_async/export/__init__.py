"""Export of traces and run results: from ended spans to the MLflow store, through a queue and a spool on disk."""

from dspy_mlflow_async.export.assemble.sampling import KEEPS
from dspy_mlflow_async.export.counters import ExportStats
from dspy_mlflow_async.export.installation import (
    count_sampled,
    flush,
    hold,
    install,
    release,
    secure,
    share,
    stats,
    take_over,
)
from dspy_mlflow_async.export.operations import Creation
from dspy_mlflow_async.export.options import ExportOptions
from dspy_mlflow_async.export.queue.replay import ReplayProgress, ReplaySummary, SpoolInfo, letters, replay, spools
from dspy_mlflow_async.export.runs import ASK_SECONDS, RunWriter, ask, create_run, is_refusal, real_id, run_writer
from dspy_mlflow_async.export.shutdown import before_leaving
from dspy_mlflow_async.export.spool.dead_letters import DeadLetter
from dspy_mlflow_async.export.write.late_runs import CREATION_TAG, is_stand_in, known, new_id
from dspy_mlflow_async.export.write.row_writer import explain as explain_rows

__all__ = [
    "ASK_SECONDS",
    "CREATION_TAG",
    "KEEPS",
    "Creation",
    "DeadLetter",
    "ExportOptions",
    "ExportStats",
    "ReplayProgress",
    "ReplaySummary",
    "RunWriter",
    "SpoolInfo",
    "ask",
    "before_leaving",
    "count_sampled",
    "create_run",
    "explain_rows",
    "flush",
    "hold",
    "install",
    "is_refusal",
    "is_stand_in",
    "known",
    "letters",
    "new_id",
    "real_id",
    "release",
    "replay",
    "run_writer",
    "secure",
    "share",
    "spools",
    "stats",
    "take_over",
]
