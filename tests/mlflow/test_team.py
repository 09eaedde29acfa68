"""``mlflow/team.sh`` with a real PostgreSQL and an S3 emulator: trainings are recorded, and access needs a password."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psycopg2
import pytest
from moto.server import ThreadedMotoServer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "mlflow" / "team.sh"
PASSWORD = "admin's-own-password"
MEMBER, MEMBERS_PASSWORD = "cat", "a-members-password"
BUCKET = "team-artifacts"
TINY = ["--batch", "8", "--eval.num", "32", "--eval.extractor", "efflite0", "--model.g-width", "8"]
TINY += ["--model.d-width", "8", "--track.tick-kimg", "0.032", "--track.snapshot-kimg", "0.064", "--kimg", "0.064"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Database:
    port: int
    password: str

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        connection = psycopg2.connect(
            host="127.0.0.1", port=self.port, user="mlflow", dbname="postgres", password=self.password
        )
        with connection, connection.cursor() as cursor:
            cursor.execute(query, values)
            rows = cursor.fetchall()
        connection.close()
        return rows


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    """A PostgreSQL server. It refuses to run as root, so root starts it as Debian's user ``postgres``."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("needs the system package postgresql")
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    if as_user:
        shutil.chown(folder, "postgres")
    base, password, port = folder / "data", "a-database-password", _free_port()
    given = folder / "password"
    given.write_text(password)
    given.chmod(0o644)
    made = [programs[-1], "-D", base, "--username=mlflow", f"--pwfile={given}", "--auth=scram-sha-256", "--no-sync"]
    subprocess.run([*as_user, *map(str, made)], check=True, stdout=subprocess.DEVNULL, cwd="/", timeout=120)
    served = [programs[-1].with_name("postgres"), "-D", base, "-p", port, "-k", folder, "-c", "fsync=off"]
    served += ["-c", "listen_addresses=127.0.0.1"]
    log = (folder.with_suffix(".log")).open("wb")
    process = subprocess.Popen([*as_user, *map(str, served)], stdout=log, stderr=log, cwd="/", start_new_session=True)
    found = Database(port, password)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                found.rows("SELECT 1")
                break
            except psycopg2.OperationalError:
                assert process.poll() is None
                assert time.monotonic() < deadline, Path(log.name).read_text()
                time.sleep(0.2)
        yield found
    finally:
        os.killpg(process.pid, signal.SIGINT)  # a fast shutdown
        process.wait(timeout=60)
        log.close()
        Path(log.name).unlink()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """The address of an S3 server that has the bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    uri = f"http://{host}:{port}"
    _s3(uri).create_bucket(Bucket=BUCKET)
    yield uri
    server.stop()


def _s3(uri: str) -> Any:
    return boto3.client(
        "s3", endpoint_url=uri, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
    )


def _clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "CATGAN_", "MLFLOW_", "PG"))}


@dataclass(frozen=True)
class Server:
    uri: str
    pid: int
    log: Path

    def ask(self, path: str, user: str | None, host: str | None = None, **body: str) -> int:
        """Send a GET, or a POST of ``body``, as ``user`` (NAME:PASSWORD). Returns the HTTP status."""
        request = urllib.request.Request(self.uri + path, json.dumps(body).encode() if body else None)
        request.add_header("Content-Type", "application/json")
        if user is not None:
            request.add_header("Authorization", "Basic " + b64encode(user.encode()).decode())
        if host is not None:
            request.add_header("Host", host)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


@pytest.fixture(scope="module")
def server(database: Database, store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("team")
    secrets = {"PGPASSWORD": database.password, "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD}
    secrets |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": "0123456789abcdef"}
    env = _clean_environment() | {"PGHOST": "127.0.0.1", "PGPORT": str(database.port), "PGUSER": "mlflow"}
    env |= {"PGDATABASE": "postgres", "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/mlflow"}
    env |= {"MLFLOW_S3_ENDPOINT_URL": store, "AWS_ACCESS_KEY_ID": "server", "AWS_SECRET_ACCESS_KEY": "server"}
    env["MLFLOW_WORKERS"] = "1"
    for name, value in secrets.items():
        (folder / name).write_text(value + "\n")
        env[f"{name}_FILE"] = str(folder / name)
    port = _free_port()
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [SCRIPT, "--port", str(port)], env=env, cwd=folder, stdout=output, stderr=output, start_new_session=True
        )
    found = Server(f"http://127.0.0.1:{port}", process.pid, log)
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                if found.ask("/health", None) == 200:
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.3)
        # Another user owns the experiment and the model, as after a training of theirs.
        for kind, body in (
            ("users", {"username": MEMBER, "password": MEMBERS_PASSWORD}),
            ("experiments", {"name": "catgan"}),
            ("registered-models", {"name": "catgan"}),
        ):
            assert found.ask(f"/api/2.0/mlflow/{kind}/create", f"admin:{PASSWORD}", **body) == 200
        yield found
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C
        process.wait(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _train(server: Server, shards: Path, out: Path, password: str) -> subprocess.CompletedProcess[str]:
    env = _clean_environment() | {"CATGAN_OFFLINE": "1", "MLFLOW_TRACKING_URI": server.uri}
    env |= {"MLFLOW_TRACKING_USERNAME": MEMBER, "MLFLOW_TRACKING_PASSWORD": password}
    command = [sys.executable, str(ROOT / "trainer" / "run.py"), "--data", str(shards), "--out", str(out)]
    command += ["--name", "team", "--workers", "0", *TINY]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.soak
@pytest.mark.slow
def test_a_training_is_recorded_in_the_database_and_the_bucket(
    server: Server, database: Database, store: str, shards: Path, tmp_path: Path
) -> None:
    done = _train(server, shards, tmp_path, MEMBERS_PASSWORD)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    run_id = result["mlflow_run_id"]

    assert database.rows("SELECT name, status FROM runs WHERE run_uuid = %s", run_id) == [("team", "FINISHED")]
    metrics = dict(database.rows("SELECT key, value FROM latest_metrics WHERE run_uuid = %s", run_id))
    assert metrics[result["metric"]["name"]] == pytest.approx(result["metric"]["value"])
    lines = [json.loads(line) for line in (tmp_path / "team" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/generator"] for line in lines if "loss/generator" in line]
    query = "SELECT value FROM metrics WHERE run_uuid = %s AND key = 'loss/generator'"
    assert sorted(value for (value,) in database.rows(query, run_id)) == pytest.approx(sorted(losses))
    query = "SELECT name, status FROM model_versions WHERE run_id = %s"
    assert database.rows(query, run_id) == [("catgan", "READY")]

    listed = _s3(store).list_objects_v2(Bucket=BUCKET)["Contents"]
    assert all(entry["Key"].startswith("mlflow/") for entry in listed)
    sizes = {Path(entry["Key"]).name: entry["Size"] for entry in listed}
    assert {"fakes_000000kimg.png", "reals.png"} <= set(sizes)
    assert sizes["model.onnx"] == (tmp_path / "team" / "best" / "gen.onnx").stat().st_size

    for secret in (PASSWORD, MEMBERS_PASSWORD, database.password):
        assert secret not in server.log.read_text()
        for file in (path for path in tmp_path.rglob("*") if path.is_file()):
            assert secret.encode() not in file.read_bytes(), file
        assert secret not in done.stderr


@pytest.mark.soak
@pytest.mark.slow
def test_a_wrong_password_is_an_error_in_one_line(server: Server, shards: Path, tmp_path: Path) -> None:
    done = _train(server, shards, tmp_path, "wrong-password-12")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "401" in done.stderr
    assert "wrong-password-12" not in done.stderr


@pytest.mark.soak
@pytest.mark.slow
def test_access_needs_a_password_and_a_known_host(server: Server) -> None:
    admin, member = f"admin:{PASSWORD}", f"{MEMBER}:{MEMBERS_PASSWORD}"
    page = "/api/2.0/mlflow/experiments/get?experiment_id=0"
    assert server.ask(page, admin) == 200
    assert server.ask(page, None) == 401
    assert server.ask(page, "admin:password1234") == 401
    assert server.ask(page, admin, host="evil.example") == 403
    assert server.ask("/api/2.0/mlflow/users/create", member, username="more", password="twelve-letters") == 403
    assert server.ask("/api/2.0/mlflow/experiments/delete", member, experiment_id="1") == 403
    command = Path(f"/proc/{server.pid}/cmdline")
    if command.exists():
        assert b"postgresql+psycopg2://\0" in command.read_bytes()


def test_missing_settings_are_reported_before_anything_starts(tmp_path: Path) -> None:
    def refused(**env: str) -> str:
        done = subprocess.run([SCRIPT], env=_clean_environment() | env, capture_output=True, text=True, timeout=30)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        return done.stderr

    given = {"PGHOST": "h", "PGUSER": "u", "PGDATABASE": "d"}
    assert "PGHOST is not set" in refused()
    assert "MLFLOW_ARTIFACTS_DESTINATION is not set" in refused(**given)
    given["MLFLOW_ARTIFACTS_DESTINATION"] = "s3://b/f"
    assert "MLFLOW_FLASK_SERVER_SECRET_KEY is not set" in refused(**given)
    assert "PGPASSWORD_FILE=/none cannot be read" in refused(**given, PGPASSWORD_FILE="/none")
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert "usage: mlflow/team.sh" in done.stdout
