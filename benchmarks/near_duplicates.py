"""The banded search for near-duplicates against comparing all hashes with all, and how long it takes for many."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
from measure import compare, count, device, machine, positive, table

from catgan.command import Parser, run_command, say
from trainer.data.build.duplicates import MAX_BITS, near_duplicates

NAME = "near_duplicates.py"
OURS, BRUTE = "ours", "all with all"
ROWS = 256  # hashes compared with all others at a time: what fits into a cache is fastest

_DESCRIPTION = f"""\
Pictures per second of looking for near-duplicates among random hashes, a tenth of them near-duplicates of another:

  {OURS:14s}trainer.data.build.duplicates.near_duplicates, with the thumbnails, down to the pictures to drop
  {BRUTE:14s}numpy's XOR and bit count of each hash with all later ones, without thumbnails, down to the pairs

`ratio` is ours over the other's speed; it grows with the number of pictures. `seconds` is ours for --many pictures.

examples:
  python benchmarks/near_duplicates.py
  python benchmarks/near_duplicates.py --many 1000000    needs minutes and 0.5 GB
"""

Pictures = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""The arguments of ``near_duplicates``."""


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"python benchmarks/{NAME}", _DESCRIPTION)
    parser.add_argument(
        "--num", type=count, default=20_000, metavar="N", help="pictures to compare with (default: %(default)s)"
    )
    parser.add_argument(
        "--many", type=count, default=100_000, metavar="N", help="pictures to take the time of (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=positive, default=2, metavar="S", help="length of a turn (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=count, default=5, metavar="N", help="rounds of turns (default: %(default)s)")
    a = parser.parse_args(argv)
    device()
    pictures = _pictures(a.num)
    ways = {OURS: partial(_ours, pictures), BRUTE: partial(_brute_force, pictures)}
    result = compare(f"{a.num} pictures", ways, seconds=a.seconds, repeats=a.repeats, settle=1)
    say(f"looking through {a.many} pictures")
    many = _pictures(a.many)
    began = time.perf_counter()
    _ours(many)
    seconds = round(time.perf_counter() - began, 2)
    speeds = result["images_per_second"]
    table(
        ("pictures", *(f"{way}/s" for way in speeds), "ratio", f"s for {a.many}"),
        [(a.num, *speeds.values(), result["ratio"], seconds)],
    )
    return {"num": a.num} | result | {"many": a.many, "seconds": seconds, "machine": machine()}


def _pictures(num: int) -> Pictures:
    """The last tenth are copies of others with up to 4 bits changed."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, num, dtype=np.uint64)
    thumbnails = rng.integers(0, 256, (num, 8, 8, 3), dtype=np.uint8)
    copies = num // 10
    originals = rng.integers(0, num - copies, copies)
    thumbnails[num - copies :] = thumbnails[originals]
    bits = np.uint64(1) << rng.integers(0, 64, (4, copies), dtype=np.uint64)
    hashes[num - copies :] = hashes[originals] ^ np.bitwise_xor.reduce(bits)
    return hashes, thumbnails, rng.integers(0, 2**24, num), np.arange(num)


def _ours(pictures: Pictures) -> int:
    near_duplicates(*pictures)
    return len(pictures[0])


def _brute_force(pictures: Pictures) -> int:
    hashes = pictures[0]
    for start in range(0, len(hashes), ROWS):
        bits = np.bitwise_count(hashes[start : start + ROWS, None] ^ hashes[start + 1 :])
        np.nonzero(bits <= MAX_BITS)
    return len(hashes)


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
