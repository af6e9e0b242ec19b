"""The battery that every registered metric goes through, and each of them against a reference.

A new metric joins by being registered, and fails here until it has a reference of its own.
"""

import math
import socket
from functools import cache
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from torch.nn.functional import avg_pool2d, interpolate

from mibench.data.sets import ImageSet
from mibench.errors import UnavailableError
from mibench.exhibit import Exhibit, Witness
from mibench.registry import metrics
from mibench.task import Classification

SHOWN, BESIDE = 12, 30
"""Originals, and further images of the gallery."""
CLASSES = tuple("abcdefgh")
LOOSE = {"lpips": 1e-5}
"""Metrics whose network works in float32, with the deviation that this allows."""
every_metric = pytest.mark.parametrize("name", metrics.names())


def smooth_bytes(count, side=32, seed=0):
    """Random images with most of their energy at low frequencies, as photographs have."""
    draws = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=draws)
    fine = torch.rand(count, 3, side, side, generator=draws)
    smooth = interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    return ((0.9 * smooth + 0.1 * fine).clamp(0, 1) * 255).round().to(torch.uint8)


class Eye:
    """A judge without a network: it sees coarse colours, and knows every class by one image."""

    def __init__(self, prototypes):
        self.prototypes = self.embed(prototypes)

    def embed(self, images):
        return avg_pool2d(images.double() - 0.5, 8).flatten(1)

    def logits(self, images):
        return -torch.cdist(self.embed(images), self.prototypes)


PIXELS = smooth_bytes(SHOWN + BESIDE)
IMAGES = PIXELS.float() / 255
EYE = Eye(IMAGES[: len(CLASSES)])
LABELS = EYE.logits(IMAGES).argmax(1)
ORIGINALS = IMAGES[:SHOWN]
EXHIBIT = Exhibit(ORIGINALS, Witness(EYE, Classification(CLASSES), ImageSet(PIXELS, LABELS)))


def noisy(sigma, seed=1):
    noise = torch.randn(ORIGINALS.shape, generator=torch.Generator().manual_seed(seed))
    return (ORIGINALS + sigma * noise).clamp(0, 1)


def uneven():
    """Noisy images, every other of which is of another original: their values differ."""
    images = noisy(0.3)
    images[::2] = images.roll(1, 0)[::2]
    return images


@cache
def bound(name):
    """The metric as it is called, or the reason why it cannot be had here."""
    metric = metrics.load(name)().bound(EXHIBIT)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", refuse)
            metric(ORIGINALS[:1], ORIGINALS[:1])
    except UnavailableError as error:
        return str(error)
    return metric


def refuse(*args, **kwargs):
    raise socket.gaierror(-2, "no test waits for a network")


@pytest.fixture
def metric(name):
    found = bound(name)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def close(one, other, name):
    torch.testing.assert_close(one, other, rtol=0, atol=LOOSE.get(name, 1e-9))


# --- the battery ---------------------------------------------------------------------------------


@every_metric
def test_identity_gives_the_best_value(metric, name):
    low, high = metric.bounds
    best = high if metric.more_leakage == "higher" else low
    close(metric(ORIGINALS, ORIGINALS), torch.full((SHOWN,), best, dtype=torch.float64), name)


@every_metric
def test_returns_float64_on_the_cpu_within_the_bounds(metric, name):
    for images in (noisy(0.1), 1 - ORIGINALS, torch.zeros_like(ORIGINALS)):
        values = metric(images, ORIGINALS)
        assert values.shape == (SHOWN,)
        assert values.dtype == torch.float64
        assert values.device.type == "cpu"
        assert not values.requires_grad
        assert metric.bounds[0] <= values.min()
        assert values.max() <= metric.bounds[1]


@every_metric
def test_leaks_less_as_noise_grows(metric, name):
    sign = 1 if metric.more_leakage == "higher" else -1
    means = [sign * metric(noisy(s), ORIGINALS).mean() for s in (0.0, 0.1, 0.5, 2.0, 8.0)]
    assert all(after <= before for before, after in pairwise(means))
    assert means[0] > means[-1]


@every_metric
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_a_batch_is_its_single_images_whatever_the_chunk(metric, name, chunk, monkeypatch):
    images = uneven()
    whole = metric(images, ORIGINALS)
    assert len(whole.unique()) > 1, "equal values would prove nothing"
    monkeypatch.setattr(type(metric), "chunk", chunk)
    singles = [metric(a[None], b[None]) for a, b in zip(images, ORIGINALS, strict=True)]
    close(torch.cat(singles), whole, name)
    close(metric(images, ORIGINALS), whole, name)


