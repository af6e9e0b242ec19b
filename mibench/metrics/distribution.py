"""Distances between the reconstructions as a set and the originals as a set: FID and KID.

A set has no score per image, so these stand apart from the metrics of the tables.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from math import inf
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from mibench.errors import UnavailableError
from mibench.metrics.base import check_pair, prepare
from mibench.metrics.intervals import Estimate
from mibench.metrics.weights import obtain

Extractor = Callable[[Tensor], Tensor]
"""Gives features (N, D) of images (N, 3, H, W) in [0, 1]."""

_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
_SHA256 = "6726825d"
_CHUNK = 32
_SUBSETS = 100
_LARGEST_SUBSET = 1000


class SetMetric(ABC):
    """One number for a whole set of reconstructions.

    Attributes:
        name: of the metric.
        version: of its definition; raised whenever values change.
        unit: empty for a pure number.
        more_leakage: the direction in which more of the private images has leaked.
        bounds: smallest and largest value the definition allows.
        fewest: images below which the number would say nothing.
        why_fewest: what fails below that.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    unit: ClassVar[str] = ""
    more_leakage: ClassVar[Literal["higher", "lower"]] = "lower"
    bounds: ClassVar[tuple[float, float]]
    fewest: ClassVar[int]
    why_fewest: ClassVar[str]

    @final
    @torch.no_grad()
    def __call__(
        self,
        reconstructions: Tensor,
        originals: Tensor,
        seed: int,
        extractor: Extractor | None = None,
    ) -> Estimate:
        """Compares the set of reconstructions with the set of originals.

        Args:
            reconstructions: what the attacker produced, (N, 3, H, W) in [0, 1], any float dtype.
            originals: the private images, same shape and range.
            seed: of the subsets, where the metric draws any.
            extractor: gives the features; None: the official Inception network, on whose features
                alone a result may be called by the metric's name.

        Returns:
            The distance, or why there is none.

        Raises:
            ValueError: As every metric, see `mibench.metrics.base.check_pair`.
            UnavailableError: The official network cannot be had here.
        """
        check_pair(self.name, reconstructions, originals)
        if len(originals) < self.fewest:
            reason = (
                f"{self.name} needs at least {self.fewest:,} images, {self.why_fewest}, and there "
                f"are {len(originals):,}"
            )
            return Estimate(None, None, None, 0, reason)
        seen = extractor or inception
        ours, theirs = (
            torch.cat(
                [
                    seen(prepare(part, originals.device)).cpu().double()
                    for part in torch.split(images, _CHUNK)
                ]
            )
            for images in (reconstructions, originals)
        )
        return self.between(ours, theirs, seed)

    @abstractmethod
    def between(self, ours: Tensor, theirs: Tensor, seed: int) -> Estimate:
        """Compares features (N, D) of reconstructions with those of their originals, float64."""


class FrechetDistance(SetMetric):
    """Fréchet Inception distance between two sets of images.

    Source: Heusel, Ramsauer, Unterthiner, Nessler and Hochreiter, "GANs Trained by a Two Time-Scale
    Update Rule Converge to a Local Nash Equilibrium", NeurIPS 2017, arXiv 1706.08500; features of
    the package ``pytorch-fid``.

    Formula: ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` with means and covariances of the 2,048
    features of Inception-v3's last pooling layer. Range from 0; a lower value means that the set of
    reconstructions looks more like the private one. Biased upwards by few images: values compare at
    the same number alone. Below 2,048 images the covariance is singular, and there is none.
    """

    name = "fid"
    version = 1
    bounds: ClassVar[tuple[float, float]] = (0.0, inf)
    fewest: ClassVar[int] = 2048
    why_fewest: ClassVar[str] = "or the covariance of its 2,048 features is singular"

    def between(self, ours: Tensor, theirs: Tensor, seed: int) -> Estimate:  # noqa: ARG002
        """The distance; without an interval, since resampled sets would add to its bias."""
        mean = (ours.mean(0) - theirs.mean(0)).square().sum()
        ours_cov, theirs_cov = torch.cov(ours.T), torch.cov(theirs.T)
        # (S1 S2)^(1/2) has the trace of (R S2 R)^(1/2) with R = S1^(1/2), which is symmetric.
        values, vectors = torch.linalg.eigh(ours_cov)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        shared = torch.linalg.eigvalsh(root @ theirs_cov @ root).clamp(min=0).sqrt().sum()
        distance = mean + ours_cov.trace() + theirs_cov.trace() - 2 * shared
        reason = "no interval: resampled sets would add to the bias of this distance"
        return Estimate(max(float(distance), 0.0), None, None, len(ours), reason)


