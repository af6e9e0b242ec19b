"""The contract of every metric that compares reconstructions with originals."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, final

import torch
from torch import Tensor

from mibench.errors import PluginError

if TYPE_CHECKING:
    from mibench.exhibit import Exhibit

_RANGE_TOLERANCE = 1e-4


class Metric(ABC):
    """One number per image that tells how much of the original the reconstruction shows.

    A subclass states the class attributes and implements ``per_image``; callers call the instance.
    Scores are kept per image: a score computed over a whole batch at once is another quantity (the
    PSNR of a batch's mean error is not the mean of the images' PSNR).

    Attributes:
        name: Registered name, set by ``metrics.register``.
        version: Definition version, set by ``metrics.register``; raised whenever values change.
        unit: Unit for tables, such as ``"dB"``; empty for a pure number.
        more_leakage: The direction in which more of the private image has leaked.
        bounds: Smallest and largest value the definition allows.
        chunk: Images per call of ``per_image``, which bounds memory and never changes the values.
    """

    required: ClassVar[tuple[str, ...]] = ("per_image",)
    name: ClassVar[str]
    version: ClassVar[int]
    unit: ClassVar[str] = ""
    more_leakage: ClassVar[Literal["higher", "lower"]]
    bounds: ClassVar[tuple[float, float]]
    chunk: ClassVar[int] = 64

    @property
    def higher_is_better(self) -> bool:
        """True when a higher value means a reconstruction nearer to the original."""
        return self.more_leakage == "higher"

    def bound(self, exhibit: "Exhibit") -> "Metric":  # noqa: ARG002 - for those that need it
        """Returns the metric that is called: this one, if a pair of images is all that it needs.

        Args:
            exhibit: the originals with whatever else is known of them.

        Raises:
            UnavailableError: If the exhibit lacks what the metric needs.
        """
        return self

    @final
    @torch.no_grad()
    def __call__(self, reconstructions: Tensor, originals: Tensor) -> Tensor:
        """Score every reconstruction against the original at the same index.

        Args:
            reconstructions: What the attacker produced, (N, 3, H, W) in [0, 1], any float dtype.
            originals: The private images, same shape and range; scoring runs on their device.

        Returns:
            Scores, (N,) float64 on the CPU.

        Raises:
            ValueError: If the two differ in shape, or either is empty, not (N, 3, H, W), not of a
                float dtype, not finite, or outside [0, 1] by more than 1e-4.
            PluginError: If ``per_image`` does not return one finite number per image.
        """
        check_pair(self.name, reconstructions, originals)
        scores = [
            self._checked_scores(
                self.per_image(prepare(a, originals.device), prepare(b, originals.device)),
                len(a),
            )
            for a, b in zip(
                torch.split(reconstructions, self.chunk),
                torch.split(originals, self.chunk),
                strict=True,
            )
        ]
        return torch.cat(scores)

    @abstractmethod
    def per_image(self, reconstructions: Tensor, originals: Tensor) -> Tensor:
        """Score one chunk.

        Args:
            reconstructions: (n, 3, H, W) float32, in [0, 1], already checked.
            originals: Same shape, range, dtype and device.

        Returns:
            Scores, (n,), each depending on its own pair of images alone.
        """

    def _checked_scores(self, scores: Tensor, n: int) -> Tensor:
        if scores.shape != (n,):
            raise PluginError(
                f"metric {self.name}: per_image must return shape ({n},) for {n} images, "
                f"got {tuple(scores.shape)}"
            )
        scores = scores.detach().cpu().double()
        if not bool(scores.isfinite().all()):
            raise PluginError(f"metric {self.name}: per_image returned values that are not finite")
        return scores


def check_pair(name: str, reconstructions: Tensor, originals: Tensor) -> None:
    """Refuses what no metric may compare.

    Args:
        name: the metric's, for messages.
        reconstructions: should be (N, 3, H, W) in [0, 1], of a float dtype.
        originals: should have the same shape and range.

    Raises:
        ValueError: If the two differ in shape, or either is empty, not (N, 3, H, W), not of a
            float dtype, not finite, or outside [0, 1] by more than 1e-4.
    """
    if reconstructions.shape != originals.shape:
        raise ValueError(
            f"{name}: reconstructions have shape {tuple(reconstructions.shape)} "
            f"but originals {tuple(originals.shape)}"
        )
    _check(name, reconstructions, "reconstructions")
    _check(name, originals, "originals")


def _check(name: str, images: Tensor, what: str) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(
            f"{name}: {what} must be (N, 3, H, W) with N > 0, got {tuple(images.shape)}"
        )
    if not images.is_floating_point():
        raise ValueError(f"{name}: {what} must be of a float dtype in [0, 1], got {images.dtype}")
    low, high = (float(extreme) for extreme in images.aminmax())
    # A NaN anywhere makes both extremes NaN, and every comparison with NaN is false.
    if not (low >= -_RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE):
        raise ValueError(
            f"{name}: {what} must be finite and lie in [0, 1], got values from {low:g} to {high:g}"
        )


def prepare(images: Tensor, device: torch.device) -> Tensor:
    """Returns checked images as float32 in [0, 1] on a device."""
    # Clamping removes rounding within the tolerance, so that the bounds of the metrics hold.
    return images.to(device=device, dtype=torch.float32).clamp(0, 1)
