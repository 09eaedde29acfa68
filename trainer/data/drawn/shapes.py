"""Soft shapes to draw with: signed distances, smooth masks and noise on a grid of coordinates.

Distances are negative inside, in the units of the coordinates; the masks made of them lie in [0, 1]. All of it is
elementwise float32 arithmetic (no BLAS, no reductions), so a picture does not depend on threads or processes.
Distances after Inigo Quilez, "2D distance functions" (the ellipse is his first-order bound, exact on the outline).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Plane = NDArray[np.floating[Any]]  # float32 [n, m]
Colour = NDArray[np.floating[Any]]  # float32 [3], linear light
Canvas = NDArray[np.floating[Any]]  # float32 [3, n, m]: red, green, blue in linear light

FUR_REACH = 1.9  # the fur texture covers [-FUR_REACH, FUR_REACH] in face units, hair growing away from its centre
FUR_TEXELS = 768
FUR_LEVELS = 5


@dataclass(frozen=True)
class Frame:
    """The grid a cat is drawn on. All planes are [n, n].

    ``x``, ``y`` are face units (origin between eyes and nose, the head reaching about 1, y down); ``u``, ``v`` are the
    same for things on the surface of the head, which turn with it. ``hair`` is the fur texture and ``blotch``,
    ``spots``, ``warp_x``, ``warp_y`` are smooth noise in about [-1, 1], coarse to fine. ``pixel`` is the width of a
    pixel in face units.
    """

    x: Plane
    y: Plane
    u: Plane
    v: Plane
    hair: Plane
    blotch: Plane
    spots: Plane
    warp_x: Plane
    warp_y: Plane
    pixel: float

    def crop(self, rows: slice, columns: slice) -> Frame:
        """The part of every plane under ``rows`` and ``columns`` (views)."""
        planes = {f.name: getattr(self, f.name)[rows, columns] for f in fields(self) if f.name != "pixel"}
        return Frame(**planes, pixel=self.pixel)


def step(low: float, high: float, x: Plane) -> Plane:
    """0 at ``low``, 1 at ``high`` (either may be the larger one), a cubic ramp between."""
    t = np.clip((x - low) * (1 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


def mix(canvas: Canvas, colour: Colour | Canvas, mask: Plane) -> None:
    """Lay ``colour`` ([3] or [3, n, m]) over ``canvas`` [3, n, m] in place where ``mask`` [n, m] is 1."""
    paint = colour.reshape(3, 1, 1) if colour.ndim == 1 else colour
    canvas += (paint - canvas) * mask


def ellipse(x: Plane, y: Plane, rx: float, ry: float) -> Plane:
    """Distance to the ellipse of half axes ``rx`` and ``ry`` around the origin."""
    ax, ay = x / rx, y / ry
    k0 = np.sqrt(ax * ax + ay * ay)
    bx, by = ax / rx, ay / ry
    return k0 * (k0 - 1) / (np.sqrt(bx * bx + by * by) + 1e-6)


def stroke(x: Plane, y: Plane, start: tuple[float, float], end: tuple[float, float], r0: float, r1: float) -> Plane:
    """Distance to a brush stroke from ``start`` (radius ``r0``) to ``end`` (radius ``r1``)."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    scale = 1 / (dx * dx + dy * dy)
    px, py = x - start[0], y - start[1]
    t = np.clip((px * dx + py * dy) * scale, 0, 1)
    qx, qy = px - t * dx, py - t * dy
    return np.sqrt(qx * qx + qy * qy) - (r0 + t * (r1 - r0))


def join(a: Plane, b: Plane, k: float) -> Plane:
    """Union of two distances, rounded over ``k`` (quadratic smooth minimum)."""
    h = np.maximum(k - np.abs(a - b), 0) * (1 / k)
    return np.minimum(a, b) - h * h * (k / 4)


def bump(x: Plane, y: Plane, rx: float, ry: float) -> Plane:
    """A smooth hill of height 1 at the origin that ends at the ellipse of half axes ``rx`` and ``ry``."""
    ax, ay = x / rx, y / ry
    q = np.maximum(1 - ax * ax - ay * ay, 0)
    return q * q


def enlarge(plane: Plane, size: int) -> Plane:
    """``plane`` [n, n] resized to [size, size] (bicubic): the same field, on a finer grid."""
    return np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC))


@cache
def fur(level: int) -> Plane:
    """Hair texture around 0, deviation 1.8 at level 0; each level has half the resolution of the one before.

    White noise averaged along the direction the hair grows, away from the nose (line integral convolution:
    Cabral and Leedom 1993), at two hair widths. The levels are a mip map: take the one whose texel is nearest
    to the pixel, otherwise small pictures show noise where large ones show hair.
    """
    assert 0 <= level < FUR_LEVELS
    if level:
        finer = fur(level - 1)
        return (finer[::2, ::2] + finer[1::2, ::2] + finer[::2, 1::2] + finer[1::2, 1::2]) * 0.25
    n, taps = FUR_TEXELS, 26
    rng = np.random.Generator(np.random.PCG64(0))
    fine = rng.random((n, n), dtype=np.float32) - 0.5
    coarse = enlarge(rng.random((n // 3, n // 3), dtype=np.float32) - 0.5, n)
    grain = fine + coarse
    axis = np.arange(n, dtype=np.float32) - (n - 1) / 2
    y, x = axis[:, None], axis[None, :]
    inverse = 1 / np.sqrt(x * x + y * y + 1)
    total = np.zeros((n, n), np.float32)
    for tap in range(-taps // 2, taps // 2):
        row = np.clip(np.rint(y + y * inverse * tap + (n - 1) / 2), 0, n - 1).astype(np.int32)
        column = np.clip(np.rint(x + x * inverse * tap + (n - 1) / 2), 0, n - 1).astype(np.int32)
        total += grain[row, column]
    return total * 0.62


def fur_at(x: Plane, y: Plane, pixel: float) -> Plane:
    """The hair texture at the coordinates ``x``, ``y`` (face units) for pixels ``pixel`` face units wide."""
    texel = 2 * FUR_REACH / FUR_TEXELS
    level = 0
    while level < FUR_LEVELS - 1 and texel * 1.5 < pixel:
        texel *= 2
        level += 1
    texture = fur(level)
    n = len(texture)
    scale, middle = n / (2 * FUR_REACH), n / 2
    column = np.clip(x * scale + middle, 0, n - 1).astype(np.int32)
    row = np.clip(y * scale + middle, 0, n - 1).astype(np.int32)
    return np.take(texture.ravel(), row * n + column)
