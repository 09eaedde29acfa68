"""How fast is the search for near-duplicates, compared with comparing all hashes with all?

Images per second on random hashes, a tenth of which are near-duplicates of another:

  ours          trainer.data.build.duplicates.near_duplicates, with thumbnails, down to the images to drop
  all with all  NumPy's XOR and bit count of each hash with all later ones, without thumbnails, down to the pairs

  ratio    our speed over the other's; above 1 ours is faster. It grows with the number of images
  seconds  what ours takes for --many images

examples:
  python benchmarks/near_duplicates.py
  python benchmarks/near_duplicates.py --many 1000000    takes minutes and 0.5 GB
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
from measure import add_turn_options, compare, count, device, machine, table

from catgan.command import Parser, run_command, say
from trainer.data.build.duplicates import MAX_BITS, near_duplicates

OURS, BRUTE = "ours", "all with all"
ROWS = 256  # hashes compared with all later ones at a time: fastest when they fit into a cache

Images = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""The arguments of ``near_duplicates``."""


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser("python benchmarks/near_duplicates.py", __doc__)
    add = parser.add_argument
    add("--num", type=count, default=20_000, metavar="N", help="images of the comparison (default: %(default)s)")
    add("--many", type=count, default=100_000, metavar="N", help="images of `seconds` (default: %(default)s)")
    add_turn_options(parser, seconds=2)
    a = parser.parse_args(argv)
    device()
    images = _images(a.num)
    ways = {OURS: partial(_ours, images), BRUTE: partial(_brute_force, images)}
    result = compare(f"{a.num} images", ways, seconds=a.seconds, repeats=a.repeats, settle=1)
    say(f"searching {a.many} images")
    many = _images(a.many)
    began = time.perf_counter()
    _ours(many)
    seconds = round(time.perf_counter() - began, 2)
    speeds = result["images_per_second"]
    table(
        ("images", *(f"{way}/s" for way in speeds), "ratio", f"s for {a.many}"),
        [(a.num, *speeds.values(), result["ratio"], seconds)],
    )
    return {"num": a.num} | result | {"many": a.many, "seconds": seconds, "machine": machine()}


def _images(num: int) -> Images:
    """Random images; the last tenth are copies of others with up to 4 bits of the hash changed."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, num, dtype=np.uint64)
    thumbnails = rng.integers(0, 256, (num, 8, 8, 3), dtype=np.uint8)
    copies = num // 10
    originals = rng.integers(0, num - copies, copies)
    thumbnails[num - copies :] = thumbnails[originals]
    bits = np.uint64(1) << rng.integers(0, 64, (4, copies), dtype=np.uint64)
    hashes[num - copies :] = hashes[originals] ^ np.bitwise_xor.reduce(bits)
    return hashes, thumbnails, rng.integers(0, 2**24, num), np.arange(num)


def _ours(images: Images) -> int:
    near_duplicates(*images)
    return len(images[0])


def _brute_force(images: Images) -> int:
    hashes = images[0]
    for start in range(0, len(hashes), ROWS):
        bits = np.bitwise_count(hashes[start : start + ROWS, None] ^ hashes[start + 1 :])
        np.nonzero(bits <= MAX_BITS)
    return len(hashes)


if __name__ == "__main__":
    run_command("near_duplicates.py", main)
