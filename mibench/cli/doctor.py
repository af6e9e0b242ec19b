"""``mibench doctor``: what this machine has, and what is missing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

BACKBONE_NAME = "alexnet-owt-7be5be79.pth"
"""File of the AlexNet weights that LPIPS needs."""
PATIENCE = 2.0
"""Seconds that the network may take to answer."""


def doctor(
    data_root: Annotated[
        Path | None,
        typer.Option(envvar="MIBENCH_DATA", help="Folder with <dataset>/<split>-*.parquet."),
    ] = None,
) -> None:
    """Show devices, data, cache and versions; downloads nothing."""
    from rich.table import Table

    from mibench.cli.terminal import console as make_console

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in [
        *_versions(),
        *_machine(),
        *_data(data_root),
        *_cache(),
        ("LPIPS weights", _lpips()),
        ("Hugging Face hub", _hub()),
    ]:
        table.add_row(name, value)
    make_console().print(table)


def _versions() -> list[tuple[str, str]]:
    import platform

    from mibench import __version__
    from mibench.provenance import PACKAGES, package_version

    packages = [f"{name} {package_version(name) or 'MISSING'}" for name in PACKAGES]
    return [
        ("mibench", __version__),
        ("Python", platform.python_version()),
        ("packages", ", ".join(packages)),
    ]


def _machine() -> list[tuple[str, str]]:
    import torch

    from mibench.cli.devices import available
    from mibench.provenance import device_name

    return [
        ("devices", ", ".join(map(device_name, available()))),
        ("CPU threads", f"{torch.get_num_threads()} (a protocol sets its own number)"),
    ]


def _data(root: Path | None) -> list[tuple[str, str]]:
    from mibench.registry import datasets

    if root is None:
        return [("data root", "none (--data-root or MIBENCH_DATA); datasets come from the hub")]
    if not root.is_dir():
        return [("data root", f"{root}: there is no such folder")]
    rows = [("data root", str(root))]
    # By the name of their folder below the data root; a dataset without one needs no files.
    places = {name: getattr(datasets.load(name), "folder", None) for name in datasets.names()}
    known = {folder or name: name for name, folder in places.items() if folder is not None}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        splits = _splits(folder)
        if folder.name in known and splits:
            rows.append((f"  {known[folder.name]}", f"splits {', '.join(splits)}"))
        elif splits:
            rows.append((f"  {folder.name}", "not a dataset of this mibench; ignored"))
    absent = [f"{name} ({folder}/)" for folder, name in known.items() if not _splits(root / folder)]
    if absent:
        rows.append(("  not found", ", ".join(absent)))
    return rows


def _splits(folder: Path) -> list[str]:
    """Splits of which there is a file ``<split>-*.parquet``."""
    files = [*folder.glob("*-*.parquet"), *folder.glob("data/*-*.parquet")]
    return sorted({file.name.partition("-")[0] for file in files})


def _cache() -> list[tuple[str, str]]:
    import shutil

    from mibench.artifacts import ArtifactStore

    root = ArtifactStore().root
    size = sum(_size(path) for path in root.rglob("*")) if root.is_dir() else 0
    nearest = next(path for path in (root, *root.absolute().parents) if path.exists())
    there, here = shutil.disk_usage(nearest).free, shutil.disk_usage(Path.cwd()).free
    return [
        ("cache", f"{root} ({_bytes(size)}; MIBENCH_CACHE chooses another)"),
        ("free disk", f"{_bytes(there)} there, {_bytes(here)} here"),
    ]


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size if path.is_file() else 0
    except OSError:  # another process has just removed it
        return 0


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _lpips() -> str:
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE_NAME
    if path.is_file():
        return f"there ({path})"
    return f"not there ({path}); downloaded when first needed, else LPIPS is left empty"


def _hub() -> str:
    """Asks the hub for its front page in a thread: looking up a name knows no time limit."""
    import threading

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "not asked: HF_HUB_OFFLINE is set"
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answer = [f"no answer from {address} within {PATIENCE:.0f} s"]
    thread = threading.Thread(target=_ask, args=(address, answer), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answer[0]


def _ask(address: str, answer: list[str]) -> None:
    import urllib.error
    import urllib.request

    try:
        request = urllib.request.Request(address, method="HEAD")  # noqa: S310 - the user's own
        with urllib.request.urlopen(request, timeout=PATIENCE):  # noqa: S310
            answer[0] = f"{address} answers"
    except urllib.error.HTTPError as error:
        answer[0] = f"{address} answers ({error.code})"
    except (OSError, ValueError) as error:
        answer[0] = f"{address} cannot be reached ({getattr(error, 'reason', error)})"
