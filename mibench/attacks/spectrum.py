"""Coordinates of images in which coarse structure and brightness take the longer steps."""

from __future__ import annotations

import torch
from torch import Tensor

OPPONENT = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))
"""Brightness, red against blue, green against both: about the principal axes of the colours of
photographs (Ohta, Kanade and Sakai, 1980)."""
CONTRAST = (1.0, 0.35, 0.25)
"""Deviations along these axes, relative to that of brightness."""


class Spectrum:
    """Coefficients v (B, 3, H, W) → S v, linear: white noise becomes noise like a photograph.

    The amplitude of a photograph's spectrum falls like 1 / frequency (Field, JOSA A 1987), and its
    colours vary mostly in brightness. S multiplies by both, scaled so that the values of S v have
    deviation 1 when those of v have. An optimiser that moves every coefficient by one step size
    then moves images along what photographs differ in (Olah, Mordvintsev and Schubert, "Feature
    Visualization", Distill 2017).

    Args:
        image_shape: (3, H, W).
        device: of the coefficients.
    """

    def __init__(self, image_shape: tuple[int, int, int], device: torch.device) -> None:
        _, self.height, self.width = image_shape
        down, right = torch.fft.fftfreq(self.height), torch.fft.fftfreq(self.width)
        # The mean of an image has no frequency; it takes the step of the longest wave.
        frequency = (down[:, None].square() + right.square()).sqrt()
        amplitude = 1 / frequency.clamp_min(1 / max(self.height, self.width))
        amplitude = amplitude / amplitude.square().mean().sqrt()
        # A real image has half of a spectrum.
        self.amplitude = amplitude[:, : self.width // 2 + 1].to(device)
        axes = torch.tensor(OPPONENT)
        axes = axes / axes.norm(dim=1, keepdim=True)
        deviations = torch.tensor(CONTRAST)
        deviations = deviations * (3 / deviations.square().sum()).sqrt()
        self.colours = (axes.T * deviations).to(device)

    def __call__(self, v: Tensor) -> Tensor:
        """Returns S v, (B, 3, H, W)."""
        waves = torch.fft.rfft2(torch.einsum("oc,bchw->bohw", self.colours, v))
        values: Tensor = torch.fft.irfft2(waves * self.amplitude, s=(self.height, self.width))
        return values
