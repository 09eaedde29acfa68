"""The run of a sweep in MLflow: the parent of its trials, with the sweep's summary.

Trials and the sweep's own command find it by a tag, whichever comes first. So it is there as well after trials that
were recorded offline are delivered.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from catgan.command import UserError, say
from trainer.tracking.server import as_user_errors, check_reachable, connect, find_experiment

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

PARENT_OF_RUN = "mlflow.parentRunId"  # MLflow's UI nests runs by it
_SWEEP_TAG = "catgan.sweep"


def find_parent(client: MlflowClient, experiment_id: str, sweep: Mapping[str, str], user: str) -> str:
    """The id of the sweep's run, created if there is none that is not deleted.

    Args:
        sweep: ``id``, which is unique, and ``name``.
    """

    def oldest() -> list[str]:
        condition, order = f"tags.`{_SWEEP_TAG}` = '{sweep['id']}'", ["attributes.start_time ASC"]
        found = client.search_runs([experiment_id], condition, max_results=1, order_by=order)  # active runs only
        return [str(run.info.run_id) for run in found]

    if found := oldest():
        return found[0]
    tags = {_SWEEP_TAG: sweep["id"], "mlflow.user": user, "mlflow.source.name": "trainer/sweep.py"}
    own = str(client.create_run(experiment_id, tags=tags, run_name=sweep["name"]).info.run_id)
    (first,) = oldest()
    if first != own:  # two trials that start at the same time both create one
        client.delete_run(own)
    return first


def log_sweep(
    uri: str,
    experiment: str,
    sweep: Mapping[str, str],
    *,
    user: str,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
    files: Mapping[str, bytes],
    status: str,
) -> str | None:
    """Log the summary of a sweep to its run. If MLflow cannot be used, print a warning.

    Args:
        tags: what a continued sweep may change, as a param cannot.
        files: artifacts by name.
        status: FINISHED, FAILED or KILLED.

    Returns:
        The id of the run; None after a warning.
    """
    try:
        check_reachable(uri)
        with as_user_errors(uri), tempfile.TemporaryDirectory() as scratch:
            client = connect(uri)
            run_id = find_parent(client, find_experiment(client, uri, experiment), sweep, user)
            for name, value in tags.items():
                client.set_tag(run_id, name, value, synchronous=True)
            for name, number in metrics.items():
                client.log_metric(run_id, name, number)
            for name, data in files.items():
                Path(scratch, name).write_bytes(data)
                client.log_artifact(run_id, str(Path(scratch, name)))
            client.set_terminated(run_id, status)
            return run_id
    except UserError as error:
        say(f"warning: the sweep's summary is not in MLflow: {error}")
        return None
