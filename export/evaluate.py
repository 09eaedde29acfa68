"""Evaluate an exported file: the training's metric on the images that onnxruntime generates with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from catgan.command import UserError, say
from catgan.dataset import Manifest
from export.generator import annotate
from infer.latents import latents
from infer.session import Generator
from trainer.features.extractors import MIN_FID, OFFLINE, choose_extractor, offline_network
from trainer.metrics import classes
from trainer.metrics.evaluate import Evaluator
from trainer.metrics.numbers import is_same_metric

MAX_RELATIVE_DIFFERENCE = 1e-3
"""Largest expected difference between the metric of an fp32 file and that of its training, from the same seeds."""


def evaluate_file(onnx_path: Path, evaluator: Evaluator) -> dict[str, Any]:
    """Evaluate an exported generator, and write ``onnx_metric`` with its value and number of generated images to the
    file's metadata.

    If an fp32 file differs from its training by more than 0.1%, a warning is printed: training may have generated its
    images on a GPU, otherwise something is wrong.

    Returns:
        The result of ``evaluator``, and ``relative``, the relative difference from the training's value in the file's
        metadata (0.01: larger by 1%), None if that has another name or number of images.
    """
    generator = Generator(onnx_path, "auto")
    say(f"evaluating {onnx_path.name}: {evaluator.name} and its standard error")
    evaluator.prepare()

    def generate(seeds: Sequence[int]) -> Tensor:
        label = classes.as_trained(generator, seeds, evaluator.manifest.splits[evaluator.split])
        return torch.from_numpy(generator(latents(seeds, generator.z_dim), label=label)).permute(0, 3, 1, 2)

    result = evaluator(generate)
    recorded = generator.metadata
    relative = None
    if is_same_metric(result, {"name": recorded.get("metric", ""), "n_fake": recorded.get("metric_n_fake")}):
        relative = result["value"] / float(recorded["metric_value"]) - 1
        if recorded["precision"] == "fp32" and not abs(relative) <= MAX_RELATIVE_DIFFERENCE:
            say(
                f"warning: {onnx_path.name} has {result['name']} {result['value']:.4g}, training measured"
                f" {float(recorded['metric_value']):.4g}: they differ by more than {MAX_RELATIVE_DIFFERENCE:.1%}"
            )
    entries = {"": result["name"], "_value": result["value"], "_n_fake": result["n_fake"]}
    annotate(onnx_path, {f"onnx_metric{key}": str(value) for key, value in entries.items()})
    return {**result, "relative": relative}


def with_evaluation(info: Mapping[str, Any], result: Mapping[str, Any] | None) -> dict[str, Any]:
    """``info`` with the standard error of ``result`` (see ``evaluate_file``) added to its metric, or with ``result`` as
    its metric if training did not evaluate this generator."""
    if result is None:
        return dict(info)
    metric = info.get("metric") or result
    if is_same_metric(metric, result) and "standard_error" in result:
        metric = {**metric, "standard_error": result["standard_error"]}
    return {**info, "metric": metric}


def open_evaluator(info: Mapping[str, Any], data: str) -> Evaluator:
    """The evaluator of a generator's training: the same metric network, number of images and seeds.

    Args:
        info: the generator's origin, see ``trainer.checkpoints.checkpoint.load_generator``.
        data: path or URL of its training data.

    Raises:
        UserError: the data are missing or not those of the training, or the metric network is not available.
    """
    metric, settings = info.get("metric") or {}, info["config"]["eval"]
    manifest = Manifest.load(data)
    if manifest.size != info["config"]["model"]["size"]:
        raise UserError(f"{data} has images of {manifest.size} pixels, the generator makes another size")
    if manifest.digest != (info.get("dataset_digest") or manifest.digest):
        raise UserError(f"{data} is not the training data of the generator (digest {manifest.digest[:12]}...)")
    name = metric.get("extractor", settings["extractor"]).partition("-")[0]
    num_fake = metric.get("n_fake", settings.get("num", MIN_FID))
    offline = offline_network(info["config"].get("projected", {}).get("weight", 0.0))
    weights = None if name in OFFLINE else settings["weights"]
    extractor = choose_extractor(name, weights, num_fake=num_fake, offline=offline)
    if extractor.weights_sha256 != metric.get("weights_sha256", extractor.weights_sha256):
        raise UserError("the metric network has other weights than in training")
    manifest = replace(manifest, max_broken=info["config"]["loader"]["max_broken"])
    return Evaluator(extractor, manifest, num_fake, seed=metric.get("seed", 0))
