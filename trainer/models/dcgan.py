"""DCGAN's all-convolutional networks (Radford et al. 2016): strided 4x4 convolutions, from and to a 4x4 map.

With batch norm they are the paper's; without it in the discriminator (``d_norm="none"``) they carry the R3GAN loss
on machines where residual networks are too slow.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.models.batchnorm import BatchNorm
from trainer.models.common import ClassProjection, Discriminator, Generator


def _widths(width: int, max_width: int, size: int) -> dict[int, int]:
    """Channels by side of the map, from 4 to half the image's."""
    sides = [4 << i for i in range(size.bit_length() - 3)]
    return {side: min(width * (size // 2 // side), max_width) for side in sides}


def _initialise(module: nn.Module) -> None:
    """N(0, 0.02) weights, batch norm's scale N(1, 0.02): section 4 of the paper."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class DCGANGenerator(Generator):
    """z -> 4x4 -> ... -> size, each step a transposed convolution, batch norm and ReLU; tanh at the end.

    Layers are named after the side of the map they make, so that weights of another size can be transferred. The
    embedding of a class is part of the latent.
    """

    takes_classes = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        widths = _widths(config.g_width, config.max_width, config.size)
        layers: dict[str, nn.Module] = {"to4": _head(self.input_dim, config.g_head, widths[4])}
        for above, side in pairwise(widths):
            layers |= _norm_and_relu(above, widths[above])
            layers[f"to{side}"] = nn.ConvTranspose2d(widths[above], widths[side], 4, 2, 1, bias=False)
        last = config.size // 2
        layers |= _norm_and_relu(last, widths[last])
        layers |= {f"rgb{config.size}": nn.ConvTranspose2d(widths[last], 3, 4, 2, 1), "tanh": nn.Tanh()}
        self.layers = nn.Sequential(OrderedDict(layers))
        self.apply(_initialise)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return self.layers(self._input(z, label))

    def features(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return self.layers[:3](self._input(z, label))  # to4, norm4, relu4

    def _input(self, z: Tensor, label: Tensor | None) -> Tensor:
        # not [..., None, None]: OpenCV reads no such ONNX
        return self.conditioned(z, label).reshape(-1, self.input_dim, 1, 1)


def _head(inputs: int, kind: str, width: int) -> nn.Module:
    """``[n, inputs, 1, 1]`` -> ``[n, width, 4, 4]``. Both kinds have the same weights; the dense one has
    a bias for each pixel, of which batch norm cancels only the mean."""
    if kind == "conv":
        return nn.ConvTranspose2d(inputs, width, 4, 1, 0, bias=False)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width * 16), nn.Unflatten(1, (width, 4, 4)))


def _norm_and_relu(side: int, channels: int) -> dict[str, nn.Module]:
    return {f"norm{side}": BatchNorm(channels), f"relu{side}": nn.ReLU(inplace=True)}


class DCGANDiscriminator(Discriminator):
    """size -> ... -> 4x4 -> logit, each step a strided convolution and leaky ReLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        has_norm = config.d_norm == "batch"
        widths = _widths(config.d_width, config.max_width, config.size)
        sides = sorted(widths, reverse=True)
        layers: dict[str, nn.Module] = {f"rgb{config.size}": nn.Conv2d(3, widths[sides[0]], 4, 2, 1)}
        for side in sides:
            if side != sides[0]:
                layers[f"to{side}"] = nn.Conv2d(widths[2 * side], widths[side], 4, 2, 1, bias=not has_norm)
                if has_norm:
                    layers[f"norm{side}"] = BatchNorm(widths[side])
            layers[f"act{side}"] = nn.LeakyReLU(0.2, inplace=True)
            if config.d_dropout:
                layers[f"drop{side}"] = nn.Dropout(config.d_dropout)
        layers["critic"] = nn.Conv2d(widths[4], 1, 4, 1, 0)
        self.layers = nn.Sequential(OrderedDict(layers))
        self.apply(_initialise)
        if config.classes:
            self.projection = ClassProjection(len(config.classes), widths[4], deviation=0.02)

    def logits(self, images: Tensor, label: Tensor | None = None) -> Tensor:
        if label is None:
            return self.layers(images).flatten()
        x = self.layers[:-1](images)
        return self.layers[-1](x).flatten() + self.projection(x.sum((2, 3)), label)
