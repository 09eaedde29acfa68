"""Painting a drawn cat over its background: chest, ears, head, eyes, muzzle and whiskers.

The head is a soft shape with a height map, whose slopes are lit. Colours are linear light until the end, so that soft
edges and the averaging of pixels blend them correctly. Numbers are positions and sizes in face units, found by eye.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from trainer.data.drawn.coats import IRISES, NOSES, TONES, Cat, albedo, linear
from trainer.data.drawn.scene import Light, Noise, backdrop
from trainer.data.drawn.shapes import Canvas, Frame, Plane, bump, ellipse, enlarge, fur_at, join, mix, step, stroke

EYE_U, EYE_V = 0.345, -0.06
YAW_SHIFT, PITCH_SHIFT = 0.17, 0.10  # displacement of the middle of the face for a yaw and pitch of 1


def _frame(cat: Cat, noise: Noise, n: int) -> Frame:
    axis = (np.arange(n, dtype=np.float32) + 0.5) * (2 / n) - 1
    px, py = axis[None, :] - cat.offset_x, axis[:, None] - cat.offset_y
    angle = math.radians(cat.tilt_degrees)
    cos, sin = math.cos(angle) / cat.scale, math.sin(angle) / cat.scale
    x, y = px * cos + py * sin, py * cos - px * sin
    dome = bump(x, y, 1.25, 1.25)
    u, v = x - YAW_SHIFT * cat.yaw * dome, y - PITCH_SHIFT * cat.pitch * dome
    warp_x, warp_y = enlarge(noise.warp_x, n), enlarge(noise.warp_y, n)
    pixel = 2 / n / cat.scale
    side = 1 if noise.turn[0] < 0 else -1
    at_x, at_y = side * u + warp_x * 0.04 + noise.turn[0] * 0.1, v + warp_y * 0.04 + noise.turn[1] * 0.1
    hair = fur_at(at_x, at_y, pixel) * (0.8 if cat.fur == "short" else 1.0)
    blotch, spots = enlarge(noise.blotch, n), enlarge(noise.spots, n)
    return Frame(x=x, y=y, u=u, v=v, hair=hair, blotch=blotch, spots=spots, warp_x=warp_x, warp_y=warp_y, pixel=pixel)


def _head(frame: Frame, cat: Cat) -> Plane:
    """Distance to the outline of the head."""
    wide = {"wedge": -0.06, "standard": 0.0, "round": 0.06}[cat.head]
    x = np.abs(frame.x - 0.04 * cat.yaw)
    skull = ellipse(x, frame.y + 0.13, 0.79 + wide * 0.6, 0.66)
    cheek = ellipse(x - (0.36 + wide), frame.y - 0.22, 0.47 + 0.10 * cat.cheeks, 0.40 + 0.03 * cat.cheeks)
    chin = ellipse(frame.u, frame.y - 0.37, 0.42 + wide, 0.31 * cat.muzzle + 0.02)
    head = join(join(skull, cheek, 0.25), chin, 0.18)
    if cat.fur == "long":
        ruff = stroke(x, frame.y, (0.45, 0.25), (0.74 + 0.16 * cat.cheeks, 0.42), 0.28, 0.05)
        head = join(head, ruff, 0.15)
    return head


def _relief(frame: Frame, cat: Cat, head: Plane) -> Plane:
    """Height of the head above the image plane, in face units."""
    inside = np.clip(head * -1.6, 0, 1)
    height = 0.50 * np.sqrt(inside * (2 - inside))
    u, v = np.abs(frame.u), frame.v
    height += 0.17 * cat.muzzle * bump(u - 0.12, v - 0.40, 0.27, 0.22)
    height += 0.06 * bump(u, v - 0.60, 0.20, 0.15)
    height += 0.13 * bump(u, v - 0.08, 0.22, 0.48)
    height += 0.06 * bump(u - 0.30, v + 0.38, 0.36, 0.24)
    height -= 0.06 * bump(u - EYE_U, v - EYE_V, 0.34, 0.28)
    height += 0.05 * bump(u - 0.58, v - 0.28, 0.36, 0.36)
    return height + frame.hair * 0.0035


def _rows(where: NDArray[np.bool_]) -> slice:
    """The rows from the first to the last true pixel."""
    rows = np.flatnonzero(where.any(axis=1))
    return slice(rows[0], rows[-1] + 1)


def _paint_chest(canvas: Canvas, whole: Frame, cat: Cat, light: Light, coat: Canvas, head: Plane) -> None:
    rows = _rows(whole.y > 0.45)
    frame, view = whole.crop(rows, slice(None)), canvas[:, rows]
    ruff = 0.10 if cat.fur == "long" else 0.0
    body = ellipse(frame.x, frame.y - 1.50, 1.16 + ruff, 0.88 + ruff)
    mask = step(0.035, -0.035, body + frame.hair * 0.02)
    inside = np.clip(body * -1.4, 0, 1)
    lamp, behind = light.on(0.5 * np.sqrt(inside * (2 - inside)) + frame.hair * 0.0035, frame.pixel)
    under = 1 - 0.72 * step(0.34, -0.05, head[rows])
    mix(view, light.shade(coat[:, rows], lamp, behind, under), mask)


def _paint_ears(canvas: Canvas, whole: Frame, cat: Cat, light: Light, coat: Canvas, head: Plane) -> None:
    rows = _rows(whole.y < 0)
    frame, view = whole.crop(rows, slice(None)), canvas[:, rows]
    angle = math.radians(cat.ear_tilt)
    cos, sin = math.cos(angle), math.sin(angle)
    x = frame.x + 0.05 * cat.yaw
    x = np.abs(x) * (1 + 0.09 * cat.yaw * np.sign(x))
    dx, dy = x - 0.45, frame.y + 0.42
    along = (dx * sin - dy * cos) / cat.ear_length
    across = dx * cos + dy * sin

    def half_width(t: Plane) -> Plane:
        rest = np.clip(1 - t, 0, 1.3)
        return rest * (0.75 - 0.6 * cat.ear_round) + np.sqrt(rest) * (0.25 + 0.6 * cat.ear_round)

    frayed = frame.hair * (0.008 if cat.fur == "short" else 0.016)
    width = half_width(along) * cat.ear_width * (1.06 - 0.12 * cat.ear_round)
    width *= 0.55 + 0.45 * step(-0.30, 0.22, along)  # narrower at the root, which must not show outside the head
    outline = np.maximum(np.abs(across) - width, np.maximum(along - 1, -0.3 - along) * cat.ear_length) + frayed
    mask = step(0.020, -0.020, outline)
    bowl = half_width(along * 1.16 + 0.02) * cat.ear_width * 0.70
    hollow = np.abs(across - 0.01) - bowl
    hollow = np.maximum(hollow, (along - 0.86) * cat.ear_length)
    lamp, behind = light.on(np.clip(outline, -0.12, 0) * -1.6 + np.clip(hollow, -0.2, 0) * 0.7, frame.pixel)
    dark_skin = cat.nose in ("black", "slate", "brown")
    skin = linear((150, 104, 98) if dark_skin else (224, 158, 146))
    ear = coat[:, rows].copy()
    inner = step(0.03, -0.05, hollow)
    mix(ear, skin, inner * 0.85)
    ear *= 1 - inner * step(0.75, 0.0, along) * 0.55
    reach = 0.10 + 0.10 * cat.ear_tufts
    tuft = step(0.06, -0.06, across + cat.ear_width * 0.62 - reach * (1 - along * 0.8) + frame.hair * 0.10)
    pale = linear(TONES["white" if cat.white > 0.4 else cat.colour][2])
    mix(ear, pale * 0.85, inner * tuft * (0.35 + 0.45 * cat.ear_tufts))
    near_head = 1 - 0.35 * step(0.16, 0.0, head[rows])
    mix(view, light.shade(ear, lamp, behind, near_head), mask)


def _window(frame: Frame, cat: Cat, u: float, v: float, reach: float) -> tuple[slice, slice]:
    """Rows and columns that contain everything within ``reach`` of the point ``u``, ``v`` of the face."""
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
    """Paint the left (``side`` -1) or the right (1) eye."""
    rows, columns = _window(whole, cat, side * EYE_U, EYE_V, cat.eye_size * 1.5)
    frame, view = whole.crop(rows, columns), canvas[:, rows, columns]
    du, dv = (frame.u - side * EYE_U) / cat.eye_size, (frame.v - EYE_V) / cat.eye_size
    pixel = frame.pixel / cat.eye_size
    angle = math.radians(cat.eye_slant)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = du * cos * side - dv * sin, du * sin * side + dv * cos
    aa = pixel * 0.8

    curve = np.clip(1 - x * x, 0, 1)
    lid = curve * 0.45 + np.sqrt(curve) * 0.55
    top = lid * (x * 0.10 - 0.92 * cat.eye_open)
    bottom = lid * 0.66
    outside = np.maximum(top - y, y - bottom) + np.maximum(np.abs(x) - 1, 0)
    duct = stroke(x, y, (-0.95, 0.05), (-1.18, 0.24), 0.06, 0.02)
    liner = step(0.20, 0.04, np.minimum(outside - np.maximum(-y, 0) * 0.10, duct))
    mix(view, linear((26, 18, 17)), liner * 0.92)
    view *= 1 - step(0.55, 0.05, outside) * (1 - liner) * step(0.1, -0.5, y) * 0.27

    gaze_x, gaze_y = x - 0.10 * cat.gaze * side, y + 0.10
    radius = np.sqrt(gaze_x * gaze_x + gaze_y * gaze_y)
    centre, rim = (linear(tone) for tone in IRISES[cat.odd_eye if side > 0 and cat.odd_eye else cat.eyes])
    iris = np.broadcast_to(rim[:, None, None], (3, *x.shape)).copy()
    mix(iris, centre, step(0.80, 0.15, radius))
    iris *= 1 + fur_at(gaze_x * 0.9, gaze_y * 0.9, pixel) * 0.12
    iris *= 0.62 + 0.95 * step(-0.75, 0.75, y - du * 0.5 * light.x)
    mix(iris, linear((30, 22, 18)), step(0.80, 0.99, radius) * 0.9)
    fall = np.clip(1 - gaze_y * gaze_y * 1.5, 0, 1)
    width = cat.pupil
    pupil = np.abs(gaze_x) - width * (fall * (1 - width) + np.sqrt(fall) * width)
    mix(iris, linear((8, 7, 9)), step(aa + 0.03, -aa - 0.03, pupil) * step(0, 0.08, fall))
    iris *= 0.35 + 0.65 * step(0.0, 0.42, y - top)
    iris *= (light.key * 0.75 + light.sky * 1.3).reshape(3, 1, 1)

    inside = step(aa, -aa, outside + 0.02)
    mix(view, iris, inside)
    glint_x = 0.30 if light.x > 0 else -0.30
    sky = inside * step(-0.05, -0.75, dv) * 0.16
    glint = step(aa + 0.04, -aa - 0.04, ellipse(du - glint_x, dv + 0.32, 0.17, 0.20))
    second = step(0.12, -0.10, ellipse(du + glint_x, dv - 0.28, 0.12, 0.10)) * 0.45
    mix(view, light.key * 1.05, inside * np.maximum(sky, np.maximum(glint, second)))


def _paint_muzzle(canvas: Canvas, whole: Frame, cat: Cat, light: Light) -> None:
    """Paint nose, mouth, the roots of the whiskers, and the tip of the tongue of a cat that shows it."""
    rows, columns = _window(whole, cat, 0, 0.40, 0.36)
    frame, view = whole.crop(rows, columns), canvas[:, rows, columns]
    u, v = np.abs(frame.u), frame.v
    blur = frame.pixel * 0.8
    line = linear((40, 26, 24))

    t = np.clip(u / 0.21, 0, 1)
    lips = np.abs(v - 0.435 - 0.24 * t * (1 - t) + t * 0.012) - 0.013 * (1 - t)
    lips = np.maximum(lips, u - 0.21)
    view *= 1 - step(0.10, -0.02, lips) * step(0.42, 0.47, v) * 0.3
    if cat.tongue:
        tongue = ellipse(u, v - 0.485, 0.055, 0.058)
        mix(view, linear((226, 118, 122)) * light.key, step(blur, -blur, tongue) * step(0.44, 0.47, v))
    mix(view, line, step(blur + 0.012, -blur, lips) * 0.8)
    mix(view, line, step(blur + 0.012, -blur, stroke(u, v, (0, 0.33), (0, 0.43), 0.004, 0.008)) * 0.7)
    dots = ellipse(u - 0.13, v - 0.385, 0.010, 0.010)
    for du, dv in ((0.19, 0.37), (0.16, 0.42), (0.225, 0.405), (0.20, 0.445)):
        dots = np.minimum(dots, ellipse(u - du, v - dv, 0.010, 0.010))
    mix(view, line, step(blur + 0.008, -blur - 0.004, dots) * 0.35)

    wing = stroke(u, v, (0.0, 0.245), (0.095, 0.232), 0.050, 0.034)
    nose = join(wing, stroke(u, v, (0.0, 0.25), (0.0, 0.330), 0.066, 0.022), 0.05)
    skin = np.broadcast_to(linear(NOSES[cat.nose])[:, None, None], (3, *u.shape)).copy()
    skin *= 0.62 + 0.5 * step(0.34, 0.21, v)
    nostril = stroke(u, v, (0.052, 0.292), (0.105, 0.268), 0.016, 0.011)
    mix(skin, linear((26, 14, 14)), step(0.014, -0.006, nostril) * 0.9)
    skin *= (light.key * 0.8 + light.sky).reshape(3, 1, 1)
    wet = bump(frame.u - (0.03 if light.x > 0 else -0.03), v - 0.228, 0.06, 0.022)
    skin += wet * 0.30
    view *= 1 - step(0.05, 0.0, nose) * 0.38
    mix(view, skin, step(blur, -blur, nose))


def _paint_whiskers(canvas: Canvas, frame: Frame, cat: Cat, light: Light) -> None:
    side = np.sign(frame.u)
    out = np.abs(frame.u) - 0.18
    coverage = np.zeros_like(out)
    length = 0.85 + 0.15 * cat.muzzle
    for row in range(4):
        reach = length * (1 - 0.12 * abs(row - 1.5))
        fall = -0.14 + 0.13 * row + 0.05 * cat.skew * side + 0.02 * cat.pitch
        curve = frame.v - 0.37 - 0.028 * row - out * fall - out * out * 0.14
        half = 0.008 * np.clip(1 - out / reach, 0, 1)
        along = step(-0.01, 0.03, out)
        # The exact coverage of each pixel, also by lines thinner than a pixel.
        covered = np.clip((curve + half) / frame.pixel + 0.5, 0, 1)
        covered -= np.clip((curve - half) / frame.pixel + 0.5, 0, 1)
        coverage = np.maximum(coverage, covered * along)
    mix(canvas, light.key * 0.95, coverage * 0.62)


def paint(cat: Cat, noise: Noise, size: int) -> NDArray[np.uint8]:
    """The image of ``cat``, uint8 [size, size, 3]: painted at twice the size or more, and averaged."""
    fold = max(2, -(-128 // size))
    n = size * fold
    frame = _frame(cat, noise, n)
    light = Light.of(cat)
    coat = albedo(frame, cat)
    head = _head(frame, cat)

    canvas = backdrop(cat, noise, n)
    canvas *= (0.52 + 0.5 * light.key).reshape(3, 1, 1)
    canvas *= 1 - 0.25 * step(0.35, -0.1, head)
    _paint_chest(canvas, frame, cat, light, coat, head)
    _paint_ears(canvas, frame, cat, light, coat, head)

    lamp, behind = light.on(_relief(frame, cat, head), frame.pixel)
    shaggy = 0.009 + (0.012 if cat.fur == "long" else 0.0) + 0.006 * cat.cheeks
    soft = 0.030 if cat.fur == "short" else 0.045
    outline = step(soft, -soft, head + frame.hair * shaggy)
    mix(canvas, light.shade(coat, lamp, behind, np.ones_like(head)), outline)
    for side in (-1, 1):
        _paint_eye(canvas, frame, cat, light, side)
    _paint_muzzle(canvas, frame, cat, light)
    _paint_whiskers(canvas, frame, cat, light)

    axis = (np.arange(n, dtype=np.float32) + 0.5) * (2 / n) - 1
    corner = 0.13 * axis * axis * axis * axis
    canvas *= 1 - corner[None, :] - corner[:, None]
    canvas = canvas * 1.18 / (1 + canvas * 0.28)  # compress highlights, so that they keep their colour
    assert canvas.dtype == np.float32
    total = canvas[:, 0::fold, 0::fold].copy()
    for i in range(1, fold * fold):
        total += canvas[:, i // fold :: fold, i % fold :: fold]
    shown = np.sqrt(np.clip(total / fold**2, 0, 1)) * 255 + 0.5
    return np.ascontiguousarray(shown.astype(np.uint8).transpose(1, 2, 0))
