"""A sequential program gives the same tree under MLflow's own tracer and ours."""

import dspy
import mlflow
import pytest

import dspy_mlflow_async
from dspy_mlflow_async.testing import capture_traces
from echo import Chain, EchoLM, usage_of

# What we record and MLflow does not.
ADDITIONS = {"outcome", "cache_hit", "program_hash", "late"}


def shown(span):
    """All that a span says, less what differs from call to call and what only we add."""
    attributes = {
        key: value
        for key, value in span.attributes.items()
        if key not in ADDITIONS and key not in {"mlflow.traceRequestId", "mlflow.chat.tokenUsage", "mlflow.llm.cost"}
    }
    events = [
        (event.name, {key: value for key, value in event.attributes.items() if key != "exception.stacktrace"})
        for event in span.events
    ]
    return span.name, span.status.status_code.value, attributes, events  # our status has a description besides


def forest(traces):
    """Each trace as nested tuples of everything that its spans say."""

    def node(spans, parent_id):
        below = sorted((span for span in spans if span.parent_id == parent_id), key=lambda span: span.start_time_ns)
        return [(*shown(span), node(spans, span.span_id)) for span in below]

    return [node(trace.data.spans, None) for trace in traces]


def under(turn_on, program):
    """What a program gives, and the traces it makes."""
    with capture_traces() as traces:
        turn_on()
        try:
            result = program()
        except Exception as error:  # noqa: BLE001 - programs here may fail, and alike
            result = error
        finally:
            mlflow.dspy.autolog(disable=True)
            dspy_mlflow_async.autolog(disable=True)
    return result, traces


def mlflows_own():
    """MLflow's tracer, less ``track_usage``, which changes the program."""
    mlflow.dspy.autolog()
    dspy.configure(track_usage=False)


def both(program):
    """The traces of a program under MLflow's tracer, and under ours."""
    theirs, their_traces = under(mlflows_own, program)
    ours, our_traces = under(dspy_mlflow_async.autolog, program)
    assert repr(theirs) == repr(ours)
    return their_traces, our_traces


def predict():
    return dspy.Predict("question -> answer")(question="@a")


def chain_of_thought():
    return dspy.ChainOfThought("question -> answer")(question="@a")


def nested_modules():
    return Chain()(question="@a")


def json_adapter():
    with dspy.context(adapter=dspy.JSONAdapter()):
        return Chain()(question="@a")


def with_demos():
    program = dspy.Predict("question -> answer")
    program.demos = [dspy.Example(question="@d", answer="@e")]
    return program(question="@a")


def a_signature_class():
    class Typed(dspy.Signature):
        """Answer."""

        question: str = dspy.InputField()
        scores: list[int] = dspy.InputField()
        answer: str = dspy.OutputField()

    return dspy.Predict(Typed)(question="@a", scores=[1, 2])


def react():
    def search(query: str) -> str:
        """Looks a query up."""
        return f"{query}.found"

    def answer(field, marker):
        if field == "next_tool_name":
            return "finish" if marker.endswith("found") else "search"
        if field == "next_tool_args":
            return "{}" if marker.endswith("found") else f'{{"query": "{marker}"}}'
        return marker

    with dspy.context(lm=EchoLM(answer=answer)):
        return dspy.ReAct("question -> answer", tools=[search])(question="@a")


def tools():
    def shout(text: str, times: int = 1) -> str:
        """Says it loud."""
        return text.upper() * times

    return dspy.Tool(shout)(text="@a", times=2)


def a_failing_tool():
    def fail(text: str) -> str:
        raise ValueError(text)

    return dspy.Tool(fail)(text="@a")


def positional_arguments():
    class Positional(dspy.Module):
        def forward(self, first, *rest, key=None):
            return {"first": first, "rest": rest, "key": key}

    return Positional()("@a", "@b", key="@c")


def outputs_of_all_kinds():
    class Kinds(dspy.Module):
        def forward(self, kind):
            return {
                "none": None,
                "text": "@a",
                "list": [1, {"a": (1, 2)}],
                "example": dspy.Example(a=1),
                "prediction": dspy.Prediction(a=1, b=[2.5, None, True]),
                "nan": float("nan"),
                "huge": 10**30,
            }[kind]

    for kind in ("none", "text", "list", "prediction", "nan", "huge"):
        Kinds()(kind=kind)


def a_failing_lm():
    def fail(marker):
        raise LookupError("no answer")

    with dspy.context(lm=EchoLM(during=fail)):
        return Chain()(question="@a")


