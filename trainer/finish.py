"""After the last step: the best generator becomes ``gen.onnx`` with a card, and a version in MLflow's registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.generator import export_onnx, metadata
from infer.command import say
from trainer.checkpoint import load_generator
from trainer.data.shards import Manifest
from trainer.recorder import progress_gif


def finish(run_dir: Path, uri: str, run_id: str, model: str, manifest: Manifest) -> dict[str, Any]:
    """Export, check, describe, log and register ``best/gen.safetensors`` of a run.

    Returns:
        kimg, metric {name, value} and onnx, for the command's JSON.
    """
    best = run_dir / "best"
    generator, info = load_generator(best)
    onnx = best / "gen.onnx"
    difference = export_onnx(generator, onnx, metadata(info))
    metric = {"name": info["metric"]["name"], "value": info["metric"]["value"]}
    say(
        f"best generator: {metric['name']} {metric['value']:.2f} at {info['kimg']:g} kimg;"
        f" {onnx} agrees with PyTorch to {difference:.1e}"
    )
    progress_gif(run_dir)
    return {"kimg": info["kimg"], "metric": metric, "onnx": str(onnx)}
