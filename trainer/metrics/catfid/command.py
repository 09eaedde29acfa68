"""The work of ``catfid``: measure how far apart two sets of images are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from catgan.command import say
from catgan.files import atomic_path
from trainer.features.extractors import choose_extractor, imagenet_classifier, offline_network
from trainer.features.networks import EFFLITE0
from trainer.metrics.catfid.checks import check_dimensions, check_sides, default_metrics
from trainer.metrics.catfid.evaluation import Evaluation, SideEvaluator
from trainer.metrics.catfid.measure import Measured, Networks, measure
from trainer.metrics.catfid.neighbours import neighbour_sheet
from trainer.metrics.catfid.options import NEED_IMAGES, Options, parse
from trainer.metrics.catfid.sides import ImageSet, Side, generator_of_run, is_trained_on_efflite0, num_images, open_side
from trainer.metrics.intervals import compare, interval


def run(argv: list[str]) -> dict[str, Any]:
    """Run ``catfid`` with these arguments. Returns the JSON object for stdout."""
    began = time.perf_counter()
    options = parse(argv)
    options = replace(
        options,
        real=generator_of_run(options.real),
        fake=options.fake and generator_of_run(options.fake),
        against=options.against and generator_of_run(options.against),
    )
    locations = {"REAL": options.real, "FAKE": options.fake, "OTHER": options.against}
    sides = {
        name: open_side(location, split=options.split, num=options.num_generated, seed=options.seed)
        for name, location in locations.items()
        if location
    }
    options = replace(options, metrics=options.metrics or default_metrics(sides, options))
    check_sides(sides, options)
    trained_on_efflite0 = [name for name, side in sides.items() if is_trained_on_efflite0(side)]
    extractor = choose_extractor(
        options.extractor, options.weights, offline=offline_network(float(bool(trained_on_efflite0)))
    )
    if trained_on_efflite0 and extractor.name == EFFLITE0.name:
        say(
            f"warning: {', '.join(trained_on_efflite0)} was trained on the features of {EFFLITE0.name} and looks better"
            " in them than it is: --extractor opennsfw measures with others"
        )
    check_dimensions(sides, extractor)
    networks = Networks(extractor, imagenet_classifier() if "cats" in options.metrics else None)
    real = None
    if options.metrics != ("ppl",) or options.save_stats:
        real = measure(sides["REAL"], "REAL", networks, not NEED_IMAGES.isdisjoint(options.metrics))
    result: dict[str, Any] = {"metrics": {}}
    if real and options.save_stats:
        real.gaussian.save(options.save_stats)
        result["save_stats"] = str(options.save_stats)
    if options.fake:
        result |= _evaluate(sides, options, SideEvaluator(options, networks, real))
    _report(result)
    return result | {
        "n_real": real.gaussian.n if real else num_images(sides["REAL"]),
        "n_fake": num_images(sides["FAKE"]) if options.fake else None,
        "extractor": extractor.name,
        "weights_sha256": extractor.weights_sha256,
        "resize": extractor.resize,
        "seed": options.seed,
        "seconds": round(time.perf_counter() - began, 2),
    }


def _evaluate(sides: Mapping[str, Side], options: Options, evaluate: SideEvaluator) -> dict[str, Any]:
    """Everything about FAKE, and about OTHER, as parts of the JSON object."""
    fake = evaluate(sides["FAKE"], "FAKE", options.seed)
    result: dict[str, Any] = {"metrics": fake.values, **fake.details, **_intervals(fake)}
    if options.repeat:
        result |= _repeat(fake, options, evaluate)
    if options.against:
        result["against"] = _compare_with_other(fake, evaluate(sides["OTHER"], "OTHER", options.seed))
    if options.neighbours:
        assert evaluate.real is not None
        assert fake.measured is not None
        _write_neighbours(sides["REAL"], evaluate.real, fake.measured, options.neighbours)
        result["neighbours"] = str(options.neighbours)
    return result


def _intervals(evaluation: Evaluation) -> dict[str, Any]:
    if not evaluation.errors:
        return {}
    return {
        "standard_error": evaluation.errors,
        "interval95": {name: interval(evaluation.values[name], error) for name, error in evaluation.errors.items()},
    }


def _repeat(first: Evaluation, options: Options, evaluate: SideEvaluator) -> dict[str, Any]:
    """Evaluate FAKE with further ranges of seeds that do not overlap: mean, standard deviation and all values."""
    assert options.fake is not None
    assert options.repeat is not None
    num = options.num_generated
    seeds_per_run = num * (2 if "ppl" in options.metrics else 1)  # a path has two ends
    runs = [first.values]
    for i in range(1, options.repeat):
        seed = options.seed + i * seeds_per_run
        side = open_side(options.fake, split=None, num=num, seed=seed)
        runs.append(evaluate(side, f"FAKE, {i + 1} of {options.repeat}", seed).values)
    columns = {name: [run[name] for run in runs] for name in first.values}
    return {
        "metrics": {name: statistics.fmean(values) for name, values in columns.items()},
        "std": {name: statistics.stdev(values) for name, values in columns.items()},
        "repeats": runs,
    }


def _compare_with_other(fake: Evaluation, other: Evaluation) -> dict[str, Any]:
    """The metrics of OTHER, and for each of them the difference of FAKE from it with its interval."""
    differences = {}
    for name, value in fake.values.items():
        comparison = compare(value, fake.errors[name], other.values[name], other.errors[name])
        differences[name] = asdict(comparison) | {"more_than_noise": comparison.more_than_noise}
    return {"metrics": other.values, **_intervals(other), "difference": differences}


def _write_neighbours(reals: Side, real: Measured, fake: Measured, path: Path) -> None:
    assert isinstance(reals, ImageSet)
    shown = fake.first_images
    sheet = neighbour_sheet(shown, fake.features[: len(shown)], real.features, reals.batches())
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG")


def _report(result: Mapping[str, Any]) -> None:
    """Print the metrics and comparisons of the JSON object ``result`` to stderr."""
    for name, value in result["metrics"].items():
        spread = ""
        if name in result.get("std", {}):
            spread = f" (standard deviation {result['std'][name]:.2g} of {len(result['repeats'])})"
        elif name in result.get("interval95", {}):
            spread = " (95 % interval {:.4g} to {:.4g})".format(*result["interval95"][name])
        say(f"{name} {value:.4g}{spread}")
    for name, found in result.get("against", {}).get("difference", {}).items():
        if found["difference"] == 0:
            say(f"{name}: FAKE and OTHER are equal")
            continue
        low, high = found["interval"]
        say(
            f"{name}: FAKE is {'better' if found['difference'] < 0 else 'worse'} than OTHER by "
            f"{abs(found['difference']):.4g} (95 % interval of the difference {low:.4g} to {high:.4g}), "
            + ("more than noise" if found["more_than_noise"] else "which can be noise")
        )