def a_lm_called_directly():
    dspy.settings.lm("hello @a", temperature=0.5)
    return dspy.settings.lm("hello @a", api_base="http://nowhere", max_tokens=7)


def lm_parameters():
    with dspy.context(lm=EchoLM(model="a/b/c", temperature_range=[0, 1], api_base="http://nowhere", seed=7)):
        return predict()


def text_completion():
    lm = EchoLM()
    lm.model_type = "text"
    with dspy.context(lm=lm):
        return predict()


def model_without_a_slash():
    with dspy.context(lm=EchoLM(model="plain")):
        return predict()


def user_spans():
    with mlflow.start_span("outer") as span:
        span.set_inputs({"question": "@a"})
        first = Chain()(question="@a")
        with mlflow.start_span("inner", span_type="TOOL"):
            second = predict()
    return first, second


def evaluation():
    examples = [dspy.Example(question=f"@{n}", answer=f"@{n}").with_inputs("question") for n in range(2)]
    evaluator = dspy.Evaluate(devset=examples, metric=exact, num_threads=1, display_progress=False)
    return evaluator(Chain())


def exact(example, prediction, trace=None):
    """Exact match."""
    return example.answer == prediction.answer


def retriever():
    class Find(dspy.Retrieve):
        def forward(self, query, k=None):
            return dspy.Prediction(passages=[f"{query}.one", f"{query}.two"])

    return Find(k=2)("@a")


def unicode_text():
    return dspy.Predict("question -> answer")(question="@ä 你好 🙂 \x00 \u2028 end @a")


PROGRAMS = [
    predict,
    chain_of_thought,
    nested_modules,
    json_adapter,
    with_demos,
    a_signature_class,
    react,
    tools,
    a_failing_tool,
    positional_arguments,
    outputs_of_all_kinds,
    a_failing_lm,
    a_lm_called_directly,
    lm_parameters,
    text_completion,
    model_without_a_slash,
    user_spans,
    evaluation,
    retriever,
    unicode_text,
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_same_spans(program):
    """Same tree, names, types, inputs, outputs, attributes, status and events; and the same result."""
    theirs, ours = both(program)

    assert theirs
    assert forest(theirs) == forest(ours)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_same_trace(program):
    """Same state, previews and tags of the trace, whose name is the root's."""

    def text(value):  # ours is the same JSON without blanks, so that more of it is shown where MLflow cuts
        return value and value.replace(": ", ":").replace(", ", ",")[:200]

    def info(trace):
        metadata = trace.info.trace_metadata
        return (
            trace.info.state,
            text(trace.info.request_preview),
            text(trace.info.response_preview),
            trace.info.tags.get("mlflow.traceName"),
            text(metadata.get("mlflow.traceInputs")),
            text(metadata.get("mlflow.traceOutputs")),
            sorted(trace.info.tags),
        )

    theirs, ours = both(program)

    assert [info(trace) for trace in theirs] == [info(trace) for trace in ours]


def test_token_usage_as_mlflow_reports_it():
    """With DSPy's ``track_usage``, which MLflow switches on, the roots report the same tokens."""

    def tracked():
        with dspy.context(track_usage=True):
            return Chain()(question="@abc")

    theirs, ours = both(tracked)

    usage = [usage_of("@abc")] * 2
    expected = {
        "input_tokens": sum(each["prompt_tokens"] for each in usage),
        "output_tokens": sum(each["completion_tokens"] for each in usage),
        "total_tokens": sum(each["total_tokens"] for each in usage),
    }
    assert [expected] == [trace.info.token_usage for trace in theirs]
    assert [expected] == [trace.info.token_usage for trace in ours]


def test_databricks_documents():
    """DatabricksRM's result is shown as MLflow documents."""

    class DatabricksRM(dspy.Retrieve):
        def forward(self, query):
            return dspy.Prediction(
                docs=["one", "two"],
                doc_ids=["1", "2"],
                doc_uris=["a", "b"] if query == "@uris" else None,
                extra_columns=[{"a": 1}, {"a": 2}],
            )

    # Both go by the class's full name; DSPy's own wants a Databricks workspace.
    DatabricksRM.__module__, DatabricksRM.__qualname__ = "dspy.retrieve.databricks_rm", "DatabricksRM"

    for query in ("@uris", "@none"):
        theirs, ours = both(lambda query=query: DatabricksRM(k=2)(query))

        assert forest(theirs) == forest(ours)
        (root,) = ours[0].data.spans
        assert ["one", "two"] == [document["page_content"] for document in root.outputs]
