"""Adversarial losses and penalties: pure functions of logits with one value per sample, so that the sums over the parts
of a batch (micro-batches, ranks) add up to the sum over the whole batch.

A *logit* is the discriminator's output before any sigmoid, float ``[n]``, high for real; for Wasserstein losses it is
the critic output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus


@dataclass(frozen=True)
class Loss:
    """A pair of losses. ``discriminator(real, fake)`` and ``generator(real, fake)`` map logits ``[n]`` to losses
    ``[n]``."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]
    relativistic: bool = False
    """Whether the generator's loss depends on ``real``; otherwise it is an empty tensor."""
    has_level: bool = True
    """Whether the sign of a logit alone tells real from fake, as ADA and LeCam need. Wasserstein and relativistic
    losses leave a constant undetermined."""
    average: bool = False
    """Relativistic average: ``real`` and ``fake`` come with the mean of the other side subtracted, taken over the
    global batch (Jolicoeur-Martineau 2019, section 4.2)."""


LOSSES = {
    # Goodfellow et al. 2014, eq. 1 with the non-saturating generator loss of section 3; this is DCGAN's BCE,
    # since -log sigmoid(x) = softplus(-x).
    "bce": Loss(
        discriminator=lambda real, fake: softplus(-real) + softplus(fake),
        generator=lambda real, fake: softplus(-fake),
    ),
    # Lim and Ye 2017; Miyato et al. 2018, eq. 16 and 17.
    "hinge": Loss(
        discriminator=lambda real, fake: relu(1 - real) + relu(1 + fake),
        generator=lambda real, fake: -fake,
    ),
    # Arjovsky et al. 2017, eq. 2, negated.
    "wasserstein": Loss(
        discriminator=lambda real, fake: fake - real,
        generator=lambda real, fake: -fake,
        has_level=False,
    ),
    # Relativistic paired loss: Jolicoeur-Martineau 2019; with R1 and R2 it is R3GAN (Huang et al. 2024, eq. 2 and 5).
    "rpgan": Loss(
        discriminator=lambda real, fake: softplus(fake - real),
        generator=lambda real, fake: softplus(real - fake),
        relativistic=True,
        has_level=False,
    ),
    # Jolicoeur-Martineau 2019, appendix B, RaLSGAN.
    "ralsgan": Loss(
        discriminator=lambda real, fake: (real - 1).square() + (fake + 1).square(),
        generator=lambda real, fake: (fake - 1).square() + (real + 1).square(),
        relativistic=True,
        has_level=False,
        average=True,
    ),
}


def lecam(real: Tensor, fake: Tensor, anchor_real: Tensor, anchor_fake: Tensor) -> Tensor:
    """LeCam regularisation (Tseng et al. 2021): penalises logits of reals above the running mean of the fakes' logits,
    and logits of fakes below the running mean of the reals' logits. As in the authors' code; eq. 3 of the paper
    penalises both sides of each mean.

    Args:
        real, fake: logits ``[n]``.
        anchor_real, anchor_fake: running means of the logits, scalars.
    """
    return relu(real - anchor_fake).square() + relu(anchor_real - fake).square()


def zero_centred_penalty(images: Sequence[Tensor], logits: Tensor) -> Tensor:
    """``sum_k |d logit_k / d images_k|^2`` for each of the given image batches, summed over the batches: ``[n]``.

    With the reals alone it is R1, with the fakes alone R2 (Mescheder et al. 2018, eq. 9 and 10). The gradient is
    taken with respect to the images only and keeps its graph, so that one ``backward()`` of the whole loss reaches
    the parameters and DistributedDataParallel's hooks fire once (pytorch#47562, pytorch#63929).

    Args:
        images: batches ``[n, c, h, w]`` that require grad; all of the same ``n``.
        logits: those of all images, any shape. Each should depend on one image only; minibatch standard deviation adds
            a small dependence on the others.
    """
    gradients = torch.autograd.grad(logits.sum(), list(images), create_graph=True)
    return torch.stack([g.float().square().sum(dim=(1, 2, 3)) for g in gradients]).sum(dim=0)


FINITE_STEP = 0.01


def perturb(images: Tensor) -> Tensor:
    """``images + s e`` with e ~ N(0, 1) for each value and s = ``FINITE_STEP``, for ``finite_difference_penalty``."""
    return images + FINITE_STEP * torch.randn_like(images)


def finite_difference_penalty(logits: Sequence[Tensor], perturbed: Sequence[Tensor]) -> Tensor:
    """An estimate of ``zero_centred_penalty`` without a second derivative: ``sum_k ((D(x_k + s e) - D(x_k)) / s)^2``
    with e ~ N(0, I), ``[n]``, as in Adversarial Flow Models (arXiv 2511.22475) and GAT (arXiv 2509.24935).

    Its mean over e is the penalty plus O(s^2), since E[(g . e)^2] = |g|^2. Its standard deviation over e is sqrt(2)
    times the penalty of one batch.

    Args:
        logits, perturbed: of batches of images and of those images from ``perturb``, float32 ``[n]`` each, computed in
            fp32 or TF32. In bf16 rounding made the estimate 1.7 and 2.4 times as large (discriminators of r3gan-cpu-32
            and r3gan-32); activations rounded to TF32's 10 bits changed it by less than 2%.
    """
    differences = torch.stack(list(perturbed)) - torch.stack(list(logits))
    return (differences / FINITE_STEP).square().sum(dim=0)


def one_centred_penalty(images: Tensor, logits: Tensor) -> Tensor:
    """``(|d logit / d images| - 1)^2`` of each image ``[n, c, h, w]``: ``[n]`` (Gulrajani et al. 2017, eq. 3, at
    points between reals and fakes)."""
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    # The norm has no gradient at zero, and a discriminator whose output is constant would give NaN.
    norm = (gradient.float().square().sum(dim=(1, 2, 3)) + 1e-12).sqrt()
    return (norm - 1).square()


def interpolate(reals: Tensor, fakes: Tensor) -> Tensor:
    """A random point on the line between each real and its fake, ``[n, c, h, w]``, that requires grad."""
    weight = torch.rand(len(reals), 1, 1, 1, device=reals.device)
    return reals.lerp(fakes, weight).detach().requires_grad_()
