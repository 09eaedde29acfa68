"""A discriminator on the features of a frozen network (Sauer et al. 2021, "Projected GANs Converge Faster").

The frozen network's feature maps are mixed by fixed random convolutions, across channels and then from the coarse maps
to the fine ones (section 3.2); each mixed map has a small trained discriminator, called its head. Only the heads are
trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrizations import spectral_norm

from trainer.models.batchnorm import BatchNorm, separate_statistics
from trainer.models.common import minibatch_stddev

_MIXED = {4: 32, 8: 48, 16: 64, 32: 96}
"""Channels of a mixed feature map by its stride."""
STRIDES = tuple(_MIXED)

Features = list[Tensor]
"""Mixed feature maps of some images, fine ones first."""


class FrozenStages(nn.Module):
    """The stem and the blocks of EfficientNet-Lite, cut where they reach the given strides.

    Images ``[n, 3, side, side]`` in [-1, 1] -> one feature map ``[n, channels, side / stride, side / stride]`` for each
    stride. Batch norm is folded into the convolutions.

    Args:
        network: ``efficientnet_lite_pytorch.EfficientNet`` with its weights; it is changed.
        offset, scale: its input is ``(pixel - offset) / scale`` for pixels of 0 to 255.
        strides: those of ``STRIDES`` to return, ascending.
    """

    def __init__(self, network: Any, offset: float, scale: float, strides: Sequence[int]) -> None:
        super().__init__()
        self.scale, self.shift = 127.5 / scale, (127.5 - offset) / scale
        self.stem = nn.Sequential(_fold(network._conv_stem, network._bn0), nn.ReLU6())
        stride, last = 2, {}
        for i, block in enumerate(network._blocks):
            stride *= block._depthwise_conv.stride[0]
            last[stride] = i
            if block._block_args.expand_ratio != 1:
                block._expand_conv, block._bn0 = _fold(block._expand_conv, block._bn0), nn.Identity()
            block._depthwise_conv, block._bn1 = _fold(block._depthwise_conv, block._bn1), nn.Identity()
            block._project_conv, block._bn2 = _fold(block._project_conv, block._bn2), nn.Identity()
        ends = [0, *(last[stride] + 1 for stride in strides)]
        blocks = list(network._blocks)
        self.stages = nn.ModuleList(nn.Sequential(*blocks[start:end]) for start, end in pairwise(ends))
        self.channels = [blocks[end - 1]._block_args.output_filters for end in ends[1:]]
        self.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, images: Tensor) -> Features:
        x = self.stem((images * self.scale + self.shift).to(self.dtype))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> _FrozenConv:
    return _FrozenConv(fuse_conv_bn_eval(conv, norm))


class _FrozenConv(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding for inputs of even side, which strides of 2 make uneven."""

    def __init__(self, conv: nn.Conv2d) -> None:
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
        even = before if before == after else 0
        super().__init__(conv.in_channels, conv.out_channels, kernel, stride, even, groups=conv.groups)
        self.uneven = None if before == after else (before, after, before, after)
        self.load_state_dict({"weight": conv.weight, "bias": conv.bias})

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.uneven) if self.uneven else x)


class Projection(nn.Module):
    """Mixes the maps of ``FrozenStages`` by fixed random 1x1 convolutions.

    Its weights are random and part of checkpoints; call ``calibrate`` once before the first use.
    """

    scale: Tensor

    def __init__(self, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        mixed = [_MIXED[stride] for stride in strides]
        self.across = nn.ModuleList(_random_conv(i, o) for i, o in zip(channels, mixed, strict=True))
        self.down = nn.ModuleList(_random_conv(below, above) for above, below in pairwise(mixed))
        self.register_buffer("scale", torch.ones(len(mixed)))
        self.requires_grad_(False)

    def forward(self, maps: Sequence[Tensor]) -> Features:
        mixed = [conv(x) * s for conv, x, s in zip(self.across, maps, self.scale.to(maps[0].dtype), strict=True)]
        y = mixed[-1]
        found = [y]
        for conv, x in zip(reversed(self.down), reversed(mixed[:-1]), strict=True):
            y = (x + F.interpolate(conv(y), scale_factor=2.0, mode="bilinear", align_corners=False)) * 0.5**0.5
            found.append(y)
        return found[::-1]

    def mean_squares(self, maps: Sequence[Tensor]) -> Tensor:
        """The mean square of each map after the convolution across channels, float32 ``[maps]``."""
        return torch.stack([conv(x).float().square().mean() for conv, x in zip(self.across, maps, strict=True)])

    def calibrate(self, mean_squares: Tensor) -> None:
        """Scale each map so that the images of ``mean_squares`` give it a mean square of 1."""
        self.scale.copy_(mean_squares.rsqrt())


def _random_conv(inputs: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
    return conv


class Heads(nn.Module):
    """A discriminator for each mixed map: convolutions of stride 2 down to 4x4, minibatch standard deviation, and a
    logit for each place of that map (Sauer et al. 2021, section 3.1, in narrow). A map below 4x4 gets one logit."""

    _WIDTH, _MAX_WIDTH = 48, 128

    def __init__(self, size: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(self._head(_MIXED[stride], size // stride) for stride in strides)

    def _head(self, channels: int, side: int) -> nn.Module:
        width = self._WIDTH
        layers: list[nn.Module] = []
        while side > 4:
            layers += [spectral_norm(nn.Conv2d(channels, width, 4, 2, 1)), BatchNorm(width), nn.LeakyReLU(0.2, True)]
            channels, width, side = width, min(2 * width, self._MAX_WIDTH), side // 2
        if not layers:
            layers = [spectral_norm(nn.Conv2d(channels, width, 1)), BatchNorm(width), nn.LeakyReLU(0.2, True)]
            channels = width
        kernel, padding = (3, 1) if side == 4 else (side, 0)
        last = spectral_norm(nn.Conv2d(channels + 1, 1, kernel, 1, padding))
        return nn.ModuleDict({"body": nn.Sequential(*layers), "last": last})

    def forward(self, *batches: Features) -> list[tuple[Tensor, ...]]:
        """For each head the logits float32 ``[n, places]`` of each batch; statistics are those of one batch."""
        sizes = [len(features[0]) for features in batches]
        found = []
        with separate_statistics(self, sizes):
            for head, *maps in zip(self.heads, *batches, strict=True):
                parts = head["body"](torch.cat(maps)).split(sizes)
                spread = [
                    minibatch_stddev(x, over_ranks=self.training).to(x.dtype).expand(len(x), 1, *x.shape[2:])
                    for x in parts
                ]
                x = torch.cat([torch.cat(parts), torch.cat(spread)], dim=1)
                found.append(head["last"](x).float().flatten(1).split(sizes))
        return found
