"""Candidates of a compile: whose each is made of, with which scores, bounded and masked; and the program's picture."""

import json
import re
from xml.etree import ElementTree as ET

import dspy
import mlflow
import pytest
from dspy.teleprompt import Teleprompter
from hypothesis import given, settings
from hypothesis import strategies as st
from runtools import Candidates, Program, devset, evaluate
from test_compile_content import examples, judge, roots, scripted

import dspy_mlflow_async
from dspy_mlflow_async.cli.lineage import reading
from dspy_mlflow_async.runs import drawing
from dspy_mlflow_async.runs import lineage as lineages
from dspy_mlflow_async.runs.lineage import Lineage, hash_of
from dspy_mlflow_async.runs.structure import structure
from dspy_mlflow_async.spans.door import Door
from echo import Chain, EchoLM


class Two(dspy.Module):
    """Two predictors, of which an optimizer changes one at a time."""

    def __init__(self):
        super().__init__()
        self.draft = dspy.Predict("question -> draft")
        self.answer = dspy.Predict("question, draft -> answer")

    def forward(self, question):
        return self.answer(question=question, draft=self.draft(question=question).draft)


def changed(program, path, instructions):
    """A copy of a program in which one predictor has other instructions."""
    copied = program.deepcopy()
    predictor = dict(copied.named_predictors())[path]
    predictor.signature = predictor.signature.with_instructions(instructions)
    return copied


@pytest.fixture
def lineage_of(runs):
    """A function that returns the lineage of the newest compile."""
    return lambda: runs.json(roots(runs)[-1], "candidates.json")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("builtins.print", lambda *args, **kwargs: None)


# --- parents ------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_gepas_parents_are_found_as_gepa_says_them(runs, lineage_of, monkeypatch):
    """What is concluded from the batches is what GEPA's own result says, two predictors and merges included."""
    concluded = {}
    follow = Lineage.follow

    def note(self, program):
        concluded.update({key: (each.parents, each.found_by) for key, each in self.candidates.items()})
        follow(self, program)

    monkeypatch.setattr(Lineage, "follow", note)
    optimizer = dspy.GEPA(
        metric=lambda gold, pred, trace=None, pred_name=None, pred_trace=None: dspy.Prediction(
            score=judge(gold, pred) and len(pred_trace or "x") > 0, feedback="more"
        ),
        max_metric_calls=60,
        reflection_minibatch_size=2,
        reflection_lm=scripted("reflection"),
        num_threads=2,
        track_stats=True,
    )
    with dspy.context(lm=scripted("a")):
        program = optimizer.compile(Two(), trainset=examples("a", 4), valset=examples("a", 6))

    results = program.detailed_results
    hashes = [hash_of(each) for each in results.candidates]
    said = {
        hash_: tuple(hashes[place] for place in places if place is not None)
        for hash_, places in zip(hashes, results.parents, strict=True)
    }
    document = lineage_of()
    shown = {each["hash"]: each for each in document["candidates"]}
    assert said == {hash_: concluded[hash_][0] for hash_ in hashes}
    assert said == {hash_: tuple(shown[hash_]["parents"]) for hash_ in hashes}
    assert len(shown) > len(hashes)  # those that GEPA has tried and not kept
    assert {None, "batch"} == {by for _, by in concluded.values()}
    assert hash_of(Two()) == document["start"]
    assert [None] * 3 == [score["step"] for score in shown[document["start"]]["scores"]][1:4]  # what it reflected on


def test_merged_candidates_have_both_parents():
    """A program whose predictors are those of two others is made of these."""
    lineage = Lineage(type("GEPA", (Teleprompter,), {})(), Two())
    first, second = changed(Two(), "draft", "One."), changed(Two(), "answer", "Two.")
    for program in (first, second, changed(first, "answer", "Two.")):
        lineage.begin(program, "eval", "metric", None, 1)

    document = json.loads(lineage.document("GEPA", None, Door()))
    merged = document["candidates"][-1]
    assert ({hash_of(first), hash_of(second)}, "merge") == ({*merged["parents"]}, merged["parents_by"])


