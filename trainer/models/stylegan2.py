"""StyleGAN2's networks (Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN"): a mapping
network, modulated and demodulated convolutions, a generator with skip connections and a residual discriminator.

All layers have equalised learning rates (Karras et al. 2018). The filter of up- and downsampling is [1, 3, 3, 1], with
which upsampling is bilinear interpolation. There are no noise inputs, so that a latent is one image.

A convolution with weights of its own for each sample would be a grouped convolution over the whole batch. Instead the
input channels are multiplied by the style, all samples are convolved with the same weights, and the output channels are
multiplied by the demodulation factor, which is equal by linearity. Styles and factors are computed in fp32 and the
feature maps in the type that autocast chooses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.models.common import ClassProjection, Discriminator, Generator, minibatch_stddev, per_map, widths_by_side
from trainer.models.progan import EqualConv

_SLOPE = 0.2
_GAIN = math.sqrt(2)  # about keeps the variance through a leaky ReLU
_MAPPING_RATE = 0.01  # factor of the mapping network's learning rate: Karras et al. 2019, appendix C


def demodulation(weight: Tensor, style: Tensor) -> Tensor:
    """The factor of each output channel that gives it unit variance, for inputs of unit variance (eq. 3).

    Args:
        weight: ``[out, in, k, k]``.
        style: factors of the input channels ``[n, in]``.

    Returns:
        ``[n, out]``.
    """
    guard = style.new_full((len(weight),), 1e-8)  # OpenCV cannot read its addition to the product
    return F.linear(style.square(), weight.square().sum((2, 3)), guard).rsqrt()


def modulated_conv(x: Tensor, weight: Tensor, style: Tensor) -> Tensor:
    """``x`` ``[n, in, h, w]`` convolved with ``weight`` ``[out, in, k, k]`` whose input channels are scaled by
    ``style`` ``[n, in]`` for each sample (eq. 1), at the same size."""
    return F.conv2d(x * per_map(style.to(x.dtype)), weight, padding=weight.shape[-1] // 2)


def upsample(x: Tensor) -> Tensor:
    """``[n, c, h, w]`` -> ``[n, c, 2h, 2w]``: zeros in between, filtered by [1, 3, 3, 1] / 4, which is bilinear."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def blur(x: Tensor) -> Tensor:
    """``[n, c, h, w]`` -> ``[n, c, h + 1, w + 1]``, filtered by [1, 3, 3, 1] / 8.

    Three averages of two neighbours are that filter. A depthwise convolution would be differentiated twice in a loop
    over its channels.
    """
    x = F.avg_pool2d(F.avg_pool2d(x, 2, stride=1, padding=1), 2, stride=1, padding=1)
    return F.avg_pool2d(x, 2, stride=1)


def downsample(x: Tensor) -> Tensor:
    """``[n, c, h, w]`` -> ``[n, c, h / 2, w / 2]``: every second pixel after ``blur``, without computing the others."""
    return F.avg_pool2d(F.avg_pool2d(F.avg_pool2d(x, 2, stride=1, padding=1), 2, stride=1), 2)


def mix_styles(z: Tensor, other: Tensor, num_styles: int, probability: float) -> Tensor:
    """Latents for style mixing (Karras et al. 2019, section 3.1): for each sample, with this probability, the layers
    from a random one on have the latent of ``other``.

    Args:
        z, other: ``[n, z_dim]``.

    Returns:
        ``[n, num_styles, z_dim]``.
    """
    n, device = len(z), z.device
    cut = torch.randint(1, num_styles, (n, 1, 1), device=device)
    is_mixed = torch.rand(n, 1, 1, device=device) < probability
    layer = torch.arange(num_styles, device=device)[:, None]
    return torch.where(is_mixed & (layer >= cut), other[:, None], z[:, None])


def _in_float32(device: torch.device) -> AbstractContextManager[object]:
    """No autocast inside. Entered only where it is on, since an export would record it."""
    kind = device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()


def _act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, _SLOPE)


class EqualLinear(nn.Module):
    """A linear layer whose weights are N(0, 1) and scaled in each pass (equalised learning rate).

    Args:
        bias: the initial value of the biases.
        rate: factor of the learning rate; the initial output does not depend on it.
    """

    def __init__(self, in_features: int, out_features: int, bias: float = 0.0, rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / rate)
        self.bias = nn.Parameter(torch.full((out_features,), bias / rate))
        self.scale, self.rate = rate / math.sqrt(in_features), rate

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias * self.rate)


