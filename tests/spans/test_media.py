"""Pictures, recordings and files are attachments on every span, never cut, and stored once for a trace."""

import base64
import json
import os

import dspy
import mlflow
import orjson
import pytest
from mlflow.tracing.client import TracingClient

import dspy_mlflow_async
from dspy_mlflow_async.export.operations import TraceOperation
from dspy_mlflow_async.export.spool import codec
from dspy_mlflow_async.seams import mlflow_media
from dspy_mlflow_async.spans.media import blocks_of, in_few_words
from dspy_mlflow_async.spans.serialize import Plain

CAN_ATTACH = hasattr(mlflow.environment_variables, "MLFLOW_TRACE_EXTRACT_ATTACHMENTS")
attaches = pytest.mark.skipif(not CAN_ATTACH, reason="this MLflow stores media as they are")
CONTENT = os.urandom(1_500_000)
TEXT = base64.b64encode(CONTENT).decode()
INLINE = 20_000  # bytes; what a span without its media has at most here


class Look(dspy.Signature):
    """Say what it is."""

    picture: dspy.Image = dspy.InputField()
    sounds: list[dspy.Audio] = dspy.InputField()
    paper: dspy.File = dspy.InputField()
    answer: str = dspy.OutputField()


def given():
    return {
        "picture": dspy.Image(f"data:image/png;base64,{TEXT}"),
        "sounds": [dspy.Audio(data=TEXT, audio_format="wav")],
        "paper": dspy.File(file_data=f"data:application/pdf;base64,{TEXT}", filename="a.pdf"),
    }


def texts(span):
    return [value for value in span._span.attributes.values() if isinstance(value, str)]


def attached(trace):
    """Every attachment of a trace, as type and content."""
    return sorted(
        (each.content_type, each.content_bytes) for span in trace.data.spans for each in span._attachments.values()
    )


@attaches
def test_media_of_dspys_types_on_every_span(traces):
    """The predictor's, the adapter's and the LM's span refer to the same three attachments, which are whole."""
    dspy.Predict(Look)(**given())

    (trace,) = traces
    assert [("application/pdf", CONTENT), ("audio/wav", CONTENT), ("image/png", CONTENT)] == attached(trace)
    ids = {each.id for span in trace.data.spans for each in span._attachments.values()}
    for name in ("Predict.forward", "ChatAdapter.format", "EchoLM.__call__"):
        span = next(span for span in trace.data.spans if span.name == name)
        shown = json.dumps(span.inputs)
        assert max(map(len, texts(span))) < INLINE
        assert "CUSTOM-TYPE" not in shown
        assert all(f"mlflow-attachment://{each}" in shown for each in ids)


class Keep(dspy.Module):
    def forward(self, **kwargs):
        return dspy.Prediction(**kwargs)


@attaches
@pytest.mark.parametrize(
    "value",
    [
        lambda: [dspy.Image(f"data:image/png;base64,{TEXT}")],
        lambda: {"a": {"b": [dspy.Audio(data=TEXT, audio_format="mp3")]}},
        lambda: dspy.History(messages=[{"picture": dspy.Image(f"data:image/png;base64,{TEXT}"), "answer": "x"}]),
        lambda: f"before {dspy.Image(f'data:image/png;base64,{TEXT}')} after",
        lambda: [
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": TEXT, "format": "wav"}}]}
        ],
    ],
    ids=["list", "dict", "history", "within-text", "messages"],
)
def test_media_wherever_it_stands(traces, value):
    """In lists, mappings, histories, the middle of a text and messages, in inputs and outputs."""
    Keep()(value=value())

    (trace,) = traces
    assert [CONTENT] == [content for _, content in attached(trace)]
    (span,) = trace.data.spans
    assert max(map(len, texts(span))) < INLINE
    assert "mlflow-attachment://" in json.dumps(span.inputs)
    assert "mlflow-attachment://" in json.dumps(span.outputs)


@attaches
def test_media_given_to_a_tool(traces):
    """A tool's argument and its result are attachments."""
    tool = dspy.Tool(lambda picture: picture, name="look", args={"picture": {"type": "string"}})
    tool(picture=f"data:image/png;base64,{TEXT}")

    assert [("image/png", CONTENT)] == attached(traces[0])


@attaches
def test_a_small_bound_cuts_none(traces):
    """However little a span may hold, a medium is whole beside it."""
    dspy_mlflow_async.autolog(max_value_bytes=2000, silent=True)
    Keep()(value=given()["picture"])

    assert [("image/png", CONTENT)] == attached(traces[0])