@every_metric
def test_permuting_the_images_permutes_the_values(metric, name):
    images, order = uneven(), torch.randperm(SHOWN, generator=torch.Generator().manual_seed(3))
    whole = metric(images, ORIGINALS)
    close(metric(images[order], ORIGINALS[order]), whole[order], name)


@every_metric
def test_other_images_of_the_batch_do_not_alter_a_value(metric, name):
    # SSIM code that takes the batch for an image axis reads 0.90 where the truth is 0.68.
    images = uneven()
    before = metric(images, ORIGINALS)[2]
    altered = torch.full_like(images, 0.5)
    altered[2] = images[2]
    close(metric(altered, ORIGINALS)[2], before, name)


@every_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_accepts_every_float_dtype(metric, name, dtype):
    images = noisy(0.1).to(dtype)
    close(metric(images, ORIGINALS), metric(images.float(), ORIGINALS), name)


def spoiled(value):
    images = ORIGINALS[:2].clone()
    images[1, 2, 3, 4] = value
    return images


@every_metric
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (ORIGINALS[:2] * 255, r"lie in \[0, 1\]"),
        (spoiled(math.nan), "finite"),
        (spoiled(math.inf), "finite"),
        (spoiled(-0.01), r"lie in \[0, 1\]"),
        (PIXELS[:2], "float dtype"),
        (ORIGINALS[:2, :1], r"\(N, 3, H, W\)"),
        (ORIGINALS[0], r"\(N, 3, H, W\)"),
        (ORIGINALS[:0], "N > 0"),
    ],
    ids=["0..255", "nan", "inf", "negative", "uint8", "grey", "3-D", "empty"],
)
def test_refuses_bad_images_on_either_side(name, bad, message):
    # Before anything else is looked at: a metric without its weights refuses them too.
    metric = metrics.load(name)().bound(EXHIBIT)
    good = torch.full(bad.shape, 0.5)
    for pair in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match=message) as caught:
            metric(*pair)
        assert caught.value.args[0].startswith(name)
        assert "\n" not in caught.value.args[0]


@every_metric
def test_refuses_shapes_that_differ(name):
    metric = metrics.load(name)().bound(EXHIBIT)
    for count in (1, 2):  # one image would broadcast silently
        with pytest.raises(ValueError, match="shape"):
            metric(ORIGINALS[:count], ORIGINALS[:3])


# --- references ----------------------------------------------------------------------------------


def as_array(image):
    return image.double().permute(1, 2, 0).numpy()


def ssim(image, original):
    _, full = structural_similarity(
        as_array(original), as_array(image), channel_axis=2, data_range=1, gaussian_weights=True,
        sigma=1.5, use_sample_covariance=False, full=True,
    )  # fmt: skip
    return full[5:-5, 5:-5].mean()  # the 5 px border rests on mirrored pixels


def lpips(image, original):
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False)
    pair = [interpolate(one[None], size=64, mode="bilinear") for one in (image, original)]
    return network(*pair, normalize=True).item()


def place_of(original):
    (place,) = [at for at, image in enumerate(IMAGES) if torch.equal(image, original)]
    return place


def recognition(image, original):
    far = [np.linalg.norm(features(image) - features(one)) for one in IMAGES[: len(CLASSES)]]
    return float(np.argmin(far) == LABELS[place_of(original)].item())


def features(image):
    blocks = as_array(image).transpose(2, 0, 1).reshape(3, 4, 8, 4, 8) - 0.5
    return blocks.mean((2, 4)).ravel()


def rank(image, original):
    def cosine(one, other):
        return one @ other / np.linalg.norm(one) / np.linalg.norm(other)

    likeness = [cosine(features(image), features(one)) for one in IMAGES]
    return 1 + sum(value > likeness[place_of(original)] + 1e-6 for value in likeness)


REFERENCES = {
    "mse": lambda a, b: mean_squared_error(as_array(b), as_array(a)),
    "psnr": lambda a, b: peak_signal_noise_ratio(as_array(b), as_array(a), data_range=1),
    "ssim": ssim,
    "lpips": lpips,
    "recognition": recognition,
    "reid-top1": lambda a, b: float(rank(a, b) == 1),
    "reid-top5": lambda a, b: float(rank(a, b) <= 5),
    "reid-mrr": lambda a, b: 1 / rank(a, b),
}


