"""The model card: what a generator is, how good it is by which protocol, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from infer.grid import grid
from infer.latents import latents
from infer.session import Generator

if TYPE_CHECKING:
    from export.variants import Variant

_PICTURES = 16

_PROTOCOL = {
    "n_real": "Real pictures",
    "n_fake": "Generated pictures, not selected",
    "seed": "of the seeds from",
    "extractor": "Feature network",
    "weights_sha256": "its weights, SHA-256",
    "resize": "Resizing before it",
}


def write_card(onnx_path: Path, info: Mapping[str, Any], max_abs_diff: float, variants: Sequence[Variant] = ()) -> Path:
    """Write ``card.md`` and its picture ``samples.png`` beside an exported generator.

    Args:
        onnx_path: written by ``export.generator.export_onnx``.
        info: the generator's origin, as ``trainer.checkpoints.checkpoint.load_generator`` gives it.
        max_abs_diff: between onnxruntime and PyTorch.
        variants: fp32 and what was compared with it, see ``export.variants.make_variants``.

    Returns:
        The path of the card.
    """
    generator = Generator(onnx_path, "cpu")
    samples = onnx_path.with_name("samples.png")
    _write(samples, grid(generator(latents(range(_PICTURES), generator.z_dim))))
    card = onnx_path.with_name("card.md")
    temporary = card.with_name(f".{card.name}")
    temporary.write_text(_text(onnx_path, generator, info, max_abs_diff, variants), encoding="utf-8")
    temporary.replace(card)
    return card


def _write(path: Path, picture: Any) -> None:
    temporary = path.with_name(f".{path.name}")
    picture.save(temporary, format="PNG")
    temporary.replace(path)


def _text(
    onnx_path: Path, generator: Generator, info: Mapping[str, Any], max_abs_diff: float, variants: Sequence[Variant]
) -> str:
    size, z_dim, name = generator.size, generator.z_dim, onnx_path.name
    facts = {
        "Recipe": f"`{info['recipe']}`, {info['kimg']:g} thousand images seen",
        "Pictures": f"{size} x {size} pixels, RGB",
        "Parameters": f"{_num_parameters(onnx_path) / 1e6:.2f} million",
        "Training data": f"digest `{info.get('dataset_digest') or 'unknown'}`",
        "MLflow run": f"`{info.get('run_id') or 'none'}`",
        "Weights": f"SHA-256 `{generator.metadata['weights_sha256']}`",
        "Exported with": f"{generator.metadata['tools']}; ONNX opset {generator.metadata['opset']}",
        "Precision": generator.metadata["precision"],
        "ONNX against PyTorch": f"largest difference {max_abs_diff:.1e} on a scale from -1 to 1",
    }
    return f"""\
# Cat generator `{info["recipe"]}` at {size} x {size}

![{_PICTURES} generated cats](samples.png)

The pictures of seeds 0 to {_PICTURES - 1}, not selected: what the command under "Use" draws.

{_table(facts)}
## How good

{_quality(info.get("metric"))}
{_exported(info.get("metric"), generator.metadata)}{_compared(variants)}
## Use

    catinfer --onnx {name} --n {_PICTURES} --seed 0 --out cats.png

or with nothing but NumPy and onnxruntime:

    import numpy, onnxruntime
    session = onnxruntime.InferenceSession("{name}", providers=["CPUExecutionProvider"])
    z = numpy.random.default_rng(0).standard_normal((4, {z_dim}), dtype=numpy.float32)
    image = session.run(["image"], {{"z": z}})[0]  # {_output(generator)}

Picture *i* of `catinfer --seed s` comes from `numpy.random.PCG64(s + i)`: the same whatever `--n`. PyTorch's seeds give
other pictures. `--psi` scales *z* outside the graph.

## Limits

- It draws what its training data shows: faces of cats, seen from the front, at this size. It knows no conditions such
  as breed or pose.
- Some seeds give distorted pictures; `--psi` below 1 trades variety for typical ones.
- A generator can come close to pictures it was trained on. Look before publishing where the data are private.

## Licence

The weights belong to who trained them. What may be done with them and with the pictures also depends on the licence of
the training data, which is not recorded here: unknown, unless whoever trained it says so.
"""


def _output(generator: Generator) -> str:
    size = generator.size
    if generator.is_uint8:
        return f"uint8 [4, {size}, {size}, 3]"
    return f"float32 [4, 3, {size}, {size}] in [-1, 1]"


def _exported(metric: Mapping[str, Any] | None, recorded: Mapping[str, str]) -> str:
    if "onnx_metric_value" not in recorded:
        return "The exported file itself: not judged.\n"
    name, value = recorded["onnx_metric"], float(recorded["onnx_metric_value"])
    text = f"The exported file itself, drawn by onnxruntime: `{name}` **{value:.2f}**"
    if metric is not None and metric["name"] == name:
        text += f", {value / metric['value'] - 1:+.2%} from the training's"
    return text + ".\n"


def _compared(variants: Sequence[Variant]) -> str:
    """The table of precisions, if there is more than one."""
    if len(variants) < 2:
        return ""
    rows = [
        "| precision | size | speed | largest difference | PSNR | distance to real pictures |",
        "|---|---|---|---|---|---|",
    ]
    for v in variants:
        distance = "not judged" if v.metric is None else f"{v.metric['value']:.2f}"
        distance += "" if v.loss is None else f" ({v.loss:+.1%})"
        if v.size is None or v.speed is None or v.pixels is None:
            rows.append(f"| {v.precision} | {v.bytes / 1e6:.2f} MB | 1 | | | {distance} |")
            continue
        psnr = "" if v.psnr is None else f"{v.psnr:.1f} dB"
        rows.append(f"| {v.precision} | {v.size:.2f} | {v.speed:.2f} | {v.pixels:g} of 255 | {psnr} | {distance} |")
    return f"""
### Precisions

{chr(10).join(rows)}

Relative to fp32. Speed is pictures a second, one at a time on the CPU of the machine that exported this, in turns with
fp32; more is faster.
"""


def _quality(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return "Not measured.\n"
    facts = {f"`{metric['name']}`": f"**{metric['value']:.2f}** (lower is better)"}
    for key, name in _PROTOCOL.items():
        if key in metric:
            facts[name] = f"`{metric[key]}`"
    return f"""{_table(facts)}
Compare it only with values of the same name on the same data: another number of pictures, feature network, resizing or
data set moves it more than a better model does.
"""


def _table(facts: Mapping[str, str]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in facts.items())


def _num_parameters(onnx_path: Path) -> int:
    total = 0
    for tensor in onnx.load(onnx_path).graph.initializer:
        count = 1
        for extent in tensor.dims:
            count *= extent
        total += count
    return total
