"""Shapes to draw with: signed distances, soft masks and noise on a grid of coordinates.

Distances are in the units of the coordinates and negative inside; masks are in 0..1. Everything is elementwise float32
arithmetic, without BLAS or reductions, so that images do not depend on the number of threads. Distances follow Inigo
Quilez, "2D distance functions"; the ellipse is his first-order bound, which is exact on the outline.
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

FUR_REACH = 1.9  # the fur texture covers -FUR_REACH..FUR_REACH in face units; hair grows away from its centre
FUR_TEXELS = 768
FUR_LEVELS = 5


@dataclass(frozen=True)
class Frame:
    """The coordinates and the noise that a cat is drawn with, as planes [n, n].

    Face units: the origin is between eyes and nose, 1 is half the width of the head, y points down.
    """

    x: Plane
    y: Plane
    u: Plane  # x on the surface of the head, which turns with it
    v: Plane  # y on the surface of the head
    hair: Plane  # fur texture around 0
    blotch: Plane  # smooth noise in about -1..1, as are the next three
    spots: Plane
    warp_x: Plane
    warp_y: Plane
    pixel: float  # width of a pixel in face units

    def crop(self, rows: slice, columns: slice) -> Frame:
        """These rows and columns of every plane, as views."""
        planes = {f.name: getattr(self, f.name)[rows, columns] for f in fields(self) if f.name != "pixel"}
        return Frame(**planes, pixel=self.pixel)


def step(low: float, high: float, x: Plane) -> Plane:
    """A cubic ramp from 0 at ``low`` to 1 at ``high``, constant beyond; ``low`` may be larger than ``high``."""
    t = np.clip((x - low) * (1 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


def mix(canvas: Canvas, colour: Colour | Canvas, mask: Plane) -> None:
    """Blend ``colour`` ([3] or [3, n, m]) into ``canvas`` [3, n, m] in place; ``mask`` [n, m] is its opacity."""
    paint = colour.reshape(3, 1, 1) if colour.ndim == 1 else colour
    canvas += (paint - canvas) * mask


def ellipse(x: Plane, y: Plane, rx: float, ry: float) -> Plane:
    """Distance to the ellipse around the origin with half axes ``rx`` and ``ry``."""
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
    """A smooth hill: 1 at the origin, 0 on and outside the ellipse with half axes ``rx`` and ``ry``."""
    ax, ay = x / rx, y / ry
    q = np.maximum(1 - ax * ax - ay * ay, 0)
    return q * q


def enlarge(plane: Plane, size: int) -> Plane:
    """Resize ``plane`` [n, n] to [size, size] (bicubic): the same field on a finer grid."""
    return np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC))


@cache
def fur(level: int) -> Plane:
    """Fur texture around 0, with a standard deviation of 1.8 at level 0; each level halves the resolution.

    White noise of two hair widths, averaged along the direction of growth away from the nose (line integral
    convolution, Cabral and Leedom 1993). The levels are a mip map: without it, small images would show noise where
    large ones show hair.
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
    """The fur texture at ``x``, ``y``, from the level whose texels are closest to ``pixel``; all in face units."""
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
