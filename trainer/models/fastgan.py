"""FastGAN's networks (Liu et al. 2021, "Towards Faster and Stabilized GAN Training for High-fidelity Few-shot Image
Synthesis"): a generator with skip-layer excitation, and a discriminator that reconstructs reals from its feature maps.

Written from the paper. Differences: the generator gets no noise, so that a latent is one image. The logits of a map are
averaged to one per image. Spectral normalisation is on the layers without batch norm only: batch norm cancels the scale
of the weights before it.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from trainer.config import ModelConfig
from trainer.models.batchnorm import BatchNorm, separate_statistics
from trainer.models.common import Discriminator, Generator

_EXCITED = 64  # side of the smallest map that is excited, by one of a sixteenth of its side: figure 3
_LAST_SIDE = 8  # of the map that the logits come from; that of twice the side is reconstructed from as well: figure 4
_RECONSTRUCTED = 128  # side of the reconstructions, at most
_DECODER_WIDTH = 128  # channels of a decoder's maps, at most


def _width(base: int, config: ModelConfig, side: int) -> int:
    """Channels of maps of this side: ``base`` at the full size, doubling per halving."""
    return min(base * (config.size // side), config.max_width)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = False) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=bias)
    nn.init.normal_(conv.weight, 0.0, 0.02)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class GLU(nn.Module):
    """The gated linear unit: the first half of the channels times the sigmoid of the second one.

    With the halves in the layout that convolutions are fastest in, a step takes half as long as with ``nn.GLU``.
    """

    def forward(self, x: Tensor) -> Tensor:
        value, gate = (half.contiguous(memory_format=torch.channels_last) for half in x.chunk(2, dim=1))
        return value * gate.sigmoid()


def _up(inputs: int, outputs: int) -> nn.Sequential:
    """From one side to twice of it: nearest neighbour, one convolution, batch norm, gated linear unit."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2.0, mode="nearest"),
        _conv(inputs, 2 * outputs, 3, padding=1),
        BatchNorm(2 * outputs),
        GLU(),
    )


