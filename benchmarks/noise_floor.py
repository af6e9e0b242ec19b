"""The noise floor: how far a result moves when nothing that it claims has changed.

One small fixed setting, `noise-floor.yaml`, is run over seeds, over the batch of the attack stage,
over thread counts, and twice in the same way with nothing reused. Each run is written to its folder
as it ends, so a killed measurement goes on where it was. `docs/noise-floor.md` holds the tables.

    python benchmarks/noise_floor.py --work DIR --data-root DATASETS
    python benchmarks/noise_floor.py --work DIR --tables
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from mibench.artifacts import ArtifactStore
from mibench.files import Json, pretty_json, write_atomically
from mibench.job import SUITE, Job
from mibench.protocol import load_protocol
from mibench.record import Record, Score, read_record

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "noise-floor.json"
DEFENSES = ("none", "noise", "privdfs")
SEEDS = (0, 1, 2, 3, 4)
BATCHES = (8, 64)
COLUMNS = ("mse", "psnr", "ssim", "recognition", "reid-top1", "reid-top5", "reid-mrr")
TABLED = (*COLUMNS[1:], "leakage(psnr)", "leakage(ssim)", "leakage(reid-mrr)", "accuracy")
ATTACKS = ("linear", "decoder", SUITE)


@dataclass(frozen=True)
class Variant:
    """One run of the setting.

    Attributes:
        name: of its folder.
        seed: of the run.
        changes: to the protocol.
        cache: name of the cache that it uses; another name means that nothing is reused.
    """

    name: str
    seed: int
    changes: dict[str, Json]
    cache: str = "shared"


def variants() -> Iterator[Variant]:
    """All runs, the base (seed 0) first."""
    yield from (Variant(f"seed-{seed}", seed, {}) for seed in SEEDS)
    yield from (Variant(f"batch-{size}", 0, {"batch": size}) for size in BATCHES)
    yield Variant("again", 0, {}, "again")
    yield Variant("threads-2", 0, {"threads": 2})


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing, or prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of runs and caches")
    parser.add_argument("--data-root", type=Path, help="datasets in the hub's layout")
    parser.add_argument("--tables", action="store_true", help="run nothing, print what is there")
    options = parser.parse_args(arguments)
    if not options.tables:
        for variant in variants():
            for defense in DEFENSES:
                run(variant, defense, options.work, options.data_root)
                summarise(options.work)
    summarise(options.work)
    tables()


def run(variant: Variant, defense: str, work: Path, data_root: Path | None) -> None:
    """Runs one variant of one defense, unless its folder holds a finished record."""
    from mibench.evaluate import evaluate
    from mibench.outputs import write_result

    out = work / "runs" / variant.name / defense
    if (out / "record.json").exists():
        return
    protocol = load_protocol(str(HERE / "noise-floor.yaml")).changed(variant.changes)
    job = Job(protocol, defense, SUITE, {}, {}, variant.seed)
    store = ArtifactStore(work / "caches" / variant.cache)
    print(f"{variant.name} {defense}", flush=True)
    write_result(evaluate(job, store, data_root, "cpu"), out)


def read(work: Path, variant: str, defense: str, attack: str) -> tuple[Record, pd.DataFrame] | None:
    """A finished run's record and per-image values; None where it is not there yet."""
    out = work / "runs" / variant / defense
    out = out if attack == SUITE else out / attack
    if not (out / "record.json").exists():
        return None
    return read_record(out), pd.read_parquet(out / "per_image.parquet")


def numbers(record: Record) -> dict[str, float]:
    """The means of a record that the tables show, by name."""
    wanted: list[Score] = [*record.scores, *record.leakage, *record.utility]
    keep = {"mse", *TABLED}
    return {one.metric: one.value for one in wanted if one.metric in keep and one.value is not None}


def summarise(work: Path) -> None:
    """Writes the means of all finished runs, and how far each is from the base, image by image."""
    found: list[Json] = []
    for variant in variants():
        for defense in DEFENSES:
            for attack in ATTACKS:
                base = read(work, "seed-0", defense, attack)
                one = read(work, variant.name, defense, attack)
                if base is None or one is None:
                    continue
                record, table = one
                apart = {name: float(np.abs(table[name] - base[1][name]).max()) for name in COLUMNS}
                found.append(
                    {
                        "variant": variant.name,
                        "defense": defense,
                        "attack": attack,
                        "corrupted": record.adversary.corrupted if record.adversary else [],
                        "weights": record.defense_facts["trained_weights"],
                        "numbers": numbers(record),
                        "greatest difference from seed-0, per image": apart,
                        "identical to seed-0": table.equals(base[1]),
                        "torch": record.provenance["packages"]["torch"],  # type: ignore[index,call-overload]
                    }
                )
    RESULTS.parent.mkdir(exist_ok=True)
    write_atomically(RESULTS, pretty_json(found))


def tables() -> None:
    """Prints the tables of `docs/noise-floor.md` from the results that are there."""
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))
    found = {(one["variant"], one["defense"], one["attack"]): one for one in runs}
    worst = dict.fromkeys(TABLED, 0.0)
    print("Standard deviation over seeds (mean in brackets)\n")
    print(f"| defense | attack | seeds | {' | '.join(TABLED)} |")
    print(f"| --- | --- | --- |{' --- |' * len(TABLED)}")
    for defense, attack in product(DEFENSES, ATTACKS):
        seeds = [found.get((f"seed-{seed}", defense, attack)) for seed in SEEDS]
        numbers = [one["numbers"] for one in seeds if one is not None]
        cells = []
        for name in TABLED:
            values = [one[name] for one in numbers if name in one]
            if len(values) < 2:
                cells.append("-")
                continue
            spread = statistics.stdev(values)
            worst[name] = max(worst[name], spread)
            cells.append(f"{spread:.4f} ({statistics.fmean(values):.3f})")
        print(f"| {defense} | {attack} | {len(numbers)} | {' | '.join(cells)} |")
    print("\nTwo runs of other seeds are this far apart at most, in 95 of 100 cases (2.8 times the")
    print("largest deviation above):", {name: round(2.8 * one, 4) for name, one in worst.items()})
    print("\nChange of the means from seed 0, and the greatest of any image in brackets\n")
    print("| variant | defense | attack | PSNR, dB | SSIM | accuracy | identical |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (variant, defense, attack), one in found.items():
        base = found.get(("seed-0", defense, attack))
        if variant.startswith("seed-") or base is None:
            continue
        change = {k: one["numbers"][k] - base["numbers"][k] for k in ("psnr", "ssim", "accuracy")}
        apart = one["greatest difference from seed-0, per image"]
        cells = [f"{change[name]:+.5f} ({apart[name]:.5f})" for name in ("psnr", "ssim")]
        same = "yes" if one["identical to seed-0"] else "no"
        print(f"| {variant} | {defense} | {attack} | {cells[0]} | {cells[1]} | "
              f"{change['accuracy']:+.4f} | {same} |")  # fmt: skip


if __name__ == "__main__":
    main()
