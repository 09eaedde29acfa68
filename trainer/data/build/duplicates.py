"""Pictures that show the same as another: re-encoded, resized, slightly cropped or corrected, or frames of one video.

A pair counts as near-duplicates when both of two measures say so:

- the Hamming distance of their perceptual hashes, which can be searched for among millions, and
- the distance of their thumbnails, since aligned faces of different cats have alike hashes: of the 28 million pairs of
  7,500 faces 129 are within ``MAX_BITS``, 3 of them also within ``MAX_DISTANCE``, and these 3 show one cat at one time.

A mirrored copy does not count. Training flips pictures at random anyway, so it is one picture that is seen twice as
often, while a hash that is blind to mirroring would find more of the faces alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_BITS = 8
"""Hashes of near-duplicates differ in at most so many of their 64 bits."""

MAX_DISTANCE = 0.04
"""Thumbnails of near-duplicates have at most this distance: 1 minus their correlation."""

Indices = NDArray[np.intp]
Hashes = NDArray[np.uint64]

_SIDE = 32
_COSINES = np.cos(np.pi / _SIDE * np.outer(np.arange(8), np.arange(_SIDE) + 0.5))
_COSINES[0] /= np.sqrt(2)

_FEW = 2048  # pictures that are compared all with all
_SORTS_PAY = (1 << 14, 1 << 18)  # pictures from which a larger k is faster, see ``_alike_between``
_CANDIDATES, _CONFIRMED = 1 << 18, 1 << 12  # pairs looked at at a time, by hash and by thumbnail, to bound the memory
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: a product spreads all bits into the high ones


def perceptual_hash(picture: Image.Image) -> int:
    """64 bits, of which few change when an RGB picture is resized, re-encoded, brightened or given more contrast.

    The luminance at 32x32, its cosine transform, and of each of the 8x8 lowest frequencies whether it is above their
    median (C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010; in this variant by
    N. Krawetz, "Looks Like It", 2011). So half of the bits are set, and two hashes differ in an even number of bits.
    """
    luma = np.asarray(picture.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), np.float64)
    frequencies = _COSINES @ luma @ _COSINES.T
    return int.from_bytes(np.packbits(frequencies > np.median(frequencies)).tobytes(), "big")


def thumbnail(picture: Image.Image) -> NDArray[np.uint8]:
    """An RGB picture at 8x8, uint8 [8, 8, 3], by plain averages."""
    return np.asarray(picture.resize((8, 8), Image.Resampling.BOX))


def near_duplicates(
    hashes: NDArray[np.uint64], thumbnails: NDArray[np.uint8], pixels: NDArray[np.integer], keys: NDArray[np.generic]
) -> dict[int, tuple[int, int]]:
    """The pictures to drop, each with the larger one that is kept for it.

    From the largest original to the smallest, a picture is dropped if and only if it is near one that is kept already.
    Nearness does not chain: of a video in which each frame is near the next only, every second one stays. The answer
    does not depend on the order of the pictures, as long as no two share both ``pixels`` and key.

    The search is exact. On one core 100,000 pictures take about 3 seconds and a million 80; it needs about 100 bytes
    of memory for each picture, besides the arguments.

    Args:
        hashes: [n], of ``perceptual_hash``.
        thumbnails: [n, ...], of ``thumbnail``; read in no order, and may be a memory-mapped file. Those of one colour
            are near nothing.
        pixels: [n], how large the originals were.
        keys: [n], anything numpy sorts, such as names or digests: of equally large pictures the lowest key is kept.

    Returns:
        {index of a dropped picture: (index of the largest kept one that it is near, Hamming distance of the hashes)}
    """
    order = np.lexsort((keys, -pixels.astype(np.int64)))
    hashes = hashes[order]
    none = len(order)
    keeper = np.full(len(order), none)  # of each rank in ``order``

    def settle(ranks: Indices) -> Indices:
        """Find the keepers among ``ranks`` (ascending), and return the ranks that stay.

        The second half first loses what is near to what stays of the first. So of a group of many copies only few
        pairs are ever formed, wherever it stands in the order.
        """
        if len(ranks) <= _FEW:
            high, low = _confirmed(thumbnails, order, *_alike_among(hashes, ranks))
            for one, other in zip(high.tolist(), low.tolist(), strict=True):
                if keeper[one] == keeper[other] == none:
                    keeper[other] = one
            return ranks[keeper[ranks] == none]
        stay, rest = settle(ranks[: len(ranks) // 2]), ranks[len(ranks) // 2 :]
        for pairs in _alike_between(hashes, stay, rest):
            high, low = _confirmed(thumbnails, order, *pairs)
            np.minimum.at(keeper, low, high)
        return np.concatenate((stay, settle(rest[keeper[rest] == none])))

    settle(np.arange(len(order)))
    low = np.flatnonzero(keeper < none)
    high = keeper[low]
    bits = np.bitwise_count(hashes[low] ^ hashes[high])
    return dict(zip(order[low].tolist(), zip(order[high].tolist(), bits.tolist(), strict=True), strict=True))


def _confirmed(thumbnails: NDArray[np.uint8], order: Indices, high: Indices, low: Indices) -> tuple[Indices, Indices]:
    """Those pairs of ranks whose thumbnails are near, too."""
    near = np.empty(len(high), bool)
    for start in range(0, len(high), _CONFIRMED):
        some = slice(start, start + _CONFIRMED)
        near[some] = _distances(thumbnails[order[high[some]]], thumbnails[order[low[some]]]) <= MAX_DISTANCE
    return high[near], low[near]


def _alike_among(hashes: Hashes, ranks: Indices) -> tuple[Indices, Indices]:
    """The pairs of ``ranks`` whose hashes differ in at most ``MAX_BITS``, the lower rank first, in ascending order."""
    bits = np.bitwise_count(hashes[ranks, None] ^ hashes[ranks])
    high, low = np.nonzero(np.triu(bits <= MAX_BITS, 1))
    return ranks[high], ranks[low]


def _alike_between(hashes: Hashes, a: Indices, b: Indices) -> Iterator[tuple[Indices, Indices]]:
    """The pairs of one of ``a`` and one of ``b`` whose hashes differ in at most ``MAX_BITS``, each pair once.

    If 64 bits are cut into MAX_BITS + k parts, two such hashes are equal in at least k of them, and a sort by these k
    brings the two together: for each choice of k parts one sort. A larger k makes more sorts and fewer candidates.
    """
    k = 1 + sum(len(a) + len(b) > limit for limit in _SORTS_PAY)
    # Neighbouring frequencies go together in pictures, so a part takes its bits from far apart.
    parts = [np.uint64(sum(1 << bit for bit in range(i, 64, MAX_BITS + k))) for i in range(MAX_BITS + k)]
    for chosen in itertools.combinations(range(len(parts)), k):
        mask = np.bitwise_or.reduce([parts[i] for i in chosen])
        earlier = [parts[i] for i in range(chosen[-1]) if i not in chosen]
        for high, low, differing in _joined(hashes, a, b, mask):
            # More than k parts may be equal; the pair belongs to the first choice of them.
            first = differing & mask == 0
            for part in earlier:
                first &= differing & part != 0
            yield high[first], low[first]


def _joined(hashes: Hashes, a: Indices, b: Indices, mask: np.uint64) -> Iterator[tuple[Indices, Indices, Hashes]]:
    """The pairs of ``_alike_between`` that are equal under ``mask``, and perhaps others, with the bits that differ."""
    a, a_keys = _by_key(hashes, a, mask)
    b, b_keys = _by_key(hashes, b, mask)
    first = np.searchsorted(a_keys, b_keys, "left")
    count = np.searchsorted(a_keys, b_keys, "right") - first
    some = np.flatnonzero(count)
    b, first, count = b[some], first[some], count[some]
    a_hashes, b_hashes = hashes[a], hashes[b]
    ends = np.cumsum(count)
    start = done = 0
    while start < len(b):
        stop = max(start + 1, int(np.searchsorted(ends, done + _CANDIDATES, "right")))
        n = count[start:stop]
        right = np.repeat(np.arange(start, stop), n)
        # Each of b with a[first : first + count], one after the other.
        left = np.repeat(first[start:stop] + n - ends[start:stop] + done, n) + np.arange(len(right))
        differing = a_hashes[left] ^ b_hashes[right]
        found = np.flatnonzero(np.bitwise_count(differing) <= MAX_BITS)
        yield a[left[found]], b[right[found]], differing[found]
        start, done = stop, int(ends[stop - 1])


def _by_key(hashes: Hashes, ranks: Indices, mask: np.uint64) -> tuple[Indices, NDArray[np.uint32]]:
    """``ranks`` sorted by the masked hashes, squeezed into 32 bits that sort 4 times as fast; two may collide."""
    keys = ((hashes[ranks] & mask) * _ODD >> np.uint64(32)).astype(np.uint32)
    order = np.argsort(keys)
    return ranks[order], keys[order]


def _distances(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[m] distances of thumbnails [m, ...]: 1 minus their correlation, 0 to 2, and 1 where one has no contrast."""
    x, y = _centred(a), _centred(b)
    scale = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return 1 - (x * y).sum(1) / np.maximum(scale, 1e-6)


def _centred(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    return flat - flat.mean(1, keepdims=True)
