"""Access to a cluster: nothing without the token, and no passwords in the descriptions of jobs."""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SECRET = "s3cr3t-0f-th3-n0d3s"
# Prints the digest of the password in the environment of a driver and of its worker.
JOB = """
import hashlib, os, ray
def seen():
    return hashlib.sha256(os.environ["MLFLOW_TRACKING_PASSWORD"].encode()).hexdigest()
ray.init(logging_level="ERROR")
print("driver", seen(), "worker", ray.get(ray.remote(seen).remote()))
"""

pytestmark = [pytest.mark.ray, pytest.mark.soak]


@pytest.fixture(scope="module")
def cluster(sandbox: Any) -> Iterator[Any]:
    """A cluster that was started with a password in its environment. The user's own environment has it no longer."""
    sandbox.env["MLFLOW_TRACKING_PASSWORD"] = SECRET
    started = sandbox.start("--cpus", "1")
    del sandbox.env["MLFLOW_TRACKING_PASSWORD"]
    assert started.returncode == 0, started.stdout
    (sandbox.home / "job").mkdir()
    (sandbox.home / "job" / "job.py").write_text(JOB)
    return sandbox


def _get(cluster: Any, path: str, token: str | None) -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{cluster.dashboard}{path}")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def _token(cluster: Any) -> str:
    return Path(cluster.env["RAY_AUTH_TOKEN_PATH"]).read_text()


def test_a_connection_needs_the_token(cluster: Any) -> None:
    for path in ("/api/jobs/", "/nodes?view=summary", "/api/v0/workers"):
        assert _get(cluster, path, None)[0] == 401, path
        assert _get(cluster, path, "f" * 64)[0] == 403, path
        assert _get(cluster, path, _token(cluster))[0] == 200, path
    assert _get(cluster, "/api/gcs_healthz", None)[0] == 200  # the path of Kubernetes' probes

    # Ray's own protocol, as used by training.
    join = ["python", "-c", f"import ray; ray.init('127.0.0.1:{cluster.port}'); print('joined')"]
    assert "joined" in cluster.run(*join).stdout
    cluster.env["RAY_AUTH_MODE"] = "disabled"
    refused = cluster.run(*join)
    cluster.env["RAY_AUTH_MODE"] = "token"
    assert refused.returncode != 0
    assert "joined" not in refused.stdout


def test_the_dashboard_listens_on_loopback_only(cluster: Any) -> None:
    listening = [c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert {address.ip for address in listening if address.port == cluster.dashboard} == {"127.0.0.1"}


def _run_job(cluster: Any, name: str, **env_vars: str) -> tuple[str, str]:
    """Run a job with cluster/runtime_env.yaml and ``env_vars``. Returns its log and the API's answers about it."""
    environment = yaml.safe_load((ROOT / "cluster" / "runtime_env.yaml").read_text())
    environment["env_vars"].update(env_vars)
    file = cluster.home / f"{name}.yaml"
    file.write_text(yaml.safe_dump(environment))
    submit = ["ray", "job", "submit", "--runtime-env", str(file), "--submission-id", name, "--", "python", "job.py"]
    done = cluster.run(*submit, cwd=cluster.home / "job")
    assert done.returncode == 0, done.stdout
    # The answers behind `ray job list`, `ray job logs`, `ray list ...` and the dashboard's pages.
    pages = [f"jobs/{page}" for page in ("", name, f"{name}/logs")]
    pages += [f"v0/{kind}?detail=1" for kind in ("actors", "jobs", "runtime_envs", "tasks", "workers")]
    answers = [_get(cluster, f"/api/{page}", _token(cluster)) for page in pages]
    assert {status for status, _ in answers} == {200}
    texts = [text for _, text in answers]
    return done.stdout, "\n".join(texts)


def _logs(cluster: Any) -> Iterator[Path]:
    """The cluster's own logs and state on disk."""
    return (path for path in (cluster.home / "c").rglob("*") if path.is_file() and not path.is_symlink())


def test_a_password_in_the_nodes_environment_reaches_jobs_and_is_not_shown(cluster: Any) -> None:
    log, answers = _run_job(cluster, "nodes")
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    assert f"driver {digest} worker {digest}" in log
    assert json.loads(_get(cluster, "/api/jobs/nodes", _token(cluster))[1])["status"] == "SUCCEEDED"
    assert "PYTHONFAULTHANDLER" in answers  # they contain the description
    assert SECRET not in log + answers
    files = list(_logs(cluster))
    assert any(path.name == "job-driver-nodes.log" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_a_password_in_the_runtime_env_is_shown(cluster: Any) -> None:
    """As the documentation warns. It also shows that the test above would find a password."""
    other = "a-passw0rd-that-is-given-away"
    _, answers = _run_job(cluster, "given", MLFLOW_TRACKING_PASSWORD=other)
    assert other in answers
