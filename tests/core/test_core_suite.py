"""All attacks of a protocol at once, whether they are strong enough, and the worst of them."""

import json

import pytest
import torch
from small_protocol import small_protocol

from mibench import strike
from mibench.artifacts import ArtifactStore
from mibench.errors import InvalidParamsError, NotApplicableError
from mibench.evaluate import evaluate
from mibench.exhibit import Exhibit
from mibench.job import SUITE, Job
from mibench.outputs import write_result
from mibench.record import read_record
from mibench.scoring import Scores, credit, gained, score, worst_of

DECODER = {"steps": 60, "batch": 16, "lr": 5e-3}
GRADIENT = {"steps": 20, "tuning_images": 2, "restarts": 1, "weights": [0.1]}


def protocol(**changes):
    attacks = {"decoder": DECODER, "gradient": GRADIENT}
    return small_protocol("suite-v1", **{"attacks": attacks} | changes)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return ArtifactStore(tmp_path_factory.mktemp("cache"))


def run(store, defense="noise", attack=SUITE, params=None, converge=False, seed=0, **changes):
    what = Job(protocol(**changes), defense, attack, {}, params or {}, seed, converge=converge)
    return evaluate(what, store, None, "cpu")


@pytest.fixture(scope="module")
def suite(store):
    return run(store)


def test_a_suite_is_the_worst_of_its_attacks_for_each_image(suite, store):
    alone = {name: run(store, attack=name) for name in ("decoder", "gradient")}
    worst = {"mse": torch.minimum, "psnr": torch.maximum, "ssim": torch.maximum}
    for metric, pick in worst.items():
        for prefix in ("", "undefended_", "permuted_"):
            one, other = (part.per_image[prefix + metric] for part in alone.values())
            assert torch.equal(suite.per_image[prefix + metric], pick(one, other))
        summary = {one.metric: one.value for one in suite.record.scores}
        assert summary[metric] == pytest.approx(suite.per_image[metric].mean().item(), rel=1e-5)
    assert suite.record.attack.name == SUITE
    assert list(suite.record.attack.params) == ["decoder", "gradient"]
    assert suite.record.attack.params["gradient"]["steps"] == 20


def test_a_suite_shows_of_each_image_what_came_closest(suite):
    parts = {name: part.per_image["ssim"] for name, part in suite.parts.items()}
    for at in range(12):
        best = max(parts, key=lambda name: parts[name][at].item())
        expected = suite.parts[best].reconstructions[at]
        assert torch.equal(suite.reconstructions[at], expected)


def test_a_suite_says_what_each_attack_did_alone(suite, store):
    told = {part.attack: part for part in suite.record.suite}
    assert list(told) == ["decoder", "gradient"]
    for name, part in told.items():
        assert part.scores == run(store, attack=name).record.scores
    for metric in ("mse", "psnr", "ssim"):
        assert sum(part.share_of_worst[metric] for part in told.values()) == pytest.approx(1)
    assert torch.equal(suite.per_image["decoder_psnr"], suite.parts["decoder"].per_image["psnr"])


def test_a_suite_goes_on_without_an_attack_that_does_not_apply(store, monkeypatch):
    def never(self, target, auxiliary, validation):
        raise NotApplicableError("no way in")

    monkeypatch.setattr("mibench.attacks.gradient.Gradient.prepare", never)
    found = run(store, seed=7)
    decoder, gradient = found.record.suite
    assert (gradient.attack, gradient.scores, gradient.reason) == ("gradient", [], "no way in")
    assert decoder.share_of_worst == {"mse": 1, "psnr": 1, "ssim": 1}
    assert torch.equal(found.reconstructions, found.parts["decoder"].reconstructions)
    assert list(found.parts) == ["decoder"]
    with pytest.raises(NotApplicableError, match="no way in"):
        run(store, attack="gradient", seed=7)
    with pytest.raises(NotApplicableError, match="no way in"):
        run(store, seed=7, attacks={"gradient": GRADIENT})


def test_an_attack_is_timed_when_it_is_made_and_not_when_it_is_reused(suite, store):
    again = run(store)
    for one, other in zip(suite.record.suite, again.record.suite, strict=True):
        assert one.seconds_per_image == other.seconds_per_image > 0
    total = sum(one.seconds_per_image for one in suite.record.suite)
    assert suite.record.seconds_per_image == pytest.approx(total)


def test_the_files_of_a_suite_hold_each_attack(suite, tmp_path):
    record = write_result(suite, tmp_path / "run")
    assert read_record(tmp_path / "run") == record
    for name in ("decoder", "gradient"):
        part = read_record(tmp_path / "run" / name)
        assert part.attack.name == name
        assert part.status == "success"


