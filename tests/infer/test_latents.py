from __future__ import annotations

import numpy as np
import pytest

from infer.latents import latents, slerp, walk


def test_rows_follow_the_published_rule() -> None:
    z = latents(range(5, 8), 16)
    assert z.shape == (3, 16)
    assert z.dtype == np.float32
    for row, seed in zip(z, (5, 6, 7), strict=True):
        expected = np.random.Generator(np.random.PCG64(seed)).standard_normal(16, dtype=np.float32)
        np.testing.assert_array_equal(row, expected)


def test_a_row_depends_on_its_seed_alone() -> None:
    np.testing.assert_array_equal(latents([7], 128)[0], latents(range(100), 128)[7])
    np.testing.assert_array_equal(latents([3, 1], 8), latents([1, 3], 8)[::-1])


def test_values_are_pinned() -> None:
    """Published images are named by seed, so a change of NumPy's stream must fail here."""
    np.testing.assert_array_equal(
        latents([0], 3)[0], np.array([1.1176220178604126, -1.3871248960494995, -0.4265716075897217], np.float32)
    )


def test_latents_are_standard_normal() -> None:
    z = latents(range(200), 512)
    assert abs(float(z.mean())) < 0.02
    assert abs(float(z.std()) - 1) < 0.02


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_slerp_keeps_the_norm_and_a_constant_speed(t: float) -> None:
    a, b = latents([0, 1], 64)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    angle = np.arccos(np.dot(a, b))
    point = slerp(a, b, t)
    assert point.dtype == np.float32
    assert np.linalg.norm(point) == pytest.approx(1, abs=1e-5)
    assert np.arccos(np.clip(np.dot(a, point), -1, 1)) == pytest.approx(t * angle, abs=1e-3)


def test_slerp_starts_and_ends_at_its_arguments() -> None:
    a, b = latents([0, 1], 64)
    np.testing.assert_allclose(slerp(a, b, 0.0), a, atol=1e-6)
    np.testing.assert_allclose(slerp(a, b, 1.0), b, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, -1.0, 2.0])
def test_slerp_of_vectors_on_one_line_is_a_straight_line(factor: float) -> None:
    (a,) = latents([0], 8)
    np.testing.assert_allclose(slerp(a, factor * a, 0.25), (0.75 + 0.25 * factor) * a, rtol=1e-5)


def test_walk_passes_the_keys_and_closes() -> None:
    keys = latents(range(3), 32)
    points = walk(keys, steps=10)
    assert points.shape == (30, 32)
    np.testing.assert_allclose(points[::10], keys, atol=1e-6)
    np.testing.assert_allclose(points[5::10], [slerp(keys[i], keys[(i + 1) % 3], 0.5) for i in range(3)], atol=1e-6)


def test_walk_turns_without_a_jerk() -> None:
    """The velocity changes no more at a key, where the direction changes, than elsewhere."""
    points = walk(latents(range(3), 32), steps=50).astype(np.float64)
    velocity = np.roll(points, -1, axis=0) - points
    change = np.linalg.norm(velocity - np.roll(velocity, 1, axis=0), axis=1)
    speed = np.linalg.norm(velocity, axis=1)
    assert change.max() < 0.1 * speed.max()
    keys = points[::50]
    even = [slerp(keys[i], keys[(i + 1) % 3], t / 50) for i in range(3) for t in range(50)]
    jerky = np.roll(even, -1, axis=0) - even
    assert np.linalg.norm(jerky - np.roll(jerky, 1, axis=0), axis=1).max() > 0.5 * np.linalg.norm(jerky, axis=1).max()
