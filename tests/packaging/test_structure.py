"""The shape of the package: what is public, who may import whom, and how long a file may be."""

import ast
import graphlib
import re
import subprocess
import sys
from collections import Counter
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import pytest
import source

import dspy_mlflow_async

# From the top down. A room may import those below it. `export` stands beside them, and knows only these.
ROOMS = (
    "pytest_plugin",
    "cli",
    "asgi",
    "requests",
    "evaluate",
    "remote",
    "composition",
    "callback",
    "hooks",
    "runs",
    "spans",
    "context",
)
BESIDE = {
    "export": {"guard", "printable", "seams", "settings", "workers"},
    "seams": {"seams"},
    "server": {"export", "seams"},
    "fallback": {"guard", "seams"},
    "guard": {"printable"},
    "printable": set(),
    "reachability": {"printable"},
    "async_programs": set(),
    "settings": set(),
    "workers": set(),
}
# Cross-cutting, for every room: the boundary around failures, the settings, what may be shown, whether a store is
# there, calls in threads, and names of others.
FOR_ALL = {"guard", "printable", "reachability", "seams", "settings", "workers"}
# What stands between the tracer and those who use it.
FOR_USERS = {"__init__", "health", "async_programs", "propagation", "testing"}
MAX_LINES = 500  # rooms, not splinters: a file holds one whole idea
MAX_ATTRIBUTES = 12  # more of them are an idea that has no name yet
# Functions and constants that nothing in the source uses, and who does.
CALLED_BY_OTHERS = {
    "cli:list_commands": "click",
    "evaluate.comparison:_repr_html_": "notebooks",
    "evaluate.comparison:to_pandas": "users",
    "evaluate.statistics:is_clear": "users, of the differences of a comparison",
    "export.assemble.span_processor:activate": "MLflow, of its queue",
    "export.assemble.span_processor:is_active": "MLflow, of its queue",
    "pytest_plugin:pytest_configure": "pytest",
    "pytest_plugin:pytest_runtest_call": "pytest",
    "requests.record:lm_calls_left_out": "users",
    "seams.mlflow_processor:_should_enable_async_logging": "MLflow, of its exporter",
    "seams.mlflow_server:log_spans_async": "MLflow, of a store",
    "spans.bounds:MARK_BYTES": "who measures what is stored: docstrings and tests speak of it",
    "spans.secret_patterns:RULES": "the page on masking, which a test compares with it",
}
# Names with an underscore that others have, too, and that tests use of them.
OF_OTHERS = {
    "_limiter": "DSPy's",
    "_mapping": "of SQLAlchemy's rows",
    "_repr_html_": "of notebooks",
    "_run": "of run.py",
}
MODULES = source.modules()


def room(module):
    """The room of a module of ours: the second part of its dotted name; the package itself is "__init__"."""
    return [*module.split("."), "__init__"][1]


def own_imports(name):
    return {module for module in source.imported_modules(MODULES[name], name) if module.split(".")[0] == source.PACKAGE}


def test_all_is_sorted_and_complete():
    """`__all__` is sorted, every name in it can be had, and no name that `__init__` takes from a room is left out."""
    names = dspy_mlflow_async.__all__
    tree = source.parse(MODULES[source.PACKAGE])
    taken = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith(f"{source.PACKAGE}.")
        for alias in node.names
    }

    assert sorted(names) == names
    assert taken == set(names)
    assert all(callable(getattr(dspy_mlflow_async, name)) for name in names)


def test_version_is_read_from_the_metadata():
    """`__version__` is what the installed distribution says, and nothing else is made up."""
    assert version("dspy-mlflow-async") == dspy_mlflow_async.__version__
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        dspy_mlflow_async.no_such_name  # noqa: B018


def test_package_is_typed():
    """The marker that tells type checkers to read our types is installed, and so is the demo's data set."""
    assert resources.files(dspy_mlflow_async).joinpath("py.typed").is_file()
    assert resources.files("dspy_mlflow_async.cli.demo").joinpath("tickets.json").is_file()


