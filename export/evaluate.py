"""How good the exported file itself is: the metric of the pictures that onnxruntime draws with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from catgan.command import UserError, say
from export.generator import annotate
from infer.latents import latents
from infer.session import Generator
from trainer.data.manifest import Manifest
from trainer.features.extractors import MIN_FID, choose_extractor
from trainer.metrics.evaluate import Evaluator
from trainer.metrics.intervals import GROUPS, frechet_error

MAX_RELATIVE_DIFFERENCE = 1e-3
"""Between the exported file's metric and the training's, of the same seeds, in fp32 on both sides."""


def judge(onnx_path: Path, evaluator: Evaluator) -> dict[str, Any]:
    """The metric of an exported generator, which is also written to the file's metadata (``onnx_metric``,
    ``onnx_metric_value``).

    Returns:
        The evaluation's result, its ``standard_error`` (see ``frechet_error``), and ``relative``: how much larger the
        value is than the training's in the file's metadata (0.01: by 1%), None if that is of another name. A warning
        is said if an fp32 file differs by more than 0.1%: training may have drawn on a GPU, else something is wrong.
    """
    generator = Generator(onnx_path, "auto")
    say(f"judging {onnx_path.name}: {evaluator.name} and its standard error")
    evaluator.prepare()
    features: list[torch.Tensor] = []
    result = evaluator(
        lambda seeds: torch.from_numpy(generator(latents(seeds, generator.z_dim))).permute(0, 3, 1, 2), features.append
    )
    assert evaluator.real is not None
    if result["n_fake"] >= 2 * GROUPS:  # else there is nothing to tell it from
        result["standard_error"] = frechet_error(evaluator.real, torch.cat(features))
    recorded = generator.metadata
    relative = None
    if recorded.get("metric") == result["name"]:
        relative = result["value"] / float(recorded["metric_value"]) - 1
        if recorded["precision"] == "fp32" and not abs(relative) <= MAX_RELATIVE_DIFFERENCE:
            say(
                f"warning: {onnx_path.name} has {result['name']} {result['value']:.4g}, training measured"
                f" {float(recorded['metric_value']):.4g}: more than {MAX_RELATIVE_DIFFERENCE:.1%} apart"
            )
    annotate(onnx_path, {"onnx_metric": result["name"], "onnx_metric_value": str(result["value"])})
    return {**result, "relative": relative}


def with_judgement(info: Mapping[str, Any], judged: Mapping[str, Any] | None) -> dict[str, Any]:
    """``info`` with the standard error that ``judge`` found, and with its metric where the training measured none of
    this generator."""
    if judged is None:
        return dict(info)
    metric = info.get("metric") or judged
    if metric["name"] == judged["name"] and "standard_error" in judged:
        metric = {**metric, "standard_error": judged["standard_error"]}
    return {**info, "metric": metric}


def open_evaluator(info: Mapping[str, Any], data: str) -> Evaluator:
    """What measured a generator in its training, once more: the same network, number of pictures and seeds.

    Args:
        info: the generator's origin, as ``trainer.checkpoints.checkpoint.load_generator`` gives it.
        data: where its training data are.

    Raises:
        UserError: they are not there, are of another size or other data, or the network cannot be had.
    """
    metric, settings = info.get("metric") or {}, info["config"]["eval"]
    manifest = Manifest.load(data)
    if manifest.size != info["config"]["model"]["size"]:
        raise UserError(f"{data} has pictures of {manifest.size} pixels, the generator draws other sizes")
    if manifest.digest != (info.get("dataset_digest") or manifest.digest):
        raise UserError(f"{data} is not what the generator was trained on (digest {manifest.digest[:12]}...)")
    name = metric.get("extractor", settings["extractor"]).partition("-")[0]
    num_fake = metric.get("n_fake", settings.get("num", MIN_FID))
    extractor = choose_extractor(name, settings["weights"] if name != "efflite0" else None, num_fake=num_fake)
    if extractor.weights_sha256 != metric.get("weights_sha256", extractor.weights_sha256):
        raise UserError("the network that judges has other weights than in training")
    manifest = replace(manifest, max_broken=info["config"]["loader"]["max_broken"])
    return Evaluator(extractor, manifest, num_fake, seed=metric.get("seed", 0))
