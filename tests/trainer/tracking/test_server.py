from __future__ import annotations

import socket
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from catgan.command import UserError
from tests.trainer.tracking.runs import begin
from trainer.tracking.server import check_reachable, resolve_uri


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
    assert not folder.exists(), "an empty folder is removed"


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
    for file_store in ("file:./mlruns", "./mlruns", "mlruns"):
        with pytest.raises(UserError, match="file store"):
            resolve_uri(file_store, Path("out"))
