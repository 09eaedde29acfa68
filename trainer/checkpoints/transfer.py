"""Transfer: initialise networks with the weights of another training, layer by layer where names and shapes match.

Layers are named after the resolution they work at, so that networks of another size share the names of their common
layers.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from catgan.command import UserError
from catgan.files import atomic_write
from trainer.checkpoints import checkpoint
from trainer.models import AtLevel
from trainer.step import GAN

GENERATOR, DISCRIMINATOR = "gen.safetensors", "disc.safetensors"
"""Released weights of the two networks, in one folder."""


def init_from(gan: GAN, path: Path) -> str:
    """Initialise ``gan`` with the weights of a run's folder, a checkpoint or a ``.safetensors`` file.

    A checkpoint has both networks, and so has a folder with ``gen.safetensors`` and ``disc.safetensors`` (``catexport
    --weights``); other released weights are the generator's only. Generator and EMA start from the source's EMA
    weights.

    Returns:
        A message about which layers were initialised.

    Raises:
        UserError: there are no weights at ``path``, no layer fits, one that is frozen would stay random, or a weight is
            not finite.
    """
    report = []
    source = _source(path)
    _check_frozen(gan, source.get("discriminator", {}), path)
    for name, module in (("generator", gan.generator), ("discriminator", gan.discriminator)):
        if name not in source:
            report.append(f"{name}: nothing in {path.name}, is initialised at random")
            continue
        report.append(f"{name}: {_load_fitting(module, source[name], path)}")
    if not gan.is_finite():
        raise UserError(f"--init-from {path}: it has weights that are not finite; give an earlier checkpoint or run")
    gan.ema.module.load_state_dict(gan.generator.state_dict())
    return "\n".join(report)


def _source(path: Path) -> dict[str, dict[str, Tensor]]:
    """State dicts by network."""
    folders = [path] if checkpoint.is_checkpoint(path) else checkpoint.find_all(path)
    if folders:
        state = checkpoint.load(folders[-1])
        return {"generator": state["ema"], "discriminator": state["discriminator"]}
    generator, _ = checkpoint.load_generator(path)
    source = {"generator": (generator.generator if isinstance(generator, AtLevel) else generator).state_dict()}
    if (path / DISCRIMINATOR).is_file():
        source["discriminator"], _ = checkpoint.load_weights(path / DISCRIMINATOR)
    return source


def _check_frozen(gan: GAN, source: dict[str, Tensor], path: Path) -> None:
    """Layers that are not trained must not keep random weights."""
    frozen = {n: p.shape for n, p in gan.discriminator.named_parameters() if not p.requires_grad}
    if missing := [name for name, shape in frozen.items() if name not in source or source[name].shape != shape]:
        raise UserError(
            f"--optim.freeze-d {gan.config.optim.freeze_d}: {path} has no weights for the discriminator's {missing[0]};"
            f" give a run, a checkpoint or a folder with {DISCRIMINATOR} of the same model, or --optim.freeze-d 0"
        )


def write_networks(path: Path, folder: Path) -> None:
    """Write ``gen.safetensors`` (the EMA) and ``disc.safetensors`` of a checkpoint to ``folder``, for ``init_from``.

    Args:
        path: a checkpoint, or a run's folder, which stands for its latest one.
        folder: made if it is missing.

    Raises:
        UserError: there is no checkpoint at ``path``, or ``folder`` cannot be written.
    """
    folders = [path] if checkpoint.is_checkpoint(path) else checkpoint.find_all(path)
    if not folders:
        raise UserError(f"{path} has no checkpoint, and only a checkpoint has the discriminator; give one, or its run")
    state = checkpoint.load(folders[-1])
    info = checkpoint.origin(state)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, network in ((DISCRIMINATOR, "discriminator"), (GENERATOR, "ema")):
            atomic_write(folder / name, checkpoint.encode_generator(state[network], info))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _load_fitting(module: nn.Module, source: dict[str, Tensor], path: Path) -> str:
    own = module.state_dict()
    fitting = {n: source[n] for n, tensor in own.items() if n in source and source[n].shape == tensor.shape}
    if all(tensor.ndim < 2 for tensor in fitting.values()):  # counters and biases would always fit
        raise UserError(
            f"--init-from {path}: no layer of it has the name and shape of one of this model's; give weights of the"
            " same architecture, with the same channels at the same sides of the maps"
        )
    module.load_state_dict(fitting, strict=False)
    total, taken = (sum(t.numel() for t in tensors.values()) for tensors in (own, fitting))
    left = sorted(own.keys() - fitting.keys())
    unused = sorted(source.keys() - fitting.keys())
    text = f"{len(fitting)} of {len(own)} tensors ({taken / total:.0%} of the values) loaded"
    if left:
        text += f"; initialised at random: {', '.join(left)}"
    if unused:
        text += f"; not used: {', '.join(unused)}"
    return text
