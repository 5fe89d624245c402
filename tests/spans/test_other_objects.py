"""Interpreters, retrievers, embedders, tools and custom LMs: as far as DSPy reports them."""

import asyncio
from typing import ClassVar

import dspy
import pytest

from dspy_mlflow_async.testing import tree
from echo import EchoLM, marker, predict_tree


class Scripted(dspy.CodeInterpreter):
    """An interpreter that runs nothing: it answers from a script, and calls a tool on the way."""

    tools: ClassVar = {}  # a property of the base class

    def __init__(self, script=lambda code: code):
        self.script = script
        self.callbacks = []

    @dspy.utils.callback.with_callbacks
    def start(self):
        return None

    @dspy.utils.callback.with_callbacks
    def execute(self, code, variables=None):
        return self.script(code)

    @dspy.utils.callback.with_callbacks
    def invoke_tool(self, name, args):
        return self.tools[name](**args)

    @dspy.utils.callback.with_callbacks
    def shutdown(self):
        return None


def test_interpreters(traces):
    """Each operation is a span below the call around it; secrets in what they are given are masked."""

    class Program(dspy.Module):
        def forward(self, question):
            interpreter = Scripted(lambda code: interpreter.invoke_tool(name="shout", args={"text": question}))
            Scripted.tools["shout"] = dspy.Tool(lambda text: text.upper(), name="shout")
            interpreter.start()
            try:
                return interpreter.execute(code="shout()", variables={"api_key": "sk"})
            finally:
                interpreter.shutdown()

    assert "@A" == Program()(question="@a")

    expected = (
        "Program.forward",
        [
            ("Scripted.startup", []),
            ("Scripted.execute", [("Scripted.tool_call", [("Tool.shout", [])])]),
            ("Scripted.shutdown", []),
        ],
    )
    assert [expected] == [tree(trace) for trace in traces]
    execute = next(span for span in traces[0].data.spans if span.name == "Scripted.execute")
    assert {"code": "shout()", "variables": {"api_key": "[masked]"}} == execute.inputs
    assert "@A" == execute.outputs


def test_a_failing_interpreter(traces):
    """An error in the code is an error of that span."""

    def fail(code):
        raise SyntaxError("bad code")

    with pytest.raises(SyntaxError):
        Scripted(fail).execute(code="(")

    assert ("Scripted.execute", "error", []) == tree(traces[0], "outcome")


def test_program_of_thought_parts(traces):
    """``finish`` is no tool of the user's; every other tool is a span, sync and async."""

    async def search(query: str) -> str:
        """Looks up."""
        return f"{query}.found"

    asyncio.run(dspy.Tool(search).acall(query="@a"))
    dspy.Tool(lambda: "done", name="finish")()

    assert [("Tool.search", "@a", [])] == [tree(trace, marker) for trace in traces]


def test_finish_hides_no_call_inside_it(traces):
    """What a tool named ``finish`` calls is below the call around it."""

    class Program(dspy.Module):
        def __init__(self):
            super().__init__()
            self.step = dspy.Predict("question -> answer")

        def forward(self, question):
            return dspy.Tool(lambda: self.step(question=question), name="finish")()

    Program()(question="@a")

    assert [("Program.forward", "@a", [predict_tree("@a")])] == [tree(trace, marker) for trace in traces]


def test_retrievers(traces):
    """A retriever is a RETRIEVER with its passages."""

    class Find(dspy.Retrieve):
        def forward(self, query, k=None):
            return dspy.Prediction(passages=[f"{query}.one"])

    Find(k=1)("@a")

    assert [("Find.forward", "RETRIEVER", {"passages": ["@a.one"]}, [])] == [
        tree(trace, "span_type", "outputs") for trace in traces
    ]


def test_embedders(traces):
    """DSPy reports no calls of an ``Embedder``: none is recorded, and what it returns is the same."""
    embedder = dspy.Embedder(lambda texts: [[1.0]] * len(texts), caching=False)

    assert [[1.0], [1.0]] == [list(each) for each in embedder(["a", "b"])]
    assert all(tree(trace)[0] == "Embedder.forward" for trace in traces)


def test_a_plain_base_lm(traces):
    """An LM of one's own, with nothing but what ``BaseLM`` asks for."""
    dspy.configure(lm=EchoLM(model="mine"))
    dspy.Predict("question -> answer")(question="@a")

    lm = next(span for span in traces[0].data.spans if span.name == "EchoLM.__call__")
    assert ("CHAT_MODEL", "mine", None) == (
        lm.span_type,
        lm.get_attribute("mlflow.llm.model"),
        lm.get_attribute("mlflow.llm.provider"),
    )


def test_subclasses_and_lambdas(traces):
    """Names are those of the class that was called."""

    class Special(dspy.Predict):
        pass

    Special("question -> answer")(question="@a")

    assert "Special.forward" == tree(traces[0])[0]
    assert "program_hash" in traces[0].data.spans[0].attributes


def test_a_fallback_adapter(traces):
    """When ChatAdapter cannot read an answer, JSONAdapter tries: both are below the predictor, which is ok."""
    answers = iter(["no fields here", '{"answer": "@a"}'])

    class Twice(EchoLM):
        def _respond(self, marker, prompt, messages):
            response = super()._respond(marker, prompt, messages)
            response.choices[0].message.content = next(answers)
            return response

    dspy.configure(lm=Twice())
    assert "@a" == dspy.Predict("question -> answer")(question="@a").answer

    name, outcome, below = tree(traces[0], "outcome")
    assert ("Predict.forward", "ok") == (name, outcome)
    assert [
        ("ChatAdapter.format", "ok"),
        ("Twice.__call__", "ok"),
        ("ChatAdapter.parse", "error"),
        ("JSONAdapter.format", "ok"),
        ("Twice.__call__", "ok"),
        ("JSONAdapter.parse", "ok"),
    ] == [child[:2] for child in below]


@pytest.mark.parametrize("kind", [dspy.BestOfN, dspy.Refine])
def test_modules_that_copy_and_call_again(traces, kind):
    """BestOfN and Refine call copies of a module several times: all below them."""
    program = kind(module=dspy.Predict("question -> answer"), N=2, reward_fn=lambda args, pred: 1.0, threshold=2.0)
    program(question="@a")

    name, below = tree(traces[0])
    assert f"{kind.__name__}.forward" == name
    assert 2 <= sum(child[0] == "Predict.forward" for child in below)
    assert 1 == len(traces)
