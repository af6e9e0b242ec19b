"""Weights that others have published: the official file, checked, or none."""

import hashlib
import http.client
import pickle
import re
from pathlib import Path

import torch

from mibench.errors import UnavailableError


def obtain(metric: str, whose: str, url: str, sha256: str) -> Path:
    """Puts a published file of weights where PyTorch keeps such files, and checks it.

    Packages load whatever has the right name, unpickling code and all. So the file is hashed and
    loaded without code here first, downloaded if need be.

    Args:
        metric: who needs it, for messages.
        whose: the network that the weights are of, for messages.
        url: where the file is published.
        sha256: how its SHA-256 begins.

    Returns:
        The file.

    Raises:
        UnavailableError: If the file can be neither read nor downloaded, or is another file.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / url.rsplit("/", 1)[-1]
    # A record keeps this, and must not tell whose home it was; in the sandbox there is no home.
    usual = (".cache", "torch", "hub", "checkpoints")
    if folder.parts[-len(usual) :] == usual:
        shown = "~/" + "/".join(usual)
    elif folder.is_relative_to(Path.home()):
        shown = f"~/{folder.relative_to(Path.home())}"
    else:
        shown = str(folder)
    advice = f"download {url} elsewhere and put it in {shown}, or leave {metric} out"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(sha256):
            raise UnavailableError(
                f"{metric}: {shown}/{path.name} is not the official {whose} (its SHA-256 begins "
                f"with {digest[:8]}, not {sha256}); delete it and {advice}"
            )
        torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, http.client.HTTPException, pickle.UnpicklingError) as error:
        problem = str(error).partition("\n")[0]
        problem = re.sub(re.escape(str(folder)) + r"[^'\"\s]*", f"{shown}/{path.name}", problem)
        raise UnavailableError(
            f"{metric} needs {whose}'s weights, which cannot be had here ({problem}): {advice}"
        ) from error
    return path
