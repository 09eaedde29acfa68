"""The metric networks: how each one is built, and how images are prepared for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.features import opennsfw
from trainer.features.weights import load_weights, read_weights


@dataclass(frozen=True)
class Network:
    """An ImageNet classifier whose pooled features metrics compare: images to features ``[n, dim]``."""

    name: str
    build: Callable[[], nn.Module]
    head: str
    """The attribute of the module that holds its last layer."""
    head_bias: bool
    """Whether the last layer is used with its bias, see ``load_head``."""
    dim: int
    """Number of features."""
    size: int
    """Height and width of its input in pixels."""
    antialias: bool
    """Whether images are low-pass filtered before they are shrunk."""
    offset: float
    scale: float
    """Its input is ``(pixel - offset) / scale`` for pixels of 0 to 255."""
    read: Callable[[Path], dict[str, Tensor]] = read_weights
    """Reads its weights file."""

    @property
    def resize(self) -> str:
        """Name of the resizing, such as "bilinear-299"; part of every result and of the cache's keys."""
        return f"bilinear{'-antialias' if self.antialias else ''}-{self.size}"

    def prepare(self, images: Tensor) -> Tensor:
        """The network's input, float32 ``[n, 3, size, size]``, from images ``[n, 3, H, W]`` of 0 to 255."""
        side = (self.size, self.size)
        pixels = F.interpolate(images.float(), side, mode="bilinear", align_corners=False, antialias=self.antialias)
        return (pixels - self.offset) / self.scale

    def load(self, weights: Path) -> nn.Module:
        """The network without its last layer, in evaluation mode: input to features. Keeps torch's random state.

        Raises:
            UserError: the file does not hold this network's weights.
        """
        module = self._load(weights)
        setattr(module, self.head, nn.Identity())
        return module

    def load_head(self, weights: Path) -> nn.Module:
        """The last layer alone: features ``[n, dim]`` to logits ``[n, classes]``.

        Inception's has no bias, because the Inception Score is defined without it (the code of Salimans et al., 2016).

        Raises:
            UserError: as ``load``.
        """
        head = getattr(self._load(weights), self.head)
        if not self.head_bias:
            head.bias = None
        return head

    def _load(self, weights: Path) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            module = self.build()
        load_weights(module, weights, self.read)
        return module.eval().requires_grad_(False)


def _inception() -> nn.Module:
    """pytorch-fid's InceptionV3, assembled from its blocks because its ``fid_inception_v3`` downloads the weights."""
    from pytorch_fid import inception as fid
    from torchvision.models.inception import Inception3

    network = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    network.Mixed_5b = fid.FIDInceptionA(192, pool_features=32)
    network.Mixed_5c = fid.FIDInceptionA(256, pool_features=64)
    network.Mixed_5d = fid.FIDInceptionA(288, pool_features=64)
    network.Mixed_6b = fid.FIDInceptionC(768, channels_7x7=128)
    network.Mixed_6c = fid.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6d = fid.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6e = fid.FIDInceptionC(768, channels_7x7=192)
    network.Mixed_7b = fid.FIDInceptionE_1(1280)
    network.Mixed_7c = fid.FIDInceptionE_2(2048)
    return network


def _efflite0() -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    # The package computes TensorFlow's "same" padding at construction, so it needs the input's size here.
    return EfficientNet.from_name("efficientnet-lite0", image_size=EFFLITE0.size)


# Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017). Pixel scale and resizing are pytorch-fid's,
# which shrinks without antialiasing.
INCEPTION = Network("inception", _inception, "fc", False, 2048, 299, antialias=False, offset=127.5, scale=127.5)

# EfficientNet (Tan and Le, 2019) without squeeze-and-excitation; pixel scale as in its training. An input of 128 takes
# a third of the time of its native 224, and few generators of faces are larger.
EFFLITE0 = Network("efflite0", _efflite0, "_fc", True, 1280, 128, antialias=True, offset=127.0, scale=128.0)

# Pixel scale as in its training, input as that of EFFLITE0.
OPENNSFW = Network(
    "opennsfw",
    opennsfw.OpenNSFW,
    "fc",
    True,
    1024,
    128,
    antialias=True,
    offset=0.0,
    scale=1.0,
    read=opennsfw.read_weights,
)
