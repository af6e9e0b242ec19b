"""A protocol on which a run, an export and an answer take seconds."""

from dataclasses import dataclass
from pathlib import Path

from mibench.artifacts import ArtifactStore
from mibench.challenge.export import Belongs, export, record_of
from mibench.evaluate import evaluate
from mibench.job import Job
from mibench.outputs import write_result
from mibench.params import build
from mibench.protocol import Protocol
from mibench.record import Record

ATTACKED = 12


def protocol_of_tests(**changes):
    """A protocol of generated images with a judge; words are fields."""
    values = {
        "id": "challenge-test",
        "track": "test",
        "title": "as small as it gets",
        "data": {
            "dataset": "procedural",
            "image_size": 32,
            "train": {"split": "stream", "start": 0, "count": 32},
            "auxiliary": {"split": "stream", "start": 1000, "count": 96},
            "validation": {"split": "stream", "start": 2000, "count": 16},
            "private": {"split": "stream", "start": 3000, "count": 24},
            "attacked": ATTACKED,
        },
        "backbone": {
            "name": "small-resnet", "params": {"stem": 8, "width": 8}, "split_point": "stem"
        },
        "recipe": {"steps": 4, "batch": 16, "precision": "fp32", "crop": 0},
        "attacks": {"linear": {}},
        "metrics": {"mse": 1, "psnr": 1, "ssim": 1, "recognition": 1, "reid-top1": 1},
        "judge": {
            "width": 4, "gallery": 16,
            "recipe": {"steps": 4, "batch": 16, "precision": "fp32", "crop": 0},
        },
        "batch": 8,
    }  # fmt: skip
    return build(Protocol, values | changes, "challenge-test")


@dataclass(frozen=True)
class Made:
    """A run with its challenge."""

    job: Job
    record: Record
    run: Path
    folder: Path
    store: ArtifactStore

    def belongs(self):
        return Belongs(self.record.id, self.record, self.run)


def make(place, defense="noise", params=None, attack="linear", **changes):
    """Runs a job below ``place`` and exports its challenge."""
    job = Job(protocol_of_tests(**changes), defense, attack, params or {}, {})
    store = ArtifactStore(place / "cache")
    record = write_result(evaluate(job, store, None, "cpu"), place / "run")
    belongs = record_of(job, place / "no-board", place / "run")
    export(job, belongs, store, None, "cpu", place / "challenge")
    return Made(job, record, place / "run", place / "challenge", store)
