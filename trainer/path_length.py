"""Path length regularisation (Karras et al. 2020, StyleGAN2, section 3.2): a step in w of a given length changes the
image by about the same amount, wherever it is and whatever its direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.distributed.collectives import sum_over_ranks, world_size

_DECAY = 0.01  # weight of a new batch in the running mean: appendix B


def random_direction(images: Tensor) -> Tensor:
    """N(0, I) over the square root of the number of pixels, of the shape of ``images`` ``[n, c, h, w]``. With that
    factor lengths do not grow with the resolution; the paper has it in the weight of the penalty."""
    return torch.randn_like(images) / (images.shape[2] * images.shape[3]) ** 0.5


def path_lengths(images: Tensor, w: Tensor) -> Tensor:
    """``|J^T y|`` of each image for a random direction y, where J is the derivative of the image with respect to its w
    (eq. 4): ``[n]``, differentiable.

    Args:
        images: ``[n, c, h, w]``.
        w: ``[n, w_dim]``, requires grad; each image depends on its own.
    """
    (gradient,) = torch.autograd.grad((images * random_direction(images)).sum(), w, create_graph=True)
    # The norm has no gradient at zero.
    return (gradient.square().sum(1) + 1e-12).sqrt()


class PathLength:
    """The penalty ``(|J^T y| - a)^2``, where a is the running mean of the lengths, the same on all ranks."""

    def __init__(self, device: torch.device) -> None:
        self.mean = torch.zeros((), device=device)
        self.num_updates = 0

    def penalty(self, lengths: Tensor) -> Tensor:
        """This rank's part of the mean over the lengths ``[n]`` of all ranks: the mean over ranks of these is that. A
        collective, which updates the running mean."""
        own = lengths.detach()
        total, count = sum_over_ranks(torch.stack([own.sum(), own.new_full((), len(own))])).unbind()
        self.num_updates += 1
        self.mean.lerp_(total / count, max(_DECAY, 1 / self.num_updates))
        return (lengths - self.mean).square().sum() * (world_size() / count)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean.copy_(state["mean"])
        self.num_updates = state["num_updates"]
