"""DCGAN written the obvious way, as in PyTorch's DCGAN tutorial: the baseline of step.py and race.py.

Two nn.Sequential, one backward for the reals and one for the fakes, Adam(2e-4, 0.5), float32, the default memory
layout, and a wait for the device in each step to read the losses. It differs from the tutorial in two points: the size
is a parameter, and the discriminator returns logits (BCEWithLogitsLoss) instead of a sigmoid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Z_DIM = 100


def generator(size: int, width: int) -> nn.Sequential:
    """``z [n, 100]`` -> images ``[n, 3, size, size]`` in [-1, 1]; ``width`` channels at half the side."""
    channels = width * size // 8
    layers: list[nn.Module] = [
        nn.Unflatten(1, (Z_DIM, 1, 1)),
        nn.ConvTranspose2d(Z_DIM, channels, 4, 1, 0, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(True),
    ]
    while channels > width:
        layers += [
            nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(channels // 2),
            nn.ReLU(True),
        ]
        channels //= 2
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())


def discriminator(size: int, width: int) -> nn.Sequential:
    """Images ``[n, 3, size, size]`` -> logits ``[n, 1, 1, 1]``."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    channels = width
    while channels < width * size // 8:
        layers += [
            nn.Conv2d(channels, channels * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(channels * 2),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        channels *= 2
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, 1, 0, bias=False))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class PlainDCGAN:
    """The networks at ``size`` pixels (a power of two from 16), their optimisers, and a training step."""

    def __init__(self, size: int, device: torch.device, width: int = 64) -> None:
        self.device = device
        self.generator = generator(size, width).apply(_initialise).to(device)
        self.discriminator = discriminator(size, width).apply(_initialise).to(device)
        self.g_optimiser = torch.optim.Adam(self.generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
        self.d_optimiser = torch.optim.Adam(self.discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
        self.criterion = nn.BCEWithLogitsLoss()

    def step(self, reals: Tensor) -> tuple[float, float]:
        """Train both networks on one batch, uint8 ``[n, 3, size, size]``. Returns the losses (D, G)."""
        reals = reals.to(self.device).float() / 127.5 - 1
        n = len(reals)
        real_label = torch.ones(n, device=self.device)
        fake_label = torch.zeros(n, device=self.device)

        self.discriminator.zero_grad()
        loss_real = self.criterion(self.discriminator(reals).view(-1), real_label)
        loss_real.backward()
        fakes = self.generator(torch.randn(n, Z_DIM, device=self.device))
        loss_fake = self.criterion(self.discriminator(fakes.detach()).view(-1), fake_label)
        loss_fake.backward()
        self.d_optimiser.step()

        self.generator.zero_grad()
        loss_generator = self.criterion(self.discriminator(fakes).view(-1), real_label)
        loss_generator.backward()
        self.g_optimiser.step()
        return loss_real.item() + loss_fake.item(), loss_generator.item()
