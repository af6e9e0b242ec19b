"""Priors that were trained elsewhere: from the hub or a folder in diffusers' layout.

Only JSON and safetensors are read. The folder of ``mibench prior train`` is such a folder.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from mibench.attacks.diffusion.denoiser import Prior
from mibench.attacks.diffusion.latent import LatentPrior
from mibench.errors import InvalidParamsError, MibenchError, UnavailableError
from mibench.files import Json

OWN = "prior.json"
"""What `mibench prior train` notes beside a prior, such as what images it saw."""
PROMPT = "empty_prompt.safetensors"
"""The embedding of the empty prompt, under the name ``embedding``, instead of a text encoder."""

SAW = {
    "google/ddpm-cifar10-32": "the 50,000 training images of CIFAR-10",
    "google/ddpm-celebahq-256": "CelebA-HQ, faces of CelebA",
    "google/ddpm-ema-celebahq-256": "CelebA-HQ, faces of CelebA",
    "google/ddpm-bedroom-256": "LSUN bedrooms",
    "google/ddpm-ema-bedroom-256": "LSUN bedrooms",
    "google/ddpm-church-256": "LSUN churches",
    "google/ddpm-ema-church-256": "LSUN churches",
    "google/ddpm-cat-256": "LSUN cats",
    "google/ddpm-ema-cat-256": "LSUN cats",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "subsets of LAION-5B, images of the web",
    "CompVis/stable-diffusion-v1-4": "subsets of LAION-5B, images of the web",
}
"""What images published priors were trained on, by their model cards."""
UNKNOWN = "unknown: see the model's card"


def load(name: str, image_shape: tuple[int, int, int]) -> tuple[Prior, dict[str, Json]]:
    """Loads a prior and checks that it fits.

    Args:
        name: hub id, or folder with ``unet/`` and ``scheduler/``, or with both at its top; for
            latent diffusion also ``vae/``, and a text encoder or ``empty_prompt.safetensors``.
        image_shape: (3, H, W) of the attack's images.

    Returns:
        The prior, and facts: ``source``, what it ``saw`` as far as known, its ``identity``.

    Raises:
        UnavailableError: it cannot be had, or not as safetensors.
        InvalidParamsError: it denoises other images, or does not predict the noise alone.
    """
    diffusers.utils.logging.set_verbosity_error()
    source = _Source(name)
    config = source.config()
    kind = config.get("_class_name")
    if kind == "UNet2DModel":
        prior = _of_pixels(source, config, image_shape)
    elif kind == "UNet2DConditionModel":
        prior = _of_latents(source, config, image_shape)
    else:
        raise source.unfit(f"is a {kind}, not a UNet2DModel or UNet2DConditionModel")
    saw = source.notes.get("saw") or SAW.get(name, UNKNOWN)
    return prior, {"source": name, "saw": saw, "identity": _identity(prior)}


class _Source:
    """A hub id or a folder, and what to say where it lacks something."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = Path(name).expanduser() if Path(name).expanduser().is_dir() else None
        self.notes: Mapping[str, Any] = {}
        if self.folder is None and name.startswith((".", "/", "~")):
            raise self.missing("there is no such folder")
        if self.folder is not None and (self.folder / OWN).is_file():
            try:
                self.notes = json.loads((self.folder / OWN).read_bytes())
            except (OSError, ValueError) as error:
                raise self.missing(f"{OWN} cannot be read: {error}") from error
            if not isinstance(self.notes, dict):
                raise self.missing(f"{OWN} is not an object")
        self._nested = True

    def config(self) -> dict[str, Any]:
        """The UNet's configuration: from ``unet/``, or from the top of older repositories."""
        if self.folder is not None and not (self.folder / "unet").is_dir():
            self._nested = False
        try:
            return self._config("unet")
        except UnavailableError:
            if self.folder is not None or not self._nested:
                raise
            self._nested = False
            return self._config("unet")

    def _config(self, part: str) -> dict[str, Any]:
        found: dict[str, Any] = self._reading(
            diffusers.UNet2DModel.load_config, subfolder=self._subfolder(part)
        )
        return found

    def model(self, kind: Any, part: str) -> Any:
        """One network, whole: a weight that is missing would stay at random."""
        net, report = self._reading(
            kind.from_pretrained,
            subfolder=self._subfolder(part),
            use_safetensors=True,
            output_loading_info=True,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
        )
        gaps = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
        if gaps:
            raise self.unfit(f"has weights in {part} that do not fit its config ({gaps[0]})")
        return net

    def scheduler(self) -> Any:
        """The noise schedule; the prior must predict the noise."""
        found = self._reading(
            diffusers.DDPMScheduler.from_pretrained, subfolder=self._subfolder("scheduler")
        )
        predicts = found.config.prediction_type
        if predicts != "epsilon":
            raise self.unfit(f"predicts {predicts!r} and not the noise ('epsilon')")
        return found

    def prompt(self) -> Tensor:
        """The embedding of the empty prompt (1, tokens, D)."""
        if self.folder is not None and (self.folder / PROMPT).is_file():
            from safetensors.torch import load_file

            stored: Mapping[str, Tensor] = self._reading(load_file, self.folder / PROMPT)
            found = stored.get("embedding")
            if found is None or found.ndim != 3 or len(found) != 1:
                raise self.unfit(f"has no tensor 'embedding' (1, tokens, D) in {PROMPT}")
            return found
        try:
            transformers = importlib.import_module("transformers")
        except ImportError as error:
            raise self.missing(
                "its text encoder needs the package transformers: pip install transformers, or put "
                f"the embedding of the empty prompt into {PROMPT} in a local copy"
            ) from error
        tokenizer = self._reading(transformers.CLIPTokenizer.from_pretrained, subfolder="tokenizer")
        encoder = self._reading(
            transformers.CLIPTextModel.from_pretrained,
            subfolder="text_encoder",
            use_safetensors=True,
        )
        tokens = tokenizer("", padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            embedding: Tensor = encoder.eval()(tokens)[0]
        return embedding

    def _reading(self, read: Any, *args: Any, **options: Any) -> Any:
        where = args or (str(self.folder or self.name),)
        try:
            return read(*where, **options)
        except MibenchError:
            raise
        except Exception as error:  # of diffusers, the hub, safetensors or the network
            words = " ".join(str(error).split())
            raise self.missing(words.partition(". ")[0][:160] or type(error).__name__) from error

    def _subfolder(self, part: str) -> str | None:
        return part if self._nested else None

    def missing(self, reason: str) -> UnavailableError:
        where = "from this folder" if self.folder is not None else "from the hub"
        return UnavailableError(
            f"cannot get the diffusion prior {self.name!r} as safetensors {where} ({reason}); "
            "connect to the internet, check the id, or leave attack.prior.pretrained out to train "
            "a prior on auxiliary images."
        )

    def unfit(self, reason: str) -> InvalidParamsError:
        return InvalidParamsError(
            f"attack.prior.pretrained: {self.name!r} {reason}; choose another prior, or leave it "
            "out to train one on auxiliary images"
        )


def _of_pixels(
    source: _Source, config: Mapping[str, Any], image_shape: tuple[int, int, int]
) -> Prior:
    channels, height, width = image_shape
    patch = int(source.notes.get("patch", 1))
    ins, outs = config["in_channels"], config["out_channels"]
    if ins != channels * patch**2:
        raise source.unfit(f"denoises images of {ins} channels, not {channels * patch**2}")
    if outs != ins:
        raise source.unfit(f"predicts {outs} channels for {ins}: not the noise alone")
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        raise source.unfit("needs a class for each image, which an attacker does not have")
    sides = _sides(config)
    if sides != (height // patch, width // patch):
        raise source.unfit(
            f"denoises images of {sides[0] * patch}x{sides[1] * patch} pixels, but those of the "
            f"protocol have {height}x{width}"
        )
    scheduler = source.scheduler()
    return Prior(source.model(diffusers.UNet2DModel, "unet"), scheduler, patch)


def _of_latents(
    source: _Source, config: Mapping[str, Any], image_shape: tuple[int, int, int]
) -> LatentPrior:
    scheduler = source.scheduler()
    prompt = source.prompt()
    expected = config["cross_attention_dim"]
    if prompt.shape[2] != expected:
        raise source.unfit(
            f"wants prompts of {expected} values a token, but its empty prompt has "
            f"{prompt.shape[2]}"
        )
    vae = source.model(diffusers.AutoencoderKL, "vae")
    latents, ins, outs = vae.config.latent_channels, config["in_channels"], config["out_channels"]
    if not latents == ins == outs:
        raise source.unfit(
            f"denoises {ins} channels to {outs}, but its VAE has {latents}: not the noise alone"
        )
    if vae.config.in_channels != image_shape[0] or vae.config.out_channels != image_shape[0]:
        raise source.unfit(f"has a VAE of {vae.config.in_channels} channels, not {image_shape[0]}")
    side = _sides(config)[0] * 2 ** (len(vae.config.block_out_channels) - 1)
    unet = source.model(diffusers.UNet2DConditionModel, "unet")
    return LatentPrior(unet, vae, scheduler, prompt, image_shape, side)


def _sides(config: Mapping[str, Any]) -> tuple[int, int]:
    size = config.get("sample_size") or 0
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _identity(prior: Prior) -> str:
    """Hash of all weights, the schedule and all configurations: what the results follow from."""
    configs = [
        {key: value for key, value in part.config.items() if not key.startswith("_")}  # type: ignore[union-attr,operator]
        for part in prior.modules()
        if hasattr(part, "config")
    ]
    told = json.dumps([prior.patch, configs], sort_keys=True, default=str)
    digest = hashlib.sha256(told.encode())
    for name, value in sorted(prior.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
