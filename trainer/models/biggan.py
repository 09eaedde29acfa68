"""BigGAN's networks (Brock et al. 2019, "Large Scale GAN Training for High Fidelity Natural Image Synthesis") for small
images: residual blocks, class-conditional batch norm with one embedding of the class for all layers, self-attention at
one resolution, spectral norm, a discriminator with projection.

Each layer gets all of z together with the embedding, as in BigGAN-deep. Without classes, batch norm depends on z alone.
Self-attention and the generator's spectral norm are options.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from trainer.config import ModelConfig
from trainer.models.batchnorm import BatchNorm
from trainer.models.common import ClassProjection, Discriminator, Generator, per_map, widths_by_side


def _initialise(module: nn.Module) -> None:
    """Orthogonal weights: section 3 of the paper."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.orthogonal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose gains and biases are, in addition to those of each channel, linear functions of the condition:
    ``x [n, channels, h, w]`` and ``condition [n, inputs]``."""

    def __init__(self, channels: int, inputs: int) -> None:
        super().__init__()
        self.norm = BatchNorm(channels)
        self.gain = nn.Linear(inputs, channels, bias=False)
        self.bias = nn.Linear(inputs, channels, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.norm(x) * per_map(1 + self.gain(condition)) + per_map(self.bias(condition))


class _Up(nn.Module):
    """Two 3x3 convolutions, the first one of the upsampled map, and a 1x1 convolution past them; then ``attention``."""

    def __init__(self, in_channels: int, out_channels: int, inputs: int) -> None:
        super().__init__()
        self.norm1 = ConditionalBatchNorm(in_channels, inputs)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = ConditionalBatchNorm(out_channels, inputs)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1)
        self.attention: nn.Module = nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        y = self.conv1(_upsample(F.relu(self.norm1(x, condition))))
        y = self.conv2(F.relu(self.norm2(y, condition)))
        return self.attention(y + _upsample(self.skip(x)))  # the same as a 1x1 convolution after the upsampling


def _add_spectral_norm(module: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear)) -> None:
    """Spectral norm (Miyato et al. 2018) on all layers of ``kinds`` in ``module``, after its weights were initialised:
    from then on ``weight`` is computed. Each forward in training takes one step of the power iteration."""
    for layer in list(module.modules()):
        if isinstance(layer, kinds):
            spectral_norm(layer)


class _Gain(nn.Module):
    """A learned factor, 0 at first. A module, so that ``--optim.freeze-d`` counts it to the layer before it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class SelfAttention(nn.Module):
    """Self-attention over the pixels of a map ``[n, channels, h, w]``, h and w even; the result has the same shape
    (Zhang et al. 2019, "Self-Attention Generative Adversarial Networks", section 3).

    As in BigGAN: query and key have an eighth of the channels, the value half of them, key and value are max-pooled to
    half the side, no biases. ``gain`` starts at 0, so that the layer starts as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner, half = max(channels // 8, 1), max(channels // 2, 1)
        self.query = nn.Conv2d(channels, inner, 1, bias=False)
        self.key = nn.Conv2d(channels, inner, 1, bias=False)
        self.value = nn.Conv2d(channels, half, 1, bias=False)
        self.out = nn.Conv2d(half, channels, 1, bias=False)
        self.gain = _Gain()

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        query = self.query(x).reshape(-1, self.query.out_channels, height * width)
        key, value = (
            F.max_pool2d(layer(x), 2).reshape(-1, layer.out_channels, height * width // 4)
            for layer in (self.key, self.value)
        )
        weights = (query.transpose(1, 2) @ key).softmax(2)  # [n, h w, h w / 4]
        attended = value @ weights.transpose(1, 2)
        return x + self.gain(self.out(attended.reshape(-1, self.out.in_channels, height, width)))


def _upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class BigGANGenerator(Generator):
    """z and the embedding of the class -> 4x4 map -> residual blocks up to the full size; tanh at the end.

    Spectral norm is on the convolutions of self-attention, and with ``g_spectral_norm`` on all other convolutions and
    linear layers too; the embedding has none, as in the authors' code.
    """

    takes_classes = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        widths = widths_by_side(config.g_width, config.max_width, config.size)
        self.to4 = nn.Linear(self.input_dim, widths[4] * 16)
        self.blocks = nn.ModuleDict(
            {f"up{side}": _Up(widths[above], widths[side], self.input_dim) for above, side in pairwise(widths)}
        )
        attention = SelfAttention(widths[config.attention]) if config.attention else nn.Identity()
        if config.attention:
            self.blocks[f"up{config.attention}"].attention = attention
        last = widths[config.size]
        rgb = nn.Conv2d(last, 3, 3, padding=1)
        self.rgb = nn.Sequential(
            OrderedDict({"norm": BatchNorm(last), "relu": nn.ReLU(), f"rgb{config.size}": rgb, "tanh": nn.Tanh()})
        )
        self.apply(_initialise)
        _add_spectral_norm(self if config.g_spectral_norm else attention)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        condition = self.conditioned(z, label)
        x = self._map(condition)
        for block in self.blocks.values():
            x = block(x, condition)
        return self.rgb(x)

    def features(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """The map before the first block, in which GANSpace (Härkönen et al. 2020) finds BigGAN's directions."""
        return self._map(self.conditioned(z, label))

    def _map(self, condition: Tensor) -> Tensor:
        return self.to4(condition).reshape(-1, self.to4.out_features // 16, 4, 4)


class _Down(nn.Module):
    """Two 3x3 convolutions, and a 1x1 convolution past them; the result is averaged over 2x2 pixels if ``down``. Then
    ``attention``.

    Args:
        activate: a ReLU before the first convolution, not for images.
    """

    def __init__(self, in_channels: int, out_channels: int, down: bool = True, activate: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1)
        self.before: Callable[[Tensor], Tensor] = F.relu if activate else nn.Identity()
        self.after: Callable[[Tensor], Tensor] = nn.AvgPool2d(2) if down else nn.Identity()
        self.attention: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(self.before(x))))
        return self.attention(self.after(y) + self.skip(self.after(x)))


class BigGANDiscriminator(Discriminator):
    """Residual blocks down to 4x4, the sum over pixels, and a linear layer with the projection of the class; spectral
    norm everywhere (Miyato et al. 2018)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = widths_by_side(config.d_width, config.max_width, config.size // 2)
        sides = sorted(widths, reverse=True)
        blocks: dict[str, nn.Module] = {f"down{sides[0]}": _Down(3, widths[sides[0]], activate=False)}
        for above, side in pairwise(sides):
            blocks[f"down{side}"] = _Down(widths[above], widths[side])
        blocks["block4"] = _Down(widths[4], widths[4], down=False)
        if config.attention:
            blocks[f"down{config.attention}"].attention = SelfAttention(widths[config.attention])
        self.blocks = nn.Sequential(OrderedDict(blocks))
        self.linear = nn.Linear(widths[4], 1)
        self.apply(_initialise)
        if config.classes:
            self.projection = ClassProjection(len(config.classes), widths[4], deviation=1.0)
            nn.init.orthogonal_(self.projection.embedding.weight)
        _add_spectral_norm(self, (nn.Conv2d, nn.Linear, nn.Embedding))

    def logits(self, images: Tensor, label: Tensor | None = None) -> Tensor:
        x = F.relu(self.blocks(images)).sum((2, 3))
        logits = self.linear(x).flatten()
        return logits if label is None else logits + self.projection(x, label)
