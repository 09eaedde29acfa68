"""R3GAN's residual networks (Huang et al. 2024, section 4): grouped convolutions, no normalisation anywhere.

A stage is a resampling step and a few inverted-bottleneck blocks. Nothing mixes samples and no buffer changes in
training, so gradient penalties and DistributedDataParallel need no special handling.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.models.common import ClassProjection, Discriminator, Generator, widths_by_side

_SLOPE = 0.2
_GAIN = math.sqrt(2 / (1 + _SLOPE**2))  # keeps the variance through a leaky ReLU


def _conv(in_channels: int, out_channels: int, kernel: int, groups: int = 1, gain: float = 1.0) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, groups=groups, bias=False)
    nn.init.normal_(conv.weight, 0.0, gain / math.sqrt(in_channels // groups * kernel * kernel))
    return conv


class _BiasedLeakyReLU(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + self.bias, _SLOPE)


class _Block(nn.Module):
    """x + 1x1(act(grouped 3x3(act(1x1(x))))). The last 1x1 starts at zero and the others are scaled by
    ``L^(-1/4)`` for ``L`` blocks in the network (Fix-up initialisation, Zhang et al. 2019)."""

    def __init__(self, channels: int, config: ModelConfig, num_blocks: int) -> None:
        super().__init__()
        inner = channels * config.expansion
        gain = _GAIN * num_blocks**-0.25
        self.layers = nn.Sequential(
            _conv(channels, inner, 1, gain=gain),
            _BiasedLeakyReLU(inner),
            _conv(inner, inner, 3, groups=max(inner // config.group_width, 1), gain=gain),
            _BiasedLeakyReLU(inner),
            _conv(inner, channels, 1, gain=0.0),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class _Resample(nn.Module):
    """A 1x1 convolution where the number of channels changes, and the separable [1, 2, 1] low-pass filter (sum 1)."""

    taps: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.project = _conv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        # A constant, so that no step copies it to the device; not part of the state.
        taps = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("taps", torch.outer(taps, taps), persistent=False)

    def kernel(self, x: Tensor) -> Tensor:
        """The filter for each channel of ``x``."""
        return self.taps.to(x.dtype).expand(x.shape[1], 1, 3, 3)


class _Upsample(_Resample):
    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        return F.conv_transpose2d(x, 4 * self.kernel(x), stride=2, padding=1, output_padding=1, groups=x.shape[1])


class _Downsample(_Resample):
    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.conv2d(x, self.kernel(x), stride=2, padding=1, groups=x.shape[1]))


class _Head(nn.Module):
    """A 4x4 depthwise convolution of 4x4 maps, ``[n, c, 4, 4]`` -> ``[n, c]``, written as a product and a sum: PyTorch
    differentiates a grouped convolution twice in a loop over its groups."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, 1, 4, 4) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight[:, 0]).sum((2, 3))


def _stage(width: int, config: ModelConfig, num_blocks: int) -> nn.Sequential:
    return nn.Sequential(*(_Block(width, config, num_blocks) for _ in range(config.blocks)))


class R3GANGenerator(Generator):
    """A learned 4x4 map modulated by a linear function of z, then stages up to the full size. No tanh. The embedding of
    a class is part of the latent."""

    takes_classes = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        widths = widths_by_side(config.g_width, config.max_width, config.size)
        num_blocks = len(widths) * config.blocks
        self.basis = nn.Parameter(torch.randn(widths[4], 4, 4))
        self.linear = nn.Linear(self.input_dim, widths[4], bias=False)
        nn.init.normal_(self.linear.weight, 0.0, 1 / math.sqrt(self.input_dim))
        layers: dict[str, nn.Module] = {}
        for side, width in widths.items():
            if side > 4:
                layers[f"up{side}"] = _Upsample(widths[side // 2], width)
            layers[f"blocks{side}"] = _stage(width, config, num_blocks)
        layers[f"rgb{config.size}"] = _conv(widths[config.size], 3, 1)
        self.layers = nn.Sequential(OrderedDict(layers))

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return self.layers(self._modulated(z, label))

    def features(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return self.layers[:1](self._modulated(z, label))  # blocks4

    def _modulated(self, z: Tensor, label: Tensor | None) -> Tensor:
        scale = self.linear(self.conditioned(z, label))
        return self.basis * scale.reshape(-1, scale.shape[1], 1, 1)


class R3GANDiscriminator(Discriminator):
    """The generator's mirror image; a depthwise 4x4 convolution and a linear layer give the logit."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = widths_by_side(config.d_width, config.max_width, config.size)
        num_blocks = len(widths) * config.blocks
        layers: dict[str, nn.Module] = {f"rgb{config.size}": _conv(3, widths[config.size], 1)}
        for side in sorted(widths, reverse=True):
            if side < config.size:
                layers[f"down{side}"] = _Downsample(widths[2 * side], widths[side])
            layers[f"blocks{side}"] = _stage(widths[side], config, num_blocks)
        self.layers = nn.Sequential(OrderedDict(layers))
        self.head = _Head(widths[4])
        self.linear = nn.Linear(widths[4], 1, bias=False)
        nn.init.normal_(self.linear.weight, 0.0, 1 / math.sqrt(widths[4]))
        if config.classes:
            self.projection = ClassProjection(len(config.classes), widths[4], deviation=1 / math.sqrt(widths[4]))

    def logits(self, images: Tensor, label: Tensor | None = None) -> Tensor:
        x = self.head(self.layers(images))
        logits = self.linear(x).flatten()
        return logits if label is None else logits + self.projection(x, label)
