"""How fast is the training step, compared with a DCGAN loop written the obvious way?

Measures trainer.step.GAN with the recipe dcgan-SIZE, EMA update included, against the loop in plain_dcgan.py. Both
train networks of the same shape on the same uint8 batches from memory. The images are noise: their content does not
change the work.

  ratio    our images/s over the plain loop's, the lowest of all batch sizes; above 1 ours is faster

examples:
  python benchmarks/step.py
  python benchmarks/step.py --batch 64 --size 64 --width 32
  python benchmarks/step.py --precision fp32             without bf16, where the processor has it
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from measure import add_turn_options, compare, count, device, machine, table
from plain_dcgan import PlainDCGAN

from catgan.command import Parser, run_command
from trainer.config import Config
from trainer.networks import set_up_device
from trainer.recipes import SIZES, resolve
from trainer.step import GAN

SEED = 0
SETTLE = 3
NUM_IMAGES = 1024


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser("python benchmarks/step.py", __doc__)
    add = parser.add_argument
    add("--batch", type=count, nargs="+", default=[16, 64], metavar="N", help="batch sizes (default: 16 64)")
    add("--size", type=int, choices=SIZES, default=32, help="side of the images in pixels (default: %(default)s)")
    add("--width", type=count, default=64, metavar="N", help="channels at half the side (default: %(default)s)")
    add("--precision", choices=("auto", "fp32"), default="auto", help="of our step (default: %(default)s)")
    add_turn_options(parser, seconds=5)
    a = parser.parse_args(argv)
    place = device()
    base = resolve(f"dcgan-{a.size}", None, gpu=False)
    model = replace(base.model, g_width=a.width, d_width=a.width, max_width=a.width * a.size)
    results = []
    for batch in a.batch:
        config = replace(base, model=model, batch=batch, precision=a.precision)
        result, bf16 = _measure(config, place, a.seconds, a.repeats)
        results.append({"batch": batch, "size": a.size, "width": a.width, "bf16": bf16} | result)
    table(
        ("batch", "bf16", "plain images/s", "ours images/s", "ratio"),
        [
            (r["batch"], r["bf16"], r["images_per_second"]["plain"], r["images_per_second"]["ours"], r["ratio"])
            for r in results
        ],
    )
    return {"results": results, "ratio": min(r["ratio"] for r in results), "machine": machine()}


def _measure(config: Config, place: torch.device, seconds: float, repeats: int) -> tuple[dict[str, Any], bool]:
    """The comparison for one batch size, and whether our step used bf16."""
    torch.manual_seed(SEED)
    set_up_device(config, place)
    size, batch = config.model.size, config.batch
    images = torch.randint(256, (max(NUM_IMAGES, batch), 3, size, size), dtype=torch.uint8)
    gan = GAN(config, place)
    plain = PlainDCGAN(size, place, config.model.g_width)
    nimg = 0

    def reals() -> torch.Tensor:
        return images[torch.randint(len(images), (batch,))]

    def ours() -> int:
        nonlocal nimg
        gan.step(reals(), nimg)
        nimg += batch
        gan.ema.update(gan.generator, batch, nimg)
        return batch

    def theirs() -> int:
        plain.step(reals())
        return batch

    ways = {"ours": ours, "plain": theirs}
    return compare(f"batch {batch}", ways, seconds=seconds, repeats=repeats, settle=SETTLE), gan.bf16


if __name__ == "__main__":
    run_command("step.py", main)
