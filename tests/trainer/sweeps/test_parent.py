"""The run of a sweep in MLflow."""

from pathlib import Path

from trainer.tracking.server import connect, find_experiment, resolve_uri
from trainer.tracking.sweeps import find_parent


def test_a_deleted_run_of_the_sweep_is_not_used_again(tmp_path: Path):
    uri = resolve_uri(None, tmp_path)
    client = connect(uri)
    experiment = find_experiment(client, uri, "catgan")
    sweep = {"id": "the-sweep", "name": "rates"}
    first = find_parent(client, experiment, sweep, "me")
    assert find_parent(client, experiment, sweep, "me") == first
    client.delete_run(first)
    second = find_parent(client, experiment, sweep, "me")
    assert second != first
    assert client.get_run(second).info.lifecycle_stage == "active"
    assert find_parent(client, experiment, sweep, "me") == second
