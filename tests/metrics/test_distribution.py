"""FID and KID against formulas written another way, with features that are not Inception's.

The official weights are not part of the tests, and no number here is called FID or KID anywhere.
"""

import hashlib
import socket
import sys
import types

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from mibench import scoring
from mibench.errors import UnavailableError
from mibench.metrics import distribution
from mibench.metrics.distribution import SET_METRICS, FrechetDistance, KernelDistance, paired_mmd

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"


@pytest.fixture(autouse=True)
def _fresh():
    distribution._network.cache_clear()
    yield
    distribution._network.cache_clear()


def features(count, width=6, seed=0, shift=0.0, stretch=1.0):
    draws = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=draws, dtype=torch.float64)
    return (
        stretch * torch.randn(count, width, generator=draws, dtype=torch.float64) @ mixing + shift
    )


def pictures(count, side=8, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def means(images):
    """Stands in for a network: mean and spread of each channel."""
    flat = images.flatten(2)
    return torch.cat([flat.mean(2), flat.std(2)], 1)


def frechet(one, other):
    a, b = one.numpy(), other.numpy()
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(s @ t)
    assert np.abs(np.imag(root)).max() < 1e-6
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * np.real(root))


@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("stretch", [1.0, 1.7])
def test_the_frechet_distance_is_that_of_a_matrix_root(shift, stretch):
    one, other = features(80), features(80, seed=1, shift=shift, stretch=stretch)
    found = FrechetDistance().between(one, other, 0)
    assert found.value == pytest.approx(frechet(one, other), rel=1e-8)
    assert found.low is None
    assert "bias" in found.reason


def test_the_frechet_distance_along_axes_is_known():
    # |m1 - m2|^2 + (s1 - s2)^2 for each axis, here with exact moments.
    axis = torch.linspace(-1, 1, 101, dtype=torch.float64)
    both = torch.stack([axis, axis.square()], 1)
    both = (both - both.mean(0)) / both.std(0)
    assert torch.cov(both.T)[0, 1].abs() < 1e-12
    found = FrechetDistance().between(both, both * torch.tensor([3, 1]) + 2, 0)
    assert found.value == pytest.approx((3 - 1) ** 2 + 2 * 2**2)


def kernel(x, y):
    return (float(x @ y) / len(x) + 1) ** 3


def double_loop(ours, theirs):
    count, total = len(ours), 0.0
    for i in range(count):
        for j in range(count):
            if i != j:
                total += kernel(ours[i], ours[j]) + kernel(theirs[i], theirs[j])
                total -= 2 * kernel(ours[i], theirs[j])
    return total / (count * (count - 1))


def test_the_kernel_discrepancy_is_that_of_a_double_loop():
    ours, theirs = features(15, 4), features(15, 4, seed=1, shift=0.3)
    assert paired_mmd(ours, theirs).item() == pytest.approx(double_loop(ours, theirs), rel=1e-10)


def test_the_kernel_discrepancy_is_unbiased():
    """Its mean over many pairs of samples of one law is 0 within its error."""
    draws = torch.Generator().manual_seed(0)
    found = []
    for _ in range(400):
        both = torch.randn(2, 20, 3, generator=draws, dtype=torch.float64)
        found.append(paired_mmd(both[0], both[1]))
    values = torch.stack(found)
    assert abs(values.mean()) < 4 * values.std() / len(values) ** 0.5
    biased = 2 * (2.0**3) / 20  # what the pairs i = i alone would add, at least
    assert values.mean() < biased / 4


def test_kid_is_the_mean_over_subsets_with_an_interval_around_it():
    ours, theirs = features(80), features(80, seed=1, shift=0.5)
    found = KernelDistance().between(ours, theirs, 0)
    assert found.low < found.value < found.high
    assert found.low < paired_mmd(ours, theirs).item() < found.high
    assert found == KernelDistance().between(ours, theirs, 0)
    assert found.value != KernelDistance().between(ours, theirs, 1).value
    copy = KernelDistance().between(theirs, theirs, 0)
    assert copy.value == pytest.approx(0, abs=1e-9)


def test_the_interval_of_kid_covers_as_often_as_it_says():
    """Of sets of the same law, whose distance is 0."""
    draws = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(100):
        both = torch.randn(2, 60, 3, generator=draws, dtype=torch.float64)
        found = KernelDistance().between(both[0], both[1], 0)
        hits += found.low <= 0 <= found.high
    assert hits >= 85


@pytest.mark.parametrize("metric", SET_METRICS, ids=lambda m: m.name)
def test_growing_noise_is_further_and_a_copy_is_nearest(metric, monkeypatch):
    monkeypatch.setattr(type(metric), "fewest", 50)
    originals, noise = pictures(64), pictures(64, seed=1)
    rising = [
        metric((1 - share) * originals + share * noise**2, originals, 0, means).value
        for share in (0.0, 0.25, 0.5, 1.0)
    ]
    assert rising == sorted(rising)
    assert rising[0] == pytest.approx(0, abs=1e-9)
    assert rising[3] > 1.5 * rising[1] > 0


