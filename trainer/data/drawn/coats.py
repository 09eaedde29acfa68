"""The traits of a drawn cat, sampled in plausible combinations, and the colours of its coat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.drawn.shapes import Canvas, Colour, Frame, Plane, ellipse, join, mix, step, stroke

# sRGB of (markings, ground colour, pale parts) for each coat colour.
TONES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]] = {
    "black": ((22, 20, 22), (52, 48, 48), (98, 90, 84)),
    "grey": ((70, 76, 88), (120, 126, 138), (178, 182, 188)),
    "orange": ((172, 84, 32), (226, 146, 74), (252, 220, 176)),
    "cream": ((206, 158, 110), (238, 208, 168), (252, 240, 220)),
    "brown": ((50, 36, 27), (150, 118, 84), (218, 192, 156)),
    "silver": ((50, 50, 54), (164, 163, 162), (234, 232, 228)),
    "chocolate": ((58, 36, 25), (110, 74, 52), (180, 140, 108)),
    "lilac": ((142, 122, 124), (190, 170, 168), (228, 216, 212)),
    "cinnamon": ((124, 64, 36), (182, 116, 74), (230, 188, 146)),
    "white": ((216, 210, 202), (245, 241, 235), (255, 252, 248)),
}
# sRGB (around the pupil, at the rim of the iris) for each eye colour.
IRISES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "green": ((188, 204, 96), (92, 160, 84)),
    "yellow": ((226, 214, 96), (222, 182, 52)),
    "amber": ((240, 196, 84), (214, 138, 34)),
    "copper": ((228, 150, 62), (176, 86, 28)),
    "hazel": ((196, 158, 76), (134, 148, 74)),
    "blue": ((160, 206, 238), (72, 136, 214)),
    "aqua": ((176, 226, 204), (76, 176, 176)),
}
NOSES: dict[str, tuple[int, int, int]] = {
    "pink": (226, 150, 142),
    "brick": (176, 98, 84),
    "black": (48, 40, 42),
    "slate": (104, 96, 106),
    "brown": (98, 66, 58),
}
# Probabilities.
COATS: dict[str, float] = {
    "tabby": 0.25,
    "solid": 0.16,
    "bicolour": 0.14,
    "tuxedo": 0.10,
    "calico": 0.09,
    "colourpoint": 0.10,
    "tortoiseshell": 0.06,
    "spotted": 0.06,
    "smoke": 0.04,
}
COLOURS: dict[str, dict[str, float]] = {
    "tabby": {"orange": 0.32, "brown": 0.30, "silver": 0.18, "grey": 0.08, "cream": 0.08, "cinnamon": 0.04},
    "solid": {
        "black": 0.24,
        "grey": 0.24,
        "white": 0.2,
        "cream": 0.1,
        "chocolate": 0.1,
        "lilac": 0.06,
        "cinnamon": 0.06,
    },
    "bicolour": {"orange": 0.25, "grey": 0.2, "brown": 0.2, "black": 0.15, "cream": 0.1, "silver": 0.1},
    "tuxedo": {"black": 0.85, "grey": 0.15},
    "calico": {"black": 0.8, "grey": 0.2},
    "colourpoint": {"chocolate": 0.5, "grey": 0.2, "lilac": 0.12, "orange": 0.18},
    "tortoiseshell": {"black": 0.8, "grey": 0.2},
    "spotted": {"brown": 0.5, "silver": 0.25, "cinnamon": 0.25},
    "smoke": {"black": 0.6, "grey": 0.4},
}
EYES = {"green": 0.3, "yellow": 0.2, "amber": 0.2, "copper": 0.11, "hazel": 0.1, "aqua": 0.05, "blue": 0.04}
BACKGROUNDS = {"wall": 0.28, "bokeh": 0.22, "room": 0.18, "garden": 0.2, "blanket": 0.12}


@dataclass(frozen=True)
class Cat:
    """All traits of an image except its noise; they become the JSON of the sample.

    The unit of length is half the width of the head. Angles are in degrees. Left and right are those of the image.
    """

    coat: str
    colour: str
    stripes: float  # strength of the tabby markings, 0..1
    white: float  # extent of the white on the face, 0 (none) .. 1
    skew: float  # asymmetry of the markings, -1..1
    shade: float  # lightness of the coat relative to its colour, 0.8..1.2
    eyes: str
    odd_eye: str | None  # colour of the right eye if it differs (heterochromia)
    eye_size: float
    eye_slant: float
    eye_open: float  # 1 wide open
    pupil: float  # width: 0.1 a slit .. 0.75 nearly round
    gaze: float  # -1 left .. 1 right
    nose: str
    tongue: bool
    head: str  # wedge, standard or round
    fur: str  # short or long
    cheeks: float  # length of the fur on the cheeks, 0..1
    muzzle: float  # size of the muzzle, about 1
    ear_length: float
    ear_width: float
    ear_tilt: float  # outwards
    ear_round: float  # tips: 0 pointed .. 1 round
    ear_tufts: float  # 0..1
    tilt_degrees: float  # head leaning right if positive
    yaw: float  # head turned -1 left .. 1 right
    pitch: float  # head turned -1 up .. 1 down
    scale: float  # width of the head relative to the image
    offset_x: float
    offset_y: float
    light_degrees: float  # direction of the lamp: 0 above, 90 right
    light_height: float  # lamp 0 at the side .. 1 in front
    warmth: float  # -1 bluish .. 1 golden
    exposure: float
    rim: float  # strength of the light from behind, along the outline of the head
    background: str
    background_hue: float  # 0..1
    background_value: float  # 0 dark .. 1 bright


def linear(colour: Sequence[float]) -> Colour:
    """Convert sRGB 0..255 to linear light 0..1, with gamma 2 in place of sRGB's curve: its inverse is a square root."""
    scaled = np.array(colour, np.float32) / 255
    return scaled * scaled


