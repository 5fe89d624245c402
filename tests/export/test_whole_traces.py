"""A server with our store takes whole traces in one request, and stores what MLflow's own server stores of them."""

import os
import sys
from pathlib import Path

import pytest
from stores import Tables

from dspy_mlflow_async.export.write.errors import Verdict
from dspy_mlflow_async.export.write.whole_traces import WholeTraces
from dspy_mlflow_async.export.write.writer import Writer
from mlflow_server import mlflow_server
from rows.compare import differences
from rows.corpus import twin

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("whole traces")]

_PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture(scope="module")
def server(_empty_store, tmp_path_factory):
    """A server with our store, which finds the entry points of the package as they are declared."""
    folder = tmp_path_factory.mktemp("server")
    database = folder / "server.db"
    database.write_bytes(_empty_store.read_bytes())
    installed = folder / "installed" / "ours-0.dist-info"  # as a wheel leaves it, where the tests run on the tree
    installed.mkdir(parents=True)
    installed.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: ours\nVersion: 0\n")
    groups = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items()]
    installed.joinpath("entry_points.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(installed.parent), os.environ.get("PYTHONPATH")])))
        with mlflow_server(folder, f"dspy+sqlite:///{database}") as server:
            yield Tables(database, server.uri)


def write(uri, operations, *, is_whole):
    """Write copies of operations, and return the verdict on each, by key, and the keys of those sent whole."""
    whole, original = [], WholeTraces.write

    def kept(self, *arguments):
        outcomes = original(self, *arguments) if is_whole else []
        whole.extend(outcome.operation.key for outcome in outcomes)
        return outcomes

    outcomes, writer = [], Writer(uri)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WholeTraces, "write", kept)
        for start in range(0, len(operations), 32):
            outcomes += writer.write([*map(twin, operations[start : start + 32])])
    return {outcome.operation.key: outcome.verdict for outcome in outcomes}, whole


@pytest.mark.long
def test_whole_traces_are_stored_as_one_by_one(server, traces):
    """Row by row and field by field: metadata, request ids, previews, tags, assessments, spans, totals."""
    expected, none = write(server.uri, traces, is_whole=False)
    theirs = server.tables()
    server.forget()
    found, whole = write(server.uri, traces, is_whole=True)

    assert [] == none
    assert expected == found
    assert [] == differences(theirs, server.tables())
    assert 0.7 * len(traces) < len(whole) < len(traces)
    assert Verdict.STORED in found.values()
