"""Differentiable augmentation of what the discriminator sees (DiffAugment, Zhao et al. 2020).

Each transform is applied to each image with probability ``p``, so a ramp of ``p`` from 0 fades augmentation in
(R3GAN ramps its augmentation the same way). Reals and fakes go through the same pipeline; gradients flow through.

Images are ``[n, c, h, w]``, or versions of the same images ``[versions, n, c, h, w]``: all versions of an image get the
same augmentation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def random_flip(images: Tensor) -> Tensor:
    """Mirror each image of ``[n, c, h, w]`` left to right with probability one half."""
    flip = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flip, images.flip(3), images)


def _factor(images: Tensor, low: float, high: float) -> Tensor:
    return torch.empty(images.shape[-4], 1, 1, 1, device=images.device).uniform_(low, high)


def colour(images: Tensor) -> Tensor:
    """Brightness +-0.5, saturation x0..2 and contrast x0.5..1.5, for images in [-1, 1]."""
    images = images + _factor(images, -0.5, 0.5)
    grey = images.mean(dim=-3, keepdim=True)
    images = (images - grey) * _factor(images, 0.0, 2.0) + grey
    mean = images.mean(dim=(-3, -2, -1), keepdim=True)
    return (images - mean) * _factor(images, 0.5, 1.5) + mean


def translation(images: Tensor, ratio: float = 0.125) -> Tensor:
    """Shift by up to ``ratio`` of the side in whole pixels; the border is filled with zeros."""
    n, _, height, width = images.shape[-4:]
    pad_y, pad_x = round(height * ratio), round(width * ratio)
    shift_y = torch.randint(2 * pad_y + 1, (n, 1), device=images.device)
    shift_x = torch.randint(2 * pad_x + 1, (n, 1), device=images.device)
    rows = (torch.arange(height, device=images.device) + shift_y)[:, :, None]
    columns = (torch.arange(width, device=images.device) + shift_x)[:, None, :]
    padded = F.pad(images, (pad_x, pad_x, pad_y, pad_y))
    samples = torch.arange(n, device=images.device)[:, None, None]
    # Channels last: an index for each pixel, not for each of its channels.
    return padded.movedim(-3, -1)[..., samples, rows, columns, :].movedim(-1, -3)


def cutout(images: Tensor, ratio: float = 0.5) -> Tensor:
    """Blank a square of ``ratio`` of the side around a random centre."""
    n, _, height, width = images.shape[-4:]
    half_y, half_x = height * ratio / 2, width * ratio / 2
    centre_y = torch.rand(n, 1, 1, 1, device=images.device) * height
    centre_x = torch.rand(n, 1, 1, 1, device=images.device) * width
    y = torch.arange(height, device=images.device)[None, None, :, None] + 0.5
    x = torch.arange(width, device=images.device)[None, None, None, :] + 0.5
    inside = ((y - centre_y).abs() < half_y) & ((x - centre_x).abs() < half_x)
    return images.masked_fill(inside, 0.0)


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "colour": colour,
    "translation": translation,
    "cutout": cutout,
}


def augment(images: Tensor, policy: tuple[str, ...], p: float | Tensor) -> Tensor:
    """Apply each transform of ``policy`` to each image with probability ``p`` in 0..1.

    ``p`` may be a scalar on the device; nothing here waits for it.
    """
    if not isinstance(p, Tensor) and p <= 0.0:
        return images
    for name in policy:
        chosen = torch.rand(images.shape[-4], 1, 1, 1, device=images.device) < p
        images = torch.where(chosen, TRANSFORMS[name](images), images)
    return images


class AdaptiveProbability:
    """ADA (Karras et al. 2020, section 3): augment more while the discriminator overfits.

    Every ``INTERVAL`` batches the probability moves by a fixed amount, up if the mean sign of the logits of reals is
    above ``target``, else down. It is a tensor on the device, so that no step waits for it.
    """

    INTERVAL = 4

    def __init__(self, p: float, target: float, kimg: float, device: torch.device) -> None:
        """``kimg``: thousands of images in which the probability can go from 0 to 1."""
        self.p = torch.tensor(p, device=device)
        self.signs = torch.zeros((), device=device)
        self.batches = 0
        self.target, self.kimg = target, kimg

    def update(self, sign: Tensor, batch: int) -> None:
        """Add a batch of ``batch`` images; ``sign`` is the mean sign of the logits of all its reals."""
        self.signs += sign
        self.batches += 1
        if self.batches == self.INTERVAL:
            direction = (self.signs / self.INTERVAL - self.target).sign()
            self.p += direction * (self.INTERVAL * batch / (self.kimg * 1000))
            self.p.clamp_(0.0, 1.0)
            self.signs.zero_()
            self.batches = 0

    def state_dict(self) -> dict[str, Any]:
        return {"p": self.p, "signs": self.signs, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.p.copy_(state["p"])
        self.signs.copy_(state["signs"])
        self.batches = state["batches"]
