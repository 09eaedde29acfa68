"""DCGAN's all-convolutional networks (Radford et al. 2016): strided 4x4 convolutions, from and to a 4x4 map.

With batch norm they are the paper's; without it in the discriminator (``d_norm="none"``) they carry the R3GAN loss
on machines where residual networks are too slow.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.models.common import BatchNorm, Discriminator, Generator


def _widths(width: int, max_width: int, size: int) -> list[int]:
    """Channels from the full-resolution end (half the picture's side) down to the 4x4 map."""
    num_stages = size.bit_length() - 3
    return [min(width << i, max_width) for i in range(num_stages)]


def _initialise(module: nn.Module) -> None:
    """N(0, 0.02) weights, batch norm's scale N(1, 0.02): section 4 of the paper."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class DCGANGenerator(Generator):
    """z -> 4x4 -> ... -> size, each step a transposed convolution, batch norm and ReLU; tanh at the end."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        widths = _widths(config.g_width, config.max_width, config.size)[::-1]
        layers: list[nn.Module] = [nn.ConvTranspose2d(config.z_dim, widths[0], 4, 1, 0, bias=False)]
        for above, below in pairwise(widths):
            layers += [BatchNorm(above), nn.ReLU(inplace=True), nn.ConvTranspose2d(above, below, 4, 2, 1, bias=False)]
        layers += [
            BatchNorm(widths[-1]),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(widths[-1], 3, 4, 2, 1),
            nn.Tanh(),
        ]
        self.layers = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z[:, :, None, None])


class DCGANDiscriminator(Discriminator):
    """size -> ... -> 4x4 -> critic value, each step a strided convolution and leaky ReLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mixes_samples = config.d_norm == "batch"
        widths = _widths(config.d_width, config.max_width, config.size)
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        for above, below in pairwise(widths):
            layers.append(nn.Conv2d(above, below, 4, 2, 1, bias=not self.mixes_samples))
            if self.mixes_samples:
                layers.append(BatchNorm(below))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        layers.append(nn.Conv2d(widths[-1], 1, 4, 1, 0))
        self.layers = nn.Sequential(*layers)
        self.apply(_initialise)

    def critic(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten()
