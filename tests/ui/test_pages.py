"""MLflow's pages in a headless Chromium, over a store that a service, evaluations and a compile have filled.

``python3 run.py ui`` runs this, and saves the pictures that the docs show. It is no part of the default tests, which
have no browser: without Playwright it is skipped.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chromium import MISSING, find_chromium
from PIL import Image

from mlflow_server import mlflow_server

playwright = pytest.importorskip("playwright.sync_api", reason="`python3 run.py ui` installs Playwright and runs this")
pytestmark = pytest.mark.timeout(900)

HERE = Path(__file__).resolve().parent
PICTURES = HERE.parent.parent / "docs" / "img"
TIMEOUT = 40_000  # milliseconds
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
# MLflow greets newcomers with a panel and a hint over its pages.
GREETED = """
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
localStorage.setItem('mlflow.detectIssues.guidanceShown_v1', 'true');
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real server over an empty SQLite store."""
    if find_chromium() is None:
        pytest.exit(MISSING, returncode=1)
    folder = tmp_path_factory.mktemp("ui")
    with mlflow_server(folder, f"sqlite:///{folder}/mlflow.db") as started:
        yield started


def fill(server, tracer):
    """The ids of what a program has left in the store, traced by us or by MLflow."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": server.uri}
    environment.pop("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", None)
    run = subprocess.run(
        [sys.executable, HERE / "scene.py", tracer], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def ours(server):
    return fill(server, "ours")


class Pages:
    """One tab of the browser."""

    def __init__(self, tab, uri):
        self.tab = tab
        self._uri = uri

    def open(self, path, *texts):
        """Go to a page of MLflow's, and wait for these texts on it."""
        self.tab.goto("about:blank")  # the next differs after the # only, which loads nothing anew
        self.tab.goto(f"{self._uri}/#{path}")
        self.wait(*texts)

    def wait(self, *texts):
        for text in texts:
            self.tab.get_by_text(text).first.wait_for(state="attached", timeout=TIMEOUT)

    def search(self, words, *texts):
        """Search the list of traces, and wait for these texts."""
        box = self.tab.get_by_placeholder("Search traces").first
        box.fill(words)
        box.press("Enter")
        self.wait(*texts)

    def click(self, text):
        """Click what has this text and can be seen."""
        self.tab.get_by_text(text).locator("visible=true").first.click()

    def drag(self, start, end):
        """Drag what is at a place to another."""
        mouse = self.tab.mouse
        mouse.move(*start)
        mouse.down()
        mouse.move(*end, steps=5)
        mouse.up()
        mouse.move(0, 0)  # what it is over is lit up

    def text(self):
        return self.tab.inner_text("body")

    def save(self, name):
        """Keep the picture for the docs, once what is on its way is there."""
        PICTURES.mkdir(exist_ok=True)
        with contextlib.suppress(playwright.TimeoutError):
            self.tab.wait_for_load_state("networkidle", timeout=2_000)  # some pages ask for ever
        picture = Image.open(io.BytesIO(self.tab.screenshot()))
        picture.quantize(128, dither=Image.Dither.NONE).save(PICTURES / f"{name}.png", optimize=True)  # a third of it


@pytest.fixture(scope="module")
def browser(server, tmp_path_factory):
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=find_chromium(),
            args=ARGUMENTS,
            viewport={"width": 1440, "height": 860},
        )
        browser.add_init_script(GREETED)
        yield browser
        browser.close()


@pytest.fixture
def pages(browser, server):
    tab = browser.new_page()
    tab.set_default_timeout(TIMEOUT)
    yield Pages(tab, server.uri)
    tab.close()


def test_the_list_of_traces(pages, ours):
    """Question and answer, session, state and tokens of each request; what was expected and found of each example."""
    pages.open(f"/experiments/{ours['experiment']}/traces", "25 of 34")  # 10 requests, 24 examples
    pages.save("traces")
    pages.search("Japan", "chat-0")
    text = pages.text()

    assert '{"question":"What is the capital of Japan?"}' in text
    assert '"answer":"Tokyo"' in text
    for column in ("Input", "Output", "Session", "State", "Tokens", "answer", "judged"):
        assert column in text


def test_a_trace(pages, ours):
    """One tree for a request with two threads, its route as name, and the prices of its LM calls."""
    pages.open(f"/experiments/{ours['experiment']}/traces", "25 of 34")
    pages.search("seat of government of Japan", "chat-0")
    pages.tab.locator("tr, [role=row]").filter(has_text="chat-0").last.get_by_text("What is the capital").first.click()
    pages.wait("POST /ask", "Desk.forward", "Spans")
    text = pages.text()

    assert 3 == text.count("Predict.forward")
    assert "ChainOfThought.forward" in text
    assert "$0.0000" in text
    pages.save("trace")


