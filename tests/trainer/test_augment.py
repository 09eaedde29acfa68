"""Augmentation: what it may change, what it must not, and that gradients flow."""

import pytest
import torch

from trainer.augment import TRANSFORMS, augment, colour, cutout, random_flip, translation


def test_probability_zero_is_the_identity():
    images = torch.randn(4, 3, 16, 16)
    assert augment(images, tuple(TRANSFORMS), 0.0) is images


@pytest.mark.parametrize("name", TRANSFORMS)
def test_versions_of_an_image_get_the_same_augmentation(name: str):
    torch.manual_seed(0)
    images = torch.rand(16, 3, 8, 8)
    first, second = augment(torch.stack([images, images]), (name,), 0.7)
    assert torch.equal(first, second)
    torch.manual_seed(1)
    pair = augment(torch.stack([images, images]), (name,), 0.7)
    torch.manual_seed(1)
    torch.testing.assert_close(pair[0], augment(images, (name,), 0.7))
    assert not torch.equal(pair[0], first)


def test_probability_is_the_share_of_changed_pictures():
    torch.manual_seed(0)
    images = torch.rand(4000, 3, 8, 8)
    changed = (augment(images, ("cutout",), 0.3) != images).flatten(1).any(dim=1).float().mean()
    assert changed.item() == pytest.approx(0.3, abs=0.03)


def test_flip_mirrors_half_of_the_pictures():
    torch.manual_seed(0)
    images = torch.randn(2000, 1, 2, 2)
    flipped = random_flip(images)
    same = (flipped == images).flatten(1).all(dim=1)
    mirrored = (flipped == images.flip(3)).flatten(1).all(dim=1)
    assert (same | mirrored).all()
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_translation_shifts_whole_pixels_and_fills_with_zero():
    torch.manual_seed(0)
    images = torch.arange(1.0, 65.0).view(1, 1, 8, 8).expand(50, 1, 8, 8)
    seen = set()
    for moved in translation(images):
        y, x = (moved[0] != 0).nonzero()[0].tolist()
        dy, dx = (
            (y or -int((8 - (moved[0] != 0).any(dim=1).sum()))),
            (x or -int(8 - (moved[0] != 0).any(dim=0).sum())),
        )
        expected = torch.zeros(8, 8)
        expected[max(dy, 0) : 8 + min(dy, 0), max(dx, 0) : 8 + min(dx, 0)] = images[0, 0][
            max(-dy, 0) : 8 + min(-dy, 0), max(-dx, 0) : 8 + min(-dx, 0)
        ]
        torch.testing.assert_close(moved[0], expected)
        seen.add((dy, dx))
    assert seen == {(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}


def test_cutout_blanks_at_most_a_quarter():
    torch.manual_seed(0)
    blank = (cutout(torch.ones(200, 3, 16, 16)) == 0).float().mean(dim=(1, 2, 3))
    assert blank.max().item() == pytest.approx(0.25, abs=1e-6)
    assert blank.min().item() > 0


def test_colour_keeps_the_structure():
    """Brightness, saturation and contrast are affine in the pixel for each picture: equal pixels stay equal."""
    torch.manual_seed(0)
    left = torch.rand(8, 3, 4, 1)
    moved = colour(left.expand(8, 3, 4, 4))
    torch.testing.assert_close(moved, moved[..., :1].expand_as(moved))
    assert not torch.allclose(moved, left.expand(8, 3, 4, 4))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradients_reach_the_pictures(name: str):
    torch.manual_seed(0)
    images = torch.rand(4, 3, 8, 8, requires_grad=True)
    TRANSFORMS[name](images).square().sum().backward()
    assert images.grad is not None
    assert images.grad.flatten(1).abs().sum(dim=1).min() > 0
