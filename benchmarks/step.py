"""Our training step against a DCGAN loop written the obvious way: same networks, batch and pictures in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from measure import compare, count, device, machine, positive, table
from plain_dcgan import PlainDCGAN

from catgan.command import Parser, run_command
from trainer.config import Config
from trainer.recipes import SIZES, resolve
from trainer.step import GAN

NAME = "step.py"
SEED = 0
SETTLE = 3
NUM_PICTURES = 1024

_DESCRIPTION = """\
Images per second of trainer.step.GAN with the recipe dcgan-SIZE, with its average of the weights, and of the plain
loop in plain_dcgan.py. Both train networks of the same shape on the same uint8 batches out of memory; the pictures
are noise, since what they show does not change the work. `ratio` is ours over the plain loop's speed, the lowest of
all batches.

examples:
  python benchmarks/step.py
  python benchmarks/step.py --batch 64 --size 64 --width 32
  python benchmarks/step.py --precision fp32             without bf16, where the processor has it
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"python benchmarks/{NAME}", _DESCRIPTION)
    parser.add_argument(
        "--batch", type=count, nargs="+", default=[16, 64], metavar="N", help="batches to measure (default: 16 64)"
    )
    parser.add_argument(
        "--size", type=int, choices=SIZES, default=32, help="side of the pictures in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--width", type=count, default=64, metavar="N", help="channels at half the side (default: %(default)s)"
    )
    parser.add_argument(
        "--precision", choices=("auto", "fp32"), default="auto", help="of our step (default: %(default)s, as trained)"
    )
    parser.add_argument(
        "--seconds", type=positive, default=5, metavar="S", help="length of a turn (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=count, default=5, metavar="N", help="rounds of turns (default: %(default)s)")
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
    """The comparison for one batch, and whether our step multiplied in bf16."""
    torch.manual_seed(SEED)
    size, batch = config.model.size, config.batch
    pictures = torch.randint(256, (max(NUM_PICTURES, batch), 3, size, size), dtype=torch.uint8)
    gan = GAN(config, place)
    plain = PlainDCGAN(size, place, config.model.g_width)
    nimg = 0

    def reals() -> torch.Tensor:
        return pictures[torch.randint(len(pictures), (batch,))]

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


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
