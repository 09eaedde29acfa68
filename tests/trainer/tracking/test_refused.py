"""An artifact store that refuses files delays no metric, and the files are delivered later."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests
from botocore.exceptions import ClientError, NoCredentialsError
from mlflow.store.artifact.s3_artifact_repo import _cached_get_s3_client
from mlflow.tracking import MlflowClient
from moto.server import ThreadedMotoServer

from catgan.command import UserError
from export.registry import register
from tests.trainer.tracking.runs import begin, end, events, images, make_image, points, track
from trainer.tracking.outbox import Outbox
from trainer.tracking.tracker import sync


def log_all(folder: Path, uri: str) -> None:
    """Files before and between points, as a training logs them."""
    tracker = track(folder, uri)
    tracker.rewind(0)
    tracker.log_artifact(make_image(folder / "reals.png"), "samples")
    for nimg in (0, 1000, 2000):
        tracker.log_grid("fakes", nimg, make_image(folder / f"fakes_{nimg}.png"))
        tracker.log_scalars({"x": float(nimg)}, nimg)
    tracker.note("rollback", "back", 2000)
    tracker.close()


def assert_complete(client: MlflowClient, run_id: str, folder: Path) -> None:
    assert [file.path for file in client.list_artifacts(run_id, "samples")] == [
        *(f"samples/fakes_{nimg}.png" for nimg in (0, 1000, 2000)),
        "samples/reals.png",
    ]
    assert len(images(client, run_id)) == 6
    assert events(client, run_id)[0].endswith("rollback  2 kimg: back")
    assert points(client, run_id, "x") == [(0, 0.0), (1, 1000.0), (2, 2000.0)]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert Outbox(folder).num_undelivered() == 0


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (NoCredentialsError(), "Unable to locate credentials"),
        (ClientError({"Error": {"Code": "AccessDenied", "Message": "Forbidden"}}, "PutObject"), "Forbidden"),
        (requests.HTTPError("413 Client Error: Request Entity Too Large"), "413"),
        (ModuleNotFoundError("No module named 'boto3'"), "boto3"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refused_files_hide_no_metric_and_are_delivered_later(
    client: MlflowClient,
    uri: str,
    folder: Path,
    run_id: str,
    error: Exception,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as store:
        store.setattr(MlflowClient, "log_artifact", refuse)
        store.setattr(MlflowClient, "log_text", refuse)
        log_all(folder, uri)
        run = client.get_run(run_id)
        assert points(client, run_id, "x") == [(0, 0.0), (1, 1000.0), (2, 2000.0)]
        assert run.data.tags["note.rollback"] == "2 kimg: back"
        assert run.data.tags["catgan.refused_files"].startswith("reals.png, ")
        warning = capsys.readouterr().err
        assert "warning: MLflow refuses reals.png" in warning
        assert reason in warning
        end(folder, uri, "FINISHED")
        assert client.get_run(run_id).info.status == "FINISHED"
        message = capsys.readouterr().err
        assert f"8 records are not in MLflow yet; `cattrain sync {folder}` delivers them" in message
        assert "refuses reals.png, fakes_0.png, fakes_1000.png and 2 more" in message
        with pytest.raises(UserError, match=rf"refuses reals\.png.*{reason}.*8 of 8 records are left.*again"):
            sync(folder, register=register)
    assert sync(folder, register=register)["delivered"] == 8
    assert_complete(client, run_id, folder)
    assert client.get_run(run_id).data.tags["catgan.refused_files"] == "none"


def test_one_refused_file_does_not_hold_up_others(
    client: MlflowClient, uri: str, folder: Path, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MlflowClient.log_artifact

    def refuse(self: MlflowClient, run_id: str, path: str, *args: Any) -> None:
        if path.endswith("reals.png"):
            raise requests.HTTPError("413 Client Error")
        real(self, run_id, path, *args)

    with monkeypatch.context() as store:
        store.setattr(MlflowClient, "log_artifact", refuse)
        log_all(folder, uri)
        end(folder, uri, "FINISHED")
    assert [entry["file"] for entry in Outbox(folder).refused_files()] == ["reals.png"]
    assert Outbox(folder).num_undelivered() == 1
    # The next process that trains in this folder delivers it.
    monkeypatch.setattr("trainer.tracking.outbox._LONGEST_RETRY_SECONDS", 0.0)
    track(folder, uri).close()
    assert_complete(client, run_id, folder)


def test_files_wait_while_mlflow_itself_is_away(
    client: MlflowClient, uri: str, folder: Path, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: Any, **kwargs: Any) -> None:
        raise ConnectionResetError("gone")

    with monkeypatch.context() as server:
        for method in ("log_artifact", "log_text", "log_batch", "set_tag", "get_run"):
            server.setattr(MlflowClient, method, away)
        log_all(folder, uri)
    assert Outbox(folder).refused_files() == []
    end(folder, uri, "FINISHED")
    assert_complete(client, run_id, folder)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A bucket on an S3 server, to which this process has no credentials."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()  # servers share their buckets
    keys = {"aws_access_key_id": "me", "aws_secret_access_key": "me"}
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", **keys)
    client.create_bucket(Bucket="mlflow")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps the credentials of earlier tests
    _cached_get_s3_client.cache_clear()
    yield "s3://mlflow/artifacts"
    _cached_get_s3_client.cache_clear()
    server.stop()


def test_a_bucket_without_credentials(
    client: MlflowClient,
    uri: str,
    bucket: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    client.create_experiment("in a bucket", artifact_location=bucket)
    run_id = begin(folder, uri, "in a bucket")
    log_all(folder, uri)
    end(folder, uri, "FINISHED")
    assert points(client, run_id, "x") == [(0, 0.0), (1, 1000.0), (2, 2000.0)]
    assert "Unable to locate credentials" in capsys.readouterr().err
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "me")
    _cached_get_s3_client.cache_clear()
    sync(folder, register=register)
    assert_complete(client, run_id, folder)
