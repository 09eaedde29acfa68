"""The model card: what a generator is, its quality and how that was measured, and how to use it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from PIL import Image

from catgan.files import atomic_write
from export.directions import AMOUNTS, SEEDS, sheet
from infer.directions import read_directions
from infer.files import encode
from infer.grid import grid
from infer.latents import latents
from infer.provenance import Provenance
from infer.session import Generator
from trainer.metrics.numbers import is_same_metric

if TYPE_CHECKING:
    from export.variants import Variant

_NUM_SAMPLES = 16
_PER_CLASS, _MAX_ROWS = 8, 16  # of a sheet by class

_PROTOCOL = {
    "n_real": "Real images",
    "n_fake": "Generated images, not selected",
    "seed": "First seed",
    "extractor": "Metric network",
    "weights_sha256": "SHA-256 of its weights",
    "resize": "Resizing to its input",
}


def write_card(onnx_path: Path, info: Mapping[str, Any], max_abs_diff: float, variants: Sequence[Variant] = ()) -> Path:
    """Write ``card.md``, and ``samples.png`` and ``directions.png`` for it, to the folder of an exported generator.

    Args:
        onnx_path: written by ``export.generator.export_onnx``.
        info: the generator's origin, see ``trainer.checkpoints.checkpoint.load_generator``.
        max_abs_diff: largest difference between onnxruntime and PyTorch.
        variants: fp32 and the precisions compared with it, see ``export.variants.make_variants``.

    Returns:
        The path of the card.

    Raises:
        OSError: a file cannot be written.
    """
    generator = Generator(onnx_path, "cpu")
    origin = Provenance("sheet", generator.sha256, range(_NUM_SAMPLES), (1.0,), device=generator.device)
    if generator.classes:
        images = {"samples.png": (_by_class(generator), replace(origin, seeds=(), psi=()).packet())}
    else:
        images = {"samples.png": (grid(generator(latents(origin.seeds, generator.z_dim))), origin.packet())}
    directions = read_directions(generator.metadata, generator.z_dim, onnx_path)
    if len(directions):
        # Its rows have different directions, which one command does not make.
        images["directions.png"] = (sheet(generator, directions), replace(origin, seeds=(), psi=()).packet())
    for name, (image, xmp) in images.items():
        atomic_write(onnx_path.with_name(name), encode(np.asarray(image), ".png", xmp))
    card = onnx_path.with_name("card.md")
    atomic_write(card, _text(onnx_path, generator, info, max_abs_diff, variants, len(directions)).encode())
    return card


def _by_class(generator: Generator) -> Image.Image:
    """A row for each class, the first ones, with the same seeds."""
    rows = min(len(generator.classes), _MAX_ROWS)
    label = np.repeat(np.arange(rows), _PER_CLASS)
    z = latents(range(_PER_CLASS), generator.z_dim)
    return grid(generator(np.tile(z, (rows, 1)), label=label), _PER_CLASS)


def _text(
    onnx_path: Path,
    generator: Generator,
    info: Mapping[str, Any],
    max_abs_diff: float,
    variants: Sequence[Variant],
    directions: int,
) -> str:
    size, z_dim, name = generator.size, generator.z_dim, onnx_path.name
    labels = generator.classes
    facts = {
        "Recipe": f"`{info['recipe']}`, {info['kimg']:g} thousand images seen",
        "Images": f"{size} x {size} pixels, RGB",
        "Parameters": f"{_num_parameters(onnx_path) / 1e6:.2f} million",
        **({"Classes": ", ".join(f"{i} {_cell(label)}" for i, label in enumerate(labels))} if labels else {}),
        "Training data": f"digest `{info.get('dataset_digest') or 'unknown'}`",
        "MLflow run": f"`{info.get('run_id') or 'none'}`",
        "Weights": f"SHA-256 `{generator.metadata['weights_sha256']}`",
        "Exported with": f"{generator.metadata['tools']}; ONNX opset {generator.metadata['opset']}",
        "Precision": generator.metadata["precision"],
        "ONNX against PyTorch": f"largest difference {max_abs_diff:.1e} for images in [-1, 1]",
    }
    return f"""\
# Cat generator `{info["recipe"]}` at {size} x {size}

{_samples(labels)}

{_table(facts)}
## Quality

{_training_metric(info.get("metric"))}
{_file_metric(info.get("metric"), generator.metadata)}{_precisions(variants)}
## Use

    catinfer --onnx {name} --n {_NUM_SAMPLES} --seed 0 --out cats.png{_one_class(name, labels)}

or with NumPy and onnxruntime alone:

    import numpy, onnxruntime
    session = onnxruntime.InferenceSession("{name}", providers=["CPUExecutionProvider"])
    z = numpy.random.default_rng(0).standard_normal((4, {z_dim}), dtype=numpy.float32)
    image = session.run(["image"], {_feed(generator)})[0]  # {_output(generator)}

Image *i* of `catinfer --seed s` comes from `numpy.random.PCG64(s + i)`, whatever `--n` is. PyTorch's seeds give other
images. {_psi(generator)}
{_directions(directions)}
## Limits

