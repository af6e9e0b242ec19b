"""A challenge goes out, an attacker has the folder alone, and the score is that of a run."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import mibench.assault
from mibench.attacks.linear import Linear
from mibench.board.model import Level, Origin
from mibench.challenge import open_challenge, save_reconstructions
from mibench.challenge.export import export
from mibench.challenge.pictures import read_reconstructions
from mibench.challenge.score import score_answer
from mibench.data.roles import load_roles
from mibench.deployment import fit
from mibench.threat import Target

WHO = Origin(kind="submission", submission="outsiders", authors=["A. N. Other"])


def rebuilt_linearly(folder, store):
    """What an outside attacker does with a folder and auxiliary images."""
    opened = open_challenge(folder)
    attack = Linear(Linear.Params(), opened.workshop(store))
    attack.prepare(opened.target, *opened.attackers_images(None, store))
    return attack.reconstruct(opened.shares)


def answer(made, images, tmp_path):
    save_reconstructions(images, tmp_path / "sent")
    challenge = open_challenge(made.folder).challenge
    return score_answer(
        challenge, made.belongs(), tmp_path / "sent", WHO, "outsiders", made.store, None
    )


@pytest.mark.parametrize("which", ["made", "several"])
def test_an_outside_attack_scores_as_the_same_attack_in_a_run(which, request, tmp_path):
    made = request.getfixturevalue(which)
    found = answer(made, rebuilt_linearly(made.folder, made.store), tmp_path).best
    assert found.scores == made.record.scores
    assert found.permuted == made.record.permuted
    assert found.leakage == made.record.leakage
    told = {one.metric for one in found.leakage if one.value is not None}
    assert {"leakage(psnr)", "leakage(ssim)"} <= told
    assert (found.record, found.level) == (made.record.id, Level.RESCORED)
    assert found.origin.authors == ["A. N. Other"]


def test_no_cache_of_the_run_is_needed(made, tmp_path):
    from mibench.artifacts import ArtifactStore

    own = rebuilt_linearly(made.folder, ArtifactStore(tmp_path / "attackers"))
    save_reconstructions(own, tmp_path / "sent")
    challenge = open_challenge(made.folder).challenge
    mine, _ = read_reconstructions(tmp_path / "sent", challenge)
    theirs = torch.stack(
        [read_reconstructions(made.run / "reconstructions", challenge)[0]]
    ).squeeze(0)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("which", ["made", "several"])
def test_shares_are_those_that_the_attack_of_the_run_got(which, request, tmp_path):
    made = request.getfixturevalue(which)
    roles = load_roles(made.job.protocol.data, None, made.store.root)
    deployed = fit(made.job, roles, made.store, "cpu")
    theirs = mibench.assault.attack(made.job, deployed, roles, made.store, "cpu").shares
    opened = open_challenge(made.folder)
    assert len(opened.shares) == len(theirs) == len(opened.challenge.messages)
    assert all(map(torch.equal, opened.shares, theirs))


@pytest.mark.parametrize("which", ["made", "several"])
def test_the_target_answers_as_in_the_run(which, request):
    from mibench import seeding

    made = request.getfixturevalue(which)
    roles = load_roles(made.job.protocol.data, None, made.store.root)
    deployed = fit(made.job, roles, made.store, "cpu")
    opened = open_challenge(made.folder)
    theirs = Target(deployed.defense, opened.target.adversary, "theirs")
    images = roles.validation.images()
    for one, other in zip(opened.target.client(images), theirs.client(images), strict=True):
        assert torch.equal(one, other)
    queried = []
    for target in (opened.target, theirs):
        with seeding.stream(7, "query"):
            queried.append(target.query(images))
    assert all(map(torch.equal, *queried))
    assert opened.target.task == theirs.task
    assert all(map(torch.equal, opened.target.replies(queried[0]), theirs.replies(queried[0])))
    likely = [t.log_likelihood(queried[0], t.client(images)) for t in (opened.target, theirs)]
    assert torch.equal(*likely)


def test_an_export_twice_gives_equal_bytes(made, tmp_path):
    export(made.job, made.belongs(), made.store, None, "cpu", tmp_path / "again")
    for path in made.folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_the_attack_of_the_docs_rebuilds_images(made, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "challenge.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIBENCH_CACHE", str(made.store.root))
    (tmp_path / "challenge").symlink_to(made.folder)
    runpy_file = tmp_path / "attack.py"
    runpy_file.write_text(script, encoding="utf-8")
    runpy.run_path(str(runpy_file))
    challenge = open_challenge(made.folder).challenge
    found = score_answer(
        challenge, made.belongs(), tmp_path / "sent", WHO, "docs", made.store, None
    )
    scores = {one.metric: one.value for one in found.best.scores}
    floor = {one.metric: one.value for one in made.record.prior_only}
    assert scores["psnr"] > floor["psnr"] + 1