def test_rooms_import_downward():
    """A room imports only rooms below it; `export` is reached from `runs` upward."""
    upward = {}
    for name in MODULES:
        if room(name) in ROOMS:
            here = ROOMS.index(room(name))
            allowed = {*ROOMS[here:], *FOR_ALL}
            allowed |= {"export"} if here <= ROOMS.index("runs") else set()
            allowed |= FOR_USERS if here < ROOMS.index("composition") else set()
            allowed |= {"propagation"} if name == "dspy_mlflow_async.hooks" else set()
            allowed |= {"fallback"} if name == "dspy_mlflow_async.asgi" else set()
            allowed |= {"evaluate"} if name == "dspy_mlflow_async.remote" else set()  # `on`, for users
            upward[name] = {module for module in own_imports(name) if room(module) not in allowed}

    assert {} == {name: modules for name, modules in upward.items() if modules}


def test_rooms_beside_know_only_what_they_must():
    """`export` knows MLflow and what is for every room; the seams and the settings know none of us."""
    others = {
        name: {module for module in own_imports(name) if room(module) not in {room(name), *BESIDE[room(name)]}}
        for name in MODULES
        if room(name) in BESIDE
    }

    assert {} == {name: modules for name, modules in others.items() if modules}


def test_context_is_pure():
    """The heart imports the standard library and itself alone."""
    outside = {
        module
        for name, path in MODULES.items()
        if room(name) == "context"
        for module in source.imported_modules(path, name)
        if module.split(".")[0] not in sys.stdlib_module_names and not module.startswith("dspy_mlflow_async.context")
    }

    assert set() == outside


def test_no_file_imports_itself():
    """Whatever way round, also inside a function, and for the eyes of a type checker alone: no import comes back."""
    imports = {name: own_imports(name) - {name} for name in MODULES}

    assert len(imports["dspy_mlflow_async.export.queue.store_queue"]) > 5  # they are seen at all
    assert len(MODULES) == len(list(graphlib.TopologicalSorter(imports).static_order()))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("`durable`", r"\bdurable\b(?!`)"),
        ('`export="process"`', r"ProcessQueue|\"process\""),
        ('`websocket="message"`', r"\"connection\", \"message\"|CurrentMessage|ConnectionScope"),
    ],
)
def test_options_are_known_where_the_design_says(option, words):
    """Deleting an option touches the files that the design names for it, and no others."""
    page = (Path(__file__).parents[2] / "docs" / "design.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| {option} |"))
    named = set(re.findall(r"`([\w/]+\.py)`", row))
    found = {
        path.relative_to(source.ROOT).as_posix()
        for path in MODULES.values()
        if re.search(words, path.read_text(encoding="utf-8"))
    }

    assert named == found


def test_the_design_names_files_that_are_there():
    """Each file that the design names is one of ours, and each room stands on its plan."""
    page = (Path(__file__).parents[2] / "docs" / "design.md").read_text(encoding="utf-8")
    plan = page.partition("## Rooms")[2].partition("Imports go downward only")[0]
    files = {path.relative_to(source.ROOT).as_posix() for path in MODULES.values()}
    rooms = {path.parent.name for path in MODULES.values() if path.name == "__init__.py"} - {source.ROOT.name}

    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", page))
    assert len(named) > 40
    assert set() == {name for name in named - files if not (Path(__file__).parents[2] / name).is_file()}
    assert {"demo", "doctor", "gate", "report"} == {
        room for room in rooms if f" {room}/ " not in plan
    }  # commands by their names


def test_private_names_stay_in_their_file():
    """No file imports a name of ours that begins with an underscore, or reads one past the door of a module."""
    taken = {name: source.taken_private_names(path) for name, path in MODULES.items()}

    assert {} == {name: names for name, names in taken.items() if names}


def test_tests_stay_outside():
    """Tests use what a file shows: no name with an underscore of ours, to read, to call or to replace."""
    tests = Path(__file__).parents[1]
    reached = {path.relative_to(tests).as_posix(): source.reached_inside(path) for path in tests.rglob("*.py")}

    assert {} == {
        name: names for name, found in reached.items() if (names := [each for each in found if each not in OF_OTHERS])
    }


def test_nothing_is_left_without_a_caller():
    """Each function, class and constant is used in the source, or it is one that others call."""
    used = source.used_names()
    idle = {
        f"{name.removeprefix(f'{source.PACKAGE}.')}:{each}"
        for name, path in MODULES.items()
        for each in source.functions_and_classes(path)
        if each not in used and not each.startswith(("__", "on_"))  # DSPy calls its handlers by name
    }

    assert {*CALLED_BY_OTHERS} == idle