@pytest.mark.parametrize("metric", SET_METRICS, ids=lambda m: m.name)
def test_the_set_matters_and_not_its_chunks_or_its_order(metric, monkeypatch):
    monkeypatch.setattr(type(metric), "fewest", 50)
    originals, images = pictures(64), pictures(64, seed=1) ** 2
    whole = metric(images, originals, 0, means)
    monkeypatch.setattr(distribution, "_CHUNK", 5)
    assert metric(images, originals, 0, means).value == pytest.approx(whole.value, rel=1e-6)
    turned = metric(images.flip(0), originals.flip(0), 0, means)
    assert turned.value == pytest.approx(whole.value, rel=0.2 if metric.name == "kid" else 1e-6)


@pytest.mark.parametrize("metric", SET_METRICS, ids=lambda m: m.name)
def test_refuses_images_in_255_and_shapes_that_differ(metric):
    originals = pictures(64)
    with pytest.raises(ValueError, match=rf"{metric.name}.*lie in \[0, 1\]"):
        metric(originals * 255, originals, 0, means)
    with pytest.raises(ValueError, match=f"{metric.name}.*shape"):
        metric(originals[:50], originals, 0, means)


@pytest.mark.parametrize(("name", "fewest"), [("fid", 2048), ("kid", 50)])
def test_too_few_images_give_no_number_but_a_reason(name, fewest):
    (metric,) = [one for one in SET_METRICS if one.name == name]
    tiny = torch.full((fewest - 1, 3, 2, 2), 0.5)
    found = metric(tiny, tiny, 0, means)
    assert found.value is None
    assert f"{name} needs at least {fewest:,} images" in found.reason


# --- the official network ------------------------------------------------------------------------


def refuse(*args, **kwargs):
    raise socket.gaierror(-2, "Name or service not known")


def package(monkeypatch, cls):
    module = types.ModuleType("pytorch_fid.inception")
    module.InceptionV3 = cls
    monkeypatch.setitem(sys.modules, "pytorch_fid", types.ModuleType("pytorch_fid"))
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", module)


def test_without_the_package_the_reason_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_fid", None)
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", None)
    with pytest.raises(UnavailableError, match="pip install pytorch-fid") as caught:
        KernelDistance()(pictures(50), pictures(50), 0)
    assert "\n" not in str(caught.value)


def test_without_the_weights_the_network_is_not_even_built(monkeypatch, tmp_path):
    package(monkeypatch, lambda **_: pytest.fail("built without its weights"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(UnavailableError, match=FILE_NAME) as caught:
        KernelDistance()(pictures(50), pictures(50), 0)
    assert str(tmp_path / "checkpoints") in str(caught.value)


def test_another_file_under_the_official_name_is_refused(monkeypatch, tmp_path):
    package(monkeypatch, lambda **_: pytest.fail("built from another file"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / FILE_NAME).write_bytes(b"half a download")
    with pytest.raises(UnavailableError, match="SHA-256"):
        KernelDistance()(pictures(50), pictures(50), 0)


def test_the_network_is_fed_images_from_0_to_1_and_its_pooled_features_are_used(
    monkeypatch, tmp_path
):
    seen = []

    class Fake(nn.Module):
        def __init__(self, **options):
            super().__init__()
            assert options["normalize_input"]
            assert options["use_fid_inception"]
            assert options["output_blocks"] == (3,)

        def forward(self, images):
            seen.append((float(images.min()), float(images.max())))
            return [means(images)[:, :, None, None]]

    package(monkeypatch, Fake)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / FILE_NAME
    torch.save({}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(distribution, "_SHA256", digest[:8])
    ours, theirs = pictures(50) ** 2, pictures(50, seed=1)
    found = KernelDistance()(ours, theirs, 0)
    assert found == KernelDistance()(ours, theirs, 0, means)
    assert all(low >= 0 and high <= 1 for low, high in seen)


def test_scores_of_sets_have_values_or_reasons_and_say_what_was_scored(monkeypatch):
    monkeypatch.setattr(scoring, "_MISSING", {})
    monkeypatch.setitem(sys.modules, "pytorch_fid", None)
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", None)
    originals = pictures(50)
    sets = {"attack": originals**2, "undefended": originals}
    found = scoring.score_sets(sets, originals, 0, "cpu")
    named = [(score.source, score.metric) for score in found]
    assert named == [(s, m) for s in ("attack", "undefended") for m in ("fid", "kid")]
    assert all(score.value is None for score in found)
    assert "2,048 images" in found[0].reason
    assert "pytorch-fid" in found[1].reason
    monkeypatch.setattr(scoring, "_MISSING", {})
    monkeypatch.setattr(distribution, "inception", means)
    found = {(s.source, s.metric): s for s in scoring.score_sets(sets, originals, 0, "cpu")}
    assert found["attack", "kid"].value > found["undefended", "kid"].value
    assert not found["attack", "kid"].higher_is_better
