"""The noise floor: how far a result moves when nothing that it claims has changed.

One small fixed setting, `noise-floor.yaml`, is run over seeds, over the batch of the attack stage,
over thread counts, and twice in the same way with nothing reused. Each run is written to its folder
as it ends, so a killed measurement goes on where it was. `docs/noise-floor.md` holds the tables.

    python benchmarks/noise_floor.py --work DIR --data-root DATASETS
    python benchmarks/noise_floor.py --work DIR --tables
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
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
SCORES = ("psnr", "ssim", "leakage(psnr)", "leakage(ssim)")
COLUMNS = ("mse", "psnr", "ssim")
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
    for seed in SEEDS:
        yield Variant(f"seed-{seed}", seed, {})
        if seed == 0:
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
    tables(options.work)


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
    keep = (*SCORES, "mse", "accuracy")
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


def tables(work: Path) -> None:
    """Prints standard deviations over seeds, and the differences of the other variants."""
    names = ("psnr", "ssim", "leakage(psnr)", "leakage(ssim)", "accuracy")
    print("Standard deviation over seeds (mean)\n")
    print(f"| defense | attack | seeds | {' | '.join(names)} |")
    print(f"| --- | --- | --- |{' --- |' * len(names)}")
    for defense in DEFENSES:
        for attack in ATTACKS:
            runs = [read(work, f"seed-{seed}", defense, attack) for seed in SEEDS]
            found = [numbers(one[0]) for one in runs if one is not None]
            if len(found) < 2:
                continue
            cells = []
            for name in names:
                values = [one[name] for one in found if name in one]
                spread = statistics.stdev(values) if len(values) > 1 else float("nan")
                cells.append(f"{spread:.4f} ({statistics.fmean(values):.3f})" if values else "-")
            print(f"| {defense} | {attack} | {len(found)} | {' | '.join(cells)} |")
    print("\nDifference of the means from seed 0, and the greatest of any image in brackets\n")
    print("| variant | defense | attack | PSNR, dB | SSIM | accuracy | identical |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for variant in variants():
        if variant.name.startswith("seed-"):
            continue
        for defense in DEFENSES:
            for attack in ATTACKS:
                base = read(work, "seed-0", defense, attack)
                one = read(work, variant.name, defense, attack)
                if base is None or one is None:
                    continue
                before, after = numbers(base[0]), numbers(one[0])
                cells = [
                    f"{after[name] - before[name]:+.5f} "
                    f"({np.abs(one[1][name] - base[1][name]).max():.5f})"
                    for name in ("psnr", "ssim")
                ]
                cells.append(f"{after['accuracy'] - before['accuracy']:+.4f}")
                same = "yes" if one[1].equals(base[1]) else "no"
                print(f"| {variant.name} | {defense} | {attack} | {' | '.join(cells)} | {same} |")


if __name__ == "__main__":
    main()
