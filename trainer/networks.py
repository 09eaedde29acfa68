"""Generator, discriminator and the generator's EMA: what a GAN consists of, and sampling from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trainer.config import Config
from trainer.distributed.memory import keep_freed_memory
from trainer.ema import EMA
from trainer.models import AtLevel, Discriminator, Generator, build_discriminator, build_generator, resize_to_level

PIXELS_PER_PASS = 64 * 128**2
"""Pixels of the images that are generated at a time without gradients: the memory of a pass grows with them."""

_EMA_LATENTS, _EMA_BATCH = 1024, 64  # for the statistics of the EMA generator
_GOLDEN_RATIO = 0.6180339887498949  # its multiples, modulo 1, are spread evenly

M = TypeVar("M", bound=nn.Module)
Condition = dict[str, Any]
"""``{"label": int64 [n]}``, or nothing."""


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware (AVX512-BF16 or AMX on CPUs), so that autocast pays off."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def set_up_device(config: Config, device: torch.device) -> None:
    """Choose for the whole process how a GPU computes convolutions and products, and how memory is kept on a CPU.

    Layers keep the shape of their input, so that trying cuDNN's algorithms once pays off. What autocast leaves in
    float32 is multiplied in TF32, unless the user wants fp32.
    """
    if device.type == "cpu":
        keep_freed_memory()
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.precision != "fp32"


class Networks:
    """The two networks and the EMA, on ``device``, at the resolution that ``set_level`` chose last.

    ``generator`` and ``discriminator`` are the bare modules, without DistributedDataParallel: state dicts come from
    them.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.generator: Generator = _place(build_generator(config.model), device)
        self.discriminator: Discriminator = _place(build_discriminator(config.model), device)
        self.ema = EMA(self.generator, config.ema.half_life_kimg * 1000, config.ema.ramp)
        self.class_counts: Sequence[int] = (1,) * len(config.model.classes)
        """How frequent the classes are in training, for ``recompute_ema_statistics``; training sets the data's numbers
        of images."""
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and native_bf16(device))
        self.set_level(0)

    def set_level(self, nimg: int) -> None:
        """Set the resolution of progressive networks at ``nimg`` images; ``growth`` is their further argument."""
        c = self.config
        self.growth = {"level": c.grow.level(nimg, c.model.size)} if self.generator.grows else {}

    def recompute_ema_statistics(self) -> None:
        """Recompute the EMA generator's batch-norm statistics or its mean w, on 1,024 latents that are always the same.
        The statistics are those of classes as frequent as ``class_counts``, to within two latents or so; a mean w is of
        one class. Call it before sampling from, evaluating or saving the EMA. It does not change the random state of
        the training."""
        random = torch.Generator().manual_seed(0)
        z_dim = self.config.model.z_dim
        batch = min(_EMA_BATCH, self.most_per_pass)
        z = torch.cat([torch.randn(_EMA_BATCH, z_dim, generator=random) for _ in range(_EMA_LATENTS // _EMA_BATCH)])
        batches = z.to(self.device).split(batch)
        labels: Sequence[Tensor] = ()
        if self.config.model.classes:
            ends = torch.tensor(self.class_counts, dtype=torch.float64).cumsum(0)
            points = torch.arange(_EMA_LATENTS, dtype=torch.float64) * _GOLDEN_RATIO % 1 * ends[-1]
            labels = torch.searchsorted(ends, points, right=True).to(self.device).split(batch)
        self.ema.recompute_statistics(batches, labels, **self.growth)
        self.ema.module.measure(batches, labels)

    @property
    def most_per_pass(self) -> int:
        """The number of images that are generated at a time without gradients."""
        return max(PIXELS_PER_PASS // self.generator.size**2, 1)

    @torch.no_grad()
    def sample(self, z: Tensor, raw: bool = False, label: Tensor | None = None) -> Tensor:
        """Images float ``[n, 3, size, size]``, nominally in [-1, 1], of latents ``[n, z_dim]`` (and labels int64
        ``[n]``), by the EMA generator (``recompute_ema_statistics`` first) or the raw one, with batch norm's running
        statistics."""
        generator = self.generator if raw else self.ema.module
        generator.eval()
        images = (AtLevel(generator, **self.growth) if self.growth else generator)(z, **self.condition(label))
        self.generator.train()
        return images

    @torch.no_grad()
    def logits(self, images: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits ``[n]`` of images ``[n, 3, size, size]`` (and labels int64 ``[n]``), uint8 or in [-1, 1], without
        augmentation and with batch norm's running statistics; the discriminator does not change."""
        images = to_float(images.to(self.device))
        return self._eval_logits(resize_to_level(images, **self.growth) if self.growth else images, label)

    @torch.no_grad()
    def fake_logits(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits ``[n]`` of the raw generator's images of latents ``[n, z_dim]`` (and labels), both with running
        statistics."""
        self.generator.eval()
        fakes = self.autocast(self.generator, z, **self.condition(label)).float()
        self.generator.train()
        return self._eval_logits(fakes, label)

    def _eval_logits(self, images: Tensor, label: Tensor | None) -> Tensor:
        self.discriminator.eval()
        (logits,) = self.autocast(self.discriminator, images, **self.condition(label))
        self.discriminator.train()
        return logits

    def condition(self, label: Tensor | None) -> Condition:
        """The labels as keyword of the networks, on the device; nothing if the networks have no classes."""
        if label is None or not self.config.model.classes:
            return {}
        return {"label": label.to(self.device, non_blocking=True)}

    def autocast(self, module: nn.Module, *inputs: Tensor, fp32: bool = False, **keywords: Any) -> Any:
        """``module`` on ``inputs`` and ``keywords`` at the current level, in bf16 where that pays off, unless it has to
        be ``fp32``. Returns its output."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16 and not fp32):
            return module(*inputs, **self.growth, **keywords)

    def is_finite(self) -> bool:
        """Whether all weights of both networks are; waits for the device."""
        return all_finite([*self.generator.parameters(), *self.discriminator.parameters()])


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all values of all tensors are finite; waits for the device once."""
    return bool(torch.stack(torch._foreach_norm(list(tensors))).isfinite().all().item())


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float in [-1, 1]; float ones as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def _place(module: M, device: torch.device) -> M:
    """On the device, in the memory layout that convolutions are fastest in."""
    module.to(device)
    module.to(memory_format=torch.channels_last)
    return module
