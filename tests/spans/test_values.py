"""What the tracer stores of a call's inputs and outputs, end to end."""

import base64
import copy
import types

import dspy
import mlflow.environment_variables
import pydantic
import pytest
from mlflow.dspy.util import EXCLUDE_LM_PARAMS

from dspy_mlflow_async import TracingCallback, autolog
from dspy_mlflow_async.spans.bounds import MARK_BYTES
from dspy_mlflow_async.spans.serialize import Plain
from dspy_mlflow_async.testing import tree
from echo import Chain, EchoLM, marker, predict_tree


class Return(dspy.Module):
    """Returns what it is given."""

    def forward(self, **kwargs):
        return kwargs


def test_values_are_bounded_by_a_setting(traces):
    """``max_value_bytes`` bounds inputs and outputs of each span, under whatever key."""
    autolog(max_value_bytes=1000)
    Return()(text="x" * 10**6, result="not media " * 10**5, data="y" * 10**6, many=["z" * 100] * 10_000)

    (span,) = traces[0].data.spans
    for value in (span.inputs, span.outputs):
        assert len(str(value)) < 2000
        assert "cut" in str(value)


@pytest.mark.parametrize("text", ["\0" * 5000, "\ud800" * 5000, '"' * 5000, "🙂" * 5000, "x" * 5000])
def test_the_bound_is_that_of_the_stored_text(traces, text):
    """Escapes count as they are written."""
    autolog(max_value_bytes=1000)
    Return()(text=text, more=[text])

    (span,) = traces[0].data.spans
    for key in ("mlflow.spanInputs", "mlflow.spanOutputs"):
        assert 900 <= len(span.to_dict()["attributes"][key].encode()) <= 1000 + MARK_BYTES


def test_the_bound_holds_for_attributes_and_errors(traces):
    """Also where they look like media: only inputs and outputs have any stored beside the trace."""
    picture = "data:image/png;base64," + "A" * 5000

    def fail():
        raise ValueError(picture)

    autolog(max_value_bytes=1000)
    with pytest.raises(ValueError, match="data:"):
        dspy.Tool(fail, name="fail", desc=picture)()

    (span,) = traces[0].data.spans
    (event,) = span.events
    stored = [span.to_dict()["attributes"]["description"], *event.attributes.values()]
    assert max(len(text.encode()) for text in stored) <= 1000 + MARK_BYTES


def test_a_prompt_is_whole_by_default(traces):
    """A prompt is what people come to read: 100 KB are far below the default bound."""
    long = "word " * 20_000
    dspy.Predict("question -> answer")(question=long + "@a")

    lm = next(span for span in traces[0].data.spans if span.name == "EchoLM.__call__")
    assert long in lm.inputs["messages"][-1]["content"]


def test_media_becomes_an_attachment(traces):
    """A base64 picture is stored beside the trace, as MLflow's tracer does, and is not cut."""
    picture = "data:image/png;base64," + base64.b64encode(b"\x89PNG" * 1000).decode()
    Return()(picture=picture, note="kept")

    (span,) = traces[0].data.spans
    if not hasattr(mlflow.environment_variables, "MLFLOW_TRACE_EXTRACT_ATTACHMENTS"):  # mlflow < 3.12
        assert span.inputs["picture"].startswith("[image/png, 4000 bytes, sha256 ")
        return
    assert span.inputs["picture"].startswith("mlflow-attachment://")
    assert span.outputs["picture"].startswith("mlflow-attachment://")
    assert "kept" == span.inputs["note"]


def test_secrets_in_lm_arguments(traces):
    """LM kwargs, of the LM and of one call, are masked; ``max_tokens`` stays."""
    lm = EchoLM(api_key="sk-lm", extra_headers={"Authorization": "Bearer lm", "X-Team": "blue"})
    dspy.configure(lm=lm)
    dspy.Predict("question -> answer")(question="@a", config={"api_key": "sk-call", "max_tokens": 7})

    text = str([span.to_dict() for span in traces[0].data.spans if span.name == "EchoLM.__call__"])
    span = next(span for span in traces[0].data.spans if span.name == "EchoLM.__call__")
    assert "sk-" not in text
    assert "Bearer" not in text
    masked = {"Authorization": "[masked]", "X-Team": "blue"}
    # MLflow 3.18 leaves headers out altogether, and so do we then.
    assert (None if "extra_headers" in EXCLUDE_LM_PARAMS else masked) == span.get_attribute("extra_headers")
    assert ("[masked]", 7) == (span.inputs["api_key"], span.inputs["max_tokens"])


