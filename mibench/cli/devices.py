"""Which device to compute on."""

from __future__ import annotations

from mibench.errors import DeviceError


def choose_device(asked: str) -> str:
    """Returns the device to use: ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        DeviceError: the device is unknown, or this machine has none.
    """
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(asked).type
        if kind == "meta":  # it exists everywhere and computes nothing
            raise RuntimeError("it computes nothing")
        torch.zeros(1, device=asked)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise DeviceError(
            f"cannot compute on {asked!r}: {_reason(error)}; this machine has: "
            f"{', '.join(available())}. Use --device auto, or one of these"
        ) from error
    return asked


def available() -> list[str]:
    """Returns the devices of this machine, best first."""
    import torch

    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]


def _reason(error: BaseException) -> str:
    """The first sentence of what PyTorch says."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.partition(". ")[0][:120]
