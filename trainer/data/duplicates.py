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

_FIRST = 1024  # pictures compared all with all; each batch after it is compared with what was kept, and three times it
_CANDIDATES, _CONFIRMED = 1 << 18, 1 << 12  # pairs looked at at a time, by hash and by thumbnail, for the memory
_MANY = 200_000  # from here a sort costs less than the candidates it saves
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
    n = len(order)
    keeper = np.full(n, n)  # by rank; n where there is none
    kept = np.arange(0)
    start = 0
    while start < n:
        batch = np.arange(start, min(start + max(_FIRST, 3 * start), n))
        # Before the batch is compared with itself, it loses what is near to kept pictures: of g copies that would be
        # compared all with all, about the first _FIRST are left.
        for high, low in _near(hashes, thumbnails, order, kept, batch):
            np.minimum.at(keeper, low, high)
        rest = batch[keeper[batch] == n]
        pairs = [np.stack(found) for found in _near(hashes, thumbnails, order, rest, rest)]
        for high, low in sorted(np.concatenate(pairs, axis=1).T.tolist()) if pairs else ():
            if keeper[high] == keeper[low] == n:
                keeper[low] = high
        kept = np.concatenate((kept, rest[keeper[rest] == n]))
        start += len(batch)
    low = np.flatnonzero(keeper < n)
    high = keeper[low]
    bits = np.bitwise_count(hashes[low] ^ hashes[high])
    return dict(zip(order[low].tolist(), zip(order[high].tolist(), bits.tolist(), strict=True), strict=True))


def _near(
    hashes: Hashes, thumbnails: NDArray[np.uint8], order: Indices, a: Indices, b: Indices
) -> Iterator[tuple[Indices, Indices]]:
    """The pairs of a picture in ``a`` with one in ``b`` that are near, each once, the lower rank first."""
    for high, low in _alike(hashes, a, b):
        for i in range(0, len(high), _CONFIRMED):
            one, other = high[i : i + _CONFIRMED], low[i : i + _CONFIRMED]
            near = _distances(thumbnails[order[one]], thumbnails[order[other]]) <= MAX_DISTANCE
            yield one[near], other[near]


def _alike(hashes: Hashes, a: Indices, b: Indices) -> Iterator[tuple[Indices, Indices]]:
    """The pairs of a picture in ``a`` with one in ``b``, or in ``a`` if they are equal, with at most ``MAX_BITS``.

    If 64 bits are cut into MAX_BITS + k parts, two such hashes are equal in at least k of them, and a sort by these k
    brings the two together: for each choice of k parts one sort. A larger k makes more sorts and fewer candidates.
    """
    k = 2 if len(b) < _MANY else 3
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
            yield np.minimum(high, low)[first], np.maximum(high, low)[first]


def _joined(hashes: Hashes, a: Indices, b: Indices, mask: np.uint64) -> Iterator[tuple[Indices, Indices, Hashes]]:
    """The pairs of ``_alike`` that are equal under ``mask``, and perhaps others, with the bits that differ."""
    itself = a is b
    a, a_keys = _by_key(hashes, a, mask)
    b, b_keys = (a, a_keys) if itself else _by_key(hashes, b, mask)
    # For each of b the candidates are a[first : first + count]; within one set, those behind it.
    first = np.arange(1, len(b) + 1) if itself else np.searchsorted(a_keys, b_keys, "left")
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
        left = np.repeat(first[start:stop] + done - (ends[start:stop] - n), n) + np.arange(len(right))
        differing = a_hashes[left] ^ b_hashes[right]
        found = np.flatnonzero(np.bitwise_count(differing) <= MAX_BITS)
        yield a[left[found]], b[right[found]], differing[found]
        start, done = stop, int(ends[stop - 1])


def _by_key(hashes: Hashes, indices: Indices, mask: np.uint64) -> tuple[Indices, NDArray[np.uint32]]:
    """``indices`` sorted by the masked hashes, squeezed into 32 bits that sort 4 times as fast; two may collide."""
    keys = ((hashes[indices] & mask) * _ODD >> np.uint64(32)).astype(np.uint32)
    order = np.argsort(keys)
    return indices[order], keys[order]


def _distances(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[m] distances of thumbnails [m, ...]: 1 minus their correlation, 0 to 2, and 1 where one has no contrast."""
    a, b = _centred(a), _centred(b)
    scale = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return 1 - (a * b).sum(1) / np.maximum(scale, 1e-6)


def _centred(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    return flat - flat.mean(1, keepdims=True)
