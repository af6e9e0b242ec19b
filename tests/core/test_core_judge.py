"""The judge: one for all runs of a protocol, what it has learned from, and what it tells."""

import dataclasses

import pytest
import torch
from test_core_evaluate import protocol as plain

from mibench import exhibit, judge
from mibench.artifacts import ArtifactStore
from mibench.controls import best_guess, blind_guesses
from mibench.data.roles import load_roles
from mibench.data.sets import ImageSet
from mibench.evaluate import evaluate
from mibench.exhibit import open_case
from mibench.job import SUITE, Job
from mibench.judge import SmallVgg, degrade, train_judge
from mibench.params import build
from mibench.protocol import JudgeRule
from mibench.record import read_record
from mibench.scoring import score
from mibench.task import Attributes

JUDGED = ("recognition", "reid-top1", "reid-top5", "reid-mrr")
RULE = {"width": 8, "recipe": {"steps": 80, "batch": 32, "lr": 0.1, "crop": 0}, "gallery": 40}


def protocol(**changes):
    """The tiny protocol with more images, and a judge."""
    data = plain().data.model_dump(mode="json")
    for role, count in {"auxiliary": 256, "validation": 24, "private": 48}.items():
        data[role]["count"] = count
    values = {
        "id": "judged-v1",
        "data": data,
        "attacks": {"linear": {}, "gradient": {"steps": 4, "tuning_images": 2, "weights": [0.1]}},
        "metrics": {"mse": 1, "psnr": 1, **dict.fromkeys(JUDGED, 1)},
        "judge": RULE,
    }
    return plain(**(values | changes))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One cache for the tests of this file, so that the judge is trained once."""
    return ArtifactStore(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def roles(store):
    return load_roles(protocol().data, None, store.root)


@pytest.fixture(scope="module")
def case(store, roles):
    return open_case(protocol(), roles, store, "cpu")


def run(store, attack="linear", defense="none", seed=0, **changes):
    what = Job(protocol(**changes), defense, attack, {}, {}, seed)
    return evaluate(what, store, None, "cpu")


class Watched(ArtifactStore):
    """Counts what is made."""

    def __init__(self, root):
        super().__init__(root)
        self.made = []

    def fetch(self, kind, spec, make):
        def noted(checkpoint):
            self.made.append(kind)
            return make(checkpoint)

        return super().fetch(kind, spec, noted)


def trained(roles, root, rule=None, **changes):
    chosen = protocol(judge=rule or RULE, **changes)
    watched = Watched(root)
    return train_judge(chosen.judge, chosen, roles, watched, "cpu"), watched.made


# --- training ------------------------------------------------------------------------------------


def test_all_runs_of_a_protocol_share_one_judge(store, roles):
    judge, _ = trained(roles, store.root)
    for seed in (0, 1):
        assert run(store, seed=seed).record.judge.artifact == judge.artifact
    again, made = trained(roles, store.root)
    assert made == []
    assert again.weights == judge.weights
    # Neither the gallery nor the target's own recipe has a part in it.
    same, made = trained(roles, store.root, RULE | {"gallery": 20}, seeds=[5])
    assert (made, same.artifact) == ([], judge.artifact)


def test_a_judge_that_is_trained_again_is_the_same(store, roles, tmp_path):
    judge, _ = trained(roles, store.root)
    again, made = trained(roles, tmp_path)
    assert made == ["judge"]
    assert (again.artifact, again.weights) == (judge.artifact, judge.weights)


@pytest.mark.parametrize(
    "change",
    [{"width": 4}, {"degraded": 0.0}, {"recipe": RULE["recipe"] | {"steps": 2}}],
    ids=["width", "degraded", "steps"],
)
def test_another_rule_is_another_judge(store, roles, change):
    judge, _ = trained(roles, store.root)
    short = RULE | {"recipe": RULE["recipe"] | {"steps": 2}} | change
    other, _ = trained(roles, store.root, short)
    assert other.artifact != judge.artifact


def test_it_learns_from_the_auxiliary_images_alone(store, roles, tmp_path):
    """All other roles may hold anything."""
    judge, _ = trained(roles, store.root)
    nothing = ImageSet(torch.zeros(64, 3, 32, 32, dtype=torch.uint8), torch.zeros(64).long())
    blank = dataclasses.replace(roles, train=nothing, validation=nothing, private=nothing)
    other, made = trained(blank, tmp_path)
    assert made == ["judge"]
    assert other.weights == judge.weights


def test_it_learns(store, roles):
    judge, _ = trained(roles, store.root)
    course = [value for _, value in judge.facts["history"]["task"]]
    assert sum(course[-5:]) < 0.9 * sum(course[:5])
    private = roles.private
    told = roles.task.correct(judge.logits(private.images()), private.labels).mean()
    assert told > 2 / roles.task.outputs


@pytest.mark.parametrize(("side", "map_side"), [(32, 32), (64, 32), (112, 56), (224, 56)])
def test_larger_images_enter_with_a_larger_stride(side, map_side):
    network = SmallVgg(side, 5, 2).eval()
    images = torch.rand(2, 3, side, side)
    assert network.features[0](images).shape == (2, 2, map_side, map_side)
    assert network.embed(images).shape == (2, 16)
    assert network(images).shape == (2, 5)
    assert SmallVgg(8, 5, 2).eval()(torch.rand(1, 3, 8, 8)).shape == (1, 5)


def test_attributes_are_learned_and_counted(roles, tmp_path):
    """Of yes-or-no labels, recognition is the share that is told rightly."""

    def binary(images):
        return ImageSet(images.raw(), torch.stack([images.labels % 2, images.labels < 5], 1).byte())

    parts = {name: binary(getattr(roles, name)) for name in ("auxiliary", "validation", "private")}
    faces = dataclasses.replace(roles, **parts, task=Attributes(("odd", "low")))
    found = open_case(protocol(), faces, ArtifactStore(tmp_path), "cpu")
    originals = found.attacked.originals
    values = score(("recognition",), originals, found.attacked, 0).per_image["recognition"]
    assert set(values.tolist()) <= {0.0, 0.5, 1.0}
    assert found.judge.accuracy == pytest.approx(values.mean().item())


@pytest.mark.parametrize("side", [32, 64, 224])
def test_long_blurs_are_not_made_in_mixed_precision(side, monkeypatch):
    """There are processors on which they never end; short ones stay as they were measured."""
    seen, convolve = set(), torch.nn.functional.conv2d

    def watched(images, kernel, groups):
        seen.add((kernel.numel() // 3, torch.is_autocast_enabled("cpu")))
        return convolve(images, kernel, groups=groups)

    monkeypatch.setattr(judge.F, "conv2d", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for seed in range(16):
            degrade(torch.rand(2, 3, side, side), 1.0, torch.Generator().manual_seed(seed))
    assert (max(taps for taps, _ in seen) > judge.MIXED_TAPS) == (side > 32)
    assert all(mixed == (taps <= judge.MIXED_TAPS) for taps, mixed in seen)


def test_degraded_images_are_blurred_noisy_and_in_range():
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = degrade(images, 0.5, torch.Generator().manual_seed(1))
    assert torch.equal(found[4:], images[4:])
    assert (found[:4] - images[:4]).abs().flatten(1).max(1).values.min() > 0.05
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(degrade(images, 0.0, torch.Generator()), images)
    flat = degrade(torch.full((2, 3, 16, 16), 0.5), 1.0, torch.Generator().manual_seed(1))
    assert flat.mean() == pytest.approx(0.5, abs=0.01), "a blur keeps the mean"


# --- the case ------------------------------------------------------------------------------------


def test_the_gallery_holds_the_attacked_images_and_enough_others(case, roles):
    assert case.judge.gallery == 40
    assert case.judge.trained_on == "auxiliary"
    assert case.judge.backbone.name == "small-vgg"
    originals = case.attacked.originals
    assert torch.equal(originals, roles.attacked.images())
    found = score(JUDGED, originals, case.attacked, 0).per_image
    assert found["reid-top1"].tolist() == [1.0] * 12
    assert found["recognition"].mean().item() == pytest.approx(case.judge.accuracy)


def test_what_the_judge_sees_falls_from_the_original_over_a_blur_to_a_blind_guess(case, roles):
    originals = case.attacked.originals
    blurred = torch.nn.functional.avg_pool2d(originals, 4).repeat_interleave(4, 2)
    blurred = blurred.repeat_interleave(4, 3)
    blind = blind_guesses(roles.auxiliary, 12)["mean-image"]
    values = [
        score(("reid-mrr",), images, case.attacked, 0).summary[0].value
        for images in (originals, blurred, blind)
    ]
    assert values[0] == 1
    assert values[0] > values[1] > values[2]


def test_blind_guesses_are_chosen_on_validation_images(case, roles):
    """A guess that is perfect on the private images, and useless on the attacker's own."""
    originals, known = case.attacked.originals, case.known.originals
    guesses = {"cheat": originals, "honest": known}
    for one in best_guess(("psnr", "reid-mrr"), guesses, case, 0).summary:
        assert one.source == "honest"


