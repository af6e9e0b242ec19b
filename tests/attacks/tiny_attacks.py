"""All built-in attacks at their smallest, and the attack stage without data and training."""

import torch
from pydantic import ValidationError

from mibench.artifacts import ArtifactStore
from mibench.assault import attack
from mibench.data.roles import Roles
from mibench.deployment import Deployed
from mibench.job import Job
from mibench.params import Parameters, build
from mibench.protocol import Protocol
from mibench.registry import attacks
from mibench.task import Classification

NAMES = [entry.name for entry in attacks.entries() if entry.origin == "mibench"]
SMALLEST = {
    "batch": 8,
    "blocks": 1,
    "channels": (16, 16),
    "inner": 2,
    "restarts": 1,
    "samples": 1,
    "steps": 8,
    "timesteps": 20,
    "tuning_images": 2,
    "width": 8,
}
"""Cheap values of parameters, by name; attacks without such a parameter keep their defaults."""
TASK = Classification(tuple("abcde"))


def smallest(params, **changes):
    """The cheap values that a parameter model accepts, and its defaults elsewhere."""
    values = {}
    for name, field in params.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Parameters):
            values[name] = smallest(field.annotation)
        elif name in SMALLEST:
            try:
                params(**values, **{name: SMALLEST[name]})
            except ValidationError:
                continue
            values[name] = SMALLEST[name]
    return {**values, **changes}


def tiny_job(name, adversary=None, **changes):
    """A job of this attack on images of 16 pixels that the test itself brings."""
    role = {"split": "any", "count": 1}
    values = {
        "id": "tiny-v1",
        "track": "test",
        "title": "no data of its own",
        "data": {
            "dataset": "procedural",
            "image_size": 16,
            **{
                part: {**role, "start": at}
                for at, part in enumerate(("train", "auxiliary", "validation"))
            },
            "private": {"split": "any", "start": 10, "count": 100},
            "attacked": 2,
        },
        "backbone": {"name": "small-resnet", "split_point": "stem"},
        "recipe": {"steps": 1},
        "adversary": adversary or {},
        "metrics": {"mse": 1},
        "batch": 4,
    }
    params = smallest(attacks.load(name).Params, **changes)
    return Job(build(Protocol, values, "tiny"), "none", name, {}, params)


def tiny_roles(auxiliary, validation, private, train=None):
    """Roles from the test's own images, all private ones attacked."""
    chosen = torch.arange(len(private))
    return Roles(train or auxiliary, auxiliary, validation, private, chosen, TASK)


def assault_on(defense, job, roles, folder):
    """Runs the attack stage against a defense with the weights that it has."""
    deployed = Deployed(defense, "weights", f"{defense.name} as it is", {})
    return attack(job, deployed, roles, ArtifactStore(folder), "cpu")
