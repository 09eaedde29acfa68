"""Near-duplicates: images that are re-encoded, resized, slightly cropped or corrected copies, or frames of one video.

Two images are near-duplicates if both of two distances are small:

- the Hamming distance of their perceptual hashes, which can be searched among millions of images, and
- the distance of their thumbnails, because aligned faces of different cats have similar hashes: of the 28 million
  pairs of 7,500 faces 129 are within ``MAX_BITS``. Only 3 of these are also within ``MAX_DISTANCE``, and all 3 show
  one cat at one time.

Mirrored copies do not count. Training flips images at random anyway, so a mirrored copy only doubles the frequency of
one image, and a hash that ignores mirroring would find more different faces similar.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_BITS = 8
"""The largest Hamming distance, of 64 bits, of the hashes of near-duplicates."""

MAX_DISTANCE = 0.04
"""The largest distance of the thumbnails of near-duplicates: 1 minus their correlation."""

Indices = NDArray[np.intp]
Hashes = NDArray[np.uint64]

_SIDE = 32
_COSINES = np.cos(np.pi / _SIDE * np.outer(np.arange(8), np.arange(_SIDE) + 0.5))
_COSINES[0] /= np.sqrt(2)

_BRUTE_FORCE = 2048  # up to this many images, compare all pairs
_LARGER_K = (1 << 14, 1 << 18)  # numbers of images from which a larger k is faster, see ``_close_between``
_MAX_CANDIDATES = 1 << 18  # pairs whose hashes are compared at a time, and
_MAX_CONFIRMED = 1 << 12  # pairs whose thumbnails are compared at a time, to bound the memory
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: a product spreads all bits into the high ones


def signature(image: Image.Image) -> bytes:
    """What the search needs to know of an RGB image: 8 bytes of ``perceptual_hash``, then the ``thumbnail``."""
    return perceptual_hash(image).to_bytes(8, "big") + thumbnail(image).tobytes()


def split_signatures(signatures: NDArray[np.uint8]) -> tuple[Hashes, NDArray[np.uint8]]:
    """Hashes [n] and thumbnails [n, 192] of signatures [n, 200]."""
    return np.ascontiguousarray(signatures[:, :8]).view(">u8")[:, 0].astype(np.uint64), signatures[:, 8:]


def perceptual_hash(image: Image.Image) -> int:
    """64 bits, few of which change when an RGB image is resized, re-encoded, brightened or given more contrast.

    The luminance at 32x32, its cosine transform, and one bit for each of the 8x8 lowest frequencies: whether it is
    above their median (C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010; this
    variant by N. Krawetz, "Looks Like It", 2011). Half of the bits are set, so two hashes differ in an even number.
    """
    luma = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), np.float64)
    frequencies = _COSINES @ luma @ _COSINES.T
    return int.from_bytes(np.packbits(frequencies > np.median(frequencies)).tobytes(), "big")


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """An RGB image at 8x8, uint8 [8, 8, 3]: the mean of each part."""
    return np.asarray(image.resize((8, 8), Image.Resampling.BOX))


def near_duplicates(
    hashes: NDArray[np.uint64], thumbnails: NDArray[np.uint8], pixels: NDArray[np.integer], keys: NDArray[np.generic]
) -> dict[int, tuple[int, int]]:
    """The images to drop, each with the larger image that is kept instead.

    From the largest original to the smallest, an image is dropped if and only if it is a near-duplicate of an image
    that is kept already. This is not transitive: of a video in which only successive frames are near-duplicates, every
    second frame is kept. The result does not depend on the order of the images, if no two share both size and key.

    The search is exact. On one core 100,000 images take about 3 seconds and a million 80. It needs about 100 bytes of
    memory per image, besides the arguments.

    Args:
        hashes: [n], of ``perceptual_hash``.
        thumbnails: [n, ...], of ``thumbnail``; read at random, may be a memory-mapped file. Images of one colour are
            near-duplicates of nothing.
        pixels: [n], the sizes of the originals.
        keys: [n], anything that NumPy sorts, such as names or digests: of equally large images the lowest key is kept.

    Returns:
        {index of a dropped image: (index of its largest kept near-duplicate, Hamming distance of the hashes)}
    """
    order = np.lexsort((keys, -pixels.astype(np.int64)))
    hashes = hashes[order]
    none = len(order)
    keeper = np.full(len(order), none)  # for each rank in ``order`` the rank of the image that is kept instead

    def settle(ranks: Indices) -> Indices:
        """Find the keepers among ``ranks`` (ascending), and return the ranks that are kept.

        The second half is compared first with what is kept of the first half. So a group of many copies forms few
        pairs, wherever it is in the order.
        """
        if len(ranks) <= _BRUTE_FORCE:
            high, low = _confirmed(thumbnails, order, *_close_among(hashes, ranks))
            for one, other in zip(high.tolist(), low.tolist(), strict=True):
                if keeper[one] == keeper[other] == none:
                    keeper[other] = one
            return ranks[keeper[ranks] == none]
        kept, rest = settle(ranks[: len(ranks) // 2]), ranks[len(ranks) // 2 :]
        for pairs in _close_between(hashes, kept, rest):
            high, low = _confirmed(thumbnails, order, *pairs)
            np.minimum.at(keeper, low, high)
        return np.concatenate((kept, settle(rest[keeper[rest] == none])))

    settle(np.arange(len(order)))
    low = np.flatnonzero(keeper < none)
    high = keeper[low]
    bits = np.bitwise_count(hashes[low] ^ hashes[high])
    return dict(zip(order[low].tolist(), zip(order[high].tolist(), bits.tolist(), strict=True), strict=True))


def _confirmed(thumbnails: NDArray[np.uint8], order: Indices, high: Indices, low: Indices) -> tuple[Indices, Indices]:
    """The pairs of ranks whose thumbnails are close, too."""
    close = np.empty(len(high), bool)
    for start in range(0, len(high), _MAX_CONFIRMED):
        part = slice(start, start + _MAX_CONFIRMED)
        close[part] = _distances(thumbnails[order[high[part]]], thumbnails[order[low[part]]]) <= MAX_DISTANCE
    return high[close], low[close]


def _close_among(hashes: Hashes, ranks: Indices) -> tuple[Indices, Indices]:
    """The pairs of ``ranks`` whose hashes differ in at most ``MAX_BITS``, the lower rank first, in ascending order."""
    bits = np.bitwise_count(hashes[ranks, None] ^ hashes[ranks])
    high, low = np.nonzero(np.triu(bits <= MAX_BITS, 1))
    return ranks[high], ranks[low]


def _close_between(hashes: Hashes, a: Indices, b: Indices) -> Iterator[tuple[Indices, Indices]]:
    """The pairs of one of ``a`` and one of ``b`` whose hashes differ in at most ``MAX_BITS``, each pair once.

    If the 64 bits are divided into MAX_BITS + k parts, two such hashes are equal in at least k parts, and sorting by
    these k parts brings the two together: one sort for each choice of k parts. With a larger k there are more sorts and
    fewer candidates.
    """
    k = 1 + sum(len(a) + len(b) > limit for limit in _LARGER_K)
    # Neighbouring frequencies are correlated, so each part takes bits that are far apart.
    parts = [np.uint64(sum(1 << bit for bit in range(i, 64, MAX_BITS + k))) for i in range(MAX_BITS + k)]
    for chosen in itertools.combinations(range(len(parts)), k):
        mask = np.bitwise_or.reduce([parts[i] for i in chosen])
        earlier = [parts[i] for i in range(chosen[-1]) if i not in chosen]
        for high, low, differing in _equal_under(mask, hashes, a, b):
            # More than k parts may be equal; the pair belongs to the first choice among them.
            first = differing & mask == 0
            for part in earlier:
                first &= differing & part != 0
            yield high[first], low[first]


def _equal_under(mask: np.uint64, hashes: Hashes, a: Indices, b: Indices) -> Iterator[tuple[Indices, Indices, Hashes]]:
    """The pairs of ``_close_between`` that are equal in the bits of ``mask``, and possibly others, with the bits that
    differ."""
    a, a_keys = _sorted_by_key(hashes, a, mask)
    b, b_keys = _sorted_by_key(hashes, b, mask)
    first = np.searchsorted(a_keys, b_keys, "left")
    count = np.searchsorted(a_keys, b_keys, "right") - first
    matched = np.flatnonzero(count)
    b, first, count = b[matched], first[matched], count[matched]
    a_hashes, b_hashes = hashes[a], hashes[b]
    ends = np.cumsum(count)
    start = done = 0
    while start < len(b):
        stop = max(start + 1, int(np.searchsorted(ends, done + _MAX_CANDIDATES, "right")))
        n = count[start:stop]
        right = np.repeat(np.arange(start, stop), n)
        # Each of b with a[first : first + count], one after the other.
        left = np.repeat(first[start:stop] + n - ends[start:stop] + done, n) + np.arange(len(right))
        differing = a_hashes[left] ^ b_hashes[right]
        found = np.flatnonzero(np.bitwise_count(differing) <= MAX_BITS)
        yield a[left[found]], b[right[found]], differing[found]
        start, done = stop, int(ends[stop - 1])


def _sorted_by_key(hashes: Hashes, ranks: Indices, mask: np.uint64) -> tuple[Indices, NDArray[np.uint32]]:
    """``ranks`` sorted by the masked hashes, which are mixed into 32 bits that sort 4 times as fast but may collide."""
    keys = ((hashes[ranks] & mask) * _GOLDEN >> np.uint64(32)).astype(np.uint32)
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