def test_without_a_judge_the_scores_are_null_with_the_reason(store):
    record = run(store, judge=None).record
    assert record.judge is None
    for group in ("scores", "undefended", "prior_only", "permuted", "leakage"):
        for one in getattr(record, group)[2:]:
            assert one.value is None
            assert "judged-v1 names no judge" in one.reason
    assert record.scores[0].value is not None


def test_an_attacker_without_labels_leaves_no_judge(roles, store):
    rule = build(JudgeRule, RULE, "judge")
    other = protocol().model_copy(
        update={
            "judge": rule,
            "adversary": protocol().adversary.model_copy(update={"auxiliary": "other"}),
        }
    )
    found = open_case(other, roles, store, "cpu")
    assert found.judge is None
    (told,) = score(("recognition",), found.attacked.originals, found.attacked, 0).summary
    assert "none of these labels" in told.reason


def test_too_few_images_for_the_gallery_leave_recognition_alone(store):
    record = run(store, judge=RULE | {"gallery": 49}).record
    scores = {one.metric: one for one in record.scores}
    assert scores["recognition"].value is not None
    assert "a gallery of 49 images is needed, and only 48 private ones differ" in (
        scores["reid-mrr"].reason
    )
    assert record.judge.gallery == 0


# --- the record ----------------------------------------------------------------------------------


