"""What cannot have come from the shares is found where it can be found."""

import pytest
import torch

from mibench.board.model import Origin
from mibench.challenge import save_reconstructions
from mibench.challenge.export import Belongs
from mibench.challenge.schema import read_challenge
from mibench.challenge.score import place_of, score_answer, write_answer
from mibench.checks.base import Verdict
from mibench.data.roles import load_roles
from mibench.errors import InvalidParamsError, StorageError


@pytest.fixture
def roles(made):
    return load_roles(made.job.protocol.data, None, made.store.root)


@pytest.fixture
def answered(made, tmp_path):
    def call(images, record=None):
        save_reconstructions(images, tmp_path / "sent")
        challenge = read_challenge(made.folder)
        belongs = Belongs(made.record.id, record or made.record, made.run)
        who = Origin(kind="submission", submission="x")
        return score_answer(challenge, belongs, tmp_path / "sent", who, "x", made.store, None)

    return call


def verdicts(answer):
    return {one.check: one.verdict for one in answer.findings}


def noise(images, deviation):
    draws = torch.Generator().manual_seed(0)
    return (images + deviation * torch.randn(images.shape, generator=draws)).clamp(0, 1)


def test_honest_images_pass(made, answered, opened):
    from mibench.attacks.linear import Linear

    attack = Linear(Linear.Params(), opened.workshop(made.store))
    attack.prepare(opened.target, *opened.attackers_images(None, made.store))
    found = answered(attack.reconstruct(opened.shares))
    assert set(verdicts(found).values()) == {Verdict.PASSED}
    assert [one.verdict for one in found.best.checks] == ["passed"] * 5


def test_originals_are_refused(answered, roles):
    found = answered(roles.attacked.images())
    assert verdicts(found)["challenge-private"] is Verdict.FAILED
    assert verdicts(found)["challenge-undefended"] is Verdict.WARNED


def test_a_single_private_image_of_another_place_is_refused(answered, roles):
    images = noise(roles.attacked.images(), 0.2)
    images[3] = roles.private.images(slice(20, 21))[0]
    (found,) = (one for one in answered(images).findings if one.check == "challenge-private")
    assert found.verdict is Verdict.FAILED
    assert "1 of 12" in found.found
    assert "0003.png" in found.found


def test_originals_with_noise_are_warned_of(answered, roles):
    found = verdicts(answered(noise(roles.attacked.images(), 0.01)))
    assert found["challenge-private"] is Verdict.PASSED
    assert found["challenge-undefended"] is Verdict.WARNED


def test_near_copies_of_private_images_that_were_not_attacked(answered, roles):
    others = [at for at in range(len(roles.private)) if at not in roles.chosen.tolist()]
    images = noise(roles.private.images(torch.tensor(others[:12])), 0.01)
    assert verdicts(answered(images))["challenge-private"] is Verdict.WARNED


@pytest.mark.parametrize("role", ["auxiliary", "train"])
def test_images_of_other_roles_are_warned_of(answered, roles, role):
    images = noise(getattr(roles, role).images(slice(0, 12)), 0.005)
    found = {one.check: one for one in answered(images).findings}["challenge-copies"]
    assert found.verdict is Verdict.WARNED
    assert f"of the role {role}" in found.found


def test_one_image_for_all_and_reading_nothing_are_warned_of(answered, roles):
    images = roles.attacked.images().mean(0, keepdim=True).expand(12, -1, -1, -1)
    found = verdicts(answered(images))
    assert found["challenge-distinct"] is Verdict.WARNED
    assert found["challenge-permuted"] is Verdict.WARNED


def test_what_another_judge_says_is_not_normalised(made, answered, roles):
    record = made.record
    other = record.judge.model_copy(update={"weights": "0" * 16})
    images = noise(roles.attacked.images(), 0.1)
    same = answered(images)
    found = answered(images, _same_id(record, judge=other))
    leaked = {one.metric: one for one in found.best.leakage}
    assert leaked["leakage(recognition)"].value is None
    assert "judge" in leaked["leakage(recognition)"].reason
    before = {one.metric: one for one in same.best.leakage}
    assert leaked["leakage(psnr)"] == before["leakage(psnr)"]
    assert found.best.scores == same.best.scores


def test_what_another_version_of_a_metric_says_is_not_normalised(made, answered, roles):
    def older(scores):
        return [
            one.model_copy(update={"version": 0}) if one.metric == "ssim" else one for one in scores
        ]

    record = made.record
    record = _same_id(record, prior_only=older(record.prior_only))
    leaked = {one.metric: one for one in answered(roles.attacked.images(), record).best.leakage}
    assert leaked["leakage(ssim)"].value is None
    assert "version 0" in leaked["leakage(ssim)"].reason
    assert leaked["leakage(psnr)"].value is not None


def _same_id(record, **changes):
    """A changed record that answers to the old id."""
    wanted, kind = record.id, type(record)

    class Changed(kind):
        @property
        def id(self):
            return wanted

    values = {name: getattr(record, name) for name in kind.model_fields} | changes
    return Changed.model_construct(**values)


def test_an_answer_is_written_once_and_reads_back(answered, roles, tmp_path):
    from mibench.board.model import BestKnown

    found = answered(noise(roles.attacked.images(), 0.1))
    place = place_of(tmp_path / "v1", "noisy")
    write_answer(found, place)
    assert BestKnown.model_validate_json(place.read_bytes()) == found.best
    with pytest.raises(StorageError, match="is there already"):
        place_of(tmp_path / "v1", "noisy")


@pytest.mark.parametrize(
    "name", ["", ".", "../x", "a/b", "a b", "-x", "<b>", ".hidden", "é", "a\n"]
)
def test_names_that_are_not_plain_are_refused(name, tmp_path):
    with pytest.raises(InvalidParamsError, match="--name"):
        place_of(tmp_path, name)
