"""How calls are named, typed and described, and which program a span names."""

import dspy
import pytest
from mlflow.entities import SpanType
from mlflow.tracing.constant import SpanAttributeKey

from dspy_mlflow_async.spans import describe
from echo import Chain, EchoLM


def lm(model):
    """An LM object with just a model."""
    made = EchoLM()
    made.model = model
    return made


@pytest.mark.parametrize(
    ("model", "provider"),
    [
        ("openai/gpt-4o", "openai"),
        ("a/b/c", "a"),
        ("plain", None),
        ("", None),
        ("/leading", None),
        ("trailing/", "trailing"),
    ],
)
def test_provider_and_model(model, provider):
    """The provider is what stands before the first slash, if anything does."""
    attributes = describe.describe_lm(lm(model), {}).attributes

    assert model == attributes[SpanAttributeKey.MODEL]
    assert provider == attributes.get(SpanAttributeKey.MODEL_PROVIDER)


@pytest.mark.parametrize("model", [None, 5, object()])
def test_a_model_that_is_no_text(model):
    """No provider and no model, and no error."""
    attributes = describe.describe_lm(lm(model), {}).attributes

    assert SpanAttributeKey.MODEL not in attributes
    assert SpanAttributeKey.MODEL_PROVIDER not in attributes


def test_an_object_that_is_reported_like_an_lm():
    """What has neither kwargs nor model_type is described as far as it goes."""

    class Bare:
        pass

    description = describe.describe_lm(Bare(), {"prompt": "hello"})

    assert ("Bare.__call__", SpanType.LLM, {"prompt": "hello"}) == description[:3]


def test_lm_arguments_are_sanitised():
    """Keys and endpoints that MLflow leaves out are left out; the dict of the LM stays."""
    made = EchoLM(api_key="sk", api_base="http://x", client_secret="c", azure_ad_token="t", seed=1)  # noqa: S106
    attributes = describe.describe_lm(made, {}).attributes

    assert {"api_key", "api_base", "client_secret", "azure_ad_token"}.isdisjoint(attributes)
    assert (1, 1000) == (attributes["seed"], attributes["max_tokens"])
    assert "sk" == made.kwargs["api_key"]


@pytest.mark.parametrize(("model_type", "expected"), [("chat", SpanType.CHAT_MODEL), ("text", SpanType.LLM)])
def test_lm_types(model_type, expected):
    """Chat models are ``CHAT_MODEL``."""
    made = EchoLM()
    made.model_type = model_type

    assert expected == describe.describe_lm(made, {}).span_type


def test_module_inputs():
    """Keywords are spread, an empty ``args`` is left out, a full one stays; the given dict is as it was."""
    given = {"args": (), "kwargs": {"question": "q"}}

    assert {"question": "q"} == describe.describe_module(Chain(), given).inputs
    assert {"args": (), "kwargs": {"question": "q"}} == given
    assert {"args": ("q",)} == describe.describe_module(Chain(), {"args": ("q",), "kwargs": {}}).inputs


def test_signatures_are_text():
    """A signature class among the inputs is stored as its readable form."""
    signature = dspy.Signature("question -> answer")
    inputs = describe.describe_adapter(dspy.ChatAdapter(), {"signature": signature}, "format").inputs

    assert repr(signature) == inputs["signature"]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: dspy.Predict("q -> a"), SpanType.LLM),
        (lambda: dspy.ChainOfThought("q -> a"), SpanType.CHAIN),
        (Chain, SpanType.CHAIN),
        (lambda: dspy.ReAct("q -> a", tools=[]), SpanType.AGENT),
        (lambda: dspy.Retrieve(k=1), SpanType.RETRIEVER),
        (lambda: dspy.Embedder(lambda texts: texts), SpanType.EMBEDDING),
    ],
)
def test_module_types(make, expected):
    """As MLflow's; embedders are embeddings."""
    made = make()
    description = describe.describe_module(made, {})

    assert (f"{type(made).__name__}.forward", expected) == (description.name, description.span_type)


