"""The judging networks: how each is built, and what its pictures must look like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.features.weights import load_weights


@dataclass(frozen=True)
class Network:
    """A classifier whose pooled features judge pictures: ``[n, 3, size, size]`` -> ``[n, dim]``."""

    name: str
    build: Callable[[], nn.Module]
    head: str
    """The attribute that holds the last layer."""
    head_bias: bool
    dim: int
    size: int
    antialias: bool
    offset: float
    scale: float

    @property
    def resize(self) -> str:
        """The way a picture takes to the network's size, in words that go with every result."""
        return f"bilinear{'-antialias' if self.antialias else ''}-{self.size}"

    def prepare(self, images: Tensor) -> Tensor:
        """Pixels ``[n, 3, H, W]``, 0 to 255, as the network's input, float32 ``[n, 3, size, size]``."""
        side = (self.size, self.size)
        pixels = F.interpolate(images.float(), side, mode="bilinear", align_corners=False, antialias=self.antialias)
        return (pixels - self.offset) / self.scale

    def load(self, weights: Path) -> nn.Module:
        """The network with these weights, without its last layer, for evaluation. Leaves torch's random state alone.

        Raises:
            UserError: the file does not hold this network's weights.
        """
        module = self._load(weights)
        setattr(module, self.head, nn.Identity())
        return module

    def load_head(self, weights: Path) -> nn.Module:
        """The last layer alone, features ``[n, dim]`` to the classes' logits, as ``load`` has the rest.

        Inception's is without its bias: so the Inception Score was defined (Salimans et al., 2016, in their code), and
        so others compute it.
        """
        head = getattr(self._load(weights), self.head)
        if not self.head_bias:
            head.bias = None
        return head

    def _load(self, weights: Path) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            module = self.build()
        load_weights(module, weights)
        return module.eval().requires_grad_(False)


def _inception() -> nn.Module:
    """pytorch-fid's InceptionV3 out of its own blocks: its ``fid_inception_v3`` would download the weights."""
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

    # TensorFlow's "same" padding, which the package computes beforehand, depends on the input's size.
    return EfficientNet.from_name("efficientnet-lite0", image_size=EFFLITE0.size)


# Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017); pixels and resizing as in pytorch-fid, which
# does not smooth when it shrinks.
INCEPTION = Network("inception", _inception, "fc", False, 2048, 299, antialias=False, offset=127.5, scale=127.5)

# EfficientNet (Tan and Le, 2019) without squeeze-and-excitation, pixels as its authors trained it. At 128 it takes a
# third of the time of its native 224, and few generators of faces exceed that.
EFFLITE0 = Network("efflite0", _efflite0, "_fc", True, 1280, 128, antialias=True, offset=127.0, scale=128.0)
