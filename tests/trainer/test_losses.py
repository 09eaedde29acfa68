"""Each loss and penalty against values worked out by hand."""

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from trainer.losses import (
    FINITE_STEP,
    LOSSES,
    finite_difference_penalty,
    interpolate,
    lecam,
    one_centred_penalty,
    perturb,
    zero_centred_penalty,
)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_bce_is_binary_cross_entropy():
    real, fake = torch.tensor([0.3, -2.0]), torch.tensor([1.0, 0.5])
    ones, zeros = torch.ones(2), torch.zeros(2)
    expected = binary_cross_entropy_with_logits(real, ones, reduction="none") + binary_cross_entropy_with_logits(
        fake, zeros, reduction="none"
    )
    torch.testing.assert_close(LOSSES["bce"].discriminator(real, fake), expected)
    torch.testing.assert_close(
        LOSSES["bce"].generator(torch.empty(0), fake), binary_cross_entropy_with_logits(fake, ones, reduction="none")
    )


def test_rpgan_sees_differences_of_pairs_only():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    loss = LOSSES["rpgan"]
    torch.testing.assert_close(loss.discriminator(real, fake), torch.tensor([softplus(-1.5), softplus(4.0)]))
    torch.testing.assert_close(loss.generator(real, fake), torch.tensor([softplus(1.5), softplus(-4.0)]))
    torch.testing.assert_close(loss.discriminator(real + 7, fake + 7), loss.discriminator(real, fake))


def test_hinge_stops_at_the_margin():
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 0.25])
    torch.testing.assert_close(LOSSES["hinge"].discriminator(real, fake), torch.tensor([0.5, 1.25]))
    torch.testing.assert_close(LOSSES["hinge"].generator(real, fake), -fake)


def test_wasserstein_is_the_difference_of_means():
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])
    assert LOSSES["wasserstein"].discriminator(real, fake).mean().item() == -1.5
    assert LOSSES["wasserstein"].generator(real, fake).mean().item() == -0.5


def test_ralsgan_is_least_squares_around_the_other_side():
    """Real and fake come as differences to the other side's mean: reals are to lie one above, fakes one below."""
    loss = LOSSES["ralsgan"]
    assert loss.average
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0])
    torch.testing.assert_close(loss.discriminator(real, fake), torch.tensor([0.0, 4.0 + 1.0]))
    torch.testing.assert_close(loss.generator(real, fake), torch.tensor([4.0 + 4.0, 16.0 + 1.0]))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_pull_the_right_way(name: str):
    loss = LOSSES[name]
    assert loss.relativistic or not loss.average
    real = torch.full((3,), 0.25, requires_grad=True)
    fake = torch.full((3,), 0.25, requires_grad=True)
    d_real, d_fake = torch.autograd.grad(loss.discriminator(real, fake).sum(), [real, fake])
    (g_fake,) = torch.autograd.grad(loss.generator(real, fake).sum(), [fake])
    assert (d_real < 0).all(), "the discriminator raises the critic on reals"
    assert (d_fake > 0).all(), "and lowers it on fakes"
    assert (g_fake < 0).all(), "the generator raises it on fakes"


def test_penalty_of_a_linear_critic_is_the_squared_norm_of_its_weights():
    weights = torch.randn(3, 4, 4)
    images = torch.randn(5, 3, 4, 4, requires_grad=True)
    penalty = zero_centred_penalty([images], (images * weights).sum(dim=(1, 2, 3)))
    torch.testing.assert_close(penalty, weights.square().sum().expand(5))


def test_penalty_of_a_quadratic_critic_and_its_gradient():
    """D(x) = a |x|^2: |dD/dx|^2 = 4 a^2 |x|^2, whose derivative by a is 8 a |x|^2."""
    a = torch.tensor(0.7, requires_grad=True)
    images = torch.randn(4, 3, 2, 2, requires_grad=True)
    norms = images.detach().square().sum(dim=(1, 2, 3))
    penalty = zero_centred_penalty([images], a * images.square().sum(dim=(1, 2, 3)))
    torch.testing.assert_close(penalty, 4 * 0.49 * norms)
    penalty.sum().backward()
    torch.testing.assert_close(a.grad, 8 * 0.7 * norms.sum())


