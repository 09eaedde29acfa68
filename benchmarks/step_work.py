"""The work of a recipe's step, counted by running it: FLOP, operations, collectives, parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from trainer.models import num_parameters
from trainer.models.batchnorm import BatchNorm
from trainer.recipes import resolve
from trainer.step import GAN

COUNTED = 2  # pictures in the batch that is counted


@dataclass(frozen=True)
class Work:
    """What a recipe's step consists of, averaged over critic and generator steps."""

    family: str
    size: int
    batch: int
    generator: int
    """Parameters."""
    discriminator: int
    n_critic: int
    flops: float
    """Per real picture."""
    draw_flops: float
    """Per generated picture, of the generator alone."""
    operations: float
    norms: float
    """Collectives for the statistics of batch norm."""
    reads: int
    """Pictures read per picture counted."""
    snapshot: int
    """Pictures between evaluations."""
    judged: int
    """Pictures per evaluation."""


class Counter(TorchDispatchMode):
    """Operations and FLOP of what runs inside. PyTorch's FlopCounterMode takes no penalties on gradients, and counts
    the gradients of a grouped convolution as if it had one group."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if func._overloadpacket == torch.ops.aten.convolution_backward:
            grad, x, weight = (tensor.shape for tensor in args[:3])
            wanted = sum(args[10][:2])  # the gradients of input and weight cost what the forward did, each
            self.flops += wanted * conv_flop_count(list(x), list(weight), list(grad), transposed=args[7])
        elif (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


def count_work(family: str, size: int) -> Work:
    """Run some steps of two pictures here and count."""
    recipe = resolve(f"{family}-{size}", None, gpu=True)
    gan = GAN(replace(recipe, batch=COUNTED, precision="fp32"), torch.device("cpu"))
    norms = 0

    def norm(module: BatchNorm, *_: Any) -> None:
        nonlocal norms
        norms += 2 if module.training else 0  # forward and backward

    for module in (*gan.generator.modules(), *gan.discriminator.modules()):
        if isinstance(module, BatchNorm):
            module.register_forward_hook(norm)
    reals = torch.zeros(COUNTED, 3, size, size, dtype=torch.uint8)
    steps = math.lcm(recipe.loss.n_critic, recipe.loss.penalty_every)
    late = 10**9  # fully grown
    with Counter() as step:
        for _ in range(steps):
            gan.step(reals, late, reals if gan.fresh_reals else None)
    with Counter() as draw:
        gan.draw(torch.zeros(COUNTED, recipe.model.z_dim), average=False)
    return Work(
        family,
        size,
        recipe.batch,
        num_parameters(gan.generator),
        num_parameters(gan.discriminator),
        recipe.loss.n_critic,
        step.flops / steps / COUNTED,
        draw.flops / COUNTED,
        step.operations / steps,
        norms / steps,
        2 if gan.fresh_reals else 1,
        round(recipe.track.snapshot_kimg * 1000),
        recipe.eval.num,
    )
