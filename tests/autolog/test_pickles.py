"""What a program pickles with our autolog on: as without it, and loadable where this package is absent."""

import subprocess
import sys
import textwrap

import pytest

# As a script of a user's: what it defines is in ``__main__``, and cloudpickle takes it by value.
PROGRAM = """
import sys
import warnings
warnings.filterwarnings("ignore")
import cloudpickle, copy, dspy, mlflow, pickle
from dspy.utils.callback import with_callbacks
from mlflow.dspy import load_model, log_model, save_model
from mlflow.pyfunc import load_model as load_pyfunc
import dspy_mlflow_async

folder, is_on = sys.argv[1], sys.argv[2] == "on"
if is_on:
    dspy_mlflow_async.autolog(silent=True, log_evals=True)

class Adapter(dspy.ChatAdapter):
    def format(self, *args, **kwargs):
        return super().format(*args, **kwargs)

class LM(dspy.BaseLM):
    @with_callbacks
    def __call__(self, prompt=None, messages=None, **kwargs):
        return ["[[ ## answer ## ]]\\nfour\\n[[ ## completed ## ]]"]

class Program(dspy.Module):
    def __init__(self):
        super().__init__()
        self.ask = dspy.Predict("question -> answer")
    @with_callbacks
    def forward(self, question):
        return self.ask(question=question)

def tool(x: int) -> int:
    return x

def metric(example, prediction, trace=None):
    return 1.0

def uses_mlflow():
    return log_model, save_model, load_model, load_pyfunc, mlflow.start_run, mlflow.dspy.autolog

dspy.configure(lm=LM("mine"))
program = Program()
program(question="q")
objects = {
    "adapter": Adapter(),
    "lm_class": LM,
    "lm": LM("mine"),
    "program": program,
    "tool": dspy.Tool(tool),
    "react": dspy.ReAct("question -> answer", tools=[tool]),
    "metric": metric,
    "evaluate": dspy.Evaluate(devset=[dspy.Example(question="q").with_inputs("question")], metric=metric),
    "evaluate_class": dspy.Evaluate,
    "uses_mlflow": uses_mlflow,
    "autolog": mlflow.dspy.autolog,
    "settings": dict(dspy.settings.config),
    "callbacks": dspy.settings.callbacks,
    "own_callback": dspy_mlflow_async.TracingCallback(max_value_bytes=1000),
}
for name, value in objects.items():
    with open(f"{folder}/{name}.pkl", "wb") as file:
        file.write(cloudpickle.dumps(value))
    copy.deepcopy(value)
for name in ("evaluate_class", "autolog", "callbacks", "own_callback"):
    pickle.loads(pickle.dumps(objects[name]))
program.save(f"{folder}/saved", save_program=True)
mlflow.dspy.save_model(program, f"{folder}/model")
"""

# Loads all of it. With "absent" no finder finds this package, as where it is not installed.
LOADER = """
import sys
import warnings
warnings.filterwarnings("ignore")
folder, where = sys.argv[1:3]

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *args):
        is_ours = name.partition(".")[0] == "dspy_mlflow_async"
        return None if is_ours else self.finder.find_spec(name, *args)

if where == "absent":
    sys.meta_path[:] = map(Hiding, sys.meta_path)

import pathlib
import cloudpickle, dspy, mlflow

loaded = {path.stem: cloudpickle.loads(path.read_bytes()) for path in pathlib.Path(folder).glob("*.pkl")}
assert len(loaded) == 14, sorted(loaded)
with dspy.context(lm=loaded["lm"]):
    assert loaded["program"](question="q").answer == "four"
    assert dspy.load(f"{folder}/saved", allow_pickle=True)(question="q").answer == "four"
    assert mlflow.dspy.load_model(f"{folder}/model")(question="q").answer == "four"
names = [type(each).__name__ for each in (*loaded["callbacks"], loaded["own_callback"])]
print(",".join(names), "dspy_mlflow_async" in sys.modules)
"""


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.fixture(scope="module")
def pickles(tmp_path_factory):
    """A folder with all that a program pickles while our autolog is on."""
    folder = tmp_path_factory.mktemp("pickles")
    done = run(PROGRAM, folder, "on")
    assert 0 == done.returncode, done.stderr[-3000:]
    return folder


@pytest.mark.timeout(200)
def test_what_pickles_without_us_pickles_with_us(tmp_path):
    """The control: without our autolog the same program pickles the same things."""
    done = run(PROGRAM, tmp_path, "off")

    assert 0 == done.returncode, done.stderr[-3000:]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_pickles_load_where_the_package_is_absent(pickles):
    """Programs, adapters, LMs and saved models load and answer there; our tracer is MLflow's own callback there."""
    done = run(LOADER, pickles, "absent")

    assert 0 == done.returncode, done.stderr[-3000:]
    assert "MlflowCallback,MlflowCallback False" == done.stdout.split("\n")[-2]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_pickles_are_traced_by_us_where_the_package_is(pickles):
    """Where it can be imported they are our tracers again."""
    done = run(LOADER, pickles, "present")

    assert 0 == done.returncode, done.stderr[-3000:]
    assert "AutologCallback,TracingCallback True" == done.stdout.split("\n")[-2]


@pytest.mark.timeout(200)
def test_only_our_own_tracer_names_us(pickles):
    """What pickles a user's own things names this package nowhere."""
    naming = {path.stem for path in pickles.glob("*.pkl") if b"dspy_mlflow_async" in path.read_bytes()}

    assert {"settings", "callbacks", "own_callback"} == naming