def test_penalty_adds_over_batches():
    weights = torch.randn(3, 2, 2)
    reals, fakes = (torch.randn(2, 3, 2, 2, requires_grad=True) for _ in range(2))
    critic = torch.cat([(reals * weights).sum(dim=(1, 2, 3)), (fakes * 3 * weights).sum(dim=(1, 2, 3))])
    torch.testing.assert_close(zero_centred_penalty([reals, fakes], critic), (10 * weights.square().sum()).expand(2))


def test_finite_differences_estimate_the_penalty_of_a_linear_critic():
    """(D(x + s e) - D(x))^2 / s^2 = (w . e)^2, of mean |w|^2 and standard deviation sqrt(2) |w|^2."""
    torch.manual_seed(0)
    weights = torch.randn(3, 2, 2)
    batches = [torch.randn(50_000, 3, 2, 2) for _ in range(2)]

    def critic(images: torch.Tensor) -> torch.Tensor:
        return (images * weights).sum(dim=(1, 2, 3))

    penalty = finite_difference_penalty([critic(x) for x in batches], [critic(perturb(x)) for x in batches])
    assert penalty.shape == (50_000,)
    square = weights.square().sum().item()
    assert penalty.mean().item() == pytest.approx(2 * square, rel=0.02)  # 4.5 standard errors
    assert penalty.std().item() == pytest.approx(2 * square, rel=0.05)


def test_finite_differences_of_a_quadratic_critic_and_their_gradient():
    """D(x) = a |x|^2 has H = 2 a, so the mean is 4 a^2 |x|^2 + s^2 a^2 (d^2 + 2 d) in d dimensions."""
    torch.manual_seed(0)
    a = torch.tensor(0.7, requires_grad=True)
    image = torch.randn(3, 2, 2)
    images = image.expand(200_000, 3, 2, 2)
    penalty = finite_difference_penalty(
        [a * images.square().sum(dim=(1, 2, 3))], [a * perturb(images).square().sum(dim=(1, 2, 3))]
    ).mean()
    square = 4 * image.square().sum().item() + FINITE_STEP**2 * (12**2 + 2 * 12)
    assert penalty.item() == pytest.approx(0.49 * square, rel=0.015)
    penalty.backward()
    assert a.grad.item() == pytest.approx(2 * 0.7 * square, rel=0.015)


def test_penalty_around_norm_one_of_a_linear_critic():
    weights = torch.randn(3, 4, 4)
    images = torch.randn(5, 3, 4, 4, requires_grad=True)
    penalty = one_centred_penalty(images, (images * weights).sum(dim=(1, 2, 3)))
    torch.testing.assert_close(penalty, (weights.norm() - 1).square().expand(5))


def test_penalty_around_norm_one_has_a_gradient_where_the_critic_is_flat():
    weights = torch.zeros(3, 2, 2, requires_grad=True)
    images = torch.randn(2, 3, 2, 2, requires_grad=True)
    one_centred_penalty(images, (images * weights).sum(dim=(1, 2, 3))).sum().backward()
    assert torch.isfinite(weights.grad).all()


def test_interpolation_lies_on_the_lines_between_reals_and_fakes():
    torch.manual_seed(0)
    points = interpolate(torch.zeros(500, 3, 2, 2), torch.ones(500, 3, 2, 2))
    assert points.requires_grad
    shares = points.detach().flatten(1)
    torch.testing.assert_close(shares, shares[:, :1].expand_as(shares))
    assert shares.min() < 0.02
    assert shares.max() > 0.98


def test_lecam_pulls_each_side_towards_the_other_ones_running_mean():
    real, fake = torch.tensor([2.0, -3.0]), torch.tensor([-1.0, 4.0])
    values = lecam(real, fake, torch.tensor(1.0), torch.tensor(-0.5))
    torch.testing.assert_close(values, torch.tensor([2.5**2 + 2.0**2, 0.0]))
