"""Networks of timm, with fresh or published weights; weights are read from safetensors only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from mibench.backbones.base import Normalise
from mibench.errors import DataError, UnavailableError

Adapt = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Changes published weights before timm fits them to the network."""

FILE = "model.safetensors"


def network(
    arch: str, classes: int, *, pretrained: bool, adapt: Adapt | None = None, **options: Any
) -> Any:
    """Builds a network of timm.

    Published weights are fitted by timm: position embeddings and patch kernels are resampled to the
    network's own sizes, and the head is kept where the number of classes agrees and fresh
    otherwise.

    Args:
        arch: timm's name of the network with the tag of its weights.
        classes: number of logits.
        pretrained: take the published weights.
        adapt: changes them first.
        options: further arguments of timm's constructor.

    Raises:
        UnavailableError: the weights are neither in the hub's cache nor to be had.
        DataError: the file is damaged, or holds the weights of another network.
    """
    import timm

    if not pretrained:
        return timm.create_model(arch, pretrained=False, num_classes=classes, **options)
    path = _download(arch)
    weights = _read(path)
    if adapt is not None:
        weights = adapt(weights)
    given = set(weights)
    # Handed over as tensors: from a name or a file timm would fall back to pickles, or read the
    # safetensors of a vision transformer as a NumPy archive (timm's custom_load).
    try:
        net = timm.create_model(
            arch,
            pretrained=True,
            num_classes=classes,
            pretrained_cfg_overlay={"state_dict": weights},
            **options,
        )
    except RuntimeError as error:
        raise _misfit(path, arch) from error
    # timm is lenient as soon as the head is another one, and would leave the rest at random.
    fresh = (_published(arch).classifier, "num_batches_tracked")
    if [key for key in net.state_dict() if key not in given and not _any_part(key, fresh)]:
        raise _misfit(path, arch)
    return net


def normalisation(arch: str) -> Normalise:
    """Returns the normalisation that the published weights of a network were trained with."""
    published = _published(arch)
    return Normalise(published.mean, published.std)


def _published(arch: str) -> Any:
    from timm.models import get_pretrained_cfg

    return get_pretrained_cfg(arch)


def _any_part(key: str, parts: tuple[str, ...]) -> bool:
    return any(part in parts for part in key.split("."))


def _download(arch: str) -> Path:
    import huggingface_hub
    from huggingface_hub import constants

    source = _published(arch).hf_hub_id
    try:
        return Path(huggingface_hub.hf_hub_download(source, FILE))
    except Exception as error:  # which HTTP library's errors pass depends on the hub's version
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UnavailableError(
            f"cannot get the pretrained weights of {arch}, the file {FILE} of {source}, from the "
            f"hub ({'HF_HUB_OFFLINE is set' if constants.HF_HUB_OFFLINE else reason}); connect to "
            "the internet once, or leave 'pretrained' out of the backbone's parameters."
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        # The hub's cache links to the file proper, and without its target a link is made anew.
        raise DataError(
            f"the pretrained weights in {path.resolve()} are damaged; delete that file and run "
            "again."
        ) from error
    return weights


def _misfit(path: Path, arch: str) -> DataError:
    return DataError(
        f"the file {path.resolve()} does not hold the weights of {arch}; delete it and run again."
    )
