"""Folders of finished runs without the hours of a run: made-up pictures, honest arithmetic."""

import hashlib
import json

import torch

from mibench import seeding
from mibench.controls import permute
from mibench.data.procedural import Procedural
from mibench.data.roles import private_images
from mibench.data.sets import ImageSet
from mibench.evaluate import Result, manifest_text, open_record
from mibench.job import Job
from mibench.metrics.distribution import SET_METRICS
from mibench.metrics.intervals import estimate_mean, normalised_leakage
from mibench.outputs import write_result
from mibench.protocol import ROLES, load_protocol
from mibench.record import AdversaryFacts, Calibration, Cost, DataFacts, JudgeFacts, Score
from mibench.registry import measures, metrics
from mibench.scoring import Scores, leakage_scores, spread, utility_scores
from mibench.stored import rounded
from mibench.task import Classification

ID = "cifar10-lite-v1"
METRICS = ("mse", "psnr", "ssim")


def pictures(count, side, seed):
    """Smooth images that all differ, uint8."""
    draws = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=draws)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    return ImageSet((smooth * 255).round().to(torch.uint8), torch.arange(count) % 10)


def disturbed(images, deviation, seed):
    draws = torch.Generator().manual_seed(seed)
    return (images + deviation * torch.randn(images.shape, generator=draws)).clamp(0, 1)


def forge(folder, *, seed=0, undefended=0.012, attack="decoder", protocol_id=ID):
    """Writes the folder of a run of the protocol.

    Args:
        folder: where.
        seed: of the run.
        undefended: deviation of the noise on the reconstructions of the undefended split; 0.012 is
            38 dB.
        attack: a built-in attack of the protocol.
        protocol_id: id of a released protocol whose private role is a range.
    """
    protocol = load_protocol(protocol_id)
    data = protocol.data
    names = tuple(name for name in protocol.metrics if name in METRICS)
    job = Job(protocol, "noise", attack, {}, {}, seed)
    opened = open_record(job, "cpu")
    if data.dataset == "procedural":
        source = Procedural(None, data.image_size, folder)
        whole, chosen = private_images(source, data)
        private, hashes = whole.at(chosen), whole.hashes()
    else:  # nobody scores these again: the real ones are not at hand
        private = pictures(data.attacked, data.image_size, 1)
        hashes = private.hashes() + [
            hashlib.sha256(str(at).encode()).hexdigest()
            for at in range(data.private.count - data.attacked)
        ]
    originals = private.images()
    rebuilt = rounded(disturbed(originals, 0.05, 3))
    bare = rounded(disturbed(originals, undefended, 4))
    mean = rounded(torch.full_like(originals, 0.5))
    permuted = permute((rebuilt,))[0]
    draws = seeding.derive(seed, "intervals")
    scored = {
        "scores": scores_of(names, rebuilt, originals, draws),
        "undefended": scores_of(names, bare, originals, draws),
        "permuted": scores_of(names, permuted, originals, draws),
        "prior_only": scores_of(names, mean, originals, draws).named("mean-image"),
    }
    right = torch.rand(data.private.count, generator=torch.Generator().manual_seed(5)) < 0.7
    logits = torch.nn.functional.one_hot(right.long(), 2).float()
    truth = torch.ones(len(right), dtype=torch.int64)
    two = Classification(("wrong", "right"))
    reached = next(s.value for s in scored["undefended"].summary if s.metric == "psnr")
    reference = protocol.references.get(attack)
    calibrated = None if reference is None else reached >= reference
    missing = [name for name in protocol.metrics if name not in names]
    fields = {place: one.summary for place, one in scored.items()}
    fields["leakage"] = leakage_scores(
        scored["scores"], scored["prior_only"], scored["undefended"], draws
    )
    fields = without_values(fields, missing)
    record = opened.completed(
        protocol=opened.protocol.model_copy(
            update={"ranked": opened.protocol.ranked and calibrated is not False}
        ),
        data=DataFacts(
            dataset=data.dataset,
            image_size=data.image_size,
            images={role: getattr(data, role).count for role in ROLES}
            | {"attacked": data.attacked},
            identities={role: getattr(data, role).identity or "" for role in ROLES},
            left_out={},
        ),
        manifest=hashlib.sha256(manifest_text(hashes)).hexdigest(),
        adversary=AdversaryFacts(knowledge="white_box", corrupted=[0], screening={}),
        utility=[
            *utility_scores("", two, logits, truth, draws),
            *utility_scores("undefended ", two, logits, truth, draws),
        ],
        judge=JudgeFacts(
            artifact="forged",
            weights="forged",
            backbone=opened.backbone,
            trained_on="auxiliary",
            accuracy=0.75,
            gallery=0,
        ),
        information=unmeasured(name for name in measures.names()),
        information_undefended=unmeasured(name for name in measures.names()),
        distribution=[
            one.model_copy(update={"source": source})
            for source in ("attack", "undefended")
            for one in unmeasured(metric.name for metric in SET_METRICS)
        ],
        cost=Cost(
            client_parameters=1792,
            client_flops=900_000,
            undefended_client_flops=900_000,
            bytes_up=65536,
            bytes_down=40,
            values_per_server=[16384],
            image_values=3072,
        ),
        calibration=[
            Calibration(attack=attack, reached=reached, reference=reference, calibrated=calibrated)
        ],
        seconds_per_image=0.002,
        provenance=opened.provenance | {"revision": None},
        **fields,
    )
    columns = {
        **scored["scores"].columns(""),
        **scored["undefended"].columns("undefended_"),
        **scored["permuted"].columns("permuted_"),
        **scored["prior_only"].columns("prior_only_"),
        "correct": right[: data.attacked].float(),
    }
    controls = {"permuted": permuted, "mean-image": mean, "typical-image": rebuilt[:1]}
    result = Result(record, hashes, CLASSES, private, rebuilt, controls, columns, undefended=bare)
    return write_result(result, folder)


