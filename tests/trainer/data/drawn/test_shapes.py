"""The shapes of drawn cats: known distances, masks, and the fur texture."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.drawn.shapes import FUR_LEVELS, Plane, bump, ellipse, enlarge, fur, fur_at, join, mix, step, stroke


def _plane(*values: float) -> Plane:
    return np.array([values], np.float32)


def test_step_runs_from_low_to_high_either_way() -> None:
    x = _plane(-1, 0, 1, 2, 3)
    assert step(0, 2, x).tolist() == [[0, 0, 0.5, 1, 1]]
    assert step(2, 0, x).tolist() == [[1, 1, 0.5, 0, 0]]


def test_an_ellipse_is_zero_on_its_outline_and_a_circle_exact() -> None:
    angle = np.linspace(0.0, 6.0, 20, dtype=np.float32)[None]
    assert np.abs(ellipse(3 * np.cos(angle), np.sin(angle), 3, 1)).max() < 1e-5
    assert ellipse(_plane(0.5, 3), _plane(0, 4), 2, 2) == pytest.approx(_plane(-1.5, 3), abs=1e-4)


def test_a_stroke_is_a_tapered_capsule() -> None:
    x, y = _plane(1, 1, -2, 6), _plane(0, 2, 0, 0)
    assert stroke(x, y, (0, 0), (2, 0), 0.5, 0.5) == pytest.approx(_plane(-0.5, 1.5, 1.5, 3.5))
    assert stroke(x, y, (0, 0), (2, 0), 0.0, 1.0) == pytest.approx(_plane(-0.5, 1.5, 2, 3))


def test_join_rounds_only_near_the_seam() -> None:
    a, b = _plane(0, 1, 5), _plane(0, 5, 1)
    assert join(a, b, 0.4) == pytest.approx(_plane(-0.1, 1, 1))


def test_a_bump_is_one_in_the_middle_and_zero_outside() -> None:
    assert bump(_plane(0, 1, 2, 9), _plane(0, 0, 0, 9), 2, 1) == pytest.approx(_plane(1, 0.5625, 0, 0))


def test_mix_blends_by_the_mask() -> None:
    canvas = np.zeros((3, 1, 3), np.float32)
    mix(canvas, np.array([1, 2, 3], np.float32), _plane(0, 0.5, 1))
    assert canvas[:, 0].tolist() == [[0, 0.5, 1], [0, 1, 2], [0, 1.5, 3]]


def test_enlarged_noise_is_the_same_field_on_every_grid() -> None:
    field = np.random.Generator(np.random.PCG64(0)).random((6, 6)).astype(np.float32)
    fine, coarse = enlarge(field, 240), enlarge(field, 120)
    assert np.abs(fine.reshape(120, 2, 120, 2).mean((1, 3)) - coarse).max() < 2e-3


def test_coarser_fur_has_less_contrast() -> None:
    deviations = [float(fur(level).std()) for level in range(FUR_LEVELS)]
    assert deviations == sorted(deviations, reverse=True)
    assert deviations[0] == pytest.approx(1.8, abs=0.1)
    assert all(abs(float(fur(level).mean())) < 0.05 for level in range(FUR_LEVELS))
    x = np.linspace(-2, 2, 50, dtype=np.float32)[None]
    assert fur_at(x, x, 0.001).std() > 2 * fur_at(x, x, 1.0).std()


def test_fur_grows_away_from_the_nose() -> None:
    """Neighbours along a hair are alike, neighbours across hairs are not."""
    texture, middle = fur(0), len(fur(0)) // 2
    right = texture[middle - 60 : middle + 60, middle + 200 : middle + 320]  # hair runs along the rows here
    along = np.abs(np.diff(right[:, ::3], axis=1)).mean()
    across = np.abs(np.diff(right[::3], axis=0)).mean()
    assert across > 2 * along
