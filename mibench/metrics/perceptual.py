"""Perceptual distance: LPIPS with its official weights or not at all."""

import warnings
from functools import cache
from importlib import resources
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mibench.errors import UnavailableError
from mibench.metrics.base import Metric
from mibench.metrics.weights import obtain
from mibench.registry import metrics

_BACKBONE_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
_BACKBONE_SHA256 = "7be5be79"
_SMALLEST_SIDE = 64


@metrics.register("lpips", version=1)
class LearnedPerceptualDistance(Metric):
    """LPIPS v0.1 distance on AlexNet features.

    Source: Zhang, Isola, Efros, Shechtman and Wang, "The Unreasonable Effectiveness of Deep
    Features as a Perceptual Metric", CVPR 2018, arXiv 1801.03924; the authors' package ``lpips``.

    Formula: the features of five AlexNet layers are normalised to unit length per position, the
    squared differences are weighted per channel by the package's trained heads, averaged over
    positions and summed over layers. Images are mapped from [0, 1] to [-1, 1] first. Images whose
    shorter side is under 64 px are bilinearly upsampled, shape kept, until it is 64: at 32 px the
    last feature maps would be a single position.

    Values start at 0 (a perfect copy) and rarely exceed 1, though no bound is defined; a lower
    value means more leakage. Input (N, 3, H, W), output (N,).

    The AlexNet weights are downloaded at the first call. Where they cannot be had the metric is
    unavailable: a random backbone gives other numbers, which must not carry this name.
    """

    unit: ClassVar[str] = ""
    more_leakage: ClassVar[Literal["higher", "lower"]] = "lower"
    bounds: ClassVar[tuple[float, float]] = (0.0, inf)
    chunk: ClassVar[int] = 32

    def per_image(self, reconstructions: Tensor, originals: Tensor) -> Tensor:
        """LPIPS of each image, (n,).

        Raises:
            UnavailableError: If the AlexNet weights are neither cached nor downloadable.
        """
        network = _network().to(originals.device)
        distances: Tensor = network(_network_input(reconstructions), _network_input(originals))
        return distances.flatten()


def _network_input(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    scale = _SMALLEST_SIDE / min(height, width)
    if scale > 1:
        size = (round(height * scale), round(width * scale))
        images = interpolate(images, size=size, mode="bilinear", align_corners=False)
    return images * 2 - 1


@cache
def _network() -> nn.Module:
    """The official network, built once per process, on the CPU."""
    import lpips  # imported here: it pulls in torchvision

    _obtain_backbone()
    # Building the layers draws random weights before the real ones replace them: the caller's
    # random stream must not depend on whether LPIPS was loaded.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package uses arguments torchvision deprecated
        network: nn.Module = lpips.LPIPS(net="alex", pretrained=False, verbose=False)
    # `pretrained` concerns the heads alone; they are loaded here so as to refuse pickled code and
    # a file that leaves any head at random.
    with resources.as_file(resources.files("lpips") / "weights" / "v0.1" / "alex.pth") as path:
        heads = torch.load(path, map_location="cpu", weights_only=True)
    expected = {key for key in network.state_dict() if key.startswith("lin") and key[3].isdigit()}
    if set(heads) != expected:
        raise UnavailableError(
            "lpips: the installed package's trained heads are incomplete; reinstall lpips>=0.1.4"
        )
    network.load_state_dict(heads, strict=False)
    return network.eval().requires_grad_(False)


def _obtain_backbone() -> None:
    """Puts torchvision's AlexNet weights where the lpips package looks for them.

    Raises:
        UnavailableError: If the file can be neither read nor downloaded, or is another file.
    """
    obtain("lpips", "AlexNet", _BACKBONE_URL, _BACKBONE_SHA256)
