"""MLflow servers that fail, never answer, want a login or have a bad certificate; passwords, which nothing shows."""

import datetime
import ipaddress
import logging
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from jobs import cli
from jobs.run.config import load_config
from jobs.tracking.logger import RunTracker, TrackingConfig, send_pending
from jobs.tracking.server import failure, import_mlflow, mlflow_client, public_uri
from medsynth.errors import UserError
from medsynth.secrets import has_secret, without_secrets
from tests.conftest import REPOSITORY

TINY = REPOSITORY / "configs/tiny/msdm.yaml"
SECRET = "hunter2-hunter2"
ANSWERS = {
    "fails": (500, "text/html", b"<html>\nInternal Server Error</html>"),
    "is overloaded": (503, "text/html", b""),
    "wants a login": (401, "text/html", b"You are not authenticated."),
    "forbids": (403, "application/json", b'{"error_code": "PERMISSION_DENIED", "message": "Permission denied"}'),
    "shows a page to log in": (200, "text/html", b"<html>Log in</html>"),
    "answers with megabytes": (200, "text/html", b"(Caused by " * 300_000),
}


class Answering(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.how == "never answers":
            self.server.over.wait()
            return
        if self.server.how == "tells what it was told":
            code, kind, body = 400, "text/html", str(self.headers).encode()
        else:
            code, kind, body = ANSWERS[self.server.how]
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """It answers as its `how` says."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as serving:
        serving.daemon_threads, serving.over = True, threading.Event()
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        yield serving
        serving.over.set()
        serving.shutdown()


@pytest.fixture(autouse=True)
def login(monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    import_mlflow()  # which takes seconds, and a training at its start


def address(server: ThreadingHTTPServer, scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{server.server_port}"


def warnings_of(caplog, where: str, words: str = "Training goes on") -> list[str]:
    """Those of one server: threads of runs before may still speak of theirs."""
    said = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    return [message for message in said if words in message and where in message]


def train_a_little(folder: Path, uri: str) -> None:
    """Log as a run does; neither its start nor its end waits long."""
    began = time.monotonic()
    tracker = RunTracker(folder, TrackingConfig(uri=uri, timeout_seconds=1), "a run")
    for step in range(100):
        tracker.log_metrics({"train/loss": 1.0}, step)
    assert time.monotonic() - began < 5
    began = time.monotonic()
    tracker.finalize("success")
    assert time.monotonic() - began < 5


def sent(folder: Path, uri: str) -> list[int]:
    """What a right database has of the run afterwards: the steps."""
    send_pending(folder, uri)
    (run,) = mlflow_client(uri).search_runs([mlflow_client(uri).get_experiment_by_name("medsynth").experiment_id])
    assert run.info.status == "FINISHED"
    return [point.step for point in mlflow_client(uri).get_metric_history(run.info.run_id, "train/loss")]


@pytest.mark.parametrize("how", [*ANSWERS, "never answers", "tells what it was told"])
def test_training_goes_on_with_one_warning_and_its_record_is_sent_later(how, server, tmp_path, caplog):
    server.how = how
    train_a_little(tmp_path / "run", address(server))
    if how != "never answers":  # of that MLflow hears after its own 20 seconds
        (said,) = warnings_of(caplog, address(server))
        login = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        assert (login in said) == (how in ("wants a login", "forbids")), said
        assert len(said) < 600 and "\n" not in said
        with pytest.raises(UserError) as refused:
            send_pending(tmp_path / "run", address(server))
        assert "is kept" in str(refused.value) and "\n" not in str(refused.value)
        assert SECRET not in str(refused.value) and "Basic bWU6" not in str(refused.value)
    assert len(warnings_of(caplog, address(server), "medsynth track")) == 1
    assert SECRET not in caplog.text and "Basic bWU6" not in caplog.text
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert files and not any(SECRET.encode() in path.read_bytes() for path in files)
    assert sent(tmp_path / "run", f"sqlite:///{tmp_path}/right.db") == list(range(100))


def test_one_warning_of_each_kind(server, tmp_path, caplog):
    server.how = "fails"
    tracker = RunTracker(tmp_path / "run", TrackingConfig(uri=address(server), timeout_seconds=0), "a run")
    tracker.log_metrics({"train/loss": 1.0}, 1)
    for how, count in (("fails", 1), ("wants a login", 2), ("forbids", 2), ("fails", 2)):
        server.how = how
        end = time.monotonic() + 20
        while len(warnings_of(caplog, address(server))) < count and time.monotonic() < end:
            tracker._thread.flush(0.5)
        tracker._thread.flush(1.2)  # another attempt, which says nothing new
        assert len(warnings_of(caplog, address(server))) == count


@pytest.mark.parametrize("days", [30, -1])
def test_a_certificate_that_is_not_trusted_is_named_with_the_mend(days, server, tmp_path, caplog, monkeypatch):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    local = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(now - datetime.timedelta(60)).not_valid_after(now + datetime.timedelta(days))
    made = made.add_extension(local, critical=False).sign(key, hashes.SHA256())
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pem = tmp_path / "server.pem"
    pem.write_bytes(
        made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(serialization.Encoding.PEM, *plain)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server.how, server.socket = "fails", context.wrap_socket(server.socket, server_side=True)
    if days < 0:  # also where who signed it is trusted
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(pem))
    train_a_little(tmp_path / "run", address(server, "https"))
    (said,) = warnings_of(caplog, address(server, "https"))
    assert "has a certificate that is not trusted: set MLFLOW_TRACKING_SERVER_CERT_PATH" in said
    assert ("expired" if days < 0 else "self-signed") in said


def test_a_full_disk_is_not_taken_for_a_server_that_is_away():
    error = OSError(28, "No space left on device")
    assert failure(error, "here") == ("disk", "what MLflow at here has cannot be written down: No space left on device")
    assert failure(ConnectionRefusedError(111, "Connection refused"), "here")[0] == "away"


# Passwords


def test_an_address_is_kept_as_it_is_where_nothing_in_it_is_hidden(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "mlruns")
    assert public_uri("sqlite:////data/mlruns.db") == "sqlite:////data/mlruns.db"
    assert without_secrets("mlruns") == "***"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"http://me:{SECRET}@host:5000/x", "http://me:***@host:5000/x"),
        (f"postgresql+psycopg2://me:{SECRET}@db/ml?sslmode=require", "postgresql+psycopg2://me:***@db/ml?sslmode=require"),
        (f"https://:{SECRET}@host", "https://:***@host"),
        (f"at http://me:a@{SECRET}@host and http://b:c@d", "at http://me:***@host and http://b:***@d"),
        (f"https://host/w.pth?X-Amz-Signature={SECRET}&a=1", "https://host/w.pth?X-Amz-Signature=***&a=1"),
        (f"https://host/w.pth?a=1&token={SECRET}", "https://host/w.pth?a=1&token=***"),
    ],
)  # fmt: skip
def test_what_is_hidden_of_an_address(text, shown, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    assert has_secret(text) and without_secrets(text) == shown
    assert not has_secret(shown) and without_secrets(shown) == shown


@pytest.mark.parametrize(
    "text", ["sqlite:///a b.db", "http://host:5000", "http://me@host", "s3://bucket/a@b", "12:30@x", "runs/a:b@c"]
)
def test_what_is_no_secret_stays(text):
    assert not has_secret(text) and without_secrets(text) == text


@pytest.mark.parametrize(
    ("setting", "mend"),
    [
        (f"tracking.uri=http://me:{SECRET}@host:5000", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (f"evaluation.weights=https://host/w.pth?token={SECRET}", "give a local path"),
        (f"model.vae=https://me:{SECRET}@host/vae", "give a local path"),
    ],
)
def test_a_config_with_a_password_is_refused_without_showing_it(setting, mend, tmp_path):
    with pytest.raises(UserError, match="holds a password or token") as refused:
        load_config([TINY], [f"data.root={tmp_path}", setting])
    assert setting.partition("=")[0] in str(refused.value) and mend in str(refused.value)
    assert SECRET not in str(refused.value)


def test_no_line_of_a_command_shows_a_password_or_obeys_a_name(monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    monkeypatch.setattr("sys.argv", ["medsynth", "train", str(TINY), f"tracking.urI=http://me:{SECRET}@host"])
    with pytest.raises(SystemExit) as ended:
        cli.run()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "there is no key tracking.urI" in said
    assert "http://me:***@host" in said and SECRET not in said
    assert cli._shown("a\x1b[2J\nb") == "a?[2J\nb"