@pytest.mark.parametrize("operation", ["execute", "tool_call", "startup", "shutdown"])
def test_interpreter_operations(operation):
    """Each operation of a code interpreter is named."""

    class Interpreter:
        pass

    description = describe.describe_interpreter(Interpreter(), {"code": "1 + 1"}, operation)

    assert (f"Interpreter.{operation}", {"code": "1 + 1"}) == (description.name, description.inputs)


# --- which program ----------------------------------------------------------------------------------------------


def program_hash(predictor):
    """The hash as the span has it."""
    return describe.describe_module(predictor, {}).attributes["program_hash"]


def test_the_hash_names_instructions_and_demos():
    """It changes with the instructions and with the demos, and with nothing else."""
    first, second = dspy.Predict("question -> answer"), dspy.Predict("question -> answer")
    base = program_hash(first)
    assert base == program_hash(second)
    assert len(base) == 12
    int(base, 16)

    second.signature = second.signature.with_instructions("Be brief.")
    instructed = program_hash(second)
    second.demos = [dspy.Example(question="q", answer="a")]
    demonstrated = program_hash(second)
    second.demos = [dspy.Example(question="q", answer="b")]
    changed = program_hash(second)
    assert 4 == len({base, instructed, demonstrated, changed})

    second.demos = []
    assert instructed == program_hash(second)
    second.lm = EchoLM()
    second.traces = ["anything"]
    assert instructed == program_hash(second)


def test_the_hash_of_a_copy_is_the_same():
    """Copies, reset copies and saved programs keep the name of their candidate."""
    import copy

    predictor = dspy.Predict("question -> answer")
    predictor.demos = [dspy.Example(question="q", answer="a").with_inputs("question")]
    loaded = dspy.Predict("question -> answer")
    loaded.load_state(predictor.dump_state())

    assert program_hash(predictor) == program_hash(copy.deepcopy(predictor))
    assert program_hash(predictor) == program_hash(predictor.deepcopy())
    assert program_hash(predictor) == program_hash(loaded)


def test_the_hash_follows_a_demo_that_is_changed_in_place():
    """A list of demos that grows names another candidate."""
    predictor = dspy.Predict("question -> answer")
    predictor.demos = [{"question": "q", "answer": "a"}]
    before = program_hash(predictor)
    predictor.demos.append({"question": "r", "answer": "b"})
    grown = program_hash(predictor)
    predictor.demos[0]["answer"] = "c"

    assert 3 == len({before, grown, program_hash(predictor)})


@pytest.mark.parametrize("instructions", ["ä" * 1000, "🙂", ""])
def test_the_hash_of_any_text(instructions):
    """Whatever the instructions are."""
    predictor = dspy.Predict("question -> answer")
    predictor.signature = predictor.signature.with_instructions(instructions)

    assert 12 == len(program_hash(predictor))


class Unprintable:
    """A value whose ``__repr__`` raises."""

    def __repr__(self):
        raise RuntimeError("no text")


def test_a_hash_of_demos_that_cannot_be_shown():
    """The predictor keeps its span; objects without a text of their own hash alike in every process."""
    predictor = dspy.Predict("question -> answer")
    predictor.demos = [dspy.Example(question="q", answer="a", extra=Unprintable())]
    unprintable = describe.program_hash(predictor)
    assert 12 == len(unprintable)
    predictor.demos = [dspy.Example(question="q", answer="b", extra=Unprintable())]
    assert unprintable != describe.program_hash(predictor)
    hashes = set()
    for _ in range(2):
        predictor.demos = [dspy.Example(question="q", extra=object())]
        hashes.add(describe.program_hash(predictor))

    assert 1 == len(hashes)


def test_outputs_that_go_round_in_circles():
    """What can be shown of a prediction is shown, whatever else is in it."""
    circle = [1]
    circle.append(circle)
    prediction = dspy.Prediction(answer="@a", circle=circle)

    assert {"answer": "@a", "circle": circle} == describe.describe_outputs(dspy.Predict("a -> b"), prediction)
