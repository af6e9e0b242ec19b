"""What a record says of the shares, whatever the attack."""

from dataclasses import replace

import pytest
from small_protocol import small_protocol

from mibench.artifacts import ArtifactStore
from mibench.data.roles import load_roles
from mibench.deployment import fit
from mibench.evaluate import evaluate
from mibench.information.base import Amounts
from mibench.job import Job
from mibench.measuring import tell
from mibench.protocol import load_protocol, released
from mibench.registry import measures


def protocol(**changes):
    gradient = {"steps": 4, "tuning_images": 2, "restarts": 1, "weights": [0.1]}
    fixed = {"attacks": {"gradient": gradient}, "metrics": {"mse": 1}}
    return small_protocol("measured-v1", **fixed | changes)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return ArtifactStore(tmp_path_factory.mktemp("cache"))


def job(defense="noise", attack="linear", params=None, **changes):
    return Job(protocol(**changes), defense, attack, params or {}, {}, 0)


class Counting(ArtifactStore):
    """Counts the measures that are taken anew."""

    made = 0

    def fetch(self, kind, spec, make):
        def counted(checkpoint):
            self.made += kind == "measure"
            return make(checkpoint)

        return super().fetch(kind, spec, counted)


def told(what, store, corrupted=(0,), **changed):
    roles = load_roles(what.protocol.data, None, store.root)
    deployed = fit(what, roles, store, "cpu")
    return tell(what, deployed, corrupted, replace(roles, **changed), store, "cpu")


def test_a_record_holds_every_measure_and_the_whole_cost(store):
    record = evaluate(job(), store, None, "cpu").record
    assert [score.metric for score in record.information] == measures.names()
    found = {score.metric: score for score in record.information}
    assert found["volume"].value == 8 * 16 * 16
    assert found["volume"].source == "100.0% of 2,048 values"
    assert found["mine"].n == 16
    assert found["conditional-entropy-bound"].value > 0
    assert found["vib-kl"].value is None
    assert found["vib-kl"].reason
    assert record.information_facts["volume"]["values"] == 2048
    bare = {score.metric: score for score in record.information_undefended}
    assert list(bare) == list(found)
    # Without noise the message tells all of the image, and ReLU leaves zeros in it.
    assert bare["conditional-entropy-bound"].value is None
    assert bare["volume"].value < found["volume"].value
    cost = record.cost
    # At least the image and what is sent.
    assert cost.peak_activation_bytes >= 4 * (3 * 32 * 32 + 2048)
    ratio = cost.latency_ratio
    assert 0 < ratio.ci_low <= ratio.value <= ratio.ci_high
    assert (ratio.n, ratio.unit) == (50, "")
    assert cost.training_seconds > 0


def test_another_attack_measures_nothing_anew(store):
    counting = Counting(store.root)
    first = evaluate(job(), counting, None, "cpu").record
    counting.made = 0
    again = evaluate(job(attack="gradient"), counting, None, "cpu").record
    assert counting.made == 0
    assert again.information == first.information
    assert again.information_facts == first.information_facts
    evaluate(job(params={"snr_db": 3.0}), counting, None, "cpu")
    assert counting.made == len(measures)


class Forbidden:
    """Images that must not be looked at."""

    def __getattr__(self, name):
        raise AssertionError(f"the private images' {name} was read")

    def __len__(self):
        raise AssertionError("the private images were counted")


def test_no_private_image_is_looked_at(store):
    what = job(params={"snr_db": 1.0})
    counting = Counting(store.root)
    told(what, counting, private=Forbidden())
    assert counting.made == len(measures)


def test_a_measure_reads_the_corrupted_servers_alone(store):
    what = job("privdfs", params={"servers": 3, "density": 0.25})
    one, two = (told(what, store, read) for read in ((1,), (0, 1)))
    values = [
        next(s.value for s in some.scores if s.metric == "volume-coded") for some in (one, two)
    ]
    assert 0 < values[0] < values[1]
    assert 2 * one.facts["volume"]["values"] == two.facts["volume"]["values"]


def test_a_measure_of_ones_own_is_taken_and_a_broken_one_breaks_no_run(
    store, tmp_path, monkeypatch
):
    body = """
from mibench.information.base import Measure, Reading
from mibench.metrics.intervals import Estimate


class {name}(Measure):
    '''A measure of one's own.'''

    def measure(self, view, checkpoint):
        return Reading(Estimate({value}, None, None, len(view.validation), "no interval"))
"""
    for name, value in (("Good", "2.5"), ("Bad", "1 / 0")):
        (tmp_path / f"{name}.py").write_text(body.format(name=name, value=value))
    names = [f"{tmp_path}/Good.py:Good", f"{tmp_path}/Bad.py:Bad"]
    monkeypatch.setattr(measures, "names", lambda: names)
    good, bad = told(job(), store).scores
    assert (good.metric, good.value, good.n) == ("good", 2.5, 16)
    assert bad.value is None
    assert "ZeroDivisionError" in bad.reason


def test_the_amounts_of_a_track_fit_its_protocols():
    tracks = {load_protocol(name).track for name in released()}
    assert {Amounts.of(track).learned for track in tracks} == {512, 4096}
    assert Amounts.of("test").steps < Amounts.of("smoke").steps < Amounts.of("lite").steps
    # What is measured without bias needs as many.
    assert Amounts.of("lite").read >= 512
