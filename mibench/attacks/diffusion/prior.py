"""Where the prior comes from: trained on auxiliary images, from the hub, or from a folder."""

from __future__ import annotations

from typing import Annotated

import diffusers
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mibench import seeding
from mibench.artifacts import Artifact, Checkpoint
from mibench.attacks.base import Workshop
from mibench.attacks.budget import images_at_once
from mibench.attacks.diffusion import pretrained
from mibench.attacks.diffusion.denoiser import Prior
from mibench.data.sets import ImageSet
from mibench.errors import InvalidParamsError
from mibench.files import Json
from mibench.params import Parameters
from mibench.protocol import Recipe
from mibench.registry import fingerprint
from mibench.training import Losses, Step, augment, optimise, shuffled_batch

AVERAGE = 0.999
"""Decay of the weights' moving average."""
VALIDATION = 512
"""Validation images on which the prior is judged."""


class PriorParams(Parameters):
    """Which prior: trained on auxiliary images, or loaded."""

    pretrained: str | None = Field(
        default=None,
        description="hub id or folder of an unconditional DDPM or of a Stable Diffusion, in "
        "diffusers' layout, safetensors only; it may have seen private images",
    )
    steps: int = Field(default=3000, gt=0, description="training steps")
    batch: int = Field(default=32, gt=0, description="images per step")
    lr: float = Field(default=1e-3, gt=0, description="peak learning rate of AdamW")
    channels: tuple[Annotated[int, Field(gt=0, multiple_of=16)], ...] = Field(
        default=(32, 64, 96), min_length=2, description="channels of the UNet's levels"
    )
    layers: int = Field(default=1, gt=0, description="residual blocks per level")
    patch: int = Field(default=2, ge=1, description="side of the pixel patches the UNet works on")
    timesteps: int = Field(default=1000, gt=1, description="T, noise levels")


def get_prior(
    params: PriorParams, workshop: Workshop, auxiliary: ImageSet, validation: ImageSet
) -> tuple[Prior, dict[str, Json]]:
    """Loads the prior, or trains it on auxiliary images (or takes it from the cache).

    Returns:
        The prior in evaluation mode, and facts: where it comes from, what images it saw, and the
        validation loss of a trained one, or the hash of a loaded one.

    Raises:
        UnavailableError: the pretrained prior cannot be had.
        InvalidParamsError: it does not fit the images, or the parameters do not.
    """
    if params.pretrained is not None:
        prior, facts = pretrained.load(params.pretrained, workshop.image_shape)
    else:
        prior, artifact = trained(params, workshop, auxiliary, validation)
        facts = {
            "source": "auxiliary",
            "saw": "the auxiliary images of the protocol",
            "validation_loss": artifact.facts["validation_loss"],
        }
    return prior.to(workshop.device).eval().requires_grad_(requires_grad=False), facts


def trained(
    params: PriorParams, workshop: Workshop, auxiliary: ImageSet, validation: ImageSet
) -> tuple[Prior, Artifact]:
    """Trains a prior on auxiliary images, or takes it from the cache.

    The mean over the last steps' weights is kept (EMA), and a training that was killed goes on from
    its checkpoint.

    Returns:
        The prior and its place in the cache.

    Raises:
        InvalidParamsError: the UNet does not fit the images.
        DivergedError: the loss became infinite or not a number.
    """
    with seeding.stream(workshop.seed, "prior"):
        prior = _build(params, workshop.image_shape).to(workshop.device)
    recipe = Recipe(
        steps=params.steps, batch=params.batch, optimizer="adamw", lr=params.lr,
        weight_decay=1e-4, warmup=0.05, clip=1.0, crop=0, average=AVERAGE,
    )  # fmt: skip

    seed = seeding.derive(workshop.seed, "prior training")

    def make(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Json]]:
        def losses(step: Step) -> Losses:
            index = shuffled_batch(len(auxiliary), params.batch, seed, step.index)
            images = augment(auxiliary.images(index), recipe, step.generator)
            return {"eps": _denoising_error(prior, images.to(workshop.device), step.generator)}

        course = optimise(
            prior, losses, recipe, seed=seed, checkpoint=checkpoint,
            title="Training diffusion prior",
        )  # fmt: skip
        error = _validation_error(prior, workshop, validation)
        return prior.state_dict(), {"losses": dict(course), "validation_loss": error}

    spec: dict[str, Json] = {
        "params": params.model_dump(mode="json"),
        "image_shape": list(workshop.image_shape),
        "auxiliary": auxiliary.identity,
        "validation": validation.identity,
        "code": [fingerprint(Prior), fingerprint(PriorParams)],
        "diffusers": diffusers.__version__,
    }
    artifact = workshop.keep("prior", spec, make)
    prior.load_state_dict(artifact.tensors)
    return prior.eval(), artifact


def _denoising_error(prior: Prior, images: Tensor, generator: torch.Generator) -> Tensor:
    """E |eps - eps(x_t, t)|^2 over uniform t: the simple loss of Ho et al., equation 14."""
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    timestep = torch.randint(0, prior.timesteps, (len(images),), generator=generator)
    timestep = timestep.to(images.device)
    noisy = prior.add_noise(prior.encode(images), noise, timestep)
    return F.mse_loss(prior(noisy, timestep).float(), noise)


@torch.no_grad()
def _validation_error(prior: Prior, workshop: Workshop, validation: ImageSet) -> float:
    draws = seeding.generator(workshop.seed, "prior validation")
    images, total = validation.take(VALIDATION), 0.0
    for some in images.chunks(images_at_once(workshop.image_shape)):
        error = _denoising_error(prior, some.to(workshop.device), draws)
        total += len(some) * error.item()
    return total / len(images)


def _build(params: PriorParams, image_shape: tuple[int, int, int]) -> Prior:
    channels, height, _ = image_shape
    levels = len(params.channels)
    if height % (params.patch * 2 ** (levels - 1)):
        raise InvalidParamsError(
            f"attack.prior: images of {height} pixels cannot be folded into patches of "
            f"{params.patch} and halved {levels - 1} times; choose another patch or fewer channels"
        )
    unet = diffusers.UNet2DModel(
        sample_size=height // params.patch,
        in_channels=channels * params.patch**2,
        out_channels=channels * params.patch**2,
        block_out_channels=params.channels,
        layers_per_block=params.layers,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        norm_num_groups=16,
    )
    scheduler = diffusers.DDPMScheduler(params.timesteps, beta_schedule="squaredcos_cap_v2")
    return Prior(unet, scheduler, params.patch)
