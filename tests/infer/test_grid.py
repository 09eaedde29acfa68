from __future__ import annotations

import numpy as np
import pytest

from infer.grid import grid, grid_shape, to_uint8


def test_to_uint8_values() -> None:
    values = np.array([-1.0, 1.0, 0.0, -7.0, 7.0, -1 + 1 / 127.5, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5], np.float32)
    images = np.broadcast_to(values, (1, 3, 1, 8))
    np.testing.assert_array_equal(to_uint8(images)[0, 0, :, 0], [0, 255, 128, 0, 255, 1, 0, 1])


def test_to_uint8_returns_every_level_of_an_image() -> None:
    levels = np.arange(256, dtype=np.float32).reshape(1, 1, 16, 16).repeat(3, axis=1)
    np.testing.assert_array_equal(to_uint8(levels / 127.5 - 1)[0, :, :, 0].ravel(), np.arange(256))


def test_to_uint8_moves_channels_last() -> None:
    output = np.zeros((2, 3, 4, 5), np.float32)
    output[1, 2, 3, 4] = 1.0
    images = to_uint8(output)
    assert images.shape == (2, 4, 5, 3)
    assert images.dtype == np.uint8
    assert images[1, 3, 4, 2] == 255


@pytest.mark.parametrize(
    ("n", "columns", "shape"),
    [(1, None, (1, 1)), (2, None, (1, 2)), (5, None, (2, 3)), (9, None, (3, 3)), (10, None, (3, 4)), (5, 4, (2, 4))],
)
def test_grid_shape(n: int, columns: int | None, shape: tuple[int, int]) -> None:
    assert grid_shape(n, columns) == shape


def test_grid_is_filled_row_by_row() -> None:
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((1, 4, 6, 3), np.uint8)
    sheet = np.asarray(grid(images))
    assert sheet.shape == (2 * 4, 3 * 6, 3)
    cells = sheet.reshape(2, 4, 3, 6, 3).transpose(0, 2, 1, 3, 4).reshape(6, 4, 6, 3)
    np.testing.assert_array_equal(cells[:5], images)
    assert (cells[5] == 255).all()


def test_grid_refuses_floats() -> None:
    with pytest.raises(AssertionError):
        grid(np.zeros((1, 2, 2, 3), np.float32))
