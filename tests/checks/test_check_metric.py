"""Checks of metrics: every built-in passes, and what is said of a broken one names its numbers."""

import textwrap

import pytest
import torch

from mibench.checks.base import Verdict, caught
from mibench.checks.metric import battery, check_metric, fresh_images
from mibench.checks.process import LIMIT_CHECKS, Nursery
from mibench.errors import MibenchError


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as started:
        yield started


@pytest.fixture
def check(nursery, tmp_path):
    """Puts a metric with this body through some of the checks."""

    def run(body, only=None):
        path = tmp_path / "metric.py"
        path.write_text(
            "import torch\nfrom mibench.metrics.base import Metric\n\n\nclass Mine(Metric):\n"
            + textwrap.indent(textwrap.dedent(body), "    ")
        )
        return {one.check: one for one in check_metric(nursery, f"{path}:Mine", only=only)}

    return run


HONEST = """
    '''Mean absolute error.'''
    more_leakage = "lower"
    bounds = (0.0, 1.0)

    def per_image(self, reconstructions, originals):
        return (reconstructions - originals).abs().flatten(1).mean(1)
"""


@pytest.mark.parametrize("name", ["mse", "psnr", "ssim", "lpips"])
def test_no_built_in_is_flagged(nursery, name):
    findings = check_metric(nursery, name)
    assert [one.check for one in findings] == [*battery.checks, *LIMIT_CHECKS]
    assert {one.verdict for one in findings} <= {Verdict.PASSED, Verdict.SKIPPED}
    skipped = {one.check for one in findings if one.verdict is Verdict.SKIPPED}
    wanted = {"lpips": {"metric-reference"}}.get(name, {"metric-input"})
    assert skipped == wanted


def test_an_honest_metric_of_ones_own_passes(check):
    assert caught(check(HONEST).values()) == []


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (("lower", "higher"), "metric-direction", "higher values show more"),
        (("(0.0, 1.0)", "(1.0, 0.0)"), "metric-declared", "hold nothing"),
        (("(0.0, 1.0)", "(0.0, 0.5)"), "metric-bounds", "black on white"),
        ((".mean(1)", ".mean(1) * 0"), "metric-monotone", "0.02 to 0.05"),
        ((".mean(1)", ".mean(1) + torch.rand(1)"), "metric-deterministic", "second call"),
        ((".mean(1)", ".mean().expand(len(originals))"), "metric-batch", "alone"),
        ((".mean(1)", ".mean(1) / 0"), "metric-bounds", "not finite"),
        ((".abs()", ".abs().add(-0.1).abs()"), "metric-identity", "perfect copy"),
    ],
)
def test_a_broken_metric_is_told_by_the_check_that_should(check, change, name, words):
    finding = check(HONEST.replace(*change), only=[name])[name]
    assert finding.verdict is Verdict.FAILED
    assert words in finding.found
    assert finding.advice
    assert "\n" not in finding.found


def test_a_metric_that_needs_weights_that_are_not_here_is_skipped(check):
    body = HONEST + (
        "\n    def __init__(self):\n"
        "        from mibench.errors import UnavailableError\n"
        "        self.problem = UnavailableError('no weights here')\n"
    )
    body = body.replace("        return (", "        raise self.problem\n        return (")
    found = [one for name, one in check(body).items() if name not in LIMIT_CHECKS]
    assert {one.verdict for one in found} == {Verdict.SKIPPED}
    assert all("no weights here" in one.found for one in found)


def test_an_unknown_metric_is_the_users_mistake(nursery):
    with pytest.raises(MibenchError, match="did you mean"):
        check_metric(nursery, "psnrr")


def test_images_follow_from_their_secret_seed():
    assert torch.equal(fresh_images(5, 4), fresh_images(5, 4))
    assert not torch.equal(fresh_images(5, 4), fresh_images(6, 4))
    assert fresh_images(5, 4).shape == (4, 3, 32, 32)
