"""A challenge as an attacker opens it: the target, the shares, and images to learn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from mibench.artifacts import ArtifactStore
from mibench.attacks.base import Workshop
from mibench.challenge.grants import blank
from mibench.challenge.schema import SHARES, WEIGHTS, Challenge, read_challenge
from mibench.data.roles import load_roles, open_dataset
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense, Shares
from mibench.deployment import build_defense
from mibench.errors import DataError, PluginError, RecordError
from mibench.evaluate import component_of
from mibench.job import Job
from mibench.protocol import Protocol
from mibench.registry import defenses
from mibench.threat import Adversary, Target

ANY_ATTACK = "linear"
"""A job names an attack; nothing of a challenge depends on it."""


@dataclass(frozen=True)
class Opened:
    """A challenge, ready to be attacked like a run.

    Attributes:
        challenge: what the folder says.
        protocol: that it is under.
        target: what an attack is handed; the weights that its adversary does not have are blank.
        shares: that the corrupted servers received of the images to rebuild, on the CPU, in the
            order of `Target`.
    """

    challenge: Challenge
    protocol: Protocol
    target: Target
    shares: Shares

    def attackers_images(
        self, data_root: Path | None = None, store: ArtifactStore | None = None
    ) -> tuple[ImageSet, ImageSet]:
        """Returns the images that an attacker may learn from, and those to choose with.

        Args:
            data_root: folder of datasets in the hub's layout, or None for the hub.
            store: the cache.

        Raises:
            DataError: the images here are not those of the challenge.
            UnavailableError: they must be downloaded and cannot be.
        """
        cache = ArtifactStore() if store is None else store
        roles = load_roles(self.protocol.data, data_root, cache.root)
        for role, identity in self.challenge.attackers_images.items():
            if getattr(roles, role).identity != identity:
                raise DataError(
                    f"the images of the role {role!r} are not those of the challenge; give the "
                    f"whole dataset {self.protocol.data.dataset}"
                )
        return roles.auxiliary, roles.validation

    def workshop(self, store: ArtifactStore | None = None, device: str = "cpu") -> Workshop:
        """Returns where an `Attack` of mibench can train its parts."""
        return Workshop(
            image_shape=(3, self.challenge.image_size, self.challenge.image_size),
            seed=self.challenge.seed,
            device=torch.device(device),
            store=ArtifactStore() if store is None else store,
            threads=self.protocol.threads,
        )


def open_challenge(folder: Path, device: str = "cpu") -> Opened:
    """Opens the folder of a challenge.

    Args:
        folder: that `mibench challenge export` has written.
        device: of the target.

    Raises:
        RecordError: the folder is not whole, or contradicts itself.
        PluginError: the defense here has other code than the challenge's.
        MibenchError: a component is not known here.
    """
    challenge = read_challenge(folder)
    protocol = challenge.rebuilt_protocol()
    defense = _built(challenge, protocol)
    _load_granted(defense, challenge, _tensors(folder / WEIGHTS))
    defense.to(device).eval().requires_grad_(requires_grad=False)
    found = challenge.adversary
    adversary = Adversary(protocol.adversary.knowledge, tuple(found.corrupted), found.transmissions)
    sent = _tensors(folder / SHARES)
    for message in challenge.messages:
        share = sent.get(message.name)
        if share is None or list(share.shape) != [challenge.images, *message.shape]:
            raise RecordError(f"{folder / SHARES} does not hold the share {message.name}")
    return Opened(
        challenge=challenge,
        protocol=protocol,
        target=Target(defense, adversary, f"challenge {challenge.id}"),
        shares=tuple(sent[message.name] for message in challenge.messages),
    )


def job_of(challenge: Challenge, protocol: Protocol) -> Job:
    """The job that trains the challenge's defense."""
    part = challenge.defense
    name = part.location or part.name
    return Job(protocol, name, ANY_ATTACK, part.params, {}, challenge.seed)


def _built(challenge: Challenge, protocol: Protocol) -> Defense:
    """The defense with weights that nobody has trained."""
    part, rule = challenge.defense, protocol.data
    job = job_of(challenge, protocol)
    has = component_of(defenses.load(job.defense), job.defense, part.params)
    if has.code != part.code:
        raise PluginError(
            f"defense {job.defense} has the code {has.code} here, and {part.code} in the "
            f"challenge; install mibench {challenge.mibench}, or restore the defense's file"
        )
    cache = ArtifactStore().root
    task = open_dataset(rule.dataset, rule.image_size, None, cache).task
    return build_defense(job, (3, rule.image_size, rule.image_size), task)


def _load_granted(defense: Defense, challenge: Challenge, tensors: Mapping[str, Tensor]) -> None:
    """Loads what is granted; all other weights become blank, so that no use of them goes unseen."""
    state = defense.state_dict()
    told = {*challenge.granted, *challenge.withheld}
    same = set(tensors) == set(challenge.granted) and set(state) == told
    if not same or any(state[name].shape != tensors[name].shape for name in tensors):
        raise RecordError(
            f"{WEIGHTS} does not fit the defense {challenge.defense.name} of this version"
        )
    with torch.no_grad():
        for name in challenge.withheld:
            blank(state[name])
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = safetensors_torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise RecordError(f"{path} holds no tensors ({error}); restore it") from error
    return found
