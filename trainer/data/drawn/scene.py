"""The light that falls on a drawn cat, and the background behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from colorsys import hsv_to_rgb
from dataclasses import dataclass, replace

import numpy as np

from trainer.data.drawn.coats import Cat, linear
from trainer.data.drawn.shapes import Canvas, Colour, Plane, ellipse, enlarge, mix, step

BACKDROP = 48  # side of the background in pixels before it is enlarged: it is out of focus


@dataclass(frozen=True)
class Noise:
    """The random fields of an image, besides the cat's traits. They do not depend on the size of the image."""

    blotch: Plane  # [6, 6]
    warp_x: Plane  # [14, 14]
    warp_y: Plane  # [14, 14]
    spots: Plane  # [22, 22]
    backdrop: Plane  # [12, 12]
    lamps: Plane  # [12, 4]: x, y, size and strength of the lights in the background, 0..1
    turn: Plane  # [2]: offset in the fur texture, -1..1


def random_noise(rng: np.random.Generator) -> Noise:
    def smooth(n: int) -> Plane:
        return rng.random((n, n)).astype(np.float32) * 2 - 1

    blotch, warp_x, warp_y, spots, backdrop = (smooth(n) for n in (6, 14, 14, 22, 12))
    lamps, turn = rng.random((12, 4)).astype(np.float32), rng.random(2).astype(np.float32) * 2 - 1
    return Noise(blotch, warp_x, warp_y, spots, backdrop, lamps, turn)


@dataclass(frozen=True)
class Light:
    """The light of an image: direction to the lamp (x right, y down, z to the viewer), and colours in linear light."""

    x: float
    y: float
    z: float
    key: Colour  # of the lamp
    sky: Colour  # from all around
    rim: Colour  # from behind

    @classmethod
    def of(cls, cat: Cat) -> Light:
        angle, w = math.radians(cat.light_degrees), cat.warmth
        front = 0.3 + 0.55 * cat.light_height
        side = math.sqrt(1 - front * front)
        key = np.array([1 + 0.16 * w, 1 + 0.02 * w, 1 - 0.22 * w], np.float32) * 1.08 * cat.exposure
        sky = np.array([1 - 0.12 * w, 1, 1 + 0.14 * w], np.float32) * 0.26 * cat.exposure
        rim = np.array([1 + 0.2 * w, 1, 1 - 0.2 * w], np.float32) * 1.1 * cat.rim
        return cls(math.sin(angle) * side, -math.cos(angle) * side, front, key, sky, rim)

    def on(self, height: Plane, pixel: float) -> tuple[Plane, Plane]:
        """Strength of the lamp's light and of the rim light on a surface of ``height``, for pixels of width ``pixel``.

        All in face units. The rim light is strongest on the side in shadow.
        """
        gy, gx = np.gradient(height, pixel)
        inverse = 1 / np.sqrt(gx * gx + gy * gy + 1)
        facing = (self.z - gx * self.x - gy * self.y) * inverse
        lamp = np.clip((facing + 0.15) * 0.92, 0, 1)
        away = np.clip((gx * self.x + gy * self.y) * inverse, 0, 1)
        grazing = 1 - inverse
        return lamp, grazing * grazing * (0.35 + away)

    def shade(self, colour: Canvas, lamp: Plane, behind: Plane, open_sky: Plane) -> Canvas:
        """Light the surface colour [3, n, m]; ``open_sky`` [n, m] is 1 where nothing occludes the ambient light."""
        light = self.key[:, None, None] * lamp + self.sky[:, None, None]
        return colour * light * open_sky + (self.rim[:, None, None] * behind) * (0.08 + colour)


@dataclass(frozen=True)
class Scenery:
    """The canvas of a background, and the inputs of its painters."""

    canvas: Canvas
    x: Plane  # -1 left .. 1 right
    y: Plane  # -1 top .. 1 bottom
    cloud: Plane  # smooth noise
    lamps: list[list[float]]  # as in Noise
    hue: float
    value: float

    def tone(self, shift: float, saturation: float, brightness: float) -> Colour:
        """The background's hue shifted by ``shift`` (1: the whole circle), in linear light."""
        return linear(tuple(255 * part for part in hsv_to_rgb((self.hue + shift) % 1, saturation, brightness)))

    def disc(self, lamp: list[float], radius: float, blur: float) -> Plane:
        x, y = self.x - (2.2 * lamp[0] - 1.1), self.y - (2.2 * lamp[1] - 1.1)
        return step(blur, -blur, ellipse(x, y, radius, radius))


