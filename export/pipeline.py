"""The work of ``catexport``: load a generator, export, evaluate and compare its precisions, then publish the files."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catgan.command import UserError, say
from export.card import write_card
from export.evaluate import open_evaluator, with_evaluation
from export.options import Options
from export.page import write_page
from export.registry import register
from export.source import WEIGHTS, Source, open_source
from export.variants import Variant, degraded, make_variants
from trainer.checkpoints.transfer import write_networks
from trainer.metrics.evaluate import Evaluator
from trainer.tracking.names import problem_with_model
from trainer.tracking.server import as_user_errors, connect, find_run


def run(options: Options, uri: str | None) -> dict[str, Any]:
    """Export the generator of ``options.source``. Returns the JSON object for stdout.

    Args:
        uri: MLflow's tracking server, if ``options.needs_mlflow``.

    Raises:
        UserError: there is no such generator, its file generates other images, it is much worse than fp32, or a file
            cannot be written.
    """
    if options.register and (problem := problem_with_model(options.register, "--register")):
        raise UserError(problem)
    source = open_source(options.source, uri)
    if options.register and not source.info.get("run_id"):
        raise UserError(f"--register: {options.source} does not tell its MLflow run")
    if options.weights is not None:
        write_networks(Path(options.source), options.weights)
    say(f"exporting {source.info['recipe']} at {source.info['kimg']:g} kimg")
    evaluator = _evaluator(source, options.data)
    with _scratch_folder(options.out) as scratch:
        exported = _write_files(source, options, evaluator, scratch)
        first = exported.variants[0]
        result: dict[str, Any] = {
            "onnx": str(exported.paths[first.precision]),
            "precision": first.precision,
            "max_abs_diff": first.max_abs_diff,
            "files": [{"onnx": str(exported.paths[v.precision]), **v.summary()} for v in exported.variants],
        }
        if options.card:
            card = write_card(exported.paths[first.precision], exported.info, first.max_abs_diff, exported.compared)
            result["card"] = str(card)
        if options.register:
            assert uri is not None
            result["versions"] = [
                _register(exported, variant, source.weights, options.register, uri) for variant in exported.variants
            ]
        if options.web is not None:
            write_page(exported.paths[first.precision], options.web)
            result["web"] = str(options.web)
    if options.weights is not None:
        result["weights"] = str(options.weights)
    return result


@dataclass(frozen=True)
class _Exported:
    """The files that were written."""

    paths: dict[str, Path]
    """By precision."""
    variants: list[Variant]
    """In the order in which they were requested."""
    compared: list[Variant]
    """fp32, whether requested or not, and the others."""
    info: dict[str, Any]
    """Of the source, with the results of evaluating the fp32 file."""


def _write_files(source: Source, options: Options, evaluator: Evaluator | None, scratch: Path) -> _Exported:
    """Export all precisions to ``scratch``, check their quality, then move the requested ones to their final paths."""
    made = {p: scratch / f"{p}.onnx" for p in dict.fromkeys(["fp32", *options.precision])}
    variants = {
        variant.precision: variant
        for variant in make_variants(source.generator, source.info, made, options.uint8, evaluator)
    }
    requested = [variants[precision] for precision in options.precision]
    if (worse := degraded(requested)) and not options.force:
        losses = ", ".join(f"{v.precision} by {v.loss:.1%}" for v in worse)
        raise UserError(f"worse than fp32: {losses}, allowed are 5%; nothing was written, --force writes it")
    unevaluated = [v.precision for v in requested if v.precision != "fp32" and v.loss is None]
    if options.register and unevaluated and not options.force:
        raise UserError(f"--register: {', '.join(unevaluated)} was not evaluated; give --data, or --force")
    paths = _paths(options.out, options.precision)
    for variant in requested:
        made[variant.precision].replace(paths[variant.precision])
        _report(paths[variant.precision], variant)
    compared = [variants["fp32"], *(v for v in requested if v.precision != "fp32")]
    return _Exported(paths, requested, compared, with_evaluation(source.info, variants["fp32"].metric))


def _evaluator(source: Source, data: str | None) -> Evaluator | None:
    """The evaluator of the training; None if ``data`` is "none", or if ``data`` is not given and the training data or
    the metric network are not available."""
    if data == "none":
        return None
    location = data or source.data
    if location is None:
        say("not evaluated: the location of the training data is unknown (--data)")
        return None
    try:
        return open_evaluator(source.info, location)
    except UserError as error:
        if data is not None:
            raise
        say(f"not evaluated: {error}")
        return None


@contextmanager
def _scratch_folder(out: Path) -> Iterator[Path]:
    """A temporary folder on the file system of ``out``. OSErrors inside become UserErrors."""
    # Not tempfile.TemporaryDirectory, which leaves the folder if a signal comes just after it made it.
    folder = out.parent / f".catexport-{uuid.uuid4().hex[:12]}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.filename or out.parent}: {error.strerror or error})") from error


def _paths(out: Path, precisions: Sequence[str]) -> dict[str, Path]:
    """The final path of each precision."""
    if len(precisions) == 1:
        return {precisions[0]: out}
    return {p: out if p == "fp32" else out.with_stem(f"{out.stem}-{p}") for p in precisions}


def _report(path: Path, variant: Variant) -> None:
    text = f"{path}: differs from PyTorch by at most {variant.max_abs_diff:.1e}"
    if variant.speed is not None:
        text += f", {variant.size:.2f} times the size and {variant.speed:.2f} times the speed of fp32"
    if variant.metric is not None:
        text += f", {variant.metric['name']} {variant.metric['value']:.2f}"
    if variant.loss is not None:
        text += f" ({variant.loss:+.1%})"
    say(text)


def _register(exported: _Exported, variant: Variant, weights: bytes | None, model: str, uri: str) -> str:
    """Register a file, with a card of its own and the weights it was made from. Returns the version."""
    path = exported.paths[variant.precision]
    with tempfile.TemporaryDirectory() as scratch:
        release = Path(scratch, path.name)
        shutil.copyfile(path, release)
        write_card(release, exported.info, variant.max_abs_diff, exported.compared)
        if weights is not None:
            release.with_name(WEIGHTS).write_bytes(weights)
        with as_user_errors(uri):
            run_id = exported.info["run_id"]
            find_run(connect(uri), uri, run_id)
            version = register(uri, run_id, model, release, exported.info)
    say(f"registered as models:/{model}/{version}")
    return version
