"""``mibench prior``: the image prior of the diffusion attacks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mibench.cli import options

if TYPE_CHECKING:
    from mibench.attacks.diffusion.prior import PriorParams
    from mibench.files import Json
    from mibench.protocol import Protocol

app = typer.Typer(no_args_is_help=True, help="Train the image prior of the diffusion attacks.")

SAMPLES = 64
"""Images on the sheet."""


@app.callback()
def _group() -> None:
    """Keeps ``train`` a command of its own while it is the only one."""


@app.command("train")
def train(
    protocol: Annotated[str, typer.Option(help="Protocol id, or a .yaml file.")],
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Another value than the protocol's, such as prior.steps=50; repeatable.",
        ),
    ] = None,
    seed: options.Seed = None,
    device: options.Device = "auto",
    data_root: options.DataRoot = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the files (default: runs/<protocol>/prior-s<seed>)."),
    ] = None,
) -> None:
    """Train a protocol's prior on its auxiliary images, where its attacks will find it.

    The prior goes to the cache, from where `mibench run` takes it; a killed training goes on from
    its checkpoint. The folder gets a copy that attack.prior.pretrained can name elsewhere, and a
    sheet of samples to look at.
    """
    from mibench.params import parse_assignments
    from mibench.protocol import load_protocol

    chosen = load_protocol(protocol)
    given = parse_assignments(assignments or [], ("prior",)).get("prior", {})
    # From here on PyTorch is needed, which takes seconds to import.
    import torch

    from mibench import seeding
    from mibench.artifacts import ArtifactStore
    from mibench.attacks.base import Workshop
    from mibench.attacks.diffusion.attack import unconditional
    from mibench.attacks.diffusion.export import SHEET, write_prior, write_sheet
    from mibench.attacks.diffusion.prior import trained
    from mibench.attacks.diffusion.sampler import SamplerParams
    from mibench.cli.devices import choose_device
    from mibench.cli.display import shown
    from mibench.cli.terminal import console as make_console
    from mibench.data.roles import load_roles
    from mibench.files import ensure_writable

    params = prior_params(chosen, given)
    device = choose_device(device)
    seed = chosen.seeds[0] if seed is None else seed
    folder = out or Path("runs", Path(chosen.id).name, f"prior-s{seed}")
    ensure_writable(folder)
    store, console = ArtifactStore(), make_console()
    torch.set_num_threads(chosen.threads)
    with shown(console):
        roles = load_roles(chosen.data, data_root, store.root)
        shape = roles.train.image_shape
        workshop = Workshop(shape, seed, torch.device(device), store, chosen.threads)
        prior, artifact = trained(params, workshop, roles.auxiliary, roles.validation)
        prior.to(workshop.device).requires_grad_(requires_grad=False)
        with seeding.stream(seed, "prior sheet"):
            images = unconditional(prior, workshop, SamplerParams(), SAMPLES)
    saw = (
        f"{len(roles.auxiliary)} auxiliary images of {chosen.id} "
        f"({chosen.data.auxiliary.dataset or chosen.data.dataset}, {roles.auxiliary.identity})"
    )
    notes = {
        "saw": saw,
        "protocol": chosen.id,
        "seed": seed,
        "params": params.model_dump(mode="json"),
        "auxiliary": roles.auxiliary.identity,
        **artifact.facts,
    }
    write_sheet(images, round(SAMPLES**0.5), folder / SHEET)
    write_prior(prior, notes, folder)
    weights = sum(one.numel() for one in prior.unet.parameters())
    loss = artifact.facts["validation_loss"]
    for line in (
        f"Prior: {weights / 1e6:.2f} M weights, {params.steps} steps of {params.batch} images",
        f"Validation loss: {loss:.4f} (squared error of the predicted noise; 1: nothing learned)",
        f"Cache: {store.root / artifact.kind / artifact.key}",
        f"Files: {folder} ({SHEET}, prior.json, unet/, scheduler/)",
    ):
        console.print(line, soft_wrap=True)


def prior_params(protocol: Protocol, given: Json) -> PriorParams:
    """The protocol's prior with what the user set on top.

    Raises:
        InvalidParamsError: a value is wrong, or the protocol's prior is not trained here.
    """
    from mibench.attacks.diffusion.attack import Diffusion
    from mibench.errors import InvalidParamsError
    from mibench.job import UNDEFENDED, Job
    from mibench.params import build

    job = Job(protocol, UNDEFENDED, Diffusion.name, {}, {"prior": given})

    params: PriorParams = build(Diffusion.Params, job.merged_attack_params(), "attack").prior
    if params.pretrained is not None:
        raise InvalidParamsError(
            f"the prior of {protocol.id} is loaded from {params.pretrained!r}, not trained; leave "
            "prior.pretrained out"
        )
    return params
