"""DSPy inside LangGraph, whose ``ainvoke`` copies contexts: one trace, where MLflow's tracer runs inline."""

import asyncio
import operator
from typing import Annotated, TypedDict

import mlflow
import pytest
from mlflow.utils.autologging_utils.versioning import is_flavor_supported_for_associated_package_versions

from dspy_mlflow_async.testing import tree
from echo import Chain, chain_tree, marker

graph = pytest.importorskip("langgraph.graph")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]


class State(TypedDict):
    """What the nodes add up."""

    answers: Annotated[list, operator.add]


def compiled():
    """Two nodes side by side, each of which awaits a program of DSPy's."""

    async def left(state):
        return {"answers": [(await Chain().acall(question="@left")).answer]}

    async def right(state):
        return {"answers": [(await Chain().acall(question="@right")).answer]}

    built = graph.StateGraph(State)
    for node in (left, right):
        built.add_node(node.__name__, node)
        built.add_edge(graph.START, node.__name__)
        built.add_edge(node.__name__, graph.END)
    return built.compile()


@pytest.fixture
def langchains():
    """MLflow's integration for LangChain and LangGraph is on, with its tracer in the task itself."""
    try:
        is_flavor_supported_for_associated_package_versions("langchain")  # `autolog` asks first, 3.11 needs LangChain
    except ModuleNotFoundError as error:
        if error.name != "langchain":
            raise
        pytest.skip("this MLflow traces LangGraph where LangChain is installed, too")
    mlflow.langchain.autolog(run_tracer_inline=True, silent=True)
    yield
    mlflow.langchain.autolog(disable=True, silent=True)


async def test_nodes_of_a_graph_are_one_trace(traces, langchains):
    """``ainvoke`` gives one trace, and each node's DSPy calls are below that node."""

    async def run():
        state = await compiled().ainvoke({"answers": []})
        await Chain().acall(
            question="@after"
        )  # the graph's span, ended, is still in the context then: by MLflow's doing
        return state

    state = await asyncio.create_task(run())

    assert {"@left", "@right"} == set(state["answers"])
    trace, after = traces
    assert chain_tree("@after") == tree(after, marker)
    root, *below = tree(trace, marker)
    nodes = {name: inside for name, _, inside in below[-1]}
    assert ("LangGraph", [chain_tree("@left")], [chain_tree("@right")]) == (root, nodes["left"], nodes["right"])


async def test_below_a_span_of_the_users(traces):
    """Without MLflow's integration nothing is needed: the graph's tasks copy the context that they start in."""
    with mlflow.start_span("mine"):
        await compiled().ainvoke({"answers": []})

    (trace,) = traces
    name, _, below = tree(trace, marker)
    assert ("mine", sorted([chain_tree("@left"), chain_tree("@right")])) == (name, sorted(below))
