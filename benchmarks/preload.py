"""What every measured process has imported when it begins: the libraries that all contestants share, and no tracer.

The forkserver imports this once, so that a fresh process costs a fork and not five seconds of imports.
"""

import dspy  # noqa: F401
import litellm  # noqa: F401 - MLflow asks it for prices when it stores the first trace
import mlflow.dspy
import mlflow.store.tracking.sqlalchemy_store
import mlflow.tracking  # noqa: F401

import benchmarks.sample  # noqa: F401