def _wall(scene: Scenery, cat: Cat) -> None:
    shadow = step(-0.8, 1.3, scene.y + scene.x * (cat.light_degrees / 110))
    mix(scene.canvas, scene.tone(0.06, 0.4, 0.12 + 0.4 * scene.value), shadow)


def _bokeh(scene: Scenery, cat: Cat) -> None:
    scene.canvas[:] = scene.tone(0.05, 0.5, 0.15 + 0.3 * scene.value)[:, None, None]
    for i, lamp in enumerate(scene.lamps):
        _, _, size, strength = lamp
        disc = scene.disc(lamp, 0.12 + 0.24 * size, 0.05) * (0.15 + 0.5 * strength)
        mix(scene.canvas, scene.tone(0.12 * (i % 3), 0.5, 0.75 + 0.25 * strength), disc)


def _room(scene: Scenery, cat: Cat) -> None:
    """Striped wallpaper, a floor and often a window."""
    places = [lamp[0] for lamp in scene.lamps]
    stripes = scene.x * (1 / (0.12 + 0.12 * places[0]))
    band = np.abs(stripes - np.floor(stripes) - 0.5)
    mix(scene.canvas, scene.tone(0.03, 0.35, 0.22 + 0.5 * scene.value), step(0.15, 0.35, band) * 0.55)
    floor = step(-0.06, 0.06, scene.y - (0.1 + 0.5 * places[1]))
    mix(scene.canvas, scene.tone(0.45, 0.42, 0.2 + 0.3 * scene.value), floor)
    aside, above = np.abs(scene.x - (1.6 * places[2] - 0.8)), np.abs(scene.y + 0.65)
    pane = step(0.08, -0.08, np.maximum(aside - 0.3, above - 0.4))
    mix(scene.canvas, scene.tone(0.55, 0.08, 1.0), pane * 0.75 * scene.value)


def _garden(scene: Scenery, cat: Cat) -> None:
    """Greens, sun on leaves, a pale sky."""
    green = replace(scene, hue=0.22 + 0.14 * scene.hue)
    value = scene.value
    scene.canvas[:] = green.tone(0, 0.6, 0.14 + 0.4 * value)[:, None, None]
    mix(scene.canvas, green.tone(-0.05, 0.55, 0.35 + 0.5 * value), step(-0.7, 0.9, scene.cloud) * 0.8)
    sky = step(-0.1, -1.3, scene.y + scene.cloud * 0.2)
    mix(scene.canvas, green.tone(0.25, 0.14, 0.7 + 0.3 * value), sky * 0.8)
    for lamp in scene.lamps:
        _, _, size, strength = lamp
        leaf = scene.disc(lamp, 0.1 + 0.2 * size, 0.10) * (0.15 + 0.3 * strength)
        mix(scene.canvas, green.tone(-0.07, 0.5, 0.3 + 0.7 * strength * value), leaf)


def _blanket(scene: Scenery, cat: Cat) -> None:
    """A chequered blanket, its threads on the diagonals."""
    one, other = (np.abs((d * 3) % 2 - 1) for d in (scene.x + scene.y, scene.x - scene.y))
    threads = step(0.55, 0.85, np.maximum(one, other)) * 0.6
    mix(scene.canvas, scene.tone(0.08, 0.5, 0.25 + 0.45 * scene.value), threads)


PAINTERS: dict[str, Callable[[Scenery, Cat], None]] = {
    "wall": _wall,
    "bokeh": _bokeh,
    "room": _room,
    "garden": _garden,
    "blanket": _blanket,
}


def backdrop(cat: Cat, noise: Noise, n: int) -> Canvas:
    """The background [3, n, n] in linear light; painted small and enlarged, as it is out of focus."""
    m = BACKDROP
    axis = (np.arange(m, dtype=np.float32) + 0.5) * (2 / m) - 1
    x, y = np.broadcast_to(axis[None, :], (m, m)), np.broadcast_to(axis[:, None], (m, m))
    canvas = np.empty((3, m, m), np.float32)
    scene = Scenery(
        canvas, x, y, enlarge(noise.backdrop, m), noise.lamps.tolist(), cat.background_hue, cat.background_value
    )
    canvas[:] = scene.tone(0, 0.28, 0.3 + 0.55 * scene.value)[:, None, None]
    PAINTERS[cat.background](scene, cat)
    canvas *= 1 + scene.cloud * 0.09
    return np.maximum(np.stack([enlarge(plane, n) for plane in canvas]), 0)
