"""The proxy attacker: both sides of the min-max move where they should."""

import pytest
import torch
from small_splits import SPECS
from torch import nn
from torch.nn import functional as F

from mibench.defenses.parts.proxy import (
    ProxyDecoder,
    adversarial_loss,
    reversed_gradient,
    unexplained,
)
from mibench.task import Classification

SHAPE = (3, 16, 16)


def test_the_reversal_keeps_values_and_turns_the_gradient_of_each_row():
    z = torch.randn(3, 2, 4, 4, requires_grad=True)
    weights = torch.tensor([1.0, 0.5, 0.0])
    out = reversed_gradient(z, weights)
    assert torch.equal(out, z)
    seen = torch.randn(z.shape)
    (out * seen).sum().backward()
    torch.testing.assert_close(z.grad, -seen * weights[:, None, None, None])


def test_the_reversal_reads_its_weights_late():
    z, weights = torch.randn(2, 3, requires_grad=True), torch.ones(2)
    total = reversed_gradient(z, weights).sum()
    weights.mul_(0)
    total.backward()
    assert torch.equal(z.grad, torch.zeros(2, 3))


def test_unexplained_is_1_for_the_mean_image_and_0_for_a_copy(pictures):
    images = pictures(8).images()
    mean = unexplained(images.mean(0), images)
    assert mean.shape == (8,)
    assert mean.mean().item() == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(unexplained(images, images), torch.zeros(8))
    half = unexplained((images + images.mean(0)) / 2, images)
    torch.testing.assert_close(half, mean / 4)


class Constant(nn.Module):
    """A decoder of which the error is known: a mix of image and mean image, and a little of z."""

    def __init__(self, images, share):
        super().__init__()
        self.images, self.share = images, share

    def forward(self, z):
        mean = self.images.mean(0)
        wrong = mean + self.share * (mean - self.images)
        return wrong + 0 * z.sum() + 1e-6 * z.view(-1, 1, 1, 1)


# Error in units of that of the mean image → what is left of the client's push.
@pytest.mark.parametrize(("error", "push"), [(0.25, 1.0), (1.0, 1.0), (1.5, 0.5), (2.5, 0.0)])
def test_the_push_fades_out_behind_the_mean_image(pictures, error, push):
    images = pictures(4).images()
    decoder = Constant(images, error**0.5 - 1)
    free = torch.zeros(4, requires_grad=True)
    unexplained(decoder(free), images).mean().backward()
    z = torch.zeros(4, requires_grad=True)
    adversarial_loss(decoder, z, images, 2.0).backward()
    torch.testing.assert_close(z.grad, -2 * push * free.grad, rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize("features", list(SPECS))
def test_the_decoder_gains_and_the_features_resist(pictures, features):
    split = SPECS[features].build(SHAPE, Classification(tuple("ab")), 0)
    images = pictures(16).images()
    torch.manual_seed(0)
    decoder = ProxyDecoder(split.feature_shape, SHAPE, split.prefix_tokens, width=8)
    z = split.client(images).detach().requires_grad_()
    weights = list(decoder.parameters())
    # Until it is better than the mean image, features have nothing to resist.
    learner = torch.optim.Adam(weights, lr=1e-2)
    course = []
    for _ in range(60):
        loss = adversarial_loss(decoder, z, images, 1.0)
        course.append(loss.item())
        learner.zero_grad()
        loss.backward()
        learner.step()
    assert course[-1] < min(0.7, 0.5 * course[0])
    value = adversarial_loss(decoder, z, images, 1.0)
    step, *slopes = torch.autograd.grad(value, [z, *weights])
    # One small step down the gradient: of the features, of the decoder.
    away = z.detach() - 0.02 * step / step.abs().mean()
    assert adversarial_loss(decoder, away, images, 1.0) > value + 1e-3
    with torch.no_grad():
        size = sum(slope.square().sum() for slope in slopes)
        for weight, slope in zip(weights, slopes, strict=True):
            weight -= 1e-2 * value / size * slope
    assert adversarial_loss(decoder, z, images, 1.0) < value


def test_the_client_weighs_only_its_own_side(pictures):
    images = pictures(8).images()
    decoder = ProxyDecoder((4, 8, 8), SHAPE, width=8)
    z = torch.rand(8, 4, 8, 8, requires_grad=True)
    weight = decoder.network[-1].weight
    found = [
        torch.autograd.grad(adversarial_loss(decoder, z, images, a), [z, weight])
        for a in (1.0, 3.0, 0.0)
    ]
    assert found[0][0].abs().sum() > 0
    torch.testing.assert_close(found[1][0], 3 * found[0][0])
    assert found[2][0].abs().sum() == 0
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][1], found[2][1])


@pytest.mark.parametrize(
    ("shape", "size", "prefix"),
    [
        ((8, 16, 16), 32, 0),
        ((6, 64, 64), 64, 0),
        ((5, 56, 56), 224, 0),
        ((64, 8), 64, 0),
        ((197, 8), 224, 1),
        ((6, 10, 10), 64, 0),  # a grid that does not divide the image
    ],
)
def test_it_builds_images_of_every_size(shape, size, prefix):
    decoder = ProxyDecoder(shape, (3, size, size), prefix, width=4)
    rebuilt = decoder(torch.randn(2, *shape))
    assert rebuilt.shape == (2, 3, size, size)
    assert rebuilt.min() > 0
    assert rebuilt.max() < 1


def test_shrinking_the_features_is_no_defense():
    decoder = ProxyDecoder((4, 8, 8), SHAPE, width=8)
    z = torch.rand(8, 4, 8, 8)
    torch.testing.assert_close(decoder(z), decoder(0.1 * z + 3), rtol=1e-2, atol=1e-3)


def test_class_tokens_are_read():
    decoder = ProxyDecoder((17, 8), SHAPE, 1, width=8).eval()
    z = torch.rand(2, 17, 8)
    other = z.clone()
    other[:, 0] += 1
    changed = (decoder(z) - decoder(other)).abs()
    # At every place.
    assert (F.adaptive_max_pool2d(changed, 4) > 0).all()
