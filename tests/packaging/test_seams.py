"""The list of seams is complete, and the installed DSPy and MLflow have what stands on it."""

import source

from dspy_mlflow_async.seams import check
from dspy_mlflow_async.seams.check import Seam
from dspy_mlflow_async.seams.listed import SEAMS

PATHS = {seam.path for seam in SEAMS}
LAST = {path.replace(":", ".").rpartition(".")[2] for path in PATHS}
HOW_TO_LIST = """
Add to SEAMS in src/dspy_mlflow_async/seams/listed.py, for each of these names, a line such as
    Seam("mlflow.tracing.trace_manager:InMemoryTraceManager._traces", _EXPORT),
that is: module, a colon, the name or Class.attribute (the class of theirs that has it), and what a user loses without
it. is_optional=True where everything works without it (say how, in the code: getattr with a default, or a probe).
"""
HOW_TO_MOVE = """
Private names of others are touched in src/dspy_mlflow_async/seams/ alone: put a function there that does it, with a
plain name, list the private name in seams/listed.py, and call the function from here.
"""
IN_SEAMS = {name: path for name, path in source.modules().items() if name.startswith("dspy_mlflow_async.seams.")}
ELSEWHERE = {
    name: path
    for name, path in source.modules().items()
    # The demo's stage works around a race in DSPy's progress bars, through a private name of tqdm.
    if not name.startswith(("dspy_mlflow_async.seams", "dspy_mlflow_async.cli.demo.stage"))
}

OUTSIDE = {"dspy_mlflow_async.remote.processes": {"_exit"}}  # os._exit, which Python documents


def test_each_seam_is_listed_once():
    """No path stands on the list twice."""
    assert len(SEAMS) == len(PATHS)


def test_seams_are_there():
    """The installed versions have each name that is not optional. Where one has gone, its reason says what breaks."""
    assert {} == {seam.path: seam.reason for seam in SEAMS if not seam.is_optional and not seam.is_present}


def test_every_touched_name_is_listed():
    """A name of DSPy or MLflow that a file in seams/ imports stands in seams/listed.py, with its reason."""
    unlisted = {name: source.touched_names(path) - PATHS for name, path in IN_SEAMS.items()}

    assert {} == {name: names for name, names in unlisted.items() if names}, HOW_TO_LIST


def test_every_private_attribute_is_listed():
    """So does each private name of theirs that it imports, reads or sets on an object, or passes as a keyword."""
    unlisted = {name: source.private_attributes(path) - LAST for name, path in IN_SEAMS.items()}

    assert {} == {name: names for name, names in unlisted.items() if names}, HOW_TO_LIST


def test_every_inherited_private_name_is_listed():
    """So does each private name that a class of ours overrides or uses of a class of theirs that it extends."""
    known = {path.partition(":")[2] for path in PATHS}
    unlisted = {(name, module) for name, module in source.inherited_names() if name not in known}

    assert set() == unlisted, HOW_TO_LIST


def test_every_private_module_is_listed():
    """So does each module of theirs with a private part in its name, through the names that are taken of it."""
    known = {path.partition(":")[0] for path in PATHS}
    unlisted = {name: source.private_modules(path) - known for name, path in source.modules().items()}

    assert {} == {name: names for name, names in unlisted.items() if names}, HOW_TO_LIST


def test_every_listed_name_is_touched():
    """A name that nobody touches any more leaves the list."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in source.modules().values() if path.name != "listed.py")
    last = {path: path.replace(":", ".").rpartition(".")[2] for path in PATHS}

    assert set() == {path for path, name in last.items() if name not in text}


def test_no_undocumented_name_outside_of_seams():
    """Nobody but seams/ touches a name that DSPy or MLflow do not document, or another's private attribute."""
    touched = {
        name: (source.touched_names(path) | (source.private_attributes(path))) - OUTSIDE.get(name, set())
        for name, path in ELSEWHERE.items()
    }

    assert {} == {name: names for name, names in touched.items() if names}, HOW_TO_MOVE


def test_no_private_name_is_inherited_outside_of_seams():
    """Nobody but seams/ overrides a private method of a class of theirs, or uses a private attribute of one."""
    outside = {(name, module) for name, module in source.inherited_names() if module not in IN_SEAMS}

    assert set() == outside, HOW_TO_MOVE


def test_missing_seams_are_found():
    """A module, a name, an attribute and an instance's attribute that do not exist are all reported as missing."""
    gone = [
        Seam("mlflow.no_such_module:name", "r"),
        Seam("mlflow.tracing.provider:no_such_name", "r"),
        Seam("mlflow.tracing.provider:no_such_name.attribute", "r"),
        Seam("mlflow.tracing.trace_manager:InMemoryTraceManager._no_such_attribute", "r"),
    ]
    present = Seam("mlflow.tracing.trace_manager:InMemoryTraceManager._traces", "only its instances have it")

    assert gone == check.missing([*gone, present])