class Excitation(nn.Module):
    """Skip-layer excitation (eq. 1 and 2): a factor in (0, 1) for each channel of a large map, from a small map."""

    def __init__(self, small: int, large: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _conv(small, large, 4, bias=True), nn.LeakyReLU(0.1), _conv(large, large, 1, bias=True), nn.Sigmoid()
        )

    def forward(self, small: Tensor, large: Tensor) -> Tensor:
        """``[n, small, s, s]`` with ``s`` a multiple of 4, ``[n, large, h, w]`` -> ``[n, large, h, w]``."""
        pooled = F.avg_pool2d(small, small.shape[-1] // 4) if small.shape[-1] > 4 else small
        return large * self.layers(pooled)


class FastGANGenerator(Generator):
    """z -> 4x4 -> ... -> size with one convolution per resolution; maps from 64x64 on, or the last one of smaller
    images, are excited by small ones. Tanh at the end."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.sides = [4 << i for i in range(config.size.bit_length() - 2)]
        widths = {side: _width(config.g_width, config, side) for side in self.sides}
        head = nn.ConvTranspose2d(config.z_dim, 2 * widths[4], 4, bias=False)
        nn.init.normal_(head.weight, 0.0, 0.02)
        self.layers = nn.ModuleDict({"to4": nn.Sequential(head, BatchNorm(2 * widths[4]), GLU())})
        self.excited_by = {side: max(side // 16, 4) for side in self.sides if side >= min(_EXCITED, config.size)}
        for side in self.sides[1:]:
            self.layers[f"to{side}"] = _up(widths[side // 2], widths[side])
            if side in self.excited_by:
                self.layers[f"excite{side}"] = Excitation(widths[self.excited_by[side]], widths[side])
        self.layers[f"rgb{config.size}"] = _conv(widths[config.size], 3, 3, padding=1, bias=True)

    def forward(self, z: Tensor) -> Tensor:
        x = self.features(z)
        maps = {4: x}
        for side in self.sides[1:]:
            x = self.layers[f"to{side}"](x)
            if side in self.excited_by:
                x = self.layers[f"excite{side}"](maps[self.excited_by[side]], x)
            maps[side] = x
        return self.layers[f"rgb{self.size}"](x).tanh()

    def features(self, z: Tensor) -> Tensor:
        return self.layers["to4"](z.reshape(-1, self.z_dim, 1, 1))


class _Down(nn.Module):
    """From one side to half of it: the mean of two convolutions and of pooling with a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            _conv(inputs, outputs, 4, 2, 1),
            BatchNorm(outputs),
            nn.LeakyReLU(0.2, inplace=True),
            _conv(outputs, outputs, 3, padding=1),
            BatchNorm(outputs),
            nn.LeakyReLU(0.2, inplace=True),
        )
        self.skip = nn.Sequential(
            nn.AvgPool2d(2), _conv(inputs, outputs, 1), BatchNorm(outputs), nn.LeakyReLU(0.2, inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.main(x) + self.skip(x)) * 0.5


def _decoder(inputs: int, config: ModelConfig, side: int, size: int) -> nn.Sequential:
    """From maps of ``side`` to images of ``size``; half as many channels as the discriminator has at the same side."""
    layers: list[nn.Module] = []
    while side < size:
        side *= 2
        outputs = min(max(_width(config.d_width, config, side) // 2, 1), _DECODER_WIDTH)
        layers.append(_up(inputs, outputs))
        inputs = outputs
    return nn.Sequential(*layers, _conv(inputs, 3, 3, padding=1, bias=True), nn.Tanh())


class FastGANDiscriminator(Discriminator):
    """size -> ... -> 8x8 -> the mean of a map of logits. Two decoders reconstruct the reals: the image from the 8x8
    map, and a quarter of it from a quarter of the 16x16 map."""

    reconstructs = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, last = config.size, min(_LAST_SIDE, config.size // 4)
        self.sides = [size >> i for i in range(1, (size // last).bit_length())]
        widths = {side: _width(config.d_width, config, side) for side in self.sides}
        layers: dict[str, nn.Module] = {
            f"rgb{size}": nn.Sequential(
                spectral_norm(_conv(3, widths[size // 2], 4, 2, 1, bias=True)), nn.LeakyReLU(0.2, inplace=True)
            )
        }
        layers |= {f"to{side}": _Down(widths[2 * side], widths[side]) for side in self.sides[1:]}
        *below, top = layers
        self.layers = nn.Sequential(OrderedDict((name, layers[name]) for name in below))
        self.last = layers[top]
        self.critic = nn.Sequential(
            _conv(widths[last], widths[last], 1),
            BatchNorm(widths[last]),
            nn.LeakyReLU(0.2, inplace=True),
            spectral_norm(_conv(widths[last], 1, min(4, last), bias=True)),
        )
        self.decode_whole = _decoder(widths[last], config, last, min(size, _RECONSTRUCTED))
        self.decode_part = _decoder(widths[2 * last], config, last, min(size // 2, _RECONSTRUCTED))

    def logits(self, images: Tensor) -> Tensor:
        return self._logits_of(self.last(self.layers(images)))

    def _logits_of(self, maps: Tensor) -> Tensor:
        return self.critic(maps).mean((1, 2, 3))

    def forward(  # type: ignore[override]
        self, *batches: Tensor, quadrant: int | None = None
    ) -> tuple[Tensor, ...]:
        """Logits of each batch, and with ``quadrant`` the reconstruction errors ``[n]`` of the first one, all float32.

        Args:
            quadrant: 0 to 3, that quarter of the images which is reconstructed from its part of the map.
        """
        if quadrant is None:
            return super().forward(*batches)
        sizes = [len(batch) for batch in batches]
        with separate_statistics(self, sizes):
            middle = self.layers(torch.cat(batches))
            last = self.last(middle)
            logits = self._logits_of(last).float().split(sizes)
        reals = batches[0]
        whole = _error(self.decode_whole(last[: len(reals)]), reals)
        part = _error(self.decode_part(_quarter(middle[: len(reals)], quadrant)), _quarter(reals, quadrant))
        return (*logits, whole + part)


def _quarter(x: Tensor, quadrant: int) -> Tensor:
    """The upper left (0), upper right (1), lower left (2) or lower right (3) quarter of ``[n, c, h, w]``."""
    side = x.shape[-1] // 2
    row, column = (quadrant // 2) * side, (quadrant % 2) * side
    return x[:, :, row : row + side, column : column + side]


def _error(made: Tensor, images: Tensor) -> Tensor:
    """The mean absolute difference of each reconstruction from its image, downsampled: ``[n]`` in 0 to 2. The paper has
    a perceptual distance, which needs a pre-trained network."""
    factor = images.shape[-1] // made.shape[-1]
    images = F.avg_pool2d(images, factor) if factor > 1 else images
    return (made.float() - images.float()).abs().mean((1, 2, 3))