- The generator makes images like its training data: cat faces, seen from the front, at this size. {_conditions(labels)}
- Some seeds give distorted images; `--psi` below 1 gives more typical and less varied ones.
- A generator can come close to images it was trained on. Check this before publishing if the data are private.

## Licence

The weights belong to the people who trained them. How they and the generated images may be used also depends on the
licence of the training data, which is not recorded here.
"""


def _directions(count: int) -> str:
    """A section with the sheet of directions, if there are any."""
    if not count:
        return ""
    return f"""
## Directions

![{SEEDS} cats, moved along {count} directions](directions.png)

Each row moves the cats of seeds 0 to {SEEDS - 1} along one direction of the latent space, by {AMOUNTS[0]} to
{AMOUNTS[-1]:+d} standard deviations, as `--direction` does. The directions are those in which the generator's first
features vary most (GANSpace, Härkönen et al. 2020). No direction is named, and most change several things at once.
"""


def _samples(labels: Sequence[str]) -> str:
    if not labels:
        return f"""![{_NUM_SAMPLES} generated cats](samples.png)

The images of seeds 0 to {_NUM_SAMPLES - 1}, not selected: the output of the command under "Use"."""
    which = "each class" if len(labels) <= _MAX_ROWS else f"each of the first {_MAX_ROWS} classes"
    return f"""![Generated cats, a row for {which}](samples.png)

A row for {which}, in the order below, with the images of seeds 0 to {_PER_CLASS - 1}, not selected."""


def _one_class(name: str, labels: Sequence[str]) -> str:
    if not labels:
        return ""
    return f"""
    catinfer --onnx {name} --n {_NUM_SAMPLES} --class {shlex.quote(labels[0])}"""


def _conditions(labels: Sequence[str]) -> str:
    if labels:
        return "Its only\n  condition is the class; a class with few training images has less varied ones."
    return "It has no conditions\n  such as breed or pose."


def _cell(text: str) -> str:
    """A name in a Markdown table."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+-.!|&~" else c for c in text)


def _feed(generator: Generator) -> str:
    label = f', "label": numpy.arange(4) % {len(labels)}' if (labels := generator.classes) else ""
    psi = ', "psi": numpy.array(1, "float32")' if generator.has_psi else ""
    return f'{{"z": z{label}{psi}}}'


def _psi(generator: Generator) -> str:
    if generator.has_psi:
        return "`--psi` is the graph's input `psi`: the intermediate latent *w* is moved towards its mean."
    return "`--psi` scales *z* outside the graph."


def _output(generator: Generator) -> str:
    size = generator.size
    if generator.is_uint8:
        return f"uint8 [4, {size}, {size}, 3]"
    return f"float32 [4, 3, {size}, {size}] in [-1, 1]"


def _training_metric(metric: Mapping[str, Any] | None) -> str:
    """The metric that training measured, with its protocol."""
    if metric is None:
        return "Not evaluated.\n"
    facts = {f"`{metric['name']}`": f"**{metric['value']:.2f}** (lower is better)"}
    for key, name in _PROTOCOL.items():
        if key in metric:
            facts[name] = f"`{metric[key]}`"
    return f"""{_table(facts)}
Compare it only with values of the same name and numbers of images on the same data: another number of images, metric
network, resizing or data set changes it more than a better model does.
"""


def _file_metric(metric: Mapping[str, Any] | None, recorded: Mapping[str, str]) -> str:
    """The metric of the exported file, from its metadata."""
    if "onnx_metric_value" not in recorded:
        return "The exported file itself is not evaluated.\n"
    name, value = recorded["onnx_metric"], float(recorded["onnx_metric_value"])
    text = f"The exported file itself, with onnxruntime: `{name}` **{value:.2f}**"
    if metric is not None and is_same_metric(metric, {"name": name, "n_fake": recorded.get("onnx_metric_n_fake")}):
        text += f", {value / metric['value'] - 1:+.2%} relative to training"
    return text + ".\n"


def _precisions(variants: Sequence[Variant]) -> str:
    """A section with the table of precisions, if there are several."""
    if len(variants) < 2:
        return ""
    rows = [
        "| precision | size | speed | largest difference | PSNR | distance from real images |",
        "|---|---|---|---|---|---|",
    ]
    for v in variants:
        distance = "not evaluated" if v.metric is None else f"{v.metric['value']:.2f}"
        distance += "" if v.loss is None else f" ({v.loss:+.1%})"
        if v.size is None or v.speed is None or v.pixels is None:
            rows.append(f"| {v.precision} | {v.bytes / 1e6:.2f} MB | 1 | | | {distance} |")
            continue
        psnr = "" if v.psnr is None else f"{v.psnr:.1f} dB"
        rows.append(f"| {v.precision} | {v.size:.2f} | {v.speed:.2f} | {v.pixels:g} of 255 | {psnr} | {distance} |")
    return f"""
### Precisions

{chr(10).join(rows)}

Relative to fp32. Speed is images per second, generated one at a time on the CPU of the exporting machine; more is
faster.
"""


def _table(facts: Mapping[str, str]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in facts.items())


def _num_parameters(onnx_path: Path) -> int:
    return sum(math.prod(tensor.dims) for tensor in onnx.load(onnx_path).graph.initializer)
