"""After the last step: export the best generator to ``gen.onnx`` with a card, and queue it for MLflow's registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from catgan.command import UserError, say
from trainer.checkpoints import checkpoint
from trainer.checkpoints.storage import Storage
from trainer.report.page import write_report
from trainer.tracking import tracker as tracking
from trainer.tracking.recorder import write_progress


def finish(run_dir: Path, model: str | None) -> None:
    """Export ``best/gen.safetensors`` of a run, check the file against PyTorch, write its card, and queue it to be
    logged and registered in MLflow. It is not evaluated again: it generates the images that training evaluated.

    Args:
        model: name in MLflow's model registry; None: it is not registered.

    Raises:
        UserError: outputs of PyTorch and onnxruntime differ.
    """
    # Importing ONNX's libraries takes seconds, which would delay the first step.
    from export import directions
    from export.card import write_card
    from export.generator import export_onnx, metadata

    generator, info = checkpoint.load_generator(run_dir / "best")
    onnx = run_dir / "best" / "gen.onnx"
    difference = export_onnx(generator, onnx, metadata(info) | directions.metadata(generator))
    write_card(onnx, info, difference)
    tracker = tracking.Tracker(run_dir)
    for animation in write_progress(run_dir):
        tracker.log_artifact(animation, "samples")
    if model is not None:
        tracker.log_model(model, onnx, info)
    metric = info["metric"]
    say(
        f"best generator: {metric['name']} {metric['value']:.2f} at {info['kimg']:g} kimg; {onnx} agrees with PyTorch"
        f" to {difference:.1e}"
    )


def write_final_report(run_dir: Path, status: tracking.Status) -> None:
    """Write ``report.html`` of a run that ends with ``status``, and queue it for MLflow. If that fails, for example on
    a full disk, print a warning, so that the rest of the run's end is not skipped."""
    try:
        path = write_report(run_dir, status=status)
    except UserError as error:
        say(f"warning: no report: {error}")
        return
    tracking.Tracker(run_dir).log_artifact(path)


def summary(storage: Storage) -> dict[str, Any]:
    """The JSON object of a finished run. Its ``mlflow_run_id`` is null as long as there is no run in MLflow."""
    _, info = checkpoint.load_generator(storage.work / "best")
    return {
        "run_dir": storage.location,
        "mlflow_run_id": tracking.mlflow_run_id(storage.work),
        "kimg": checkpoint.position(storage.checkpoints()[-1]) / 1000,
        "metric": {"name": info["metric"]["name"], "value": info["metric"]["value"], "kimg": info["kimg"]},
        "onnx": storage.join("best/gen.onnx"),
    }