@pytest.mark.timeout(300)
def test_simbas_parents_are_those_that_simba_copied(runs, lineage_of, monkeypatch):
    """Each candidate's parent is the program that SIMBA has copied to make it."""
    copied = []
    deepcopy = Program.__deepcopy__

    def note(self, memo):
        made = deepcopy(self, memo)
        made.__dict__.update({key: value for key, value in self.__dict__.items() if key == "simba_idx"})
        copied.append((hash_of(self), made))
        return made

    monkeypatch.setattr(Program, "__deepcopy__", note)
    optimizer = dspy.SIMBA(metric=judge, bsize=2, num_candidates=3, max_steps=3, max_demos=2, num_threads=2)
    with dspy.context(lm=scripted("a")):
        optimizer.compile(Program(), trainset=examples("a", 4))

    made_of = {}
    for source, program in copied:
        made_of.setdefault(hash_of(program), set()).add(source)
    others = [each for each in lineage_of()["candidates"] if each["parents"]]
    assert others
    assert {"optimizer"} == {each["parents_by"] for each in others}
    assert all({*each["parents"]} <= made_of[each["hash"]] for each in others)


def test_generations_by_what_an_lm_proposed(runs, lineage_of):
    """An optimizer of one's own: what it tries after it has asked an LM is made of the best that it had before."""

    class Climbing(Teleprompter):
        def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
            for round_, rights in enumerate([(1, 3), (2, 4)]):
                dspy.Predict("x -> y")(x="@idea")
                for place, right in enumerate(rights):
                    candidate = changed(student, "answer", f"Round {round_}, {place}.")
                    evaluate("a", right, 4, program=candidate)
            return candidate

    Climbing().compile(Program(), trainset=devset("t", 1, 1))

    names = {}
    lineage = lineage_of()
    for each in lineage["candidates"]:
        names[each["hash"]] = lineage["instructions"][each["predictors"]["answer"]["instructions"]]
    made_of = {names[each["hash"]]: [names[parent] for parent in each["parents"]] for each in lineage["candidates"]}
    first, *_ = names.values()
    assert {
        first: [],
        "Round 0, 0.": [first],
        "Round 0, 1.": [first],
        "Round 1, 0.": ["Round 0, 1."],
        "Round 1, 1.": ["Round 0, 1."],
    } == made_of
    assert "Round 1, 1." == names[lineage["result"]]


def test_evaluations_inside_an_example_are_no_candidates(runs, lineage_of):
    """A program or a metric that evaluates something itself has tried nothing for the optimizer."""

    class Judging(Program):
        def forward(self, question):
            evaluate("inner", 1, 1, program=Chain())
            return super().forward(question)

    Candidates([("a", 1)], program=Judging).compile(Judging(), trainset=devset("t", 1, 1))

    assert [hash_of(Program())] == [each["hash"] for each in lineage_of()["candidates"]]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["GEPA", "MIPROv2", "COPRO", "Mine"]),
    tried=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2), st.booleans()), max_size=12),
)
def test_any_search_is_a_tree(kind, tried):
    """Whatever is tried in whatever order: each program stands once, below one that was tried before it."""
    lineage = Lineage(type(kind, (Teleprompter,), {})(), Two())
    batches = [examples("a", 1), examples("b", 1), examples("c", 1)]
    for draft, answer, batch, has_asked in tried:
        if has_asked:
            lineage.proposing()
        program = changed(changed(Two(), "draft", f"D{draft}."), "answer", f"A{answer}.")
        lineage.begin(program, "eval", None, batches[batch], 1).end(float(draft), None, lambda: None)

    read = reading.Lineage.of(lineage.document(kind, None, Door()))
    walked = list(read.walk())
    order = [*read.candidates]
    assert len({(draft, answer) for draft, answer, _, _ in tried}) + 1 == len(order) == len(walked)
    assert {*order} == {candidate.hash for _, candidate in walked}
    assert [0] == [depth for depth, candidate in walked if not candidate.parents]
    for candidate in read.candidates.values():
        assert all(order.index(parent) < order.index(candidate.hash) for parent in candidate.parents)
        assert candidate.hash == read.start or read.changes(candidate)
    assert len(tried) == sum(len(candidate.scores) for candidate in read.candidates.values())


# --- what is written ----------------------------------------------------------------------------------------------


def test_without_runs_of_evaluations(store):
    """``log_compiles`` alone: the candidates have their scores, at no step and in no run."""
    dspy_mlflow_async.autolog(log_compiles=True, silent=True)
    Candidates([("a", 1), ("b", 3)]).compile(Program(), trainset=devset("t", 1, 1))

    (only,) = store.json(roots(store)[0], "candidates.json")["candidates"]
    assert [(25.0, None, None), (75.0, None, None)] == [
        (each["score"], each["step"], each["run_id"]) for each in only["scores"]
    ]
    assert ["exact"] * 2 == [each["metric"] for each in only["scores"]]