def test_a_session(pages, ours):
    """Three requests of one client are three turns of a conversation, with what was asked and answered."""
    pages.open(f"/experiments/{ours['experiment']}/chat-sessions/chat-0", "Turn 3")
    text = pages.text()

    for country in ("France", "Japan", "Peru"):
        assert f"What is the capital of {country}?" in text
    pages.save("session")


def test_the_evaluation_runs(pages, ours):
    """Each case below its parent, with the devset in the column Dataset, and the score."""
    pages.open(f"/experiments/{ours['experiment']}/evaluation-runs", "devset", "evaluate_all")
    text = pages.text()

    assert 3 == text.count("devset")
    for said in ("direct", "reasoned", "75", "100"):
        assert said in text
    pages.save("evaluation-runs")


def test_two_evaluations_compared(pages, ours):
    """Side by side by example, each with the answer, what was expected, and what the metric said."""
    direct, reasoned = ours["cases"]["direct"], ours["cases"]["reasoned"]
    pages.open(f"/experiments/{ours['experiment']}/evaluation-runs", "devset")
    boxes = pages.tab.get_by_role("checkbox")
    boxes.nth(1).click()
    boxes.nth(2).click()
    pages.tab.get_by_role("button", name="Actions").first.click()
    pages.tab.get_by_text("Compare").first.click()
    pages.wait("Comparing", '{"answer":"Mombasa"}', "Nairobi")
    text = pages.text()

    assert {direct, reasoned} <= set(pages.tab.url.replace("&", "=").split("="))
    assert "Expectations" in text
    pages.drag((654, 600), (480, 600))  # the list of runs gives its room to the answers
    pages.save("compare")


def test_a_wrong_answer_shows_the_right_one(pages, ours):
    """An example's trace has its label beside the feedback, and the metric's reason."""
    pages.open(f"/experiments/{ours['experiment']}/traces", "25 of 34")
    pages.search("Mombasa", '{"answer":"Mombasa"}')
    pages.click('{"answer":"Mombasa"}')
    pages.wait("Predict.forward", "Assess")
    pages.tab.get_by_role("button", name="Assess").first.click()
    pages.wait("Add feedback", "Nairobi")
    value = pages.tab.get_by_text("0", exact=True).locator("visible=true").last.bounding_box()
    pages.tab.mouse.click(value["x"] - 20, value["y"] + value["height"] / 2)  # the arrow that unfolds the reason
    pages.wait("Mombasa is a city of the country, but not its capital.")
    text = pages.text()

    assert "Nairobi" in text
    assert "judged" in text
    pages.save("wrong-answer")


def test_a_comparison_described(pages, ours):
    """The page of the parent run has the table of the cases."""
    pages.open(f"/experiments/{ours['experiment']}/runs/{ours['comparison']}", "Best: reasoned, 100.0.")
    text = pages.text()

    assert "75.0 ± 13.1" in text
    assert "devset (" in text
    pages.click("Show more")
    pages.save("comparison")


def test_a_compile_described(pages, ours):
    """The page of a compile says what was found, and how the instructions differ."""
    pages.open(f"/experiments/{ours['experiment']}/runs/{ours['compile']}", "COPRO", "trainset (")
    pages.wait("-Answer the question.", "+Answer with one word.")
    text = pages.text()

    assert "best eval 100" in " ".join(text.split())
    pages.click("Show more")
    pages.save("compile")


def test_charts_of_a_compile(pages, ours):
    """What it used is charted by role, and its scores by step."""
    pages.open(f"/experiments/{ours['experiment']}/runs/{ours['compile']}/model-metrics", "cost_usd", "lm_calls")
    text = pages.text()

    for name in ("input_tokens", "output_tokens", "task", "Model metrics"):
        assert name in text
    pages.tab.get_by_text("Model metrics").last.evaluate("section => section.scrollIntoView()")
    pages.wait("COPRO (eval)", "Step")
    pages.save("charts")


def test_the_same_by_mlflows_own_tracer(pages, server, ours):
    """Beside ours: no session, no data set, no expectation, and a request is several traces."""
    theirs = fill(server, "mlflow")
    pages.open(f"/experiments/{theirs['experiment']}/traces", "25 of 42")  # 10 requests of 3 traces, 12 examples
    pages.save("traces-mlflow")
    pages.search("Japan", "Tokyo")

    assert "chat-0" not in pages.text()
    pages.open(f"/experiments/{theirs['experiment']}/evaluation-runs", "direct")
    assert "devset" not in pages.text()
