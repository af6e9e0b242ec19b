"""Clusters are found and shrink towards the noise; the term is what the formula says."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_splits import VIT, build_split
from torch.nn import functional as F

from mibench.artifacts import Checkpoint
from mibench.backbones.base import BackboneSpec
from mibench.data.sets import ImageSet
from mibench.defenses import cem
from mibench.defenses.cem import CEM, OFFSET, TAU, kmeans
from mibench.protocol import Recipe
from mibench.task import Attributes, Classification
from mibench.training import Step

TASK = Classification(tuple("abcde"))


def step(index=50, total=100):
    return Step(index, total, torch.Generator().manual_seed(index))


def recipe(steps):
    return Recipe(steps=steps, batch=16, lr=0.05, crop=2, precision="fp32")


def buffers(defense):
    return {k: v.clone() for k, v in defense.named_buffers()}


# --- what is sent -------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["map", "tokens", "class-token"])
@torch.no_grad()
def test_a_narrow_message_between_zero_and_one_with_noise_is_sent(make_defense, pictures, features):
    defense = make_defense("cem", {"sigma": 0.2, "channels": 3}, features=features).eval()
    images = pictures(64).images()
    (clean,) = defense.predict(images)
    assert clean.shape[1 if features == "map" else 2] == 3
    assert 0 < clean.min() < clean.max() < 1
    noise = defense.protect(images)[0] - clean
    assert noise.mean().abs() < 0.01
    assert noise.std().item() == pytest.approx(0.2, rel=0.02)
    sent, other = clean + noise, clean.flip(0)
    law = torch.distributions.Normal(0.0, 0.2)
    expected = (law.log_prob(noise) - law.log_prob(sent - other)).flatten(1).sum(1)
    found = defense.log_likelihood((sent,), (clean,)) - defense.log_likelihood((sent,), (other,))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


# --- clustering ---------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 40))
def test_separated_blobs_are_told_apart(seed, count, values):
    draws = torch.Generator().manual_seed(seed)
    middles = 100 * torch.eye(max(count, values))[:count]
    which = torch.arange(count).repeat_interleave(20)
    points = middles[which] + torch.randn(len(which), middles.shape[1], generator=draws)
    centroids = kmeans(points, count, torch.Generator().manual_seed(seed))
    nearest = torch.cdist(points, centroids).argmin(1)
    for blob in range(count):
        assert len(nearest[which == blob].unique()) == 1
        mean = points[which == blob].mean(0)
        torch.testing.assert_close(centroids[nearest[which == blob][0]], mean, rtol=1e-4, atol=1e-4)
    assert len(nearest.unique()) == count


def test_clusters_are_a_function_of_the_generator_and_better_than_their_start():
    points = torch.rand(200, 10, generator=torch.Generator().manual_seed(0))

    def found(seed):
        return kmeans(points, 5, torch.Generator().manual_seed(seed))

    assert torch.equal(found(1), found(1))
    assert not torch.equal(found(1), found(2))
    cost = torch.cdist(points, found(1)).min(1).values.square().mean()
    assert cost < torch.cdist(points, points[:5]).min(1).values.square().mean()


def test_points_that_are_all_alike_are_one_cluster():
    centroids = kmeans(torch.full((10, 3), 0.5), 2, torch.Generator().manual_seed(0))
    assert torch.equal(centroids, torch.full((2, 3), 0.5))


def test_each_class_has_clusters_of_its_own_messages(make_defense, pictures):
    defense, train = make_defense("cem", {"clusters": 2}), pictures(200)
    defense.observe(train, step())
    defense.eval()
    with torch.no_grad():
        clean = defense.predict(train.images())[0].flatten(1)
    assert defense.slots.tolist() == [0, 1, 2, 3, 4]
    for label in range(5):
        own = clean[train.labels == label]
        assert defense.counts[label].sum() == len(own)
        distance, nearest = torch.cdist(own, defense.centroids[label]).min(1)
        for one in range(2):
            mine = nearest == one
            assert defense.counts[label, one] == mine.sum()
            torch.testing.assert_close(defense.centroids[label, one], own[mine].mean(0))
            variance = distance[mine].square().mean() / clean.shape[1]
            torch.testing.assert_close(defense.variances[label, one], variance, rtol=1e-3, atol=0)


def test_a_class_of_few_images_has_fewer_clusters(make_defense, pictures):
    defense, images = make_defense("cem"), pictures(30)
    labels = torch.tensor([0] * 20 + [1] * 9 + [2])  # none of 3 and 4
    defense.observe(ImageSet(images.raw(), labels), step())
    assert (defense.counts > 0).sum(1).tolist() == [2, 1, 0, 0, 0]
    assert defense.slots.tolist() == [0, 1, -1, -1, -1]


def test_too_many_classes_take_turns(make_defense, pictures, monkeypatch):
    monkeypatch.setattr(cem, "IMAGES", 48)
    defense, train = make_defense("cem", {"clusters": 2}), pictures(200)
    assert len(defense.counts) == 3
    seen = set()
    for index in range(50, 60):
        defense.slots.fill_(7)
        defense.counts.zero_()
        defense.observe(train, step(index))
        chosen = [label for label, slot in enumerate(defense.slots.tolist()) if slot >= 0]
        assert [defense.slots[label] for label in chosen] == [0, 1, 2]
        assert defense.counts.sum() <= 48
        seen |= set(chosen)
    assert seen == {0, 1, 2, 3, 4}
    # Images of the others take no part.
    labels = torch.arange(5).repeat(4)
    clean = torch.rand(20, 8, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(defense.conditional(clean, labels), clean)
    taking_part = gradient.flatten(1).abs().sum(1) > 0
    assert set(labels[taking_part].tolist()) == set(chosen)


@pytest.mark.parametrize("size", [32, 224])
def test_memory_is_bounded_at_every_size(size):
    spec = BackboneSpec("small-resnet", {"stem": 4, "width": 4}, "stem")
    names = tuple(map(str, range(1000)))
    defense = CEM(spec.build((3, size, size), Classification(names), 0), CEM.Params())
    values = defense.centroids.shape[2]
    assert values == 8 * (size // 2) ** 2
    assert defense.room == min(4096, 2**25 // values)
    assert len(defense.counts) * 5 * 8 <= defense.room
    assert defense.centroids.numel() <= 2**25 // 8


# --- when it is done ----------------------------------------------------------------------------


def test_clusters_are_found_after_the_warm_up_and_then_every_so_many_steps(make_defense, pictures):
    defense, batch = make_defense("cem", {"warmup": 0.2, "refresh": 10}), pictures(64)
    found = []
    for index in range(50):
        before = defense.centroids.clone()
        defense.observe(batch, step(index))
        if not torch.equal(before, defense.centroids):
            found.append(index)
        with torch.no_grad():
            defense.bottleneck[0].weight.mul_(1.01)
        terms = defense.loss(batch.images(), batch.labels, step(index))
        assert ("conditional" in terms) is (index >= 20)
    assert found == [20, 30, 40]


def test_without_strength_there_is_no_term(make_defense, pictures):
    defense, batch = make_defense("cem", {"strength": 0.0}), pictures(64)
    defense.observe(batch, step())
    assert set(defense.loss(batch.images(), batch.labels, step())) == {"task"}


def test_looking_for_clusters_changes_nothing_else(make_defense, pictures):
    defense, train = make_defense("cem"), pictures(64)
    before, state = buffers(defense), torch.get_rng_state()
    defense.observe(train, step())
    assert defense.training
    assert all(module.training for module in defense.modules())
    assert torch.equal(torch.get_rng_state(), state)
    own = {"centroids", "variances", "counts", "slots"}
    changed = {k for k, v in buffers(defense).items() if not torch.equal(v, before[k])}
    assert changed == own
    assert not defense.centroids.requires_grad


def test_an_interrupted_training_goes_on_with_its_clusters(
    make_defense, pictures, tmp_path, monkeypatch
):
    params = {"refresh": 4, "warmup": 0.1}
    whole = make_defense("cem", params)
    whole.fit(pictures(64), recipe(12), 0, Checkpoint(tmp_path / "whole"))

    class Killed(Exception):
        pass

    def dies(self, train, step):
        if step.index == 7:  # between two refreshes
            raise Killed
        observe(self, train, step)

    observe = CEM.observe
    with monkeypatch.context() as patch:
        patch.setattr(CEM, "observe", dies)
        with pytest.raises(Killed):
            make_defense("cem", params).fit(
                pictures(64), recipe(12), 0, Checkpoint(tmp_path / "killed", interval=0)
            )
    resumed = make_defense("cem", params, seed=9)
    resumed.fit(pictures(64), recipe(12), 0, Checkpoint(tmp_path / "killed"))
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, msg=key)


# --- the term -----------------------------------------------------------------------------------


def by_hand(defense, clean, labels):
    """L_C in plain loops, from the formula."""
    sigma, clusters = defense.params.sigma, defense.params.clusters
    floor = math.log(TAU * sigma**2 + OFFSET)
    total, classes = 0.0, 0
    for label, slot in enumerate(defense.slots.tolist()):
        if slot < 0:
            continue
        classes += 1
        near = {j: [] for j in range(clusters)}
        for message in clean[labels == label].flatten(1):
            distances = [
                (message - defense.centroids[slot, j]).square().mean().item()
                if defense.counts[slot, j]
                else math.inf
                for j in range(clusters)
            ]
            j = distances.index(min(distances))
            near[j].append(distances[j])
        for j, distances in near.items():
            stored, size = defense.variances[slot, j].item(), defense.counts[slot, j].item()
            if not size:
                continue
            a = min(0.99, 10 * len(distances) / size)
            v = (a * sum(distances) / len(distances) if distances else 0) + (1 - a) * stored
            weight = size / defense.counts[slot].sum().item()
            total += weight * max(0, math.log(v + OFFSET) - floor)
    return total / classes


def clustered(make_defense, pictures, count=200, **params):
    """A defense with clusters whose messages differ much."""
    defense, train = make_defense("cem", params), pictures(count)
    with torch.no_grad():
        defense.bottleneck[0].weight.mul_(5)
    defense.observe(train, step())
    return defense.eval()


@pytest.mark.parametrize("count", [40, 200])
def test_the_term_is_that_of_the_formula(make_defense, pictures, count):
    defense = clustered(make_defense, pictures, count, clusters=3, sigma=0.1)
    batch = pictures(32, seed=1)
    with torch.no_grad():
        (clean,) = defense.predict(batch.images())
    labels = batch.labels.where(batch.labels != 2, 3)  # a class that is not in the batch
    expected = by_hand(defense, clean, labels)
    assert expected > 0.05
    assert defense.conditional(clean, labels).item() == pytest.approx(expected, rel=1e-4)


def test_it_is_zero_where_the_noise_covers_the_clusters(make_defense, pictures):
    for sigma, covered in ((2.0, True), (0.01, False)):
        defense = clustered(make_defense, pictures, sigma=sigma)
        batch = pictures(64)
        (clean,) = defense.predict(batch.images())
        assert (defense.variances.max() <= TAU * sigma**2) == covered
        assert (defense.conditional(clean, batch.labels).item() == 0) == covered


def test_descending_it_shrinks_clusters_to_the_floor_and_no_further(make_defense, pictures):
    defense, batch = clustered(make_defense, pictures, clusters=1, sigma=0.3), pictures(100)
    with torch.no_grad():
        defense.counts.fill_(1.0)  # so that the batch alone decides
        defense.variances.zero_()
        spread = 0.4 * torch.randn(100, 8, 8, 8)
    own = defense.centroids[defense.slots[batch.labels], 0].view(100, 8, 8, 8)
    messages = (own + spread).requires_grad_()
    for _ in range(300):
        (gradient,) = torch.autograd.grad(defense.conditional(messages, batch.labels), messages)
        messages = (messages - 30 * gradient).detach().requires_grad_()
    variance = (messages - own).square().mean().item()
    assert variance == pytest.approx(TAU * 0.3**2, rel=0.15)


def test_the_term_reaches_the_client(make_defense, pictures):
    defense, batch = clustered(make_defense, pictures).train(), pictures(16)
    term = defense.loss(batch.images(), batch.labels, step())["conditional"]
    convolution = next(p for p in defense.client.parameters() if p.ndim == 4)
    (gradient,) = torch.autograd.grad(term, convolution)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 1e-6


def test_strength_is_the_weight_of_the_term(make_defense, pictures):
    found = []
    for strength in (1.0, 3.0):
        defense, batch = clustered(make_defense, pictures, strength=strength), pictures(16)
        found.append(defense.loss(batch.images(), batch.labels, step())["conditional"].item())
    assert found[1] == pytest.approx(3 * found[0], rel=1e-5)


def test_training_with_it_shrinks_the_clusters(make_defense, pictures, tmp_path):
    margins, bounds = [], []
    for strength in (0.0, 10.0):
        defense = make_defense("cem", {"strength": strength, "refresh": 10, "sigma": 0.03})
        how = Recipe(steps=60, batch=32, lr=0.1, crop=0, precision="fp32")
        defense.fit(pictures(64), how, 0, Checkpoint(tmp_path / str(strength)))
        facts = defense.examine(pictures(64))
        margins.append(facts["log_variance_margin"])
        bounds.append(facts["information_nats"])
    assert margins[1] < margins[0] / 2
    assert bounds[1] < bounds[0]


# --- other tasks and facts ----------------------------------------------------------------------


@pytest.mark.parametrize("features", ["map", "class-token"])
def test_all_images_are_one_class_where_the_task_has_attributes(pictures, features):
    task = Attributes(tuple("abcde"))
    defense = CEM(build_split(features, task), CEM.Params(clusters=3))
    images = pictures(64)
    labels = torch.arange(320).view(64, 5).remainder(2).to(torch.uint8)
    defense.observe(ImageSet(images.raw(), labels), step())
    assert defense.counts.shape == (1, 3)
    assert defense.counts.sum() == 64
    torch.manual_seed(0)
    terms = defense.loss(images.images(), labels, step())
    assert terms["conditional"].requires_grad
    torch.manual_seed(0)
    expected = F.binary_cross_entropy_with_logits(defense(images.images()), labels.float())
    torch.testing.assert_close(terms["task"], expected, rtol=1e-4, atol=1e-5)


def test_facts_are_the_margin_and_the_information_of_the_mixture(make_defense, pictures):
    defense = clustered(make_defense, pictures, clusters=2, sigma=0.1)
    images = pictures(300, seed=1)
    facts = defense.examine(images)
    clean = defense.predict(images.images())[0].detach().flatten(1)
    centroids = defense.centroids.flatten(0, 1)
    nearest = torch.cdist(clean, centroids).argmin(1)
    nats = margin = 0.0
    for j in nearest.unique():
        mine = clean[nearest == j] - centroids[j]
        weight, moment = len(mine) / 300, mine.square().mean(0)
        gain = 0.5 * (1 + moment / 0.1**2).log().sum().item()
        nats += weight * (gain - math.log(weight))
        margin += weight * math.log((moment.mean().item() + 0.01) / (0.125 * 0.01 + 0.01))
    assert facts["clusters"] == len(nearest.unique())
    assert facts["information_nats"] == pytest.approx(nats, rel=1e-4)
    assert facts["information_bits"] == pytest.approx(nats / math.log(2), rel=1e-4)
    assert facts["log_variance_margin"] == pytest.approx(margin, rel=1e-4)


def test_the_information_is_a_bound():
    """Of messages that are two Gaussians, whose information with noise is known within a bit."""
    torch.manual_seed(0)
    split = BackboneSpec("small-vit", {**VIT, "pool": "avg"}, "block1").build((3, 16, 16), TASK, 0)
    defense = CEM(split, CEM.Params(sigma=0.5, clusters=2, channels=1)).eval()
    side = torch.randint(2, (2000,))
    clean = 10.0 * side[:, None] + torch.randn(2000, 64)
    middles = torch.stack([clean[side == k].mean(0) for k in (0, 1)])
    defense.centroids[0] = middles
    defense.counts[0] = 1000
    defense.predict = lambda images: (clean[: len(images)],)  # type: ignore[method-assign]
    pixels = torch.zeros(256, 3, 16, 16, dtype=torch.uint8)
    facts = defense.examine(ImageSet(pixels, torch.zeros(256, dtype=torch.int64)))
    truth = math.log(2) + 64 / 2 * math.log(1 + 1 / 0.5**2)
    assert facts["information_nats"] == pytest.approx(truth, rel=0.02)


def test_there_are_no_facts_without_clusters(make_defense, pictures):
    assert make_defense("cem").eval().examine(pictures(4)) == {}


def test_clusters_of_the_final_weights_are_found_at_the_end(make_defense, pictures, tmp_path):
    defense = make_defense("cem", {"strength": 0.0})
    defense.fit(pictures(64), recipe(5), 0, Checkpoint(tmp_path))
    facts = defense.examine(pictures(64))
    assert 5 <= facts["clusters"] <= 10
    assert facts["information_nats"] > 0
