"""Traces of many kinds, as the writer gets them: programs run under the tracer, and what is written is kept."""

import asyncio
import contextlib
import copy
import math

import dspy
import mlflow
from mlflow.entities import AssessmentSource, Expectation, Feedback, SpanType
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan

import dspy_mlflow_async
from dspy_mlflow_async.export.operations import TraceOperation
from dspy_mlflow_async.export.write.errors import Outcome, Verdict
from dspy_mlflow_async.export.write.writer import Writer
from dspy_mlflow_async.seams import mlflow_traces
from echo import EchoLM

PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
    "rkJggg=="
)


@mlflow.trace
def _mine(text):
    """A span of the user's around a call, with attributes that MLflow takes for a model and for tokens."""
    with mlflow.start_span("inner") as span:
        span.set_attributes({"k": 1, "gen_ai.request.model": "m", "gen_ai.usage.input_tokens": 3})
        span.set_inputs({"a": "é😀\x7f"})
    return dspy.Predict("question -> answer")(question=text).answer


def spans_with_attributes_of_others():
    _mine("@a")


def a_session_and_a_user():
    with mlflow.start_span("root"):
        mlflow.update_current_trace(
            tags={"t": "v", "ümlaut": "ß"},
            metadata={"mlflow.trace.session": "s1", "mlflow.trace.user": "u"},
            client_request_id="c-1",
        )
        dspy.Predict("question -> answer")(question="@a")


def previews_and_a_name_of_its_own():
    with mlflow.start_span("root"):
        mlflow.update_current_trace(request_preview="r", response_preview="s", tags={"mlflow.traceName": "named"})


def totals_of_its_own():
    with mlflow.start_span("root"):
        mlflow.update_current_trace(
            metadata={
                "mlflow.trace.tokenUsage": '{"input_tokens": 7, "output_tokens": 1, "total_tokens": 8}',
                "mlflow.trace.cost": '{"input_cost": 0.5, "output_cost": 0.25, "total_cost": 0.75}',
            }
        )


def odd_totals_of_its_own():
    for usage in ("no JSON", "[]", '{"input_tokens": "many"}'):
        with mlflow.start_span("root"):
            mlflow.update_current_trace(metadata={"mlflow.trace.tokenUsage": usage, "mlflow.trace.cost": usage})


def a_user_by_an_attribute():
    @mlflow.trace(span_type="LLM", attributes={"user.id": "u7", "session.id": "s9", "tools": [1]})
    def two():
        return "plain text"

    two()


def json_in_texts():
    for text in ('{"x": 1}', '["a"]', '"quoted"', ' {"x": 1}', "{", '""', "null", "", "\\", '{"model": "gpt-4o-mini"}'):
        with mlflow.start_span("root") as span:
            span.set_inputs(text)
            span.set_attribute("note", text)
            span.set_outputs(text)


def a_field_called_model():
    with dspy.context(lm=EchoLM()):
        dspy.Predict("model -> answer")(model="@gpt")


def priced():
    for model in ("openai/gpt-4o-mini", "anthropic/claude-3-5-sonnet-20241022", "gpt-4o"):
        with dspy.context(lm=EchoLM(model=model)):
            dspy.ReAct("question -> answer", tools=[lambda query: '{"found": 1}'], max_iters=1)(question="@a")


def priced_agents():
    """Usage and a model on spans of every type, one within another."""
    usage = {"input_tokens": 100, "output_tokens": 10, "total_tokens": 110, "cache_read_input_tokens": 50}
    for kind in (SpanType.AGENT, SpanType.LLM, SpanType.CHAIN, "OWN", None):
        with mlflow.start_span("outer", span_type=kind or SpanType.UNKNOWN) as outer:
            for _ in range(2):
                with mlflow.start_span("inner", span_type=SpanType.CHAT_MODEL) as inner:
                    inner.set_attributes({"mlflow.chat.tokenUsage": usage, "mlflow.llm.model": "gpt-4o-mini"})
            outer.set_attributes({"mlflow.chat.tokenUsage": usage, "mlflow.llm.model": "gpt-4o-mini"})


def costs_of_its_own():
    for cost in ({"input_cost": 1, "output_cost": 2.5, "total_cost": 3.5}, {"total_cost": math.inf}, {}, "none", [1]):
        with mlflow.start_span("root") as span:
            span.set_attribute("mlflow.llm.cost", cost)


def odd_usage():
    for usage in ({}, None, {"total_tokens": 3}, "x", {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}):
        with mlflow.start_span("root") as span:
            span.set_attribute("mlflow.chat.tokenUsage", usage)


def errors():
    class Bad(dspy.Module):
        def forward(self, question):
            dspy.Predict("question -> answer")(question=question)
            raise ValueError("no \x00 pé \ud800 {}")

    with contextlib.suppress(ValueError):
        Bad()(question="@a")


def events_of_others():
    with mlflow.start_span("root") as span:
        span._span.add_event("gen_ai.content.prompt", {"gen_ai.prompt": "hello"})
        span._span.add_event("note", {"number": 1, "text": "ü"})


