"""After the last step: the best generator becomes ``gen.onnx`` with a card, to be registered in MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catgan.command import UserError, say
from trainer.checkpoints import checkpoint
from trainer.checkpoints.storage import Storage
from trainer.report.page import write_report
from trainer.tracking import tracker as tracking
from trainer.tracking.recorder import write_progress


def finish(run_dir: Path, model: str, data: str) -> None:
    """Export ``best/gen.safetensors`` of a run, check it against PyTorch, judge the file as training judged the
    generator, describe it, and have it logged and registered as a version of ``model``.

    Args:
        data: where the training data are.

    Raises:
        UserError: PyTorch and onnxruntime disagree.
    """
    # Not above: ONNX's libraries take seconds to import, which the first step would wait for.
    from export.card import write_card
    from export.generator import export_onnx, metadata

    generator, info = checkpoint.load_generator(run_dir / "best")
    onnx = run_dir / "best" / "gen.onnx"
    difference = export_onnx(generator, onnx, metadata(info))
    info = _judged(onnx, info, data)
    write_card(onnx, info, difference)
    tracker = tracking.Tracker(run_dir, None)
    for film in write_progress(run_dir):
        tracker.log_artifact(film, "samples")
    tracker.log_model(model, onnx, info)
    metric = info["metric"]
    say(
        f"best generator: {metric['name']} {metric['value']:.2f} at {info['kimg']:g} kimg; {onnx} agrees with PyTorch"
        f" to {difference:.1e}"
    )


def leave_report(run_dir: Path, status: tracking.Status) -> None:
    """Write ``report.html`` of a run that ends with ``status``, and have it logged. What stands in the way, such as a
    full disk, is worth a warning: a run must come to its end."""
    try:
        path = write_report(run_dir, status=status)
    except UserError as error:
        say(f"warning: no report: {error}")
        return
    tracking.Tracker(run_dir, None).log_artifact(path)


def _judged(onnx: Path, info: Mapping[str, Any], data: str) -> dict[str, Any]:
    """``info`` with what judging the file tells; as it is, with a warning, where it cannot be judged."""
    from export.evaluate import judge, open_evaluator, with_judgement

    try:
        judged = judge(onnx, open_evaluator(info, data))
    except UserError as error:
        say(f"warning: {onnx.name} is not judged: {error}")
        return dict(info)
    noise = f" +- {judged['standard_error']:.2f}" if "standard_error" in judged else ""
    say(f"{onnx.name} through onnxruntime: {judged['name']} {judged['value']:.2f}{noise}")
    return with_judgement(info, judged)


def summary(storage: Storage) -> dict[str, Any]:
    """The JSON object of a finished run; its ``mlflow_run_id`` is null as long as MLflow knows nothing of it."""
    _, info = checkpoint.load_generator(storage.work / "best")
    return {
        "run_dir": storage.location,
        "mlflow_run_id": tracking.mlflow_run_id(storage.work),
        "kimg": checkpoint.position(storage.checkpoints()[-1]) / 1000,
        "metric": {"name": info["metric"]["name"], "value": info["metric"]["value"], "kimg": info["kimg"]},
        "onnx": storage.join("best/gen.onnx"),
    }
