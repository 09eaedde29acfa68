"""Painting a drawn cat: background, chest, ears, head, features, whiskers, light.

The head is a soft shape with a height over it; light falls on the slopes of that height. Colours are linear light
until the very end, so that soft edges and the averaging of pixels mix them as light mixes.
"""

from __future__ import annotations

import math
from colorsys import hsv_to_rgb
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.coats import IRISES, NOSES, TONES, Cat, albedo, linear
from trainer.data.shapes import Frame, Plane, bump, ellipse, enlarge, fur_at, join, mix, step, stroke

Canvas = NDArray[np.float32]  # [3, n, n], linear light

EYE_U, EYE_V = 0.345, -0.06
YAW_SHIFT, PITCH_SHIFT = 0.17, 0.10  # how far features in the middle move for yaw and pitch of 1
BACKDROP = 48  # the background is out of focus: painted on so many pixels, then enlarged


@dataclass(frozen=True)
class Noise:
    """The chance in a picture beside the cat's traits, none of it bound to the picture's size."""

    blotch: Plane  # [6, 6]
    warp_x: Plane  # [14, 14]
    warp_y: Plane  # [14, 14]
    spots: Plane  # [22, 22]
    backdrop: Plane  # [12, 12]
    lamps: Plane  # [12, 4]: x, y, size, strength of the lights in the background, in [0, 1)
    turn: Plane  # [2]: where the fur texture is taken from, in [-1, 1)


def random_noise(rng: np.random.Generator) -> Noise:
    def smooth(n: int) -> Plane:
        return rng.random((n, n)).astype(np.float32) * 2 - 1

    blotch, warp_x, warp_y, spots, backdrop = (smooth(n) for n in (6, 14, 14, 22, 12))
    return Noise(
        blotch, warp_x, warp_y, spots, backdrop, rng.random((12, 4)).astype(np.float32),
        rng.random(2).astype(np.float32) * 2 - 1,
    )  # fmt: skip