class Mapping(nn.Module):
    """z -> w, both ``[..., z_dim]``: z at unit mean square, then linear layers with leaky ReLU.

    The embedding of a class ``[n, input_dim - z_dim]``, also at unit mean square, follows z (StyleGAN2-ADA).
    """

    def __init__(self, input_dim: int, z_dim: int, num_layers: int) -> None:
        super().__init__()
        inputs = [input_dim, *[z_dim] * (num_layers - 1)]
        self.layers = nn.ModuleList(EqualLinear(i, z_dim, rate=_MAPPING_RATE) for i in inputs)

    def forward(self, z: Tensor, embedded: Tensor | None = None) -> Tensor:
        w = _unit_mean_square(z)
        if embedded is not None:
            embedded = embedded if z.ndim == 2 else embedded[:, None].expand(-1, z.shape[1], -1)  # one for each style
            w = torch.cat([w, _unit_mean_square(embedded)], dim=-1)
        for layer in self.layers:
            w = _act(layer(w)) * _GAIN
        return w


def _unit_mean_square(z: Tensor) -> Tensor:
    return z * (z.square().mean(dim=-1, keepdim=True) + 1e-8).rsqrt()


class _Modulated(nn.Module):
    """The parameters of a modulated convolution."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, w_dim: int) -> None:
        super().__init__()
        self.affine = EqualLinear(w_dim, in_channels, bias=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.scale = 1 / math.sqrt(in_channels * kernel * kernel)


class StyledConv(_Modulated):
    """A modulated and demodulated 3x3 convolution and leaky ReLU; with ``up``, of the upsampled input."""

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, up: bool = False) -> None:
        super().__init__(in_channels, out_channels, 3, w_dim)
        self.up = up

    def modulation(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the input and of the output channels, ``[n, in]`` and ``[n, out]``."""
        style = self.affine(w)
        return style, demodulation(self.weight * self.scale, style)

    def forward(self, x: Tensor, style: Tensor, factor: Tensor) -> Tensor:
        x = modulated_conv(upsample(x) if self.up else x, self.weight * self.scale, style)
        # The gain of a leaky ReLU can be applied before it, to these small tensors.
        factor, bias = (per_map(_GAIN * t.to(x.dtype)) for t in (factor, self.bias[None]))
        return _act(torch.addcmul(bias, x, factor))


class ToRGB(_Modulated):
    """A modulated 1x1 convolution to an image, float32, without demodulation."""

    def __init__(self, in_channels: int, w_dim: int) -> None:
        super().__init__(in_channels, 3, 1, w_dim)

    def modulation(self, w: Tensor) -> tuple[Tensor]:
        return (self.affine(w),)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return modulated_conv(x, self.weight * self.scale, style) + self.bias[:, None, None]


