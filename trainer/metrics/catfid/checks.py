"""Which metrics are possible for the given sides; everything here is checked before images are read."""

from __future__ import annotations

from collections.abc import Mapping

from catgan.command import UserError, say
from trainer.features.extractors import MIN_FID, Extractor
from trainer.metrics.catfid.manifold import DENSITY_NEIGHBOURS, NEIGHBOURS
from trainer.metrics.catfid.options import NEED_IMAGES, Options
from trainer.metrics.catfid.scores import SPLITS
from trainer.metrics.catfid.sides import ImageSet, Side, num_images, width_x_height
from trainer.metrics.frechet import Gaussian
from trainer.metrics.intervals import GROUPS

# Fewest images of REAL and of the evaluated side.
_FEWEST = {"is": (0, SPLITS), "pr": (DENSITY_NEIGHBOURS + 1, NEIGHBOURS + 1)}


def default_metrics(sides: Mapping[str, Side], options: Options) -> tuple[str, ...]:
    """The metrics that are computed without --metrics: fid and kid, as far as the sides allow."""
    if any(isinstance(side, Gaussian) for side in sides.values()):
        return ("fid",)
    if not options.fake:
        return ()
    count = num_images(sides["FAKE"]) or 0
    if count >= MIN_FID or options.force:
        return ("fid", "kid")
    say(f"kid only: FAKE has {count:,} images, fid needs {MIN_FID:,} (or --force)")
    return ("kid",)


def check_sides(sides: Mapping[str, Side], options: Options) -> None:
    """Raise ``UserError`` unless REAL, FAKE and OTHER can be compared by ``options.metrics``."""
    kinds = {side.kind for side in sides.values() if isinstance(side, ImageSet)}
    if options.split is not None and "shards" not in kinds:
        raise UserError("--split is given, but neither side is a folder of shards: leave it out")
    if options.num is not None and "onnx" not in kinds:
        raise UserError("--num is given, but neither side is a gen.onnx: leave it out")
    _check_sizes(sides)
    evaluated = {name: side for name, side in sides.items() if name != "REAL"}
    for name, side in evaluated.items():
        _check_kind(name, side, sides["REAL"], options)
        _check_counts(name, side, sides["REAL"], options)
    if len({num_images(side) for side in evaluated.values()}) > 1:
        raise UserError(
            f"FAKE has {num_images(sides['FAKE'])} images, OTHER has {num_images(sides['OTHER'])}: distances of "
            "different numbers cannot be compared, give equally many"
        )
    num_real = num_images(sides["REAL"])
    if num_real is not None and num_real < 2:
        raise UserError(f"REAL has {num_real} images: at least 2 are needed")
    if "fid" in options.metrics and num_real is not None and num_real < MIN_FID:
        say(f"warning: with only {num_real:,} real images a Fréchet distance is biased upwards; kid is not")


def check_dimensions(sides: Mapping[str, Side], extractor: Extractor) -> None:
    """Raise ``UserError`` if given statistics are of another network."""
    for name, side in sides.items():
        if isinstance(side, Gaussian) and side.dim != extractor.dim:
            raise UserError(
                f"the statistics of {name} have {side.dim} dimensions, {extractor.name} has {extractor.dim}: "
                "give the images, or the extractor that computed them"
            )


def _check_sizes(sides: Mapping[str, Side]) -> None:
    sizes = {name: side.size for name, side in sides.items() if isinstance(side, ImageSet)}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} is {width_x_height(size)}" for name, size in sizes.items())
        raise UserError(f"{listed}: resize one side (catdata build --size), or the distance would measure sharpness")


def _check_kind(name: str, side: Side, real: Side, options: Options) -> None:
    """Whether ``side`` is of a kind that allows the metrics and options."""
    location = options.fake if name == "FAKE" else options.against
    kind = side.kind if isinstance(side, ImageSet) else "npz"
    if "ppl" in options.metrics and kind != "onnx":
        raise UserError(f"ppl follows paths between latents: {name} must be a gen.onnx, {location} is not")
    if options.repeat and kind != "onnx":
        raise UserError(
            f"--repeat generates images of other seeds: {name} must be a gen.onnx, {location} is not; for other images "
            "use --interval"
        )
    if "ppl" in options.metrics and isinstance(side, ImageSet) and side.generator and side.generator.is_uint8:
        raise UserError(f"ppl measures changes below one pixel level: {location} rounds; export it without --uint8")
    without_images = isinstance(real, Gaussian) or kind == "npz"
    if without_images and (others := [m for m in options.metrics if m in NEED_IMAGES]):
        raise UserError(
            f"{', '.join(others)}: the images of both sides are needed, an .npz has statistics only; use --metrics fid"
        )
    if options.with_errors and kind == "npz":
        raise UserError(f"intervals need the images of {name}, {location} has statistics only")


def _check_counts(name: str, side: Side, real: Side, options: Options) -> None:
    """Whether there are enough images on both sides."""
    num_real, num_fake = num_images(real), num_images(side)
    if num_fake is None:
        location = options.fake if name == "FAKE" else options.against
        raise UserError(f"{location} does not contain its number of images (n), which the result's name needs")
    if min(num_fake, num_real or 2) < 2:
        raise UserError(f"REAL has {num_real} images, {name} has {num_fake}: at least 2 of each are needed")
    if options.with_errors and num_fake < 2 * GROUPS:
        raise UserError(f"intervals need {2 * GROUPS} images of {name}, it has {num_fake}")
    for metric in options.metrics:
        fewest_real, fewest_fake = _FEWEST.get(metric, (0, 0))
        if (num_real or 0) < fewest_real or num_fake < fewest_fake:
            raise UserError(
                f"{metric} needs at least {fewest_real} real and {fewest_fake} generated images, REAL has {num_real}, "
                f"{name} has {num_fake}: add images, or use --metrics kid"
            )
    if "fid" in options.metrics and num_fake < MIN_FID:
        if not options.force:
            raise UserError(
                f"fid needs at least {MIN_FID:,} images, {name} has {num_fake:,}: add images, or use --metrics kid "
                "(--force computes it anyway)"
            )
        say(f"warning: the Fréchet distance of only {num_fake:,} images is mostly bias; kid is not")
