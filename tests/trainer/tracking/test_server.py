from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from catgan.command import UserError
from export.registry import register
from export.source import open_source
from tests.trainer.tracking.runs import begin, end, images, make_image, points, track
from trainer.tracking.server import (
    artifact_location,
    check_reachable,
    connect,
    mlflow_command,
    resolve_uri,
    sqlite_path,
    sqlite_uri,
)
from trainer.tracking.tracker import sync

ODD_NAMES = [
    "a b",
    "a%20b",
    "50%",
    "x?mode=memory&uri=true",
    "#1",
    "Kätzchen 猫",
    "a;b:c@d+[e]",
    "~$HOME'\"\\",
    "a\nb\t",
]


@pytest.mark.parametrize("hangs", [False, True])
def test_a_server_that_does_not_answer_ends_a_training_before_it_begins(
    hangs: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.tracking.server._PROBE_SECONDS", 0.5)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        if hangs:
            closed.listen()
        port = closed.getsockname()[1]
        reason = "timed out" if hangs else "refused"
        with pytest.raises(UserError, match=rf"http://127\.0\.0\.1:{port} .*{reason}.*--track\.offline") as caught:
            begin(folder, f"http://me:secret@127.0.0.1:{port}")
    assert "secret" not in str(caught.value)
    assert list(folder.rglob("*")) == []


def test_retries_are_bounded(client: MlflowClient) -> None:
    """By default MLflow's client retries for minutes."""
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    assert MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() <= 3
    assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() <= 30


def test_a_database_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    uri = resolve_uri(f"sqlite:///{tmp_path}/file/mlflow.db", tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="cannot write the MLflow database"):
        begin(tmp_path / "run", uri)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("something else")
    with pytest.raises(UserError, match=r"mlflow\.db is not an SQLite database"):
        check_reachable(resolve_uri(f"sqlite:///{tmp_path}/mlflow.db", tmp_path))
    assert (tmp_path / "mlflow.db").read_text() == "something else"


def test_a_database_server_that_is_away_is_not_waited_for_for_minutes() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        began = time.monotonic()
        with pytest.raises(
            UserError, match=r"postgresql\+psycopg2://127\.0\.0\.1:\d+/mlflow cannot be used .*refused"
        ) as caught:
            check_reachable(f"postgresql+psycopg2://me:secret@127.0.0.1:{closed.getsockname()[1]}/mlflow")
    assert time.monotonic() - began < 20
    assert "secret" not in str(caught.value)


def test_an_interrupted_creation_of_the_database_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = resolve_uri(None, tmp_path)

    def interrupted(context: object, revision: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("alembic.command.upgrade", interrupted)
        with pytest.raises(KeyboardInterrupt):
            check_reachable(uri)
    (tmp_path / ".0.partial.mlflow.db").write_bytes(b"of a killed process")
    check_reachable(uri)
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}
    assert [experiment.name for experiment in MlflowClient(uri).search_experiments()] == ["Default"]


def test_the_uri_comes_from_the_option_the_environment_or_the_output_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(None, Path("out")) == f"sqlite:///{tmp_path}/out/mlflow.db"
    assert resolve_uri("sqlite:///mine.db", Path("out")) == f"sqlite:///{tmp_path}/mine.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert resolve_uri(None, Path("out")) == "http://127.0.0.1:5000"
    assert resolve_uri("sqlite:////mine.db", Path("out")) == "sqlite:////mine.db"
    for uri in ("sqlite://mine.db", "sqlite:mine.db", "sqlite://"):
        with pytest.raises(UserError, match=r"give sqlite:///PATH\.db|file store"):
            resolve_uri(uri, Path("out"))
    for file_store in ("file:./mlruns", "./mlruns", "mlruns"):
        with pytest.raises(UserError, match="file store"):
            resolve_uri(file_store, Path("out"))


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_folder_whose_name_has_characters_of_urls(
    name: str, uri: str, onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records, files and models are stored there, and no other folder is made."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    out = tmp_path / name
    run_dir = out / "run"
    (run_dir / "best").mkdir(parents=True)
    shutil.copy(uri.removeprefix("sqlite:///"), out / "mlflow.db")  # making one takes a second
    onnx = Path(shutil.copy(onnx_file, run_dir / "best"))
    odd = resolve_uri(None, out)
    assert sqlite_path(odd) == out / "mlflow.db"
    assert resolve_uri(odd, Path("elsewhere")) == odd
    run_id = begin(run_dir, odd, "odd")
    tracker = track(run_dir, odd)
    tracker.log_scalars({"x": 1.0}, 1000)
    tracker.log_grid("fakes", 1000, make_image(run_dir / "fakes.png"))
    tracker.log_model("odd", onnx, {"recipe": "tiny", "kimg": 1.0, "metric": None})
    tracker.close()
    end(run_dir, odd, "FINISHED")
    client = connect(odd)
    assert points(client, run_id, "x") == [(1, 1.0)]
    assert len(images(client, run_id)) == 2
    assert Path(client.download_artifacts(run_id, "samples/fakes.png")).is_file()
    with pytest.raises(UserError, match="no readable"):  # it has no weights, but is found
        open_source("models:/odd/1", odd)
    assert sync(run_dir, register=register)["delivered"] == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert {path.name for path in out.iterdir()} <= {"mlflow.db", ".mlflow.db.lock", "mlartifacts", "run"}


def test_uris_that_users_give_are_decoded_as_sqlalchemy_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("sqlite:///a%20b.db?timeout=5", Path("out")) == f"sqlite:///{tmp_path}/a b.db"
    assert sqlite_path("sqlite:///a%2525.db") == tmp_path / "a%25.db"
    assert sqlite_path("sqlite+pysqlite:///a.db") == tmp_path / "a.db"
    assert sqlite_path("postgresql://host/db") is None


def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    for convert in (sqlite_uri, artifact_location):
        with pytest.raises(UserError, match=r"not UTF-8; give another --out"):
            convert(tmp_path / "\udcff")


@pytest.mark.parametrize(
    ("uri", "variable"),
    [
        ("http://mlflow.example:5000", "HTTP_PROXY"),
        ("http://mlflow.example:5000", "http_proxy"),
        ("https://mlflow.example", "HTTPS_PROXY"),
        ("http://mlflow.example:5000", "ALL_PROXY"),
    ],
)
def test_a_proxy_on_the_way_is_named(uri: str, variable: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv(variable, f"http://me:secret@127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(UserError, match=rf"{uri} through the proxy in {variable} does not answer") as caught:
            begin(folder, uri)
    assert "NO_PROXY=mlflow.example avoids the proxy" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_proxy_that_does_not_apply_is_not_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example")
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="refused") as caught:
            begin(folder, f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert "roxy" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("deleted", ["run", "experiment", "experiment of others"])
def test_the_commands_that_restore_what_was_deleted_work_as_printed(deleted: str, uri: str, tmp_path: Path) -> None:
    out = tmp_path / "50% of $HOME's"
    (out / "run").mkdir(parents=True)
    shutil.copy(uri.removeprefix("sqlite:///"), out / "mlflow.db")
    odd = resolve_uri(None, out)
    client = connect(odd)
    run_id = begin(out / "run", odd, "mine")
    if deleted == "run":
        client.delete_run(run_id)
    else:
        client.delete_experiment(client.get_run(run_id).info.experiment_id)
    name = "another" if deleted == "experiment of others" else "run"
    (out / name).mkdir(exist_ok=True)
    with pytest.raises(UserError, match="was deleted") as caught:
        begin(out / name, odd, "mine")
    (command,) = re.findall("`(.+)`", str(caught.value))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    (out / name).mkdir(exist_ok=True)  # an empty one was removed
    assert (begin(out / name, odd, "mine") == run_id) is (name == "run")
    assert client.get_run(run_id).info.lifecycle_stage == "active"


def test_a_password_is_not_in_a_printed_command() -> None:
    printed = mlflow_command("https://me:secret@host", "runs", "restore", "--run-id", "0123")
    assert printed.startswith("`MLFLOW_TRACKING_URI=https://host mlflow runs restore --run-id 0123` (add the user")
