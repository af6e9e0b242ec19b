"""Where a result comes from: code revision, package versions and machine."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

from pydantic import JsonValue

from mibench import __version__

PACKAGES = (
    "torch", "torchvision", "timm", "diffusers", "lpips", "pytorch-fid", "datasets", "numpy",
    "pydantic",
)  # fmt: skip


def provenance(device: str, threads: int) -> dict[str, JsonValue]:
    """Returns versions, revision and machine as the record keeps them."""
    return {
        "mibench": __version__,
        "revision": revision(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "device": device_name(device),
        "threads": threads,
    }


def package_version(name: str) -> str | None:
    """Returns the installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def revision() -> dict[str, JsonValue] | None:
    """Returns commit and dirty flag of the checkout mibench runs from; None if installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        dirty = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": dirty}


def device_name(device: str) -> str:
    """Returns the device with its model name."""
    import torch

    if device.startswith("cuda"):
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({_cpu_model()})"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(  # noqa: S603 - fixed words, no shell
        ["git", "-C", str(root), *words],  # noqa: S607
        check=True,
        capture_output=True,
        text=True,
        timeout=10,
    )
    return done.stdout.strip()
