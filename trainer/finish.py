"""After the last step: the best generator becomes ``gen.onnx`` with a card, and a version in MLflow's registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.card import write_card
from export.generator import export_onnx, metadata
from export.registry import register
from infer.command import say
from trainer import checkpoint
from trainer.recorder import progress_gif
from trainer.storage import Storage
from trainer.tracking import connect


def finish(run_dir: Path, uri: str, run_id: str, model: str) -> None:
    """Export ``best/gen.safetensors`` of a run, check it against PyTorch, describe it, log it and register it.

    Raises:
        UserError: PyTorch and onnxruntime disagree, or MLflow does not answer.
    """
    generator, info = checkpoint.load_generator(run_dir / "best")
    onnx = run_dir / "best" / "gen.onnx"
    difference = export_onnx(generator, onnx, metadata(info))
    write_card(onnx, info, difference)
    progress_gif(run_dir)
    connect(uri).log_artifact(run_id, str(run_dir / "progress.gif"), "samples")
    version = register(uri, run_id, model, onnx, info)
    metric = info["metric"]
    say(
        f"best generator: {metric['name']} {metric['value']:.2f} at {info['kimg']:g} kimg; {onnx} agrees with PyTorch"
        f" to {difference:.1e}; registered as models:/{model}/{version}"
    )


def summary(storage: Storage, run_id: str) -> dict[str, Any]:
    """The JSON object of a finished run."""
    _, info = checkpoint.load_generator(storage.work / "best")
    return {
        "run_dir": storage.location,
        "mlflow_run_id": run_id,
        "kimg": checkpoint.position(storage.checkpoints()[-1]) / 1000,
        "metric": {"name": info["metric"]["name"], "value": info["metric"]["value"], "kimg": info["kimg"]},
        "onnx": storage.join("best/gen.onnx"),
    }
