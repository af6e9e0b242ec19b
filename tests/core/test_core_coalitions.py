"""The worst case over coalitions: each attacks, and for each image the most harmful one counts."""

import itertools

import pytest
import torch
from small_protocol import small_protocol

from mibench.artifacts import ArtifactStore
from mibench.errors import InvalidParamsError
from mibench.evaluate import evaluate
from mibench.job import EVERY_COALITION, SUITE, Job
from mibench.outputs import write_result
from mibench.record import read_record

PAIRS = [[0, 1], [0, 2], [1, 2]]


def protocol():
    return small_protocol(
        "coalitions-v1",
        backbone={
            "name": "small-resnet", "params": {"stem": 12, "width": 8}, "split_point": "stem"
        },
        adversary={"coalition": 2},
        attacks={"linear": {}, "decoder": {"steps": 20, "batch": 16, "lr": 5e-3}},
        references={"linear": 1.0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return ArtifactStore(tmp_path_factory.mktemp("cache"))


def run(store, attack="linear", defense="privdfs", **how):
    params = {"servers": 3} if defense == "privdfs" else {}
    return evaluate(Job(protocol(), defense, attack, params, {}, **how), store, None, "cpu")


@pytest.fixture(scope="module")
def every(store):
    return run(store, every_coalition=True)


def test_the_worst_coalition_counts_for_each_image_and_metric(every, store):
    alone = [run(store, coalition=tuple(pair)) for pair in PAIRS]
    worst = {"mse": torch.minimum, "psnr": torch.maximum, "ssim": torch.maximum}
    for metric, pick in worst.items():
        for prefix in ("", "permuted_"):
            values = [one.per_image[prefix + metric] for one in alone]
            expected = pick(pick(values[0], values[1]), values[2])
            assert torch.equal(every.per_image[prefix + metric], expected)
    # Otherwise a mistake in the choice would not show.
    assert len({tuple(one.per_image["psnr"].tolist()) for one in alone}) == 3


def test_every_coalition_leaks_at_least_what_the_screened_one_does(every, store):
    screened = run(store)
    assert screened.record.adversary.coalitions == []
    assert (every.per_image["psnr"] >= screened.per_image["psnr"]).all()
    assert every.record.adversary.corrupted == screened.record.adversary.corrupted
    assert every.record.adversary.screening == screened.record.adversary.screening


def test_the_record_says_what_each_coalition_did(every):
    record = every.record
    assert record.attack.name == "linear"
    assert record.adversary.coalitions == PAIRS
    assert [part.attack for part in record.suite] == ["linear@0+1", "linear@0+2", "linear@1+2"]
    assert [part.corrupted for part in record.suite] == PAIRS
    for metric in ("mse", "psnr", "ssim"):
        assert sum(part.share_of_worst[metric] for part in record.suite) == pytest.approx(1)
    assert EVERY_COALITION in record.deviations
    assert [one.attack for one in record.calibration] == ["linear"]
    for score in record.scores:
        values = every.per_image[score.metric]
        assert score.worst == pytest.approx(float(values.max() if score.higher_is_better
                                                  else values.min()))  # fmt: skip


def test_the_part_of_a_coalition_is_no_ranked_record(every, tmp_path):
    write_result(every, tmp_path)
    part = read_record(tmp_path / "linear@0+2")
    assert part.adversary.corrupted == [0, 2]
    assert part.adversary.coalitions == [[0, 2]]
    assert "coalition 0+2 chosen by hand, not by the screening" in part.deviations
    assert not part.protocol.ranked


def test_it_works_with_a_suite(store, every):
    found = run(store, SUITE, every_coalition=True)
    names = [part.attack for part in found.record.suite]
    labels = ("0+1", "0+2", "1+2")
    assert names == [f"{a}@{c}" for a, c in itertools.product(("linear", "decoder"), labels)]
    best = torch.stack([part.per_image["ssim"] for part in found.parts.values()]).amax(0)
    assert torch.equal(found.per_image["ssim"], best)
    assert (found.per_image["ssim"] >= every.per_image["ssim"]).all()


def test_one_server_is_one_coalition(store):
    every, plain = run(store, "linear", "none", every_coalition=True), run(store, "linear", "none")
    assert every.record.scores == plain.record.scores
    assert every.record.suite == []
    assert EVERY_COALITION in every.record.deviations


def test_a_coalition_that_does_not_exist_is_refused(store):
    with pytest.raises(InvalidParamsError, match=r"no coalition 0\+3.*0\+1, 0\+2, 1\+2"):
        run(store, coalition=(0, 3))


def test_convergence_is_told_for_each_coalition(store):
    found = run(store, "decoder", every_coalition=True, converge=True).record.convergence
    assert [one.attack for one in found] == ["decoder@0+1", "decoder@0+2", "decoder@1+2"]