class Chance:
    """Random values from ``rng.random()`` only: NumPy may change the algorithms of its other distributions."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def within(self, low: float, high: float) -> float:
        """Uniform in [low, high)."""
        return round(low + (high - low) * self.rng.random(), 3)

    def about(self, middle: float, reach: float) -> float:
        """The mean of three uniform values: in ``middle`` +- ``reach``, mostly near ``middle``."""
        return round(middle + reach * (sum(self.rng.random() for _ in range(3)) * 2 / 3 - 1), 3)

    def true(self, probability: float) -> bool:
        return self.rng.random() < probability

    def one_of(self, weights: Mapping[str, float]) -> str:
        """A key, with a probability in proportion to its weight."""
        left = self.rng.random() * sum(weights.values())
        for name, weight in weights.items():
            left -= weight
            if left < 0:
                return name
        return name


def _coat(chance: Chance) -> tuple[str, str, float, float]:
    """Coat, colour, strength of the stripes and extent of the white."""
    coat = chance.one_of(COATS)
    colour = chance.one_of(COLOURS[coat])
    stripes = {"tabby": chance.within(0.7, 1), "spotted": chance.within(0.5, 0.9)}.get(coat, 0.0)
    if coat == "bicolour" and colour != "black":
        stripes = chance.within(0.4, 0.95)
    if colour in ("orange", "cream", "silver", "brown"):
        stripes = max(stripes, 0.35)  # such coats always have markings
    spread = {"bicolour": (0.4, 1.0), "tuxedo": (0.12, 0.45), "calico": (0.3, 0.95)}.get(coat)
    white = chance.within(*spread) if spread else 0.0
    if coat == "tabby" and chance.true(0.3):
        white = chance.within(0.1, 0.25)
    return coat, colour, stripes, white


def _nose(chance: Chance, coat: str, colour: str, white: float) -> str:
    if white > 0.45 or colour in ("white", "cream", "orange"):
        return "pink" if chance.true(0.85) else "brick"
    if colour in ("black", "silver") or coat == "smoke":
        return "black" if chance.true(0.8) else "brick"
    if colour in ("grey", "lilac"):
        return "slate"
    return "brick" if chance.true(0.6) else "brown"


def _eyes(chance: Chance, coat: str, colour: str) -> tuple[str, str | None]:
    if coat == "colourpoint":
        return "blue", None
    pale = colour == "white"
    eyes = chance.one_of({"blue": 0.5, "amber": 0.2, "green": 0.2, "copper": 0.1} if pale else EYES)
    if not chance.true(0.25 if pale else 0.02):
        return eyes, None
    return (eyes, "amber") if eyes in ("blue", "aqua") else (eyes, "blue")


def random_cat(rng: np.random.Generator) -> Cat:
    """Sample a cat. Traits are correlated as in nature: colourpoints have blue eyes, orange cats have stripes."""
    chance = Chance(rng)
    coat, colour, stripes, white = _coat(chance)
    eyes, odd_eye = _eyes(chance, coat, colour)
    head = chance.one_of({"standard": 0.5, "round": 0.3, "wedge": 0.2})
    fur = chance.one_of({"short": 0.65, "long": 0.35})
    large = {"standard": 0.0, "round": -0.07, "wedge": 0.1}[head]
    return Cat(
        coat=coat,
        colour=colour,
        stripes=stripes,
        white=white,
        skew=chance.about(0, 1),
        shade=chance.about(1, 0.22),
        eyes=eyes,
        odd_eye=odd_eye,
        eye_size=chance.about(0.212, 0.035),
        eye_slant=chance.about(11 if head != "wedge" else 17, 9),
        eye_open=chance.within(0.35, 0.7) if chance.true(0.12) else chance.about(0.9, 0.14),
        pupil=chance.within(0.1, 0.78),
        gaze=chance.about(0, 1),
        nose=_nose(chance, coat, colour, white),
        tongue=chance.true(0.05),
        head=head,
        fur=fur,
        cheeks=chance.within(0.35, 1) if fur == "long" else chance.within(0, 0.6),
        muzzle=chance.about(1, 0.18),
        ear_length=chance.about(0.84 + large, 0.13),
        ear_width=chance.about(0.37 + large / 3, 0.05),
        ear_tilt=chance.about(25, 14),
        ear_round=chance.within(0.1, 0.6) if head == "wedge" else chance.within(0.2, 1),
        ear_tufts=chance.within(0.2, 1),
        tilt_degrees=chance.about(0, 24),
        yaw=chance.about(0, 1),
        pitch=chance.about(0, 1),
        scale=chance.about(0.845, 0.08),
        offset_x=chance.about(0, 0.09),
        offset_y=chance.about(0.15, 0.07),
        light_degrees=chance.about(0, 110),
        light_height=chance.within(0.2, 1),
        warmth=chance.about(0.15, 0.95),
        exposure=chance.about(1, 0.22),
        rim=chance.within(0, 1),
        background=chance.one_of(BACKGROUNDS),
        background_hue=chance.within(0, 1),
        background_value=chance.within(0.1, 1),
    )


# Tabby markings of one half of the face as strokes: (start, end, radius at start, radius at end) in face units. The
# first six form the M on the forehead; the next cross the cheek from the outer corner of the eye.
STRIPES: tuple[tuple[tuple[float, float], tuple[float, float], float, float], ...] = (
    ((0.0, -0.50), (0.0, -0.95), 0.012, 0.030),
    ((0.075, -0.36), (0.105, -0.92), 0.018, 0.034),
    ((0.075, -0.36), (0.155, -0.50), 0.014, 0.020),
    ((0.215, -0.42), (0.255, -0.90), 0.020, 0.040),
    ((0.215, -0.42), (0.320, -0.46), 0.016, 0.022),
    ((0.380, -0.43), (0.430, -0.85), 0.022, 0.050),
    ((0.600, -0.12), (1.020, -0.13), 0.018, 0.040),
    ((0.500, 0.10), (1.000, 0.14), 0.012, 0.042),
    ((0.430, 0.22), (0.930, 0.42), 0.010, 0.040),
    ((0.560, 0.52), (0.800, 0.66), 0.022, 0.040),
)


def _stripes(frame: Frame) -> Plane:
    """Mask of a tabby's dark markings: the M, the cheek stripes and the necklaces below the chin."""
    u = np.abs(frame.u + frame.warp_x * 0.035)
    v = frame.v + frame.warp_y * 0.045
    distance = stroke(u, v, *STRIPES[0])
    for one in STRIPES[1:]:
        distance = np.minimum(distance, stroke(u, v, *one))
    ring = np.abs(np.abs(v - 1.26 + u * u * 0.25) - 0.13) - 0.04
    distance = np.minimum(distance, np.maximum(ring, 0.95 - v))
    return step(0.03, -0.025, distance + frame.hair * 0.012)