def test_secrets_nowhere_in_the_trace(traces):
    """A key given in one call's config does not appear in the spans around the LM either, nor in previews."""
    dspy.Predict("question -> answer")(question="@a", config={"api_key": "sk-call-secret", "max_tokens": 7})

    everything = str([span.to_dict() for span in traces[0].data.spans]) + str(traces[0].info.to_dict())
    assert "sk-call-secret" not in everything


def test_secrets_in_tool_arguments(traces):
    """Tool arguments are masked by key, in depth."""

    def fetch(url: str, headers: dict, password: str, max_tokens: int) -> str:
        """Fetches."""
        return "done"

    dspy.Tool(fetch)(
        url="http://x",
        headers={"Cookie": "session", "Accept": "*"},
        password="hunter2",  # noqa: S106
        max_tokens=3,
    )

    (span,) = traces[0].data.spans
    assert {
        "url": "http://x",
        "headers": {"Cookie": "[masked]", "Accept": "*"},
        "password": "[masked]",
        "max_tokens": 3,
    } == span.inputs


def test_secrets_in_whatever_a_tool_is_given(traces):
    """Objects, pairs and names in camel case; the arguments are the caller's own, as they were."""

    def fetch(example: object, client: object, pairs: object, githubToken: str, options: object):  # noqa: N803
        """Fetches."""
        return example.password, client.api_key, pairs[0][1], githubToken, options["pwd"]

    found = dspy.Tool(fetch)(
        example=dspy.Example(password="hunter-1", question="why"),  # noqa: S106
        client=types.SimpleNamespace(api_key="hunter-2"),
        pairs=[("Authorization", "hunter-3")],
        githubToken="hunter-4",
        options=types.MappingProxyType({"pwd": "hunter-5", "max_tokens": 5}),
    )

    (span,) = traces[0].data.spans
    assert tuple(f"hunter-{n}" for n in range(1, 6)) == found
    assert {
        "example": {"password": "[masked]", "question": "why"},
        "client": {"api_key": "[masked]"},
        "pairs": [["Authorization", "[masked]"]],
        "githubToken": "[masked]",
        "options": {"pwd": "[masked]", "max_tokens": 5},
    } == span.inputs


def test_the_redact_hook_sees_everything_that_is_stored(traces):
    """Inputs, outputs, attributes, error texts: no value passes it by."""

    def redact(value):
        return value.replace("@secret", "***") if isinstance(value, str) else value

    def fail(each):
        if each == "@secret/fails":
            raise ValueError("cannot do @secret/fails")

    autolog(redact=redact)
    dspy.configure(lm=EchoLM(during=fail, model="echo/@secret"))
    program = Chain()
    program.first.signature = program.first.signature.with_instructions("Never tell @secret.")
    program(question="@secret/ok")
    with pytest.raises(ValueError, match="@secret"):
        program(question="@secret/fails")
    dspy.Tool(lambda text: text, name="tool", desc="knows @secret")(text="@secret")

    assert 3 == len(traces)
    for trace in traces:
        everything = str([span.to_dict() for span in trace.data.spans]) + str(trace.info.to_dict())
        assert "@secret" not in everything


def test_a_redact_hook_that_raises(traces):
    """It stores a mask and changes nothing for the program."""

    def redact(value):
        raise LookupError("a fault of the hook")

    autolog(redact=redact)
    assert "@a" == dspy.Predict("question -> answer")(question="@a").answer

    assert predict_tree() == tree(traces[0])
    root = next(span for span in traces[0].data.spans if span.parent_id is None)
    assert ("[masked]", "[masked]") == (root.inputs, root.outputs)