def test_secrets_do_not_pass(runs, lineage_of):
    """Instructions and demos are masked and redacted as everything else."""
    key = "sk-proj-abcdefghijklmnopqrstuvwxyz0123456789ABCD"
    program = changed(Program(), "answer", f"Use {key}.")
    program.answer.demos = [dspy.Example(question=f"my key is {key}", answer="fine")]
    Candidates([], program=Program).compile(program, trainset=devset("t", 1, 1))

    assert key not in json.dumps(lineage_of())
    assert "fine" in json.dumps(lineage_of()["demos"])


def test_bounds(monkeypatch):
    """Beyond so many candidates they are counted; long texts are cut, and beyond so much none is kept."""
    monkeypatch.setattr(lineages, "MAX_CANDIDATES", 3)
    monkeypatch.setattr(lineages, "MAX_TEXTS_BYTES", 50_000)
    lineage = Lineage(Teleprompter(), Program())
    trials = [
        lineage.begin(changed(Program(), "answer", f"{n}{'x' * 100_000}"), "eval", None, None, 1) for n in range(4)
    ]
    trials[0].end(50.0, 0, lambda: None)

    document = json.loads(lineage.document("Mine", None, Door()))
    assert (3, 2) == (len(document["candidates"]), document["left_out"])
    assert [None, None] == trials[2:]
    assert len(json.dumps(document)) < 100_000
    assert 50.0 == document["candidates"][1]["scores"][0]["score"]


def test_programs_that_cannot_be_walked(runs):
    """A module whose walk raises, and one whose demos have no text: the compile and its run are as ever."""

    class Odd(Program):
        def named_predictors(self):
            raise ValueError("not mine")

    class Mute:
        def __repr__(self):
            raise ValueError("not mine")

    mute = Program()
    mute.answer.demos = [Mute()]
    Candidates([("a", 1)], program=Odd).compile(mute, trainset=devset("t", 1, 1))

    (run,) = roots(runs)
    assert "FINISHED" == run.info.status
    assert 1 == len(runs.json(run, "candidates.json")["candidates"])


def test_a_hash_is_that_of_the_spans(runs):
    """A program of one predictor has the hash that its spans show; of more, one of all, whatever their order."""
    program = dspy.Predict("question -> answer")
    with dspy.context(lm=EchoLM()):
        program(question="@a")

    (trace,) = runs.traces()
    assert hash_of(program) == trace.data.spans[0].attributes["program_hash"]
    assert re.fullmatch("[0-9a-f]{12}", hash_of(Two()))
    assert hash_of(Two()) != hash_of(changed(Two(), "draft", "Other."))
    assert hash_of(dspy.Module()) is None


# --- the picture --------------------------------------------------------------------------------------------------


def test_picture_of_a_program(runs):
    """Modules, predictors with their signatures, and tools, by their paths, in SVG that is XML and in Mermaid."""

    def look_up(word: str) -> str:
        """Look a word up."""
        return word

    class Desk(dspy.Module):
        def __init__(self):
            super().__init__()
            self.parts = [dspy.ChainOfThought("ticket -> label"), {"not": "a module"}]
            self.agents = {"<b>&": dspy.ReAct("question -> answer", tools=[look_up])}
            self.again = self.parts[0]

        def forward(self, question):
            return dspy.Prediction(answer=question)

    evaluate("a", program=Desk())

    run = runs.run("eval")
    svg, chart = (mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/program.{each}") for each in ("svg", "mmd"))
    texts = [text.text for text in ET.fromstring(svg).iter() if text.text]  # noqa: S314 - ours
    expected = ["Desk", "parts[0]", "ChainOfThought", "predict", "ticket -> reasoning, label", "look_up", "Tool"]
    assert [] == [each for each in expected if not any(each in text for text in texts)]
    assert "agents['<b>&']" in texts
    assert 1 == svg.count("parts[0]")
    assert 0 == svg.count("again")
    assert chart.startswith('flowchart TD\n  n0["Desk"]\n  n0 --> n1["parts[0]: ChainOfThought"]\n  n1 --> n2["predict')
    assert "#lt;b#gt;#amp;" in chart


def test_picture_is_small_whatever_the_program():
    """A program of a thousand parts, and names of control characters: a bounded picture that is still XML."""

    class Many(Program):
        def __init__(self, during=None):
            super().__init__(during)
            self.__dict__["\x00\ud800"] = [[self.answer], *([dspy.Module()] * 10)]
            self.__dict__ |= {f"part_{number}": dspy.Module() for number in range(1000)}

    rows = structure(Many(), Door())
    svg = drawing.svg(rows, "\x00")

    assert 201 == len(rows)
    assert ET.fromstring(svg.encode()).tag.endswith("svg")  # noqa: S314 - ours
    assert len(svg) < 100_000
    assert 202 == len(drawing.mermaid(rows).encode().splitlines())
