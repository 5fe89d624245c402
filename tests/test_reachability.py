"""What is said of a store's server that takes nothing: real sockets, TLS and servers that are not MLflow."""

import asyncio
import contextlib
import ipaddress
import socket
import sqlite3
import ssl
import threading
from datetime import datetime, timedelta, timezone

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dspy_mlflow_async.reachability import look, missing_store
from echo import TIMEOUT
from mlflow_server import free_port


@contextlib.contextmanager
def serving(answer, tls=None):
    """A server of aiohttp's in a thread of its own, whose every page is this answer; gives its port."""
    started, told = threading.Event(), []

    async def serve():
        async def handle(request):
            return web.Response(**answer)

        app = web.Application()
        app.router.add_get("/{path:.*}", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        over = asyncio.Event()
        told.extend((runner.addresses[0][1], asyncio.get_running_loop(), over))
        started.set()
        await over.wait()
        await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(TIMEOUT)
    port, loop, over = told
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(TIMEOUT)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A file with a key and a certificate that it has signed itself, for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(timezone.utc)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    return file


@pytest.fixture
def tls_port(certificate):
    """The port of a server with TLS that answers as MLflow does."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    with serving({"text": "3.17.2"}, context) as port:
        yield port


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://no-such-host.invalid:5000", "there is no host no-such-host.invalid"),
        ("http://127.0.0.1:port", "cannot be reached (nonnumeric port: 'port')"),
        ("sqlite:///nowhere.db", None),
    ],
)
def test_what_is_said_of_a_store(uri, words):
    """In plain words, with what to do about it; a store that is no server is not asked."""
    problem = look(uri).problem

    assert (words is None) == (problem is None)
    assert words is None or words in problem


def test_a_server_that_never_answers():
    """It is waited for as long as was said, and no longer."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert "no answer within 0.2 s" in look(f"http://127.0.0.1:{port}", 0.2).problem


def test_nothing_listens():
    """A refused connection, with how to start a server."""
    assert (
        "nothing listens there (connection refused); start it with" in look(f"http://127.0.0.1:{free_port()}").problem
    )


def test_a_certificate_that_nobody_knows(tls_port, certificate, monkeypatch):
    """TLS is named as what failed, with the two ways out of it, and both lead out of it."""
    uri = f"https://127.0.0.1:{tls_port}"

    problem = look(uri).problem
    assert f"{uri} cannot be reached: TLS failed (" in problem
    assert "self-signed certificate" in problem.replace("self signed", "self-signed")
    assert "or name the certificate by MLFLOW_TRACKING_SERVER_CERT_PATH" in problem

    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
    assert (None, "3.17.2") == (look(uri).problem, look(uri).version)

    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", "nowhere.pem")
    assert "MLFLOW_TRACKING_SERVER_CERT_PATH names nowhere.pem, which cannot be read" in look(uri).problem

    monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    assert look(uri).problem is None


def test_tls_where_there_is_none():
    """``https`` to a server without TLS: the scheme is what to correct."""
    with serving({"text": "3.17.2"}) as port:
        problem = look(f"https://127.0.0.1:{port}").problem

    assert "TLS failed (" in problem
    assert "correct the scheme (http or https)" in problem


def test_no_tls_where_there_is_some(tls_port):
    """``http`` to a server with TLS, which hangs up: the scheme is what to correct, and nothing is to be started."""
    problem = look(f"http://127.0.0.1:{tls_port}").problem

    assert f"http://127.0.0.1:{tls_port} does not answer in HTTP (" in problem
    assert problem.endswith("; correct the scheme (http or https), or MLFLOW_TRACKING_URI")


def test_what_speaks_no_http():
    """A server of another kind at the port, which greets first."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet():
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                connection.recv(1000)

        thread = threading.Thread(target=greet)
        thread.start()
        problem = look(f"http://127.0.0.1:{server.getsockname()[1]}").problem
        thread.join(TIMEOUT)

    assert "does not answer in HTTP (SSH-2.0-OpenSSH_9.6" in problem


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"text": "<html>Welcome</html>"}, "answers, but not as an MLflow server does: correct MLFLOW_TRACKING_URI"),
        ({"status": 404}, "answers HTTP 404 to /version: is it an MLflow server?"),
        ({"status": 503}, "answers HTTP 503 to /version: is it an MLflow server?"),
        ({"status": 401}, "answers, but refuses us (HTTP 401): set MLFLOW_TRACKING_USERNAME"),
        ({"status": 403}, "answers, but refuses us (HTTP 403): set MLFLOW_TRACKING_USERNAME"),
    ],
    ids=["a page", "404", "503", "401", "403"],
)
def test_what_is_no_mlflow_server(answer, words):
    """Another server at the address, and one that does not let us in."""
    with serving(answer) as port:
        assert f"http://127.0.0.1:{port} {words}" in look(f"http://127.0.0.1:{port}").problem


@pytest.mark.parametrize("name", ["mlflow.db", "some folder/mlflow.db", "mlruns"])
def test_what_is_missing_is_said(name, tmp_path):
    """A file or a folder that is not there is no store, nor is a file without MLflow's tables."""
    uri = f"sqlite:///{tmp_path / name}" if name.endswith(".db") else f"file:{tmp_path / name}"
    assert f"there is no store in {uri}; run this where" in missing_store(uri)
    if name == "mlruns":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with contextlib.closing(sqlite3.connect(tmp_path / name)) as connection:
            connection.execute("CREATE TABLE bills (n)")
        assert f"{uri} is no store of MLflow; run this where" in missing_store(uri)
        with contextlib.closing(sqlite3.connect(tmp_path / name)) as connection:
            connection.execute("CREATE TABLE experiments (n)")

    assert missing_store(uri) is None


def test_what_is_no_file_is_not_looked_at():
    """A server, another database, and what is kept in memory."""
    uris = ["http://127.0.0.1:9", "databricks", "databricks://me", "postgresql://me@nowhere/db", "sqlite:///:memory:"]

    assert [] == list(filter(missing_store, [*uris, "sqlite://"]))