def _white(frame: Frame, cat: Cat) -> Plane:
    """Mask of the white parts: muzzle, chin and bib; with much white also an inverted V on the forehead."""
    amount = cat.white
    u = frame.u + frame.warp_x * 0.10 - 0.09 * cat.skew
    v = frame.v + frame.warp_y * 0.06
    distance = ellipse(u, v - 0.48, 0.24 + 0.22 * amount, 0.22 + 0.10 * amount)
    if amount > 0.3:
        top = (0.06 * cat.skew, 0.05 - 0.95 * amount)
        distance = join(distance, stroke(u, v, (0.0, 0.42), top, 0.10 + 0.42 * amount, 0.015 + 0.05 * amount), 0.1)
    bib = ellipse(u, v - 1.15, 0.26 + 0.5 * amount, 0.5)
    return step(0.035, -0.035, join(distance, bib, 0.12) + frame.hair * 0.02)


def _patches(frame: Frame, cat: Cat) -> Plane:
    """Mask of the orange parts: large patches on a calico, fine brindle on a tortoiseshell."""
    if cat.coat == "calico":
        return step(-0.08, 0.08, frame.blotch + 0.3 * cat.skew * np.clip(frame.u * 8, -1, 1) + frame.hair * 0.04)
    return step(-0.3, 0.35, frame.blotch * 0.7 + frame.warp_x * 0.8 + frame.hair * 0.07)