def unmeasured(names):
    """Numbers without a value, with the unit and direction that they have."""
    found = []
    for name in names:
        known = next((one for one in SET_METRICS if one.name == name), None)
        higher = measures.load(name).higher_is_better if known is None else False
        unit = measures.load(name).unit if known is None else known.unit
        found.append(
            Score(
                metric=name,
                version=1,
                unit=unit,
                higher_is_better=higher,
                value=None,
                ci_low=None,
                ci_high=None,
                n=0,
                reason="it was not measured",
            )
        )
    return found


def scores_of(names, images, originals, draws):
    """Scores from the metrics themselves."""
    per_image, summary = {}, []
    for name in names:
        metric = metrics.load(name)()
        values = per_image[name] = metric(images, originals)
        mean = estimate_mean(values, draws)
        summary.append(
            Score(
                metric=name,
                version=metric.version,
                unit=metric.unit,
                higher_is_better=metric.more_leakage == "higher",
                value=mean.value,
                ci_low=mean.low,
                ci_high=mean.high,
                n=mean.n,
                **spread(values, metric.more_leakage),
            )
        )
    return Scores(summary, per_image)


def without_values(fields, missing):
    """The protocol's other metrics, which could not be computed here."""
    found = {}
    for place, scores in fields.items():
        blank = scores[0].model_copy(
            update=dict.fromkeys(("value", "ci_low", "ci_high", "p50", "p95", "worst", "source"))
            | {"n": 0, "reason": "its weights are not here"}
        )
        found[place] = list(scores)
        for name in missing:
            known = metrics.load(name)
            own = {
                "metric": name,
                "version": known.version,
                "unit": known.unit,
                "higher_is_better": known.more_leakage == "higher",
            }
            if place == "leakage":
                own |= {"metric": f"leakage({name})", "unit": blank.unit, "higher_is_better": True}
            found[place].append(blank.model_copy(update=own))
    return found


CLASSES = Classification(tuple("abcdefghij"))


# --- what a cheat needs --------------------------------------------------------------------------


def read(folder):
    """The values of ``record.json``."""
    return json.loads((folder / "record.json").read_text())


def write(folder, values):
    """Replaces ``record.json``; what it says of the files stays."""
    (folder / "record.json").write_text(json.dumps(values))


def score_of(values, place, metric):
    """One score among the values of a record."""
    return next(one for one in values[place] if one["metric"] == metric)


def cover_up(folder, values):
    """Writes the record with hashes of the files that are there now."""
    files = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("grid.png", "manifest.txt", "per_image.parquet")
    }
    for kind in sorted({"reconstructions", *values["files"]} - set(files)):
        together = hashlib.sha256()
        for path in sorted((folder / kind).glob("*.png")):
            together.update(path.read_bytes())
        files[kind] = together.hexdigest()
    values["files"] = files
    values["manifest"] = files["manifest.txt"]
    write(folder, values)


def reckon(folder, values, table):
    """Writes other per-image values, and a record that follows from them in every number."""
    table.to_parquet(folder / "per_image.parquet", index=False)
    draws = seeding.derive(values["seed"], "intervals")
    prefixes = {
        "scores": "",
        "undefended": "undefended_",
        "permuted": "permuted_",
        "prior_only": "prior_only_",
    }

    def column(name):
        return torch.tensor(table[name].tolist(), dtype=torch.float64)

    for place, prefix in prefixes.items():
        for one in values[place]:
            if one["value"] is None:
                continue
            told = column(prefix + one["metric"])
            mean = estimate_mean(told, draws)
            one |= {"value": mean.value, "ci_low": mean.low, "ci_high": mean.high, "n": mean.n}
            one |= spread(told, "higher" if one["higher_is_better"] else "lower")
    for one, base in zip(values["leakage"], values["scores"], strict=True):
        if base["value"] is None:
            continue
        share = normalised_leakage(
            *(column(prefix + base["metric"]) for prefix in ("", "prior_only_", "undefended_")),
            more_leakage="higher" if base["higher_is_better"] else "lower",
            seed=draws,
        )
        one |= {"value": share.value, "ci_low": share.low, "ci_high": share.high, "n": share.n}
    for one in values["calibration"]:
        one["reached"] = score_of(values, "undefended", "psnr")["value"]
    cover_up(folder, values)