def test_parameters_of_a_suite_are_given_by_attack(store):
    found = run(store, params={"gradient": {"steps": 2}}).record
    assert found.attack.params["gradient"]["steps"] == 2
    assert found.attack.params["decoder"]["steps"] == 60
    assert "gradient.steps set by hand" in found.deviations


def test_a_protocol_without_attacks_has_no_suite(store):
    with pytest.raises(InvalidParamsError, match="names no attacks"):
        run(store, attacks={})


@pytest.mark.parametrize(("reference", "calibrated"), [(5.0, True), (59.0, False), (None, None)])
def test_an_attack_below_its_reference_is_not_calibrated(store, reference, calibrated):
    references = {} if reference is None else {"decoder": reference}
    (told,) = run(store, attack="decoder", references=references).record.calibration
    assert told.calibrated is calibrated
    undefended = {one.metric: one.value for one in run(store, attack="decoder").record.undefended}
    assert told.reached == pytest.approx(undefended["psnr"])


def test_a_changed_protocol_has_no_references():
    one = protocol(references={"decoder": 30.0})
    assert one.changed({"recipe": {"steps": 3}}).references == {}
    assert one.on(one.data).references == {}


def test_references_change_no_result():
    assert protocol(references={"decoder": 30.0}).content_id == protocol().content_id


def test_convergence_compares_with_an_honest_run_of_twice_the_budget(store):
    before = run(store, attack="gradient", converge=True)
    after = run(store, attack="gradient", params={"steps": 40})
    (told,) = before.record.convergence
    assert told.budget == {"steps": (20, 40)}
    for metric, sign in {"mse": -1, "psnr": 1, "ssim": 1}.items():
        change = (after.per_image[metric] - before.per_image[metric]).mean().item()
        assert told.gained[metric] == pytest.approx(sign * change, abs=1e-5)
    enough = abs(told.gained["psnr"]) <= 0.5 and abs(told.gained["ssim"]) <= 0.02
    assert told.converged is enough
    assert run(store, attack="gradient").record.convergence is None


@pytest.mark.parametrize(("allowed", "converged"), [(0.01, False), (50.0, True)])
def test_an_attack_that_gains_more_than_allowed_has_not_converged(
    store, monkeypatch, allowed, converged
):
    monkeypatch.setattr(strike, "CONVERGED", {"psnr": allowed})
    (told,) = run(store, "none", "gradient", converge=True).record.convergence
    assert told.gained["psnr"] > 0.1
    assert told.converged is converged


def test_worst_and_gained_follow_the_direction_of_each_metric():
    originals = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    near, far = 0.9 * originals, 0.2 * originals
    mixed = torch.stack([near[0], far[1], near[2]])
    other = torch.stack([far[0], near[1], far[2]])
    names = ("mse", "psnr", "ssim")
    exhibit = Exhibit(originals)
    parts = {"a": score(names, mixed, exhibit, 0), "b": score(names, other, exhibit, 0)}
    found = worst_of(parts, 0)
    worst = found.scores
    best = score(names, near, exhibit, 0)
    for name in names:
        assert found.chosen[name] == ["a", "b", "a"]
        assert found.shares[name] == pytest.approx({"a": 2 / 3, "b": 1 / 3})
        assert torch.equal(worst.per_image[name], best.per_image[name])
    assert worst.summary == best.summary
    assert all(value > 0 for value in gained(score(names, far, exhibit, 0), best).values())
    assert isinstance(worst, Scores)


def test_attacks_that_are_equally_bad_share_the_credit():
    harm = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    # All three for the first image and the last, one alone for each of the others.
    assert credit(harm).tolist() == pytest.approx([5 / 12, 5 / 12, 2 / 12])
    assert credit(harm.flip(0)).tolist() == pytest.approx([2 / 12, 5 / 12, 5 / 12])


def test_a_record_of_an_older_format_is_still_read(suite, tmp_path):
    values = json.loads(suite.record.to_json())
    for key in ("calibration", "convergence", "suite"):
        del values[key]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(values | {"format_version": 2}))
    found = read_record(path)
    assert found.suite == []
    assert found.convergence is None


@pytest.mark.parametrize(
    ("attack", "params", "doubled"),
    [
        ("linear", {}, set()),
        ("gradient-warm", {}, {"steps", "decoder.steps"}),
        ("query-free", {"then": "gradient"}, {"steps", "gradient.steps"}),
        ("diffusion", {"start": "noise"}, {"sampler.steps"}),
        (
            "diffusion",
            {"start": "gradient-warm"},
            {"sampler.steps", "gradient_warm.steps", "gradient_warm.decoder.steps"},
        ),
    ],
)
def test_what_is_doubled_is_what_the_attack_uses(attack, params, doubled):
    job = Job(protocol(), "none", attack, {}, params)
    before, after = job.budget(), job.doubled().budget()
    assert set(before) == doubled
    assert after == {key: 2 * value for key, value in before.items()}