class KernelDistance(SetMetric):
    """Kernel Inception distance: squared maximum mean discrepancy of Inception features.

    Source: Bińkowski, Sutherland, Arbel and Gretton, "Demystifying MMD GANs", ICLR 2018, arXiv
    1801.01401.

    Formula: the unbiased estimate ``mean over i != j of k(x_i, x_j) + k(y_i, y_j) - 2 k(x_i, y_j)``
    with ``k(x, y) = (x.y / D + 1)^3``. Each reconstruction has its original in the other set, so
    pairs i = j are left out of all three terms (the U-statistic of Gretton et al., "A Kernel
    Two-Sample Test", JMLR 2012, equation 4): a perfect copy gets 0. The value is the mean over 100
    random subsets of half the images, at most 1,000. Unbounded below, since it is unbiased; around
    0 the sets cannot be told apart, a lower value means more leakage.

    The interval is 1.96 standard deviations to both sides. The deviation of a whole set's estimate
    is that over subsets times ``sqrt((m / n) / (1 - m / n))`` for m of n images (the delete-d
    jackknife of Shao and Wu, 1989), which is 1 for halves.
    """

    name = "kid"
    version = 1
    bounds: ClassVar[tuple[float, float]] = (-inf, inf)
    fewest: ClassVar[int] = 50
    why_fewest: ClassVar[str] = "or its interval tells nothing"

    def between(self, ours: Tensor, theirs: Tensor, seed: int) -> Estimate:
        """The mean over subsets, with an interval."""
        count = len(ours)
        size = min(count // 2, _LARGEST_SUBSET)
        draws = torch.Generator().manual_seed(seed)
        found = []
        for _ in range(_SUBSETS):
            chosen = torch.randperm(count, generator=draws)[:size]
            found.append(paired_mmd(ours[chosen], theirs[chosen]))
        subsets = torch.stack(found)
        share = size / count
        reach = 1.96 * float(subsets.std()) * (share / (1 - share)) ** 0.5
        value = float(subsets.mean())
        return Estimate(value, value - reach, value + reach, count)


SET_METRICS: tuple[SetMetric, ...] = (FrechetDistance(), KernelDistance())
"""All of them, in the order of the record."""


def paired_mmd(ours: Tensor, theirs: Tensor) -> Tensor:
    """Unbiased squared discrepancy of two sets of features (n, D), pairs left out; a scalar."""
    count, width = ours.shape
    total = torch.zeros((), dtype=ours.dtype)
    for left, right, weight in ((ours, ours, 1), (theirs, theirs, 1), (ours, theirs, -2)):
        kernel = (left @ right.T / width + 1) ** 3
        total += weight * (kernel.sum() - kernel.trace())
    return total / (count * (count - 1))


def inception(images: Tensor) -> Tensor:
    """Features (N, 2048) of the official Inception-v3 of images (N, 3, H, W) in [0, 1].

    Raises:
        UnavailableError: The package or its weights cannot be had here.
    """
    network = _network().to(images.device)
    (features,) = network(images)
    found: Tensor = features.flatten(1)
    return found


@cache
def _network() -> nn.Module:
    """The official network, built once per process, on the CPU."""
    try:
        from pytorch_fid.inception import InceptionV3
    except ImportError as error:
        raise UnavailableError(
            "fid and kid need the package pytorch-fid; install it with `pip install pytorch-fid`"
        ) from error
    obtain("fid or kid", "Inception", _URL, _SHA256)
    # Building the layers draws random weights before the real ones replace them.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network: nn.Module = InceptionV3(
            output_blocks=(3,), resize_input=True, normalize_input=True, use_fid_inception=True
        )
    return network.eval().requires_grad_(False)