def test_test_files_have_names_of_their_own():
    """No two test files have the same name: pytest imports them by it, and refuses the second."""
    names = Counter(path.name for path in Path(__file__).parents[1].rglob("test_*.py"))

    assert [] == [name for name, count in names.items() if count > 1]


def test_files_stay_short():
    """A file that grows past five hundred lines has more than one job."""
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}

    assert {} == {name: count for name, count in lines.items() if count > MAX_LINES}


# Distributions by what is imported of them, where the names differ; and what nobody needs to install.
DISTRIBUTIONS = {"google": "protobuf", "mlflow": "mlflow-tracing", "opentelemetry": "opentelemetry-sdk"}
LOOKED_UP = {"pytest", "trio"}  # used where the program has imported it
# What needs the whole of MLflow.
OF_MLFLOW = {"matplotlib", "numpy", "pandas", "sqlalchemy"}
OF_RAY = {"ray"}  # in its own file alone


def test_what_is_imported_is_declared():
    """Each distribution that a file imports, also late, is a dependency, or in the extra it belongs to."""
    project = source.pyproject()["project"]

    def names(requirements):
        return {re.match(r"[\w.-]+", each)[0].replace("_", "-") for each in requirements}

    imported = {
        DISTRIBUTIONS.get(root, root).replace("_", "-")
        for name, path in MODULES.items()
        for root in {module.partition(".")[0] for module in source.imported_modules(path, name)}
        if root not in {source.PACKAGE, *sys.stdlib_module_names, *LOOKED_UP}
    }

    assert OF_MLFLOW == names(project["optional-dependencies"]["mlflow"]) - {"mlflow"}
    assert OF_RAY == names(project["optional-dependencies"]["ray"]) - {"dspy-mlflow-async"}
    assert imported - OF_MLFLOW - OF_RAY == names(project["dependencies"]) - {"opentelemetry-api"}
    assert {"dspy_mlflow_async.remote.ray_actors"} == {
        name for name, path in MODULES.items() if "ray" in source.imported_modules(path, name)
    }


def test_source_distribution_has_every_folder():
    """What the documents point to and the tests run is in the source distribution, examples included."""
    included = source.pyproject()["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    folders = {path.parts[len(source.TREE.parts)] for path in source.TREE.glob("*/**/*.py")}

    assert {name for name in folders if not name.startswith(".")} <= {*included}
    assert {"CHANGELOG.md", "CONTRIBUTING.md", "run.py", "tox.ini"} <= {*included}


def test_classes_stay_small():
    """No class keeps more than a dozen attributes."""
    counts = {
        f"{name}.{node.name}": len(source.attributes_of_instances(node))
        for name, path in MODULES.items()
        for node in ast.walk(source.parse(path))
        if isinstance(node, ast.ClassDef)
    }

    assert 5 < counts["dspy_mlflow_async.export.counters.ExportStats"]  # fields are seen,
    assert 5 < counts["dspy_mlflow_async.export.assemble.open_trace.OpenTrace"]  # slots,
    assert 5 < counts["dspy_mlflow_async.export.queue.store_queue.StoreQueue"]  # and what `__init__` assigns
    assert {} == {name: count for name, count in counts.items() if count > MAX_ATTRIBUTES}


def test_modules_say_what_they_are_for():
    """Every module begins with a docstring whose first paragraph is a sentence."""
    first = {name: (ast.get_docstring(source.parse(path)) or "").split("\n\n")[0] for name, path in MODULES.items()}

    assert {} == {name: text for name, text in first.items() if not text.endswith((".", "?"))}


def test_docstrings_open_with_a_verb_or_a_noun():
    """No docstring of a module, class or function opens with a word that leaves its subject to the rest of it."""
    opens = re.compile(r"(?:What|Who|Whom|Whoever|Whatever|As|How|When|Where)\b")
    found = [
        f"{name}: {text.splitlines()[0]}"
        for name, path in MODULES.items()
        for node in ast.walk(source.parse(path))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and opens.match(text := ast.get_docstring(node) or "")
    ]

    assert [] == found


@pytest.mark.parametrize("name", ["callback", "cli.doctor", "export", "runs.run_block", "seams.check", "testing"])
def test_modules_import_alone(name):
    """A module needs no other to have been imported first: it is the first import of a process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import dspy_mlflow_async.{name}"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-2000:]
