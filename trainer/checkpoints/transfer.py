"""Starting from what another training has learnt: layers that fit are taken over, the rest starts afresh.

Layers are named after the side of the map they work on, so that those of another resolution find their counterparts.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from catgan.command import UserError
from trainer.checkpoints import checkpoint
from trainer.models import AtLevel
from trainer.step import GAN


def init_from(gan: GAN, path: Path) -> str:
    """Take over weights from a run's folder, a checkpoint or a ``.safetensors`` file.

    A checkpoint gives both networks; a file of released weights the generator only. The generator becomes the average
    generator of the source, and so does its average.

    Returns:
        What was taken over and what was not, for people.

    Raises:
        UserError: nothing of the kind there, or no layer fits.
    """
    report = []
    source = _source(path)
    for name, module in (("generator", gan.generator), ("discriminator", gan.discriminator)):
        if name not in source:
            report.append(f"{name}: nothing in {path.name}, starts afresh")
            continue
        report.append(f"{name}: {_take_over(module, source[name], path)}")
    gan.ema.module.load_state_dict(gan.generator.state_dict())
    return "\n".join(report)


def _source(path: Path) -> dict[str, dict[str, Tensor]]:
    """State dicts by network."""
    folders = [path] if checkpoint.is_checkpoint(path) else checkpoint.find_all(path)
    if folders:
        state = checkpoint.load(folders[-1])
        return {"generator": state["ema"], "discriminator": state["discriminator"]}
    generator, _ = checkpoint.load_generator(path)
    return {"generator": (generator.generator if isinstance(generator, AtLevel) else generator).state_dict()}


def _take_over(module: nn.Module, source: dict[str, Tensor], path: Path) -> str:
    own = module.state_dict()
    fitting = {n: source[n] for n, tensor in own.items() if n in source and source[n].shape == tensor.shape}
    if all(tensor.ndim < 2 for tensor in fitting.values()):  # counters and biases fit anything
        raise UserError(
            f"--init-from {path}: no layer of it has the name and shape of one of this model's; give weights of the"
            " same architecture, with the same channels at the same sides of the maps"
        )
    module.load_state_dict(fitting, strict=False)
    total, taken = (sum(t.numel() for t in tensors.values()) for tensors in (own, fitting))
    left = sorted(own.keys() - fitting.keys())
    unused = sorted(source.keys() - fitting.keys())
    text = f"{len(fitting)} of {len(own)} tensors ({taken / total:.0%} of the values) taken over"
    if left:
        text += f"; afresh: {', '.join(left)}"
    if unused:
        text += f"; not used: {', '.join(unused)}"
    return text