def _pale_parts(frame: Frame) -> Plane:
    """Mask of a tabby's pale parts: around the eyes, the muzzle, the chin and the chest."""
    u = np.abs(frame.u)
    eyes = np.abs(ellipse(u - 0.345, frame.v + 0.06, 0.27, 0.20)) - 0.05
    muzzle = ellipse(u, frame.v - 0.47, 0.29, 0.19)
    chest = ellipse(u, frame.v - 1.1, 0.4, 0.35)
    return step(0.09, -0.07, np.minimum(eyes, np.minimum(muzzle, chest)) + frame.hair * 0.02)


def albedo(frame: Frame, cat: Cat) -> Canvas:
    """Colour of the fur in linear light [3, n, n], for the whole frame: face, ears and chest use their parts of it."""
    dark, ground, pale = (linear(tone) * cat.shade for tone in TONES[cat.colour])
    white = linear(TONES["white"][1])
    n = len(frame.u)
    coat = np.broadcast_to(ground[:, None, None], (3, n, n)).copy()
    centre = np.sqrt(frame.u * frame.u + (frame.v - 0.15) ** 2)
    if cat.coat == "colourpoint":
        cream = linear((236, 220, 198)) * cat.shade
        mix(coat, cream, np.ones((n, n), np.float32))
        mask = step(0.80 + 0.15 * cat.skew, 0.16, centre + frame.warp_x * 0.08 + frame.hair * 0.03)
        ears = step(-0.55, -0.80, frame.v + frame.hair * 0.03)
        mix(coat, dark if cat.colour == "chocolate" else ground, np.maximum(mask * 0.92, ears))
    elif cat.coat == "smoke":
        mix(coat, dark, step(0.9, 0.2, centre))
        mix(coat, pale, step(0.75, 1.25, centre + frame.hair * 0.10) * 0.8)
    elif cat.coat in ("calico", "tortoiseshell"):
        patches = _patches(frame, cat)
        orange = [linear(tone) for tone in (TONES["orange"] if cat.colour == "black" else TONES["cream"])]
        mix(coat, dark, np.ones((n, n), np.float32))
        mix(coat, orange[1], patches)
        mix(coat, orange[0], patches * _stripes(frame) * 0.5)
    else:
        if cat.stripes:
            mix(coat, pale, _pale_parts(frame) * 0.75)
            marks = _stripes(frame)
            if cat.coat == "spotted":
                spots = step(0.10, 0.32, frame.spots) * step(0.45, 0.62, centre)
                marks = np.maximum(marks * step(0.75, 0.45, centre), spots)
            mix(coat, dark, marks * 0.88 * cat.stripes)
        else:
            mix(coat, pale, step(0.35, 0.9, frame.v) * 0.25)
    if cat.white:
        mix(coat, white, _white(frame, cat))
    coat *= 1 + np.clip(frame.hair, -1.6, 1.6) * 0.11
    return coat