def test_a_record_has_judged_scores_with_controls_and_leakage(store, tmp_path):
    result = run(store, SUITE, defense="noise")
    record = result.record
    (tmp_path / "record.json").write_bytes(record.to_json())
    assert read_record(tmp_path) == record
    metrics = [one.metric for one in record.scores]
    assert metrics == ["mse", "psnr", *JUDGED]
    for name in JUDGED:
        parts = [result.parts[attack].per_image[name] for attack in ("linear", "gradient")]
        assert torch.equal(result.per_image[name], torch.stack(parts).max(0).values)
        assert f"undefended_{name}" in result.per_image
        assert f"prior_only_{name}" in result.per_image
    assert 0 < record.judge.accuracy <= 1
    assert record.protocol.values["judge"]["width"] == 8
    assert [(one.metric, one.source) for one in record.distribution] == [
        ("fid", "attack"), ("kid", "attack"),
    ]  # fmt: skip
    assert all(one.reason for one in record.distribution)
    part = result.parts["linear"].record
    assert [one.source for one in part.distribution] == ["attack"] * 2 + ["undefended"] * 2
    assert part.judge == record.judge


def test_features_are_computed_once_for_all_metrics_and_never_mistaken(case, monkeypatch):
    witness, asked = case.attacked.witness, []
    kind = type(witness._seer)
    embed = kind.embed
    monkeypatch.setattr(exhibit, "KEPT", 2)
    monkeypatch.setattr(witness, "_remembered", {})
    monkeypatch.setattr(kind, "embed", lambda self, x: asked.append(len(x)) or embed(self, x))
    originals = case.attacked.originals
    sets = [originals, originals.flip(0), originals.flip(3), originals]
    found = [score(JUDGED[1:], images, case.attacked, 0) for images in sets]
    # Four sets of one batch each (the first was forgotten when it came again), beside the gallery.
    assert asked.count(len(originals)) == 4
    assert found[0].per_image["reid-mrr"].tolist() == [1.0] * len(originals)
    assert found[1].per_image["reid-mrr"].mean() < 1
    assert all(found[0].per_image[k].equal(found[3].per_image[k]) for k in JUDGED[1:])