def _frame(cat: Cat, noise: Noise, n: int) -> Frame:
    axis = (np.arange(n, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / n) - 1
    px, py = axis[None, :] - np.float32(cat.offset_x), axis[:, None] - np.float32(cat.offset_y)
    angle = math.radians(cat.tilt_degrees)
    cos, sin = np.float32(math.cos(angle) / cat.scale), np.float32(math.sin(angle) / cat.scale)
    x, y = px * cos + py * sin, py * cos - px * sin
    dome = bump(x, y, 1.25, 1.25)
    u, v = x - np.float32(YAW_SHIFT * cat.yaw) * dome, y - np.float32(PITCH_SHIFT * cat.pitch) * dome
    warp_x, warp_y = enlarge(noise.warp_x, n), enlarge(noise.warp_y, n)
    pixel = 2 / n / cat.scale
    side = np.float32(1 if noise.turn[0] < 0 else -1)
    hair = fur_at(
        side * u + warp_x * np.float32(0.04) + noise.turn[0] * np.float32(0.1),
        v + warp_y * np.float32(0.04) + noise.turn[1] * np.float32(0.1),
        pixel,
    )
    if cat.fur == "short":
        hair = hair * np.float32(0.8)
    return Frame(x, y, u, v, hair, enlarge(noise.blotch, n), enlarge(noise.spots, n), warp_x, warp_y, pixel)


@dataclass(frozen=True)
class Light:
    """Light of one picture: direction towards the lamp (x right, y down, z to the viewer) and colours [3]."""

    x: float
    y: float
    z: float
    key: NDArray[np.float32]
    sky: NDArray[np.float32]
    rim: NDArray[np.float32]

    @classmethod
    def of(cls, cat: Cat) -> Light:
        angle, side = math.radians(cat.light_degrees), math.sqrt(1 - (0.35 + 0.5 * cat.light_height) ** 2)
        w = cat.warmth
        key = np.array([1 + 0.16 * w, 1 + 0.02 * w, 1 - 0.22 * w], np.float32) * np.float32(0.98 * cat.exposure)
        sky = np.array([1 - 0.12 * w, 1, 1 + 0.14 * w], np.float32) * np.float32(0.30 * cat.exposure)
        rim = np.array([1 + 0.2 * w, 1, 1 - 0.2 * w], np.float32) * np.float32(0.75 * cat.rim)
        return cls(math.sin(angle) * side, -math.cos(angle) * side, 0.35 + 0.5 * cat.light_height, key, sky, rim)

    def on(self, height: Plane, pixel: float) -> tuple[Plane, Plane]:
        """(light of the lamp 0..1, light from behind 0..1) on a surface of ``height`` in face units."""
        gy, gx = np.gradient(height, np.float32(pixel))
        inverse = 1 / np.sqrt(gx * gx + gy * gy + 1)
        facing = (np.float32(self.z) - gx * np.float32(self.x) - gy * np.float32(self.y)) * inverse
        lamp = np.clip((facing + np.float32(0.25)) * np.float32(0.8), 0, 1)
        edge = np.clip((gx * np.float32(self.x) + gy * np.float32(min(self.y, -0.2))) * inverse, 0, 1)
        grazing = 1 - inverse
        return lamp, grazing * grazing * (np.float32(0.35) + edge)

    def shade(self, colour: Canvas, lamp: Plane, behind: Plane, open_sky: Plane) -> Canvas:
        """``colour`` [3, n, m] as lit; ``open_sky`` [n, m] is 1 where nothing shuts out the light of all around."""
        light = self.key[:, None, None] * lamp + self.sky[:, None, None]
        return colour * light * open_sky + (self.rim[:, None, None] * behind) * (np.float32(0.08) + colour)


def _backdrop(cat: Cat, noise: Noise, n: int) -> Canvas:
    """The background [3, n, n]: out of focus, so painted small and enlarged."""
    m = BACKDROP
    axis = (np.arange(m, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / m) - 1
    x, y = np.broadcast_to(axis[None, :], (m, m)), np.broadcast_to(axis[:, None], (m, m))
    cloud = enlarge(noise.backdrop, m)
    value, hue = cat.background_value, cat.background_hue

    def tone(shift: float, saturation: float, brightness: float) -> NDArray[np.float32]:
        r, g, b = hsv_to_rgb((hue + shift) % 1, saturation, brightness)
        return np.array([r * r, g * g, b * b], np.float32)

    picture = np.broadcast_to(tone(0, 0.28, 0.3 + 0.55 * value)[:, None, None], (3, m, m)).copy()
    lamps = [tuple(float(a) for a in lamp) for lamp in noise.lamps]
    if cat.background == "wall":
        mix(picture, tone(0.06, 0.4, 0.12 + 0.4 * value), step(-0.8, 1.3, y + x * np.float32(cat.light_degrees / 110)))
    elif cat.background == "bokeh":
        mix(picture, tone(0.05, 0.55, 0.10 + 0.3 * value), np.full((m, m), 0.85, np.float32))
        for i, (lx, ly, size, strength) in enumerate(lamps):
            radius = 0.12 + 0.24 * size
            disc = step(0.05, -0.05, ellipse(x - (2.2 * lx - 1.1), y - (2.2 * ly - 1.1), radius, radius))
            mix(picture, tone(0.12 * (i % 3), 0.5, 0.75 + 0.25 * strength), disc * np.float32(0.15 + 0.5 * strength))
    elif cat.background == "room":
        stripe = 0.12 + 0.12 * lamps[0][0]
        phase = x * np.float32(1 / stripe) - np.floor(x * np.float32(1 / stripe))
        mix(picture, tone(0.03, 0.35, 0.22 + 0.5 * value), step(0.15, 0.35, np.abs(phase - np.float32(0.5))) * np.float32(0.55))
        floor = 0.1 + 0.5 * lamps[1][0]
        mix(picture, tone(0.45, 0.42, 0.2 + 0.3 * value), step(-0.06, 0.06, y - floor))
        window = np.maximum(np.abs(x - (1.6 * lamps[2][0] - 0.8)) - 0.3, np.abs(y + 0.65) - 0.4)
        mix(picture, tone(0.55, 0.08, 1.0), step(0.08, -0.08, window) * np.float32(0.75 * value))
    elif cat.background == "garden":
        hue = 0.22 + 0.14 * hue
        mix(picture, tone(0, 0.6, 0.14 + 0.4 * value), np.ones((m, m), np.float32))
        mix(picture, tone(-0.05, 0.55, 0.35 + 0.5 * value), step(-0.7, 0.9, cloud) * np.float32(0.8))
        mix(picture, tone(0.25, 0.14, 0.7 + 0.3 * value), step(-0.1, -1.3, y + cloud * np.float32(0.2)) * np.float32(0.8))
        for lx, ly, size, strength in lamps:
            leaf = step(0.10, -0.10, ellipse(x - (2.2 * lx - 1.1), y - (2.2 * ly - 1.1), 0.1 + 0.2 * size, 0.08 + 0.2 * size))
            mix(picture, tone(-0.07, 0.5, 0.3 + 0.7 * strength * value), leaf * np.float32(0.15 + 0.3 * strength))
    else:
        check = np.maximum(np.abs(((x + y) * 3) % 2 - 1), np.abs(((x - y) * 3) % 2 - 1))
        mix(picture, tone(0.08, 0.5, 0.25 + 0.45 * value), step(0.55, 0.85, check) * np.float32(0.6))
        picture *= 1 + cloud * np.float32(0.15)
    picture *= 1 + cloud * np.float32(0.08)
    return np.maximum(np.stack([enlarge(plane, n) for plane in picture]), 0)


def _head(frame: Frame, cat: Cat) -> Plane:
    """Distance to the outline of the head."""
    wide = {"wedge": -0.06, "standard": 0.0, "round": 0.06}[cat.head]
    x = np.abs(frame.x - np.float32(0.04 * cat.yaw))
    skull = ellipse(x, frame.y + np.float32(0.13), 0.79 + wide * 0.6, 0.66)
    cheek = ellipse(
        x - np.float32(0.36 + wide), frame.y - np.float32(0.22), 0.47 + 0.10 * cat.cheeks, 0.40 + 0.03 * cat.cheeks
    )
    chin = ellipse(frame.u, frame.y - np.float32(0.37), 0.42 + wide, 0.31 * cat.muzzle + 0.02)
    return join(join(skull, cheek, 0.25), chin, 0.18)


def _relief(frame: Frame, cat: Cat, head: Plane) -> Plane:
    """Height of the head over the picture's plane, face units."""
    inside = np.clip(head * np.float32(-1 / 0.62), 0, 1)
    height = np.float32(0.50) * np.sqrt(inside * (2 - inside))
    u, v = np.abs(frame.u), frame.v
    height += np.float32(0.17 * cat.muzzle) * bump(u - np.float32(0.12), v - np.float32(0.40), 0.27, 0.22)
    height += np.float32(0.06) * bump(u, v - np.float32(0.60), 0.20, 0.15)
    height += np.float32(0.13) * bump(u, v - np.float32(0.08), 0.22, 0.48)
    height += np.float32(0.06) * bump(u - np.float32(0.30), v + np.float32(0.38), 0.36, 0.24)
    height -= np.float32(0.06) * bump(u - np.float32(EYE_U), v - np.float32(EYE_V), 0.34, 0.28)
    height += np.float32(0.05) * bump(u - np.float32(0.58), v - np.float32(0.28), 0.36, 0.36)
    return height + frame.hair * np.float32(0.0035)


def _paint_chest(canvas: Canvas, frame: Frame, cat: Cat, light: Light, coat: Canvas, head: Plane) -> None:
    ruff = 0.10 if cat.fur == "long" else 0.0
    body = ellipse(frame.x, frame.y - np.float32(1.50), 1.16 + ruff, 0.88 + ruff)
    mask = step(0.035, -0.035, body + frame.hair * np.float32(0.02))
    inside = np.clip(body * np.float32(-1 / 0.7), 0, 1)
    lamp, behind = light.on(np.float32(0.5) * np.sqrt(inside * (2 - inside)) + frame.hair * np.float32(0.0035), frame.pixel)
    under = np.float32(1) - np.float32(0.72) * step(0.34, -0.05, head)
    mix(canvas, light.shade(coat, lamp, behind, under), mask)


def _paint_ears(canvas: Canvas, frame: Frame, cat: Cat, light: Light, coat: Canvas, head: Plane) -> None:
    angle = math.radians(cat.ear_tilt)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    x = frame.x + np.float32(0.05 * cat.yaw)
    x = np.abs(x) * (1 + np.float32(0.09 * cat.yaw) * np.sign(x))
    dx, dy = x - np.float32(0.47), frame.y + np.float32(0.42)
    along = (dx * sin - dy * cos) * np.float32(1 / cat.ear_length)
    across = dx * cos + dy * sin

    def half_width(t: Plane) -> Plane:
        rest = np.clip(1 - t, 0, 1.3)
        return rest * np.float32(0.55) + np.sqrt(rest) * np.float32(0.45)

    frayed = frame.hair * np.float32(0.008 if cat.fur == "short" else 0.016)
    width = half_width(along) * np.float32(cat.ear_width)
    length = np.float32(cat.ear_length)
    outline = np.maximum(np.abs(across) - width, np.maximum(along - 1, -0.3 - along) * length) + frayed
    soft = 0.020
    mask = step(soft, -soft, outline)
    bowl = half_width(along * np.float32(1.16) + np.float32(0.02)) * np.float32(cat.ear_width * 0.70)
    hollow = np.abs(across - np.float32(0.01)) - bowl
    hollow = np.maximum(hollow, (along - np.float32(0.86)) * length)
    lamp, behind = light.on(np.clip(outline, -0.12, 0) * np.float32(-1.6) + np.clip(hollow, -0.2, 0) * np.float32(0.7), frame.pixel)
    dark_skin = cat.nose in ("black", "slate", "brown")
    skin = linear((150, 104, 98) if dark_skin else (224, 158, 146))
    ear = coat.copy()
    inner = step(0.03, -0.05, hollow)
    mix(ear, skin, inner * np.float32(0.85))
    ear *= 1 - inner * step(0.75, 0.0, along) * np.float32(0.55)
    reach = np.float32(0.10 + 0.10 * cat.ear_tufts)
    tuft = step(0.06, -0.06, across + np.float32(cat.ear_width * 0.62) - reach * (1 - along * np.float32(0.8)) + frame.hair * np.float32(0.10))
    pale = linear(TONES["white" if cat.white > 0.4 else cat.colour][2])
    mix(ear, pale * np.float32(0.85), inner * tuft * np.float32(0.35 + 0.45 * cat.ear_tufts))
    near_head = 1 - np.float32(0.35) * step(0.16, 0.0, head)
    mix(canvas, light.shade(ear, lamp, behind, near_head), mask)


def _window(frame: Frame, cat: Cat, u: float, v: float, reach: float) -> tuple[slice, slice]:
    """Rows and columns around the feature at ``u``, ``v`` that hold everything within ``reach`` of it."""
    n = len(frame.u)
    dome = max(0.0, 1 - (u * u + v * v) / 1.25**2) ** 2
    x, y = u + YAW_SHIFT * cat.yaw * dome, v + PITCH_SHIFT * cat.pitch * dome
    angle = math.radians(cat.tilt_degrees)
    px = (x * math.cos(angle) - y * math.sin(angle)) * cat.scale + cat.offset_x
    py = (x * math.sin(angle) + y * math.cos(angle)) * cat.scale + cat.offset_y
    half = (reach * 1.1 + 0.04) * cat.scale

    def span(middle: float) -> slice:
        low, high = (math.floor((middle + s * half + 1) / 2 * n) for s in (-1, 1))
        return slice(max(0, low), max(0, min(n, high + 1)))

    return span(py), span(px)


def _paint_eye(canvas: Canvas, whole: Frame, cat: Cat, light: Light, side: int) -> None:
    """The eye on the picture's left (``side`` -1) or right (1)."""
    rows, columns = _window(whole, cat, side * EYE_U, EYE_V, cat.eye_size * 1.5)
    frame, view = whole.crop(rows, columns), canvas[:, rows, columns]
    r = np.float32(1 / cat.eye_size)
    du, dv = (frame.u - np.float32(side * EYE_U)) * r, (frame.v - np.float32(EYE_V)) * r
    angle = math.radians(cat.eye_slant)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    x, y = du * cos * side - dv * sin, du * sin * side + dv * cos
    aa = frame.pixel / cat.eye_size * 0.8

    curve = np.clip(1 - x * x, 0, 1)
    lid = curve * np.float32(0.45) + np.sqrt(curve) * np.float32(0.55)
    top = lid * (np.float32(-0.92 * cat.eye_open) + x * np.float32(0.10))
    bottom = lid * np.float32(0.66)
    outside = np.maximum(top - y, y - bottom) + np.maximum(np.abs(x) - 1, 0)
    duct = stroke(x, y, (-0.95, 0.05), (-1.18, 0.24), 0.06, 0.02)
    liner = step(0.20, 0.04, np.minimum(outside - np.maximum(-y, 0) * np.float32(0.10), duct))
    mix(view, linear((26, 18, 17)), liner * np.float32(0.92))
    mix(view, view * np.float32(0.55), step(0.55, 0.05, outside) * (1 - liner) * step(0.1, -0.5, y) * np.float32(0.6))

    gaze_x, gaze_y = x - np.float32(0.10 * cat.gaze * side), y + np.float32(0.10)
    radius = np.sqrt(gaze_x * gaze_x + gaze_y * gaze_y)
    centre, rim = (linear(tone) for tone in IRISES[cat.odd_eye if side > 0 and cat.odd_eye else cat.eyes])
    iris = np.broadcast_to(rim[:, None, None], (3, *x.shape)).copy()
    mix(iris, centre, step(0.80, 0.15, radius))
    iris *= 1 + fur_at(gaze_x * np.float32(0.9), gaze_y * np.float32(0.9), frame.pixel * float(r)) * np.float32(0.12)
    iris *= np.float32(0.62) + np.float32(0.95) * step(-0.75, 0.75, y + du * np.float32(-0.5 * light.x))
    mix(iris, linear((30, 22, 18)), step(0.80, 0.99, radius) * np.float32(0.9))
    fall = np.clip(1 - gaze_y * gaze_y * np.float32(1 / 0.66), 0, 1)
    width = np.float32(cat.pupil)
    pupil = np.abs(gaze_x) - width * (fall * (1 - width) + np.sqrt(fall) * width)
    mix(iris, linear((8, 7, 9)), step(aa + 0.03, -aa - 0.03, pupil) * step(0, 0.08, fall))
    iris *= np.float32(0.35) + np.float32(0.65) * step(0.0, 0.42, y - top)
    iris *= (light.key * np.float32(0.75) + light.sky * np.float32(1.3)).reshape(3, 1, 1)

    inside = step(aa, -aa, outside + np.float32(0.02))
    mix(view, iris, inside)
    glint_x = 0.30 if light.x > 0 else -0.30
    sky = inside * step(-0.05, -0.75, dv) * np.float32(0.16)
    glint = step(aa + 0.04, -aa - 0.04, ellipse(du - np.float32(glint_x), dv + np.float32(0.32), 0.17, 0.20))
    second = step(0.12, -0.10, ellipse(du + np.float32(glint_x), dv - np.float32(0.28), 0.12, 0.10)) * np.float32(0.45)
    mix(view, light.key * np.float32(1.05), inside * np.maximum(sky, np.maximum(glint, second)))


def _paint_muzzle(canvas: Canvas, whole: Frame, cat: Cat, light: Light) -> None:
    """Nose, mouth, the dots the whiskers grow from, and at times the tip of a tongue."""
    rows, columns = _window(whole, cat, 0, 0.40, 0.36)
    frame, view = whole.crop(rows, columns), canvas[:, rows, columns]
    u, v = np.abs(frame.u), frame.v
    blur = frame.pixel * 0.8
    line = linear((40, 26, 24))

    t = np.clip(u * np.float32(1 / 0.21), 0, 1)
    lips = np.abs(v - np.float32(0.435) - np.float32(0.24) * t * (1 - t) + t * np.float32(0.012)) - np.float32(0.013) * (1 - t)
    lips = np.maximum(lips, u - np.float32(0.21))
    mix(view, view * np.float32(0.5), step(0.10, -0.02, lips) * step(-0.02, 0.03, v - np.float32(0.44)) * np.float32(0.6))
    if cat.tongue:
        tongue = ellipse(u, v - np.float32(0.485), 0.055, 0.058)
        mix(view, linear((226, 118, 122)) * light.key, step(blur, -blur, tongue) * step(0.44, 0.47, v))
    mix(view, line, step(blur + 0.012, -blur, lips) * np.float32(0.8))
    mix(view, line, step(blur + 0.012, -blur, stroke(u, v, (0, 0.33), (0, 0.43), 0.004, 0.008)) * np.float32(0.7))
    dots = ellipse(u - np.float32(0.13), v - np.float32(0.385), 0.010, 0.010)
    for du, dv in ((0.19, 0.37), (0.16, 0.42), (0.225, 0.405), (0.20, 0.445)):
        dots = np.minimum(dots, ellipse(u - np.float32(du), v - np.float32(dv), 0.010, 0.010))
    mix(view, line, step(blur + 0.008, -blur - 0.004, dots) * np.float32(0.35))

    wing = stroke(u, v, (0.0, 0.245), (0.095, 0.232), 0.050, 0.034)
    nose = join(wing, stroke(u, v, (0.0, 0.25), (0.0, 0.330), 0.066, 0.022), 0.05)
    skin = np.broadcast_to(linear(NOSES[cat.nose])[:, None, None], (3, *u.shape)).copy()
    skin *= np.float32(0.62) + np.float32(0.5) * step(0.34, 0.21, v)
    mix(skin, linear((26, 14, 14)), step(0.014, -0.006, stroke(u, v, (0.052, 0.292), (0.105, 0.268), 0.016, 0.011)) * np.float32(0.9))
    skin *= (light.key * np.float32(0.8) + light.sky).reshape(3, 1, 1)
    wet = bump(frame.u - np.float32(0.03 if light.x > 0 else -0.03), v - np.float32(0.228), 0.06, 0.022)
    skin += wet * np.float32(0.30)
    mix(view, view * np.float32(0.45), step(0.05, 0.0, nose) * np.float32(0.7))
    mix(view, skin, step(blur, -blur, nose))


def _paint_whiskers(canvas: Canvas, frame: Frame, cat: Cat, light: Light) -> None:
    side = np.sign(frame.u)
    out = np.abs(frame.u) - np.float32(0.18)
    coverage = np.zeros_like(out)
    length = 0.85 + 0.15 * cat.muzzle
    for row in range(4):
        reach = length * (1 - 0.12 * abs(row - 1.5))
        fall = -0.14 + 0.13 * row + 0.05 * cat.skew * side + np.float32(0.02 * cat.pitch)
        curve = frame.v - np.float32(0.37 + 0.028 * row) - out * fall.astype(np.float32) - out * out * np.float32(0.14)
        half = np.float32(0.008) * np.clip(1 - out * np.float32(1 / reach), 0, 1)
        along = step(-0.01, 0.03, out)
        # Exactly the part of a pixel that a line of this width covers, however thin it is.
        covered = np.clip((curve + half) / np.float32(frame.pixel) + np.float32(0.5), 0, 1)
        covered -= np.clip((curve - half) / np.float32(frame.pixel) + np.float32(0.5), 0, 1)
        coverage = np.maximum(coverage, covered * along)
    mix(canvas, light.key * np.float32(0.95), coverage * np.float32(0.75))


def paint(cat: Cat, noise: Noise, size: int) -> NDArray[np.uint8]:
    """The picture of ``cat``, uint8 [size, size, 3]: painted on a finer grid and averaged."""
    fold = max(2, -(-128 // size))
    n = size * fold
    frame = _frame(cat, noise, n)
    light = Light.of(cat)
    coat = albedo(frame, cat)
    head = _head(frame, cat)

    canvas = _backdrop(cat, noise, n)
    canvas *= np.float32(0.55 + 0.5 * cat.exposure)
    canvas *= 1 - np.float32(0.25) * step(0.35, -0.1, head)
    _paint_chest(canvas, frame, cat, light, coat, head)
    _paint_ears(canvas, frame, cat, light, coat, head)

    lamp, behind = light.on(_relief(frame, cat, head), frame.pixel)
    shaggy = 0.009 + (0.012 if cat.fur == "long" else 0.0) + 0.006 * cat.cheeks
    soft = 0.030 if cat.fur == "short" else 0.045
    outline = step(soft, -soft, head + frame.hair * np.float32(shaggy))
    mix(canvas, light.shade(coat, lamp, behind, np.ones_like(head)), outline)
    for side in (-1, 1):
        _paint_eye(canvas, frame, cat, light, side)
    _paint_muzzle(canvas, frame, cat, light)
    _paint_whiskers(canvas, frame, cat, light)

    axis = (np.arange(n, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / n) - 1
    canvas *= 1 - np.float32(0.13) * (axis * axis * axis * axis)[None, :] - np.float32(0.13) * (axis**4)[:, None]
    canvas = canvas * np.float32(1.18) / (1 + canvas * np.float32(0.28))
    total = canvas[:, 0::fold, 0::fold].copy()
    for i in range(1, fold * fold):
        total += canvas[:, i // fold :: fold, i % fold :: fold]
    shown = np.sqrt(np.clip(total * np.float32(1 / fold**2), 0, 1)) * 255 + np.float32(0.5)
    return np.ascontiguousarray(shown.astype(np.uint8).transpose(1, 2, 0))
