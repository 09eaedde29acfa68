"""Images of seeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from infer.latents import latents
from trainer.networks import Networks


def generate(
    networks: Networks, seeds: Sequence[int], raw: bool = False, labels: Sequence[int] | None = None
) -> Tensor:
    """Images of ``seeds`` (and of ``labels``, one for each) by the EMA generator or the raw one, rounded like a saved
    file: uint8 ``[n, 3, size, size]``; see ``Networks.sample``."""
    z = torch.from_numpy(latents(seeds, networks.generator.z_dim)).to(networks.device)
    label = None if labels is None else torch.tensor(labels)
    most = networks.most_per_pass
    images = []
    for first in range(0, len(z), most):
        part = slice(first, first + most)
        made = networks.sample(z[part], raw, None if label is None else label[part])
        images.append(((made.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(images)