class StyleGAN2Generator(Generator):
    """z -> w -> styles of the convolutions on a learned 4x4 map; the image is the sum of one per resolution (skip
    generator, section 4.1). No tanh."""

    truncates = True
    takes_classes = True
    mean_w: Tensor
    """``[z_dim]``; with classes that of each class, ``[classes, z_dim]``, so that truncation keeps the class (as in
    StyleGAN-XL, Sauer et al. 2022)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        widths = widths_by_side(config.g_width, config.max_width, config.size)
        self.sides = list(widths)
        self.num_styles = 2 * len(widths) - 1
        self.mapping = Mapping(self.input_dim, config.z_dim, config.mapping_layers)
        if config.classes:
            nn.init.normal_(self.embedding.weight)  # normalised afterwards, so this decides its speed of learning alone
        means = (len(config.classes), config.z_dim) if config.classes else (config.z_dim,)
        self.register_buffer("mean_w", torch.zeros(means))
        self.const = nn.Parameter(torch.randn(1, widths[4], 4, 4))
        self.layers = nn.ModuleDict()
        for side, width in widths.items():
            if side > 4:
                self.layers[f"up{side}"] = StyledConv(widths[side // 2], width, config.z_dim, up=True)
            self.layers[f"conv{side}"] = StyledConv(width, width, config.z_dim)
            self.layers[f"rgb{side}"] = ToRGB(width, config.z_dim)

    def forward(
        self, z: Tensor, offset: Tensor | None = None, psi: Tensor | None = None, label: Tensor | None = None
    ) -> Tensor:
        """Images of latents.

        Args:
            z: ``[n, z_dim]``, or for style mixing a latent for each style, ``[n, num_styles, z_dim]``.
            offset: added to w, ``[n, z_dim]``; the gradient with respect to it is that with respect to w.
            psi: scalar; w is moved to its mean so that this share of the distance is left (truncation, Karras et al.
                2019, appendix B). None: 1.
            label: ``[n]``, if there are classes.
        """
        with _in_float32(z.device):
            w = self.features(z, label)
            if offset is not None:
                w = w + offset
            if psi is not None:
                mean = self.mean_w if label is None else F.embedding(label, self.mean_w)
                w = mean + psi * (w - mean)
            factors = {name: layer.modulation(w_of_layer) for name, layer, w_of_layer in self._layers(w)}
        x, image = self.const, None
        for side in self.sides:
            for name in (f"up{side}", f"conv{side}"):
                if name in self.layers:
                    x = self.layers[name](x, *factors[name])
            rgb = self.layers[f"rgb{side}"](x, *factors[f"rgb{side}"])
            image = rgb if image is None else upsample(image) + rgb
        assert image is not None
        return image

    def features(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """w, ``[n, z_dim]``, in which GANSpace (Härkönen et al. 2020) finds the directions of StyleGANs."""
        assert (label is not None) == bool(self.classes), "a label for each latent, if there are classes"
        return self.mapping(z, None if label is None else self.embedding(label))

    def _layers(self, w: Tensor) -> Iterator[tuple[str, StyledConv | ToRGB, Tensor]]:
        """Each layer with its name and its w ``[n, z_dim]``; that of ToRGB is the last convolution's."""
        of_style = [w] * self.num_styles if w.ndim == 2 else w.unbind(1)
        style = -1
        for name, layer in self.layers.items():
            assert isinstance(layer, StyledConv | ToRGB)
            style += isinstance(layer, StyledConv)
            yield name, layer, of_style[style]

    @torch.no_grad()
    def measure(self, batches: Iterable[Tensor], labels: Sequence[Tensor] = ()) -> None:
        if not self.classes:
            self.mean_w.copy_(torch.stack([self.mapping(z).mean(0) for z in batches]).mean(0))
            return
        # All classes on the same latents, so that they differ by the class alone.
        z = torch.cat(list(batches))
        for label, mean in enumerate(self.mean_w):
            mean.copy_(self.features(z, z.new_full((len(z),), label, dtype=torch.long)).mean(0))


class _Down(nn.Module):
    """Two convolutions, the second one at every second pixel, and a 1x1 convolution past them (section 4.1)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = EqualConv(in_channels, in_channels, 3, 1)
        self.conv2 = EqualConv(in_channels, out_channels, 3, 0, stride=2)
        self.skip = EqualConv(in_channels, out_channels, 1, 0, gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        y = _act(self.conv2(blur(_act(self.conv1(x)))))
        return (y + self.skip(downsample(x))) / math.sqrt(2)  # the variance of either


class StyleGAN2Discriminator(Discriminator):
    """Residual blocks down to 4x4; the minibatch standard deviation is an additional feature map there."""

    mixes_samples = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = widths_by_side(config.d_width, config.max_width, config.size)
        sides = sorted(widths, reverse=True)
        self.from_rgb = nn.ModuleDict({f"rgb{config.size}": EqualConv(3, widths[config.size], 1, 0)})
        self.down = nn.ModuleDict({f"down{side}": _Down(widths[2 * side], widths[side]) for side in sides[1:]})
        self.conv = EqualConv(widths[4] + 1, widths[4], 3, 1)
        self.dense = EqualConv(widths[4], widths[4], 4, 0)
        self.out = EqualConv(widths[4], 1, 1, 0, gain=1.0)
        if config.classes:
            self.projection = ClassProjection(len(config.classes), widths[4], 1.0, gain=1 / math.sqrt(widths[4]))

    def logits(self, images: Tensor, label: Tensor | None = None) -> Tensor:
        x = images
        for layer in self.from_rgb.values():
            x = _act(layer(x))
        for layer in self.down.values():
            x = layer(x)
        stddev = minibatch_stddev(x, over_ranks=self.training).to(x.dtype).expand(len(x), 1, *x.shape[2:])
        x = _act(self.conv(torch.cat([x, stddev], dim=1)))
        x = _act(self.dense(x))
        logits = self.out(x).flatten()
        return logits if label is None else logits + self.projection(x.flatten(1), label)