def test_a_redact_hook_that_calls_dspy(traces):
    """A hook that calls an LM itself does not end in itself."""
    calls = []

    def redact(value):
        if value == "@a" and len(calls) < 3:
            calls.append(value)
            dspy.settings.lm("a question of the hook's")
        return value

    autolog(redact=redact)
    assert "@a" == Return()(question="@a")["question"]

    assert calls
    assert "Return.forward" in [tree(trace)[0] for trace in traces]


def test_nothing_is_mutated(traces):
    """Inputs and outputs are the caller's own objects, as they were."""
    value = {"api_key": "sk", "list": [1, {"a": (1, 2)}], "circle": []}
    value["circle"].append(value["list"])
    before = copy.deepcopy(value)

    returned = Return()(value=value)

    assert value is returned["value"]
    assert before == value


def test_a_value_that_changes_later(traces):
    """What is stored is what was passed, not what became of it."""

    class Change(dspy.Module):
        def forward(self, items):
            items.append("later")
            return items

    items = ["first"]
    returned = Change()(items=items)
    returned.append("much later")

    (span,) = traces[0].data.spans
    assert ({"items": ["first"]}, ["first", "later"]) == (span.inputs, span.outputs)


class Hostile:
    """Raises whatever one does with it."""

    def __getattr__(self, name):
        raise RuntimeError(name)

    def __str__(self):
        raise RuntimeError("text")

    __repr__ = __eq__ = __bool__ = __len__ = __iter__ = __hash__ = __str__


def test_hostile_inputs_and_outputs(traces):
    """A call whose values raise when looked at is recorded, and returns them."""
    hostile = Hostile()
    circle = []
    circle.append(circle)

    returned = Return()(hostile=hostile, circle=circle, nan=float("nan"), huge=10**5000, surrogate="\ud800", ok=1)

    assert hostile is returned["hostile"]
    (span,) = traces[0].data.spans
    assert "Hostile without text" in span.inputs["hostile"]
    assert 1 == span.inputs["ok"]
    assert span.inputs["circle"] == ["[circular]"]


def test_callbacks_keyword(captured):
    """The same settings on the public callback."""
    with dspy.context(callbacks=[TracingCallback(redact=lambda value: "x" if value == "@a" else value)]):
        Return()(question="@a", kept="@b")

    (span,) = captured[0].data.spans
    assert {"question": "x", "kept": "@b"} == span.inputs
    assert "@b" == marker(span)


class Wrapped(pydantic.RootModel[str]):
    """A model that is a text."""


class Counted(pydantic.RootModel[int]):
    """A model that is a number."""


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (dspy.Image("https://x.y/z.png"), dspy.Image("https://x.y/z.png").model_dump()),
        (Wrapped("hello"), "hello"),
        (Counted(5), 5),
    ],
)
def test_models_that_are_no_mappings(value, shown):
    """What ``model_dump`` gives, as MLflow stores it, and not its characters one by one."""
    assert shown == Plain(10_000)(value)


def test_equal_attributes_of_other_types(traces):
    """What is equal to an attribute of an earlier call, and is not the same, is stored as what it is."""
    values = [1, True, 1.0, 0.0, -0.0, False, 0, "1", None, "sk-" + "a1" * 24, {1: 2}]
    for value in values:
        with dspy.context(lm=EchoLM(seed=value)):
            dspy.Predict("question -> answer")(question="@a")

    found = [span.attributes["seed"] for trace in traces for span in trace.data.spans if "seed" in span.attributes]
    assert [*map(repr, values[:9]), repr("[masked]"), repr({"1": 2})] == list(map(repr, found))


def test_a_hook_sees_the_attributes_of_each_call(captured):
    """What a hook has seen in one call it sees again in the next."""
    seen = []

    def redact(value):
        seen.append(value)
        return value

    autolog(silent=True, redact=redact)
    counts = []
    for _ in range(2):
        dspy.Predict("question -> answer")(question="@a")
        counts.append(sum(1 for value in seen if type(value) is str and value == "echo/one"))

    assert 2 == len(captured)
    assert 0 < counts[0] == counts[1] - counts[0]