def hostile_values():
    values = [
        "\x00",
        "\ud800",
        "a" * 20_000,
        "\u2028\u2029\x7f\x1b[31m",
        "%s {} \\N",
        {"a": {"b": [{}]}},
        10**30,
        math.nan,
    ]
    for value in values:
        with mlflow.start_span(f"root {str(value)[:20]}") as span:
            span.set_inputs({"value": value})
            span.set_attribute(f"key {str(value)[:10]}", value)


def pictures():
    dspy.Predict("image: dspy.Image, question -> answer")(image=dspy.Image(url=PICTURE), question="@a")


def streams():
    async def read():
        return [each async for each in dspy.streamify(dspy.Predict("question -> answer"))(question="@a")]

    asyncio.run(read())


def tasks():
    async def both():
        ask = dspy.ChainOfThought("question -> answer")
        return await asyncio.gather(*(ask.acall(question=f"@{n}") for n in range(3)))

    asyncio.run(both())


def a_failing_metric():
    def metric(example, prediction, trace=None):
        raise LookupError("none")

    examples = [dspy.Example(question=f"@{n}", answer="x").with_inputs("question") for n in range(2)]
    with contextlib.suppress(Exception):
        dspy.Evaluate(devset=examples, metric=metric, num_threads=1, display_progress=False, max_errors=9)(
            dspy.Predict("question -> answer")
        )


def in_a_run():
    with dspy_mlflow_async.run("named"):
        dspy.Predict("question -> answer")(question="@a")


def many_spans():
    with mlflow.start_span("root"):
        for number in range(150):
            with mlflow.start_span(f"child {number}") as span:
                span.set_inputs({"number": number})


def raw_attributes():
    """Values that are no texts, as OpenTelemetry's own tracers write them."""
    with mlflow.start_span("root") as span:
        span._span.set_attributes({"int": 1, "float": 0.5, "bool": True, "list": (1, 2), "texts": ("a", "b")})


MORE = [
    spans_with_attributes_of_others, a_session_and_a_user, previews_and_a_name_of_its_own, totals_of_its_own,
    odd_totals_of_its_own, a_user_by_an_attribute, json_in_texts, a_field_called_model, priced, priced_agents,
    costs_of_its_own, odd_usage, errors, events_of_others, hostile_values, pictures, streams, tasks, a_failing_metric,
    in_a_run, many_spans, raw_attributes,
]  # fmt: skip
# Those that have most kinds between them, for the suite.
SAMPLE = [
    MORE[0], a_session_and_a_user, totals_of_its_own, json_in_texts, priced, errors, hostile_values, raw_attributes,
    many_spans,
]  # fmt: skip


def collect(programs):
    """Run programs under the tracer, and return the operations on traces that the writer was given.

    A program that fails here, with an older MLflow for example, leaves the traces that it has begun.
    """
    kept = []
    original = Writer.write

    def write(self, items):
        traces = [item for item in items if isinstance(item, TraceOperation)]
        kept.extend(map(twin, traces))
        outcomes = [Outcome(item, Verdict.STORED) for item in traces]
        return outcomes + original(self, [item for item in items if not isinstance(item, TraceOperation)])

    Writer.write = write
    try:
        dspy_mlflow_async.autolog()
        with dspy.context(lm=EchoLM()):
            for program in programs:
                with contextlib.suppress(Exception):
                    program()
        assert dspy_mlflow_async.flush(60)
    finally:
        Writer.write = original
        dspy_mlflow_async.autolog(disable=True)
    return list(_varied(kept))


def _varied(items):
    """Add what no program can make by itself, to twins of the first traces."""
    source = AssessmentSource(source_type="CODE", source_id="corpus")
    more = [
        [
            Feedback(name="score", value=0.5, rationale="ü", source=source),
            Feedback(name="yes", value="Yes", source=source),
        ],
        [Feedback(name="error", error=ValueError("none"), source=source)],
        [Expectation(name="expected", value={"a": [1]}, source=source, metadata={"k": "v"})],
    ]
    for number, item in enumerate(items):
        if number < len(more):
            item.info.assessments = more[number]
            for index, assessment in enumerate(more[number]):
                assessment.trace_id, assessment.assessment_id = item.key, f"a-{number}-{index}"
        if number == len(more):
            resource = Resource({"service.name": "corpus", "number": 3, "telemetry.sdk.name": "x", "mlflow.own": "y"})
            item.spans = [_with(span, resource) for span in item.spans]
        yield item


def _with(span, resource):
    otel = span._span
    parts = ("name", "context", "parent", "attributes", "events", "links", "kind", "status", "start_time", "end_time")
    readable = ReadableSpan(**{part: getattr(otel, part) for part in parts}, resource=resource)
    return mlflow_traces.restore_span(readable, {}, None)


def twin(item):
    """A copy that may be prepared and written by itself."""
    made = copy.copy(item)
    if isinstance(item, TraceOperation):
        made.info = copy.copy(item.info)
        made.info.trace_metadata, made.info.tags = dict(item.info.trace_metadata), dict(item.info.tags)
        made.info.assessments = list(item.info.assessments)
        made.spans = list(item.spans)
    return made