@attaches
def test_media_is_stored_and_read_back(stored):
    """What was attached can be downloaded where MLflow looks for it."""
    dspy.Predict(Look)(**given())
    dspy_mlflow_async.flush()

    (trace,) = stored()
    reference = next(
        part["image_url"]["url"] for part in trace.data.spans[0].inputs["picture"] if part["type"] == "image_url"
    )
    found = mlflow.tracing.attachments.Attachment.parse_ref(reference)
    repository = TracingClient()._get_artifact_repo_for_trace(trace.info)
    assert (trace.info.trace_id, "image/png") == (found["trace_id"], found["content_type"])
    assert CONTENT == repository.download_trace_attachment(found["attachment_id"])


@attaches
def test_media_survives_the_spool(traces):
    """A record of the spool has each attachment once, and gives it back."""
    dspy.Predict(Look)(**given())

    trace = traces[0]
    operation = TraceOperation(
        key=trace.info.trace_id, info=trace.info, spans=trace.data.spans, experiment_id=trace.info.experiment_id
    )
    record = codec.encode(operation)
    restored = codec.decode(record).spans
    assert 3 == sum(len(span.get("attachments", ())) for span in orjson.loads(record)["spans"])
    assert [CONTENT] * 3 == [each.content_bytes for span in restored for each in span._attachments.values()]


def test_without_attachments_there_are_few_words(traces, monkeypatch):
    """Where MLflow cannot store any, a medium is its type, its size and a hash: on its lowest version."""
    monkeypatch.setattr("dspy_mlflow_async.spans.tracer.CAN_ATTACH", False)
    dspy.Predict(Look)(**given())

    for span in traces[0].data.spans:
        assert {} == span._attachments
        assert max(map(len, texts(span))) < INLINE
    assert "[image/png, 1500000 bytes, sha256 " in json.dumps(traces[0].data.spans[0].inputs)


@attaches
def test_switched_off_by_the_user(traces, monkeypatch):
    """With MLflow's switch off, media are inline as far as they fit, and otherwise few words: never a half."""
    monkeypatch.setenv("MLFLOW_TRACE_EXTRACT_ATTACHMENTS", "false")
    small = f"data:image/png;base64,{base64.b64encode(CONTENT[:3000]).decode()}"
    Keep()(small=small, large=given()["picture"])

    inputs = traces[0].data.spans[0].inputs
    assert small == inputs["small"]
    assert "[image/png, 1500000 bytes, sha256 " in json.dumps(inputs["large"])


def test_what_is_no_medium_is_as_before():
    """The address of a picture, a text that only looks like one, and broken markers are stored as they were."""
    picture = dspy.Image("https://example.org/a.png").model_dump()

    assert picture == Plain(10_000)(picture)
    assert blocks_of("<<CUSTOM-TYPE-START-IDENTIFIER>>[{]<<CUSTOM-TYPE-END-IDENTIFIER>>") is None
    assert blocks_of("<<CUSTOM-TYPE-START-IDENTIFIER>>[") is None
    assert "data" * 400 == in_few_words("data" * 400, "note")


def test_within_a_text_that_does_not_fit():
    """A medium in the middle of a text is not cut either."""
    shown = Plain(1000, media=False)(f"see ![x](data:image/png;base64,{TEXT}) there")

    assert shown.startswith("see ![x]([image/png, 1500000 bytes, sha256 ")
    assert shown.endswith(") there")


def test_a_picture_that_cannot_be_decoded(traces):
    """Broken base64 is no attachment: it is bounded, and the span is there."""
    Keep()(picture="data:image/png;base64," + "!" * 3_000_000)

    assert max(map(len, texts(traces[0].data.spans[0]))) <= 1024 * 1024 + 64


def test_pdf_documents(traces):
    """``dspy.experimental.Document`` with a PDF is an attachment, though MLflow does not know its form."""
    document = getattr(dspy, "experimental", None) and getattr(dspy.experimental, "Document", None)
    if document is None or not CAN_ATTACH:
        pytest.skip("no documents here")
    Keep()(value=document(data=TEXT, media_type="application/pdf"))

    assert [("application/pdf", CONTENT)] == attached(traces[0])


def test_the_seam_tells_whether_it_can():
    """``CAN_ATTACH`` is what MLflow has."""
    assert CAN_ATTACH == mlflow_media.CAN_ATTACH