@every_metric
@pytest.mark.parametrize("images", [noisy(0.05), noisy(1.0), uneven()], ids=["near", "far", "both"])
def test_agrees_with_its_reference_image_by_image(metric, name, images):
    expected = [REFERENCES[name](a, b) for a, b in zip(images, ORIGINALS, strict=True)]
    # A float32 image mean against a float64 one.
    assert metric(images, ORIGINALS).tolist() == pytest.approx(expected, abs=1e-6)


# --- what a judge adds ---------------------------------------------------------------------------


class Blind(Eye):
    """Sees nothing: all images are alike."""

    def embed(self, images):
        return torch.ones(len(images), 2, dtype=torch.float64)


class Rough(Eye):
    """Sees three kinds of images and nothing else."""

    def embed(self, images):
        kind = (images.mean((1, 2, 3)) * 1000).long() % 3
        return torch.eye(3, dtype=torch.float64)[kind]


def judged(name, eye):
    known = Witness(eye, Classification(CLASSES), ImageSet(PIXELS, LABELS))
    return metrics.load(name)().bound(Exhibit(ORIGINALS, known))


@pytest.mark.parametrize(
    ("name", "worth"),
    [
        ("reid-top1", lambda rank: rank <= 1),
        ("reid-top5", lambda rank: rank <= 5),
        ("reid-mrr", lambda rank: 1 / rank),
    ],
)
@pytest.mark.parametrize("eye", [Blind, Rough])
def test_ties_are_worth_the_mean_over_all_their_orders(name, worth, eye):
    judge = eye(IMAGES[:8])
    values = judged(name, judge)(ORIGINALS, ORIGINALS)
    kinds = judge.embed(IMAGES)
    for at, value in enumerate(values.tolist()):
        alike = int((kinds == kinds[at]).all(1).sum())
        # All orders of a small tie, and of a large one all places, which are equally likely.
        orders = list(permutations(range(alike))) if alike < 8 else [(p,) for p in range(alike)]
        expected = np.mean([worth(order[0] + 1) for order in orders])
        assert value == pytest.approx(expected)


@pytest.mark.parametrize("name", ["reid-top1", "reid-top5", "reid-mrr"])
def test_a_constant_guess_gains_nothing(name):
    """Over the whole gallery, each place is taken once."""
    everything = Exhibit(IMAGES, Witness(EYE, Classification(CLASSES), ImageSet(PIXELS, LABELS)))
    metric = metrics.load(name)().bound(everything)
    constant = IMAGES.mean(0).expand_as(IMAGES)
    count = len(IMAGES)
    chance = {
        "reid-top1": 1 / count,
        "reid-top5": 5 / count,
        "reid-mrr": sum(1 / place for place in range(1, count + 1)) / count,
    }
    assert metric(constant, IMAGES).mean().item() == pytest.approx(chance[name])


@pytest.mark.parametrize("name", ["recognition", "reid-top1", "reid-top5", "reid-mrr"])
def test_without_a_judge_the_reason_is_said(name):
    with pytest.raises(UnavailableError, match="nobody to ask"):
        metrics.load(name)().bound(Exhibit(ORIGINALS, None, "nobody to ask"))
    with pytest.raises(UnavailableError, match=f"{name} needs a judge"):
        metrics.load(name)()(ORIGINALS, ORIGINALS)


def test_a_small_gallery_leaves_recognition_alone():
    small = Witness(EYE, Classification(CLASSES), ImageSet(PIXELS, LABELS), "too few images")
    exhibit = Exhibit(ORIGINALS, small)
    assert small.gallery == 0
    values = metrics.load("recognition")().bound(exhibit)(ORIGINALS, ORIGINALS)
    assert values.tolist() == [1.0] * SHOWN
    with pytest.raises(UnavailableError, match="too few images"):
        metrics.load("reid-mrr")().bound(exhibit)


def test_copies_in_a_gallery_count_once():
    twice = ImageSet(torch.cat([PIXELS, PIXELS[:5]]), torch.cat([LABELS, LABELS[:5]]))
    known = Witness(EYE, Classification(CLASSES), twice)
    assert known.gallery == len(PIXELS)
    values = metrics.load("reid-top1")().bound(Exhibit(ORIGINALS, known))(ORIGINALS, ORIGINALS)
    assert values.tolist() == [1.0] * SHOWN


def test_an_original_that_the_judge_was_not_shown_is_refused():
    with pytest.raises(ValueError, match="1 of 1 originals are not known"):
        judged("recognition", EYE)(ORIGINALS[:1], 1 - ORIGINALS[:1])
