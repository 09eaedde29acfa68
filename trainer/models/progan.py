"""Progressive growing (Karras et al. 2018): networks that start at 4x4 and double their resolution during training.

The level is the current resolution, see ``GrowConfig.level``. While a new resolution fades in, its output is blended
with the upsampled output of the one before: section 2 and figure 2 of the paper. There is no batch norm; only the
discriminator's minibatch standard deviation mixes samples.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.models.common import Discriminator, Generator, minibatch_stddev


class EqualConv(nn.Conv2d):
    """A convolution whose weights are N(0, 1) and scaled by He's constant in each pass, so that Adam updates all layers
    at the same speed (equalised learning rate, section 4.1)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, padding: int, gain: float = 2**0.5, stride: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, padding)
        nn.init.normal_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)
        self.scale = gain / math.sqrt(in_channels * kernel * kernel)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight * self.scale, self.bias)


def pixel_norm(x: Tensor) -> Tensor:
    """Each pixel's feature vector ``[n, c, h, w]`` at unit mean square (section 4.2)."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def resize_to_level(images: Tensor, level: float) -> Tensor:
    """Reals at ``level``: downsampled, and blended with the next lower resolution while the new one fades in.
    ``[n, 3, size, size]`` -> ``[n, 3, side, side]`` with ``side = 2^ceil(level)``."""
    images = F.avg_pool2d(images, images.shape[-1] >> math.ceil(level))
    alpha = level % 1
    return _upsample(F.avg_pool2d(images, 2)).lerp(images, alpha) if alpha else images


def _upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def _width(base: int, config: ModelConfig, level: int) -> int:
    """Channels at ``2^level`` pixels a side: ``base`` at the full size, doubling per halving."""
    return min(base << (config.size.bit_length() - 1 - level), config.max_width)


class _Up(nn.Module):
    """From one resolution to the next: upsample, two convolutions."""

    def __init__(self, above: int, below: int) -> None:
        super().__init__()
        self.conv1 = EqualConv(above, below, 3, 1)
        self.conv2 = EqualConv(below, below, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = pixel_norm(_act(self.conv1(_upsample(x))))
        return pixel_norm(_act(self.conv2(x)))


class ProGANGenerator(Generator):
    """z -> 4x4 -> ... -> the level's resolution, each with an output layer of its own. No tanh."""

    grows = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.full = config.size.bit_length() - 1
        widths = {level: _width(config.g_width, config, level) for level in range(2, self.full + 1)}
        self.first = EqualConv(config.z_dim, widths[2], 4, 3)
        self.conv = EqualConv(widths[2], widths[2], 3, 1)
        self.up = nn.ModuleDict({str(1 << n): _Up(widths[n - 1], widths[n]) for n in range(3, self.full + 1)})
        self.to_rgb = nn.ModuleDict({str(1 << n): EqualConv(w, 3, 1, 0, gain=1.0) for n, w in widths.items()})

    def forward(self, z: Tensor, level: float | None = None) -> Tensor:
        level = self.full if level is None else level
        top, alpha = math.ceil(level), level % 1
        below = x = self.features(z)
        for n in range(3, top + 1):
            below, x = x, self.up[str(1 << n)](x)
        images = self.to_rgb[str(1 << top)](x)
        if alpha:
            images = _upsample(self.to_rgb[str(1 << (top - 1))](below)).lerp(images, alpha)
        return images

    def features(self, z: Tensor) -> Tensor:
        x = pixel_norm(_act(self.first(pixel_norm(z.reshape(-1, self.z_dim, 1, 1)))))
        return pixel_norm(_act(self.conv(x)))


class _Down(nn.Module):
    """From one resolution to the one before: two convolutions, average pooling."""

    def __init__(self, below: int, above: int) -> None:
        super().__init__()
        self.conv1 = EqualConv(below, below, 3, 1)
        self.conv2 = EqualConv(below, above, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(_act(self.conv2(_act(self.conv1(x)))), 2)


class ProGANDiscriminator(Discriminator):
    """The generator's mirror image; the minibatch standard deviation is an additional feature map at 4x4."""

    grows = True
    mixes_samples = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.full = config.size.bit_length() - 1
        widths = {level: _width(config.d_width, config, level) for level in range(2, self.full + 1)}
        self.from_rgb = nn.ModuleDict({str(1 << n): EqualConv(3, w, 1, 0) for n, w in widths.items()})
        self.down = nn.ModuleDict({str(1 << n): _Down(widths[n], widths[n - 1]) for n in range(3, self.full + 1)})
        self.conv = EqualConv(widths[2] + 1, widths[2], 3, 1)
        self.dense = EqualConv(widths[2], widths[2], 4, 0)
        self.out = EqualConv(widths[2], 1, 1, 0, gain=1.0)

    def logits(self, images: Tensor, level: float | None = None) -> Tensor:
        """``images`` as ``resize_to_level`` and the generator make them, at the level's resolution."""
        level = self.full if level is None else level
        top, alpha = math.ceil(level), level % 1
        x = _act(self.from_rgb[str(1 << top)](images))
        for n in range(top, 2, -1):
            x = self.down[str(1 << n)](x)
            if n == top and alpha:
                old = _act(self.from_rgb[str(1 << (n - 1))](F.avg_pool2d(images, 2)))
                x = old.lerp(x, alpha)
        stddev = minibatch_stddev(x, over_ranks=self.training).to(x.dtype).expand(len(x), 1, *x.shape[2:])
        x = _act(self.conv(torch.cat([x, stddev], dim=1)))
        return self.out(_act(self.dense(x))).flatten()


class AtLevel(Generator):
    """A progressive generator at ``level`` whose images are upsampled (nearest) to the full resolution."""

    def __init__(self, generator: Generator, level: float) -> None:
        nn.Module.__init__(self)
        self.generator: Generator = generator
        self.level = level
        self.z_dim, self.size = generator.z_dim, generator.size

    def forward(self, z: Tensor) -> Tensor:
        factor = self.size >> math.ceil(self.level)
        images = self.generator(z, level=self.level)
        return F.interpolate(images, scale_factor=float(factor), mode="nearest") if factor > 1 else images

    def features(self, z: Tensor) -> Tensor:
        return self.generator.features(z)
