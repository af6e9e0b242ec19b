"""Distributed shares: what each holds, how they are learned, and what the branches know."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mibench.artifacts import Checkpoint
from mibench.backbones.base import BackboneSpec
from mibench.defenses import privdfs
from mibench.defenses.parts.closed_form import explained_variance
from mibench.errors import InvalidParamsError
from mibench.params import build
from mibench.protocol import Recipe
from mibench.registry import defenses
from mibench.task import Attributes, Classification
from mibench.training import Step

quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


INFORMATION = {"masks": "information", "leakage": 0.0}


def step(index, total=100, phase="training"):
    return Step(index, total, torch.Generator().manual_seed(index), phase)


def fitted(defense, images, folder, **changes):
    how = {"steps": 12, "batch": 16, "lr": 0.05, "crop": 0, "flip": False, "precision": "fp32"}
    return defense.fit(images, Recipe(**how | changes), 0, Checkpoint(folder))


def assert_partial_partition(defense):
    """Every share holds n units, and no unit is in two shares."""
    rows = [row.tolist() for row in defense.assignment]
    assert len(rows) == defense.servers
    assert all(len(set(row)) == len(row) == defense.kept for row in rows)
    together = [unit for row in rows for unit in row]
    assert len(set(together)) == len(together)
    assert min(together) >= 0
    assert max(together) < defense.units


@quick
@given(st.integers(2, 6), st.floats(0.01, 1.0), st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_shares_are_disjoint_and_of_equal_size(make_defense, servers, density, period, seed):
    params = {"servers": servers, "density": density, "period": period, "width": 4}
    units = 8 * period**2
    wanted = max(1, round(density * units))
    if servers * wanted > units:
        with pytest.raises(InvalidParamsError, match="density can be at most"):
            make_defense("privdfs", params)
        return
    defense = make_defense("privdfs", params, seed)
    assert (defense.units, defense.kept) == (units, wanted)
    assert_partial_partition(defense)
    torch.manual_seed(seed)
    with torch.no_grad():
        defense.logits.copy_(torch.randn_like(defense.logits))
    images = torch.rand(4, 3, 16, 16)
    defense.loss(images, torch.tensor([0, 1, 2, 3]), step(0))
    assert_partial_partition(defense)
    for share in defense.eval().protect(images):
        assert share.shape == (4, wanted, 8 // period, 8 // period)


def test_shares_hold_the_assigned_units_only(make_defense, pictures):
    defense = make_defense("privdfs", {"servers": 4, "density": 0.25, "period": 2}).eval()
    images = pictures(3).images()
    features = defense.client(images)
    for row, share in zip(defense.assignment.tolist(), defense.protect(images), strict=True):
        for place, unit in enumerate(row):
            channel, phase = divmod(unit, 4)
            dy, dx = divmod(phase, 2)
            assert torch.equal(share[:, place], features[:, channel, dy::2, dx::2])


@pytest.mark.parametrize("features", ["tokens", "class-token"])
@pytest.mark.parametrize("period", [1, 2, 8])
def test_units_of_tokens_are_phases_of_their_grid(make_defense, pictures, features, period):
    params = {"servers": 2, "density": 0.25, "period": period}
    defense, images = (
        make_defense("privdfs", params, features=features).eval(),
        pictures(3).images(),
    )
    tokens = defense.client(images)
    prefix = tokens.shape[1] - 64
    assert prefix == (features == "class-token")
    for row, share in zip(defense.assignment.tolist(), defense.protect(images), strict=True):
        assert share.shape == (3, len(row), 8 // period, 8 // period)
        for place, unit in enumerate(row):
            channel, phase = divmod(unit, period**2)
            dy, dx = divmod(phase, period)
            for i in range(8 // period):
                for j in range(8 // period):
                    token = prefix + 8 * (dy + i * period) + dx + j * period
                    assert torch.equal(share[:, place, i, j], tokens[:, token, channel])


def test_a_period_that_does_not_divide_the_token_grid_is_refused(make_defense):
    with pytest.raises(InvalidParamsError, match=r"period is 3, which does not divide .* 8x8"):
        make_defense("privdfs", {"period": 3}, features="class-token")


@pytest.mark.parametrize("index", [0, 99])
@pytest.mark.parametrize("features", ["map", "class-token"])
def test_attributes_are_learned_with_their_own_loss(make_defense, pictures, features, index):
    task, images = Attributes(tuple("abcde"), smoothing=0.1), pictures(8).images()
    defense = make_defense("privdfs", {"branch": 0.5}, features=features, task=task)
    labels = (torch.rand(8, 5, generator=torch.Generator().manual_seed(0)) < 0.5).to(torch.uint8)
    terms = defense.loss(images, labels, step(index))
    shares = defense.protect(images)
    replies = tuple(defense.serve(k, share) for k, share in enumerate(shares))
    wanted = labels * 0.9 + 0.05
    fused, *own = (
        F.binary_cross_entropy_with_logits(scores, wanted)
        for scores in (defense.fuse(replies), *replies)
    )
    torch.testing.assert_close(terms["task"], fused, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["branch"], 0.5 * sum(own) / 4, rtol=1e-4, atol=1e-5)


@quick
@given(st.integers(0, 10_000), st.floats(0.01, 30.0))
def test_masks_are_exactly_zero_or_one(make_defense, seed, spread):
    defense = make_defense("privdfs", {"servers": 3, "density": 0.1, "period": 2})
    torch.manual_seed(seed)
    with torch.no_grad():
        defense.logits.copy_(0.1 * spread * torch.randn_like(defense.logits))
    masks = defense._straight_through()
    expected = torch.zeros(3, defense.units).scatter_(1, defense.assignment, 1.0)
    assert torch.equal(masks, expected)


def test_kept_and_dropped_units_feel_the_loss(make_defense, pictures):
    defense, batch = make_defense("privdfs"), pictures(16)
    terms = defense.loss(batch.images(), batch.labels, step(0))
    (gradient,) = torch.autograd.grad(sum(terms.values()), defense.logits)
    gradient = gradient.view(defense.servers, defense.units)
    kept = torch.zeros_like(gradient, dtype=torch.bool).scatter_(1, defense.assignment, value=True)
    assert (gradient[kept] != 0).all()
    dropped_everywhere = ~kept.any(0)
    assert dropped_everywhere.any()
    assert (gradient[:, dropped_everywhere] != 0).all()


def test_a_unit_with_a_higher_logit_is_taken(make_defense, pictures):
    defense, batch = make_defense("privdfs"), pictures(8)
    wanted = [unit for unit in range(defense.units) if unit not in defense.assignment[1]]
    wanted = sorted(wanted[: defense.kept])
    with torch.no_grad():
        defense.logits.view(defense.servers, -1)[1, wanted] = 5.0
    defense.loss(batch.images(), batch.labels, step(0))
    assert defense.assignment[1].tolist() == wanted


@pytest.mark.parametrize(("index", "masks", "moves"), [
    (0, "learned", True), (40, "learned", True), (50, "learned", False), (90, "learned", False),
    (0, "random", False),
])  # fmt: skip
@pytest.mark.parametrize("unit", ["phase", "token"])
def test_masks_are_learned_in_the_first_half_only(
    make_defense, pictures, index, masks, moves, unit
):
    defense, batch = make_defense("privdfs", {"masks": masks, "unit": unit}), pictures(8)
    before = defense.assignment.clone()
    with torch.no_grad():
        defense.logits.neg_()
    terms = defense.loss(batch.images(), batch.labels, step(index))
    assert torch.equal(defense.assignment, before) is not moves
    (gradient,) = torch.autograd.grad(sum(terms.values()), defense.logits, allow_unused=True)
    assert (gradient is not None) is moves


def test_sending_does_not_move_the_masks(make_defense, pictures):
    defense = make_defense("privdfs").eval()
    before = defense.assignment.clone()
    with torch.no_grad():
        defense.logits.neg_()
    defense(pictures(4).images())
    assert torch.equal(defense.assignment, before)


def test_the_leakage_term_pulls_at_the_stem(make_defense, pictures):
    def gradients(leakage):
        defense, batch = make_defense("privdfs", {"leakage": leakage}), pictures(32)
        terms = defense.loss(batch.images(), batch.labels, step(60))
        assert ("leakage" in terms) is (leakage > 0)
        convolution = next(p for p in defense.client.parameters() if p.ndim == 4)
        return torch.autograd.grad(sum(terms.values()), convolution)[0]

    assert (gradients(0.0) - gradients(1.0)).abs().max() > 1e-6


def test_shrinking_units_does_not_look_private():
    torch.manual_seed(0)
    images = torch.rand(64, 3, 16, 16)
    share = torch.nn.functional.pixel_unshuffle(images, 2) + 0.01 * torch.randn(64, 12, 8, 8)
    scales = torch.logspace(-2, 0, 12).view(-1, 1, 1)
    told, shrunk = explained_variance(share, images), explained_variance(scales * share, images)
    assert told > 0.95
    assert shrunk == pytest.approx(told.item(), abs=0.01)


def test_the_leakage_term_is_that_of_the_worst_share(make_defense, pictures):
    defense, batch = make_defense("privdfs", {"leakage": 2.0}).eval(), pictures(32)
    images = batch.images()
    worst = max(explained_variance(share, images) for share in defense.protect(images))
    term = defense.loss(images, batch.labels, step(60))["leakage"]
    assert term.item() == pytest.approx(2.0 * worst.item(), rel=1e-4)


def test_more_shares_than_units_are_refused_with_the_limit(make_defense):
    with pytest.raises(InvalidParamsError, match=r"density can be at most 0\.25") as caught:
        make_defense("privdfs", {"servers": 4, "density": 0.5})
    assert "\n" not in str(caught.value)


def test_a_period_that_does_not_divide_the_map_is_refused(make_defense):
    with pytest.raises(InvalidParamsError, match="period is 3"):
        make_defense("privdfs", {"period": 3})


def test_facts_count_what_is_sent_and_what_moved(make_defense, pictures):
    defense, batch = make_defense("privdfs", {"servers": 2, "density": 0.25}), pictures(8)
    assert defense.describe()["units_moved"] == [0, 0]
    first = [set(row.tolist()) for row in defense.assignment]
    with torch.no_grad():
        defense.logits.neg_()
    defense.loss(batch.images(), batch.labels, step(0))
    facts = defense.describe()
    now = [set(row.tolist()) for row in defense.assignment]
    assert facts["units_moved"] == [len(b - a) for a, b in zip(first, now, strict=True)]
    assert sum(facts["units_moved"]) > 0
    share = defense.eval().protect(batch.images())[0]
    assert facts["values_per_share"] == share[0].numel()


@pytest.mark.parametrize(("unit", "values"), [("phase", 8 * 16), ("token", 16 * 8)])
def test_facts_set_the_shares_against_the_features_and_the_image(make_defense, unit, values):
    facts = make_defense("privdfs", {"servers": 2, "density": 0.25, "unit": unit}).describe()
    assert facts["values_per_share"] == values
    assert facts["share_to_image"] == values / (3 * 16 * 16)
    assert facts["density"] == 0.25
    assert (facts["overlap"], facts["balance"]) == (0, 1)


def test_overlap_is_measured(make_defense):
    defense = make_defense("privdfs", {"servers": 2, "density": 0.25})
    defense.assignment[1, :2] = defense.assignment[0, :2]
    assert defense.describe()["overlap"] == 2 / 8


# --- shares of whole tokens -------------------------------------------------------------------


@pytest.mark.parametrize("features", ["map", "tokens", "class-token"])
def test_a_share_of_tokens_holds_whole_places(make_defense, pictures, features):
    params = {"servers": 3, "density": 0.2, "unit": "token"}
    defense = make_defense("privdfs", params, features=features).eval()
    images = pictures(3).images()
    assert (defense.units, defense.kept) == (64, 13)
    assert_partial_partition(defense)
    sent = defense.client(images)
    for row, share in zip(defense.assignment.tolist(), defense.protect(images), strict=True):
        assert share.shape == (3, 13, 8)
        for number, place in enumerate(row):
            if features == "map":
                expected = sent[:, :, place // 8, place % 8]
            else:
                expected = sent[:, place + (features == "class-token")]
            assert torch.equal(share[:, number], expected)


@pytest.mark.parametrize("features", ["map", "tokens"])
def test_a_branch_knows_which_places_it_got(make_defense, pictures, features):
    defense = make_defense("privdfs", {"unit": "token"}, features=features).eval()
    share = defense.protect(pictures(4).images())[0]
    before = defense.serve(0, share)
    assert torch.equal(defense.serve(0, share), before)
    defense.assignment[0] = (defense.assignment[0] + 1) % 64
    assert not torch.allclose(defense.serve(0, share), before, atol=1e-6)


@pytest.mark.parametrize("index", [0, 99])
def test_masks_of_tokens_change_no_value(make_defense, pictures, index):
    defense, batch = make_defense("privdfs", {"unit": "token"}), pictures(8)
    terms = defense.loss(batch.images(), batch.labels, step(index))
    expected = F.cross_entropy(defense(batch.images()), batch.labels)
    torch.testing.assert_close(terms["task"], expected, rtol=1e-4, atol=1e-5)


def test_masks_of_tokens_feel_every_term(make_defense, pictures):
    defense, batch = make_defense("privdfs", {"unit": "token"}), pictures(16)
    terms = defense.loss(batch.images(), batch.labels, step(0))
    assert terms.keys() == {"task", "branch", "leakage"}
    for name, term in terms.items():
        (gradient,) = torch.autograd.grad(term, defense.logits, retain_graph=True)
        kept = gradient.view(4, 64).gather(1, defense.assignment)
        # The leakage is that of the worst share alone.
        assert (kept != 0).all(1).sum() == (1 if name == "leakage" else 4), name


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("params", [{}, {"unit": "token"}, INFORMATION], ids=str)
@pytest.mark.parametrize("features", ["map", "tokens"])
def test_larger_images_are_cut_as_well(size, params, features):
    vit = {"width": 8, "depth": 1, "heads": 2, "pool": "token"}
    spec = {
        "map": BackboneSpec("small-resnet", {"stem": 4, "width": 4}, "layer2"),
        "tokens": BackboneSpec("small-vit", vit, "embed"),
    }[features]
    split = spec.build((3, size, size), Classification(tuple("abc")), 0)
    defense = defenses.load("privdfs")(split, build(privdfs.PrivDFS.Params, params, "privdfs"))
    images = torch.rand(4, 3, size, size)
    terms = defense.loss(images, torch.tensor([0, 1, 2, 0]), step(0))
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    defense.eval()
    assert defense(images).shape == (4, 3)
    facts = defense.describe()
    assert [share[0].numel() for share in defense.protect(images)] == 4 * [
        facts["values_per_share"]
    ]


# --- the least telling units ------------------------------------------------------------------


def test_the_stem_is_trained_as_an_undefended_split_first(make_defense, pictures):
    defense, batch = make_defense("privdfs", INFORMATION), pictures(8)
    assert [tuple(phase) for phase in defense.phases] == [("stem", 0.5), ("branches", 0.5)]
    terms = defense.loss(batch.images(), batch.labels, step(0, phase="stem"))
    plain = defense.server(defense.client(batch.images()))
    assert terms.keys() == {"task"}
    torch.testing.assert_close(terms["task"], F.cross_entropy(plain, batch.labels))


@pytest.mark.parametrize("unit", ["phase", "token"])
@pytest.mark.parametrize("features", ["map", "class-token"])
def test_what_is_scored_stays_as_it_was(make_defense, pictures, tmp_path, features, unit):
    defense = make_defense("privdfs", INFORMATION | {"unit": unit}, features=features)
    start = {k: v.clone() for k, v in defense.client.state_dict().items()}
    images, seen = pictures(48), {}

    def begin(phase, train, original=defense.begin):
        original(phase, train)
        seen[phase] = {k: v.clone() for k, v in defense.state_dict().items()}

    defense.begin = begin
    facts = fitted(defense, images, tmp_path)
    assert facts["steps"] == 12
    after, before = defense.state_dict(), seen["branches"]
    for name, value in after.items():
        fixed = name.startswith(("client.", "server.", "logits", "assignment"))
        # Codes and columns of units that are not sent have nothing to learn.
        assert torch.equal(value, before[name]) is fixed or value.numel() == 0, name
    learned = [k for k, v in start.items() if not torch.equal(v, after[f"client.{k}"])]
    assert {k for k, _ in defense.client.named_parameters()} <= set(learned)
    assert not any(module.training for module in defense.train().client.modules())
    assert all(branch.training for branch in defense.branches)


def test_the_units_that_tell_least_are_dealt_in_turn(make_defense, pictures, monkeypatch):
    defense = make_defense("privdfs", INFORMATION | {"servers": 3, "density": 0.1})
    scores = torch.rand(32, generator=torch.Generator().manual_seed(0))
    deviation = torch.ones(32)
    deviation[scores.argsort()[:4]] = 0.04  # the quietest four are dead
    monkeypatch.setattr(privdfs, "explained_alone", lambda batches: (scores, deviation))
    defense.begin("branches", pictures(8))
    ranked = scores.argsort()[4:13].tolist()
    assert defense.assignment.tolist() == [sorted(ranked[k::3]) for k in range(3)]


def test_dead_units_are_sent_where_live_ones_are_too_few(make_defense, pictures, monkeypatch):
    defense = make_defense("privdfs", INFORMATION | {"servers": 2, "density": 0.5})
    deviation = torch.ones(32)
    deviation[:3] = 0
    monkeypatch.setattr(privdfs, "explained_alone", lambda b: (torch.rand(32), deviation))
    defense.begin("branches", pictures(8))
    assert_partial_partition(defense)
    assert set(range(32)) == set(defense.assignment.flatten().tolist())


@pytest.mark.parametrize("unit", ["phase", "token"])
def test_units_of_noise_are_taken_before_units_that_tell(make_defense, pictures, unit):
    """Half of the features are made noise that the image says nothing of."""
    defense = make_defense("privdfs", INFORMATION | {"density": 0.125, "unit": unit})
    quiet = torch.zeros(8, 8, 8)
    chosen = (slice(0, 4), ...) if unit == "phase" else (slice(None), slice(0, 4))
    quiet[chosen] = 1
    draws = torch.Generator().manual_seed(0)

    class Noisy(torch.nn.Module):
        def forward(self, images):
            told = F.avg_pool2d(images, 2)[:, [0, 1, 2, 0, 1, 2, 0, 1]]
            noise = torch.randn(told.shape, generator=draws)
            return told * (1 - quiet) + noise * quiet

    defense.client = Noisy()
    defense.begin("branches", pictures(300))
    units = quiet.flatten(1)[0] if unit == "token" else F.pixel_unshuffle(quiet, 2)[:, 0, 0]
    assert units[defense.assignment].all()


def test_a_penalty_that_could_change_nothing_is_refused():
    with pytest.raises(InvalidParamsError, match="set leakage to 0") as caught:
        build(privdfs.PrivDFS.Params, {"masks": "information"}, "defense privdfs")
    assert "\n" not in str(caught.value)


# --- what the branches know -------------------------------------------------------------------


@pytest.mark.parametrize("task", [Classification(tuple("abcde")), Attributes(tuple("abcde"))])
def test_branches_are_examined_one_by_one(make_defense, pictures, task, monkeypatch):
    monkeypatch.setattr(privdfs, "CHUNK", 4)
    defense, images = make_defense("privdfs", {"embedding": 2}, task=task).eval(), pictures(10)
    if isinstance(task, Attributes):
        images.labels = (images.labels[:, None] > torch.arange(5)).to(torch.uint8)
    facts = defense.examine(images)
    replies = [defense.serve(k, s) for k, s in enumerate(defense.protect(images.images()))]

    def score(logits):
        return pytest.approx(task.correct(logits, images.labels).mean().item(), abs=1e-4)

    assert facts["fused_accuracy"] == score(defense.fuse(tuple(replies)))
    assert facts["branch_accuracy"] == [score(reply[:, :5]) for reply in replies]
    for k, found in enumerate(facts["accuracy_without"]):
        silenced = [reply * (i != k) for i, reply in enumerate(replies)]
        assert found == score(defense.fuse(tuple(silenced)))


@pytest.mark.parametrize("params", [{}, {"unit": "token"}, INFORMATION], ids=str)
def test_every_branch_counts(make_defense, pictures, tmp_path, params):
    """The fused prediction gets worse when a branch's reply is lost."""
    defense, images = make_defense("privdfs", params | {"servers": 2}), pictures(96)
    fitted(defense, images, tmp_path, steps=60, batch=32)
    facts = defense.examine(images)
    assert facts["fused_accuracy"] > 0.7
    assert max(facts["accuracy_without"]) < facts["fused_accuracy"] - 0.05
    assert sum(facts["branch_accuracy"]) / 2 > 0.3  # five classes
