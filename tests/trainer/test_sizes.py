"""Recipes at 256 pixels, with networks of a few channels: a step, the images of an evaluation, the exported file."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from export.generator import USUAL_ABS_DIFF, export_onnx
from infer.latents import latents
from infer.session import Generator
from tests.trainer.tiny import tiny
from trainer.recipes import resolve
from trainer.sample import generate
from trainer.step import GAN

GROWN = 10_000_000  # images after which progressive networks are grown


@pytest.mark.parametrize("family", ["r3gan", "stylegan2", "progan", "fastgan"])
def test_a_step_and_a_file_at_256_pixels(family: str, tmp_path: Path) -> None:
    assert resolve(f"{family}-256", None, gpu=True).model.size == 256
    c = tiny(family, 256, batch=2)
    model = replace(c.model, g_width=8, max_width=16)  # pixel norm of fewer channels magnifies rounding
    gan = GAN(replace(c, model=model), torch.device("cpu"))
    reals = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    stats = gan.step(reals, GROWN, reals.flip(3) if gan.fresh_reals else None)
    assert all(value.isfinite() for value in stats.values())
    gan.ema.update(gan.generator, 2, GROWN)
    gan.recompute_ema_statistics()
    images = generate(gan, range(2))
    assert images.shape == (2, 3, 256, 256)
    path = tmp_path / "gen.onnx"
    assert export_onnx(gan.ema.module, path, {}) <= USUAL_ABS_DIFF * (10 if family == "progan" else 1)
    from_file = torch.from_numpy(Generator(path, "cpu")(latents(range(2), 8))).permute(0, 3, 1, 2)
    assert (from_file.int() - images.int()).abs().max() <= 1


def test_large_images_are_generated_in_passes() -> None:
    gan = GAN(tiny("fastgan"), torch.device("cpu"))
    gan.recompute_ema_statistics()
    whole = generate(gan, range(7))
    sizes = []
    gan.ema.module.register_forward_hook(lambda _, __, images: sizes.append(len(images)))
    with mock.patch("trainer.networks.PIXELS_PER_PASS", 3 * 32**2):
        assert torch.equal(generate(gan, range(7)), whole)
        assert sizes == [3, 3, 1]
        sizes.clear()
        gan.recompute_ema_statistics()
        assert max(sizes) == 3
        assert sum(sizes) == 1024
        few = generate(gan, range(7)).int()
        assert (few - whole.int()).abs().float().mean() < 2, "the statistics are nearly those of larger batches"
    with mock.patch("trainer.networks.PIXELS_PER_PASS", 1):
        assert len(generate(gan, range(2))) == 2
