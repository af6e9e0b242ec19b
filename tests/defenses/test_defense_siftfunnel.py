"""SiftFunnel: its edges, its loss term by term, and what it reports."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_splits import build_split
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mibench.artifacts import Checkpoint
from mibench.backbones.base import BackboneSpec
from mibench.defenses.parts.dependence import distance_correlation
from mibench.defenses.siftfunnel import (
    SiftFunnel,
    channel_correlation,
    effective_rank,
    input_correlation,
)
from mibench.errors import InvalidParamsError
from mibench.protocol import Recipe
from mibench.task import Attributes, Classification
from mibench.training import Step

TASK = Classification(tuple("abcde"))
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
quick = settings(max_examples=25, deadline=None)


def build(spec, side=32, task=TASK, **params):
    torch.manual_seed(0)
    return SiftFunnel(spec.build((3, side, side), task, 0), SiftFunnel.Params(**params))


def small_resnet(split_point="stem"):
    return BackboneSpec("small-resnet", {"stem": 8, "width": 8}, split_point)


def small_vit(pool="token"):
    sizes = {"width": 8, "depth": 2, "heads": 2}
    return BackboneSpec("small-vit", {**sizes, "pool": pool}, "block1")


def step():
    return Step(0, 10, torch.Generator().manual_seed(0))


def in_places(rows):
    """Rows of channels (c, m) with m square → one map."""
    side = math.isqrt(rows.shape[1])
    return torch.as_tensor(rows).float().view(1, -1, side, side)


# --- the edges --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edge", "parameters", "macs"),
    [("cnn", 10_354, 10.3e6), ("resnet", 232_152, 242e6), ("vgg", 300_990, 395e6)],
)
def test_edges_cost_what_those_of_the_paper_cost(edge, parameters, macs):
    defense = build(small_resnet(), side=64, edge=edge).eval()
    assert sum(p.numel() for p in defense.client.parameters()) == parameters
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        defense.protect(torch.zeros(1, 3, 64, 64))
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=5e-3)
    facts = defense.describe()
    assert facts["edge_macs"] == counter.get_total_flops() // 2
    assert facts["edge_parameters"] == parameters


@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize(
    ("edge", "channels", "shrink"), [("cnn", 12, 4), ("resnet", 6, 2), ("vgg", 4, 4)]
)
def test_what_is_sent_is_the_papers_fraction_of_the_image(side, edge, channels, shrink):
    defense = build(small_resnet(), side=side, edge=edge).eval()
    images = torch.rand(1, 3, side, side)
    with torch.no_grad():
        (z,) = shares = defense.protect(images)
        assert z.shape == (1, channels, side // shrink, side // shrink)
        assert defense.answer(shares).shape == (1, 5)
    widths = [m.out_channels for m in defense.client.modules() if isinstance(m, nn.Conv2d)]
    assert widths[0] == (32 if side < 64 else 64)


@pytest.mark.parametrize("split_point", ["stem", "layer1", "layer2", "layer3"])
def test_the_edge_fits_every_split_point_of_a_network_that_pools(split_point):
    defense = build(small_resnet(split_point)).eval()
    assert defense(torch.rand(2, 3, 32, 32)).shape == (2, 5)


def test_the_replaced_client_is_gone():
    split = build_split("map", TASK)
    replaced = {id(p) for p in split.client.parameters()}
    defense = SiftFunnel(split, SiftFunnel.Params())
    assert not replaced & {id(p) for p in defense.parameters()}
    assert {id(p) for p in split.server.parameters()} < {id(p) for p in defense.parameters()}


@pytest.mark.parametrize(("split_point", "edge"), [("ReLU22", "resnet"), ("pool2", "cnn")])
def test_fully_connected_layers_are_served_where_the_size_agrees(split_point, edge):
    defense = build(BackboneSpec("he-cnn", {}, split_point), edge=edge).eval()
    assert defense(torch.rand(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(("split_point", "edge"), [("conv11", "cnn"), ("ReLU22", "vgg")])
def test_a_server_that_cannot_read_the_map_is_refused(split_point, edge):
    with pytest.raises(InvalidParamsError, match=f"edge '{edge}' sends maps of 8x8") as caught:
        build(BackboneSpec("he-cnn", {}, split_point), edge=edge)
    assert "he-cnn" in str(caught.value)
    assert "small-resnet" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_that_leave_one_place_are_refused():
    with pytest.raises(InvalidParamsError, match="image size of 8 at least"):
        build(small_resnet(), side=4)
    assert build(small_resnet(), side=8)(torch.rand(2, 3, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize(("side", "tokens"), [(32, 64), (64, 64), (224, 196)])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_every_token_becomes_twelve_values(side, tokens, pool):
    defense = build(small_vit(pool), side=side).eval()
    images = torch.rand(2, 3, side, side)
    assert defense.protect(images)[0].shape == (2, tokens + (pool == "token"), 12)
    assert defense(images).shape == (2, 5)


def test_another_edge_is_refused_for_tokens():
    with pytest.raises(InvalidParamsError, match="leave 'edge' out"):
        build(small_vit(), edge="vgg")


@pytest.mark.parametrize("features", ["map", "tokens"])
def test_an_untrained_edge_does_not_fade(make_defense, pictures, features):
    (z,) = make_defense("siftfunnel", features=features).protect(pictures(32).images())
    assert z.std(0).mean() > 0.003


# --- the loss ---------------------------------------------------------------------------------


@quick
@given(st.integers(2, 9), st.floats(0, 0.49), st.sampled_from([0.0, 0.1, 0.5]))
def test_the_task_term_is_the_divergence_from_smoothed_labels(classes, smoothing, recipes_own):
    task = Classification(tuple("abcdefghi"[:classes])).smoothed(recipes_own)
    defense = build(small_resnet(), 16, task, smoothing=smoothing, beta=0, gamma=0, sparsity=0)
    torch.manual_seed(classes)
    images, labels = torch.rand(6, 3, 16, 16), torch.randint(0, classes, (6,))
    wanted = torch.full((6, classes), smoothing / (classes - 1))
    wanted[torch.arange(6), labels] = 1 - smoothing
    torch.testing.assert_close(wanted.sum(1), torch.ones(6))
    log_p = defense.eval()(images).log_softmax(1)
    expected = F.kl_div(log_p, wanted, reduction="batchmean")
    terms = defense.loss(images, labels, step())
    assert list(terms) == ["task"]
    torch.testing.assert_close(terms["task"], expected, rtol=1e-4, atol=1e-6)


def test_each_attribute_counts_as_two_classes():
    task = Attributes(tuple("abc"), smoothing=0.1)
    defense = build(small_resnet(), 16, task, smoothing=0.3).eval()
    images, labels = torch.rand(4, 3, 16, 16), torch.randint(0, 2, (4, 3), dtype=torch.uint8)
    logits = defense(images)
    log_p = torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], -1)
    wanted = torch.where(F.one_hot(labels.long(), 2).bool(), 0.7, 0.3)
    expected = F.kl_div(log_p, wanted, reduction="sum") / labels.numel()
    term = defense.loss(images, labels, step())["task"]
    torch.testing.assert_close(term, expected, rtol=1e-4, atol=1e-6)


def test_without_smoothing_and_penalties_it_is_cross_entropy(make_defense, pictures):
    bare = {"smoothing": 0, "beta": 0, "gamma": 0, "sparsity": 0}
    defense, batch = make_defense("siftfunnel", bare).eval(), pictures(8)
    terms = defense.loss(batch.images(), batch.labels, step())
    expected = F.cross_entropy(defense(batch.images()), batch.labels)
    assert list(terms) == ["task"]
    torch.testing.assert_close(terms["task"], expected)


@pytest.mark.parametrize("features", ["map", "tokens", "class-token"])
def test_terms_are_those_of_the_definition_over_alpha(make_defense, pictures, features):
    weights = {"alpha": 4.0, "beta": 3.0, "gamma": 2.0, "sparsity": 0.5}
    defense, batch = make_defense("siftfunnel", weights, features=features).eval(), pictures(16)
    images = batch.images()
    (z,) = defense.protect(images)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in CIFAR10)
    x = (images - mean) / std
    patches = z[:, features == "class-token" :] if z.ndim == 3 else z
    terms = defense.loss(images, batch.labels, step())
    assert terms["distance"].item() == pytest.approx(3 / 4 * distance_correlation(x, z).item())
    assert terms["sparsity"].item() == pytest.approx(0.5 / 4 * z.abs().mean().item())
    assert terms["linear"].item() == pytest.approx(2 / 4 * channel_correlation(patches).item())

    other = {**weights, "dcor": "unbiased", "linear": "input"}
    defense = make_defense("siftfunnel", other, features=features).eval()
    terms = defense.loss(images, batch.labels, step())
    unbiased = distance_correlation(x, z, unbiased=True).item()
    assert terms["distance"].item() == pytest.approx(3 / 4 * unbiased)
    assert terms["linear"].item() == pytest.approx(2 / 4 * input_correlation(x, z).item())


@pytest.mark.parametrize(
    ("weight", "term"), [("beta", "distance"), ("gamma", "linear"), ("sparsity", "sparsity")]
)
def test_a_weight_of_zero_removes_its_term_only(make_defense, pictures, weight, term):
    batch = pictures(8)
    names = [
        set(make_defense("siftfunnel", params).loss(batch.images(), batch.labels, step()))
        for params in ({}, {weight: 0.0})
    ]
    assert names[0] - names[1] == {term}
    assert "task" in names[1]


@pytest.mark.parametrize("features", ["map", "tokens", "class-token"])
@pytest.mark.parametrize("params", [{}, {"dcor": "unbiased", "linear": "input"}])
def test_every_term_pulls_at_the_first_layer_of_the_edge(make_defense, pictures, features, params):
    defense, batch = make_defense("siftfunnel", params, features=features), pictures(8)
    first = next(m for m in defense.client.modules() if isinstance(m, nn.Conv2d)).weight
    terms = defense.loss(batch.images(), batch.labels, step())
    assert set(terms) == {"task", "distance", "sparsity", "linear"}
    for name, value in terms.items():
        (gradient,) = torch.autograd.grad(value, first, retain_graph=True)
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0, name


def test_penalties_are_computed_in_full_precision(make_defense, pictures):
    defense, batch = make_defense("siftfunnel"), pictures(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = defense.loss(batch.images(), batch.labels, step())
    assert {term.dtype for term in terms.values()} == {torch.float32}
    maps, images = torch.rand(16, 4, 8, 8), batch.images()
    for correlation in (channel_correlation, lambda z: input_correlation(images, z)):
        exact = correlation(maps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(correlation(maps), exact)


@pytest.mark.parametrize("features", ["map", "class-token"])
@pytest.mark.parametrize("task", [TASK, Attributes(tuple("abc"))])
def test_both_tasks_train(make_defense, features, task):
    defense = make_defense("siftfunnel", features=features, task=task)
    size = (8,) if task is TASK else (8, 3)
    labels = torch.randint(0, 2, size, dtype=torch.int64 if task is TASK else torch.uint8)
    sum(defense.loss(torch.rand(8, 3, 16, 16), labels, step()).values()).backward()
    assert all(p.grad is not None for p in defense.parameters())


@pytest.mark.parametrize("edge", ["resnet", "vgg"])
def test_everything_on_the_larger_edges_learns(make_defense, pictures, edge, tmp_path):
    defense = make_defense("siftfunnel", {"edge": edge})
    before = {k: v.detach().clone() for k, v in defense.named_parameters()}
    recipe = Recipe(steps=10, batch=16, lr=0.05, crop=2, precision="fp32", weight_decay=0.0)
    facts = defense.fit(pictures(64), recipe, 0, Checkpoint(tmp_path))
    assert not [k for k, v in defense.named_parameters() if torch.equal(v, before[k])]
    assert set(facts["losses"]) == {"task", "distance", "sparsity", "linear"}


# --- linear correlation -----------------------------------------------------------------------


@pytest.mark.parametrize("side", [2, 4, 16])
def test_identical_channels_correlate_fully(side):
    torch.manual_seed(0)
    z = torch.randn(3, 1, side, side).expand(-1, 5, -1, -1)
    places = side**2
    assert channel_correlation(z).item() == pytest.approx(((places - 1) / places) ** 2, rel=1e-5)


def test_orthogonal_channels_count_by_the_diagonal_alone():
    waves = [np.sin(2 * np.pi * k * np.arange(64) / 64) for k in range(1, 9)]
    z = in_places(np.stack(waves))
    assert channel_correlation(z).item() == pytest.approx((63 / 64) ** 2 / 8, rel=1e-4)


@pytest.mark.parametrize("level", [0.0, 3.0])
def test_dead_channels_do_not_count_and_do_not_break_the_gradient(level):
    torch.manual_seed(0)
    alive = torch.randn(2, 2, 8, 8)
    dead = torch.full((2, 6, 8, 8), level)
    assert channel_correlation(dead) == 0
    z = torch.cat([alive, dead], 1).requires_grad_()
    value = channel_correlation(z)
    assert value.item() == pytest.approx(channel_correlation(alive).item() * (2 / 8) ** 2, rel=1e-4)
    (gradient,) = torch.autograd.grad(value, z)
    assert gradient.isfinite().all()


def test_channel_correlation_is_pearsons():
    torch.manual_seed(0)
    z = torch.randn(4, 5, 4, 4)
    squares = [np.corrcoef(one.flatten(1).numpy()) ** 2 for one in z]
    expected = np.mean(squares) * (15 / 16) ** 2
    assert channel_correlation(z).item() == pytest.approx(expected, rel=1e-4)
    assert channel_correlation(10 * z + 2).item() == pytest.approx(expected, rel=1e-3)


def test_channel_correlation_leaves_class_tokens_out():
    torch.manual_seed(0)
    z = torch.randn(2, 5, 4, 4)
    tokens = torch.cat([100 * torch.ones(2, 1, 5), z.flatten(2).transpose(1, 2)], 1)
    torch.testing.assert_close(channel_correlation(tokens, prefix=1), channel_correlation(z))


@pytest.mark.parametrize("side", [4, 8])
def test_input_correlation_is_pearsons_over_the_batch(side):
    torch.manual_seed(0)
    x = torch.rand(20, 3, side, side)
    z = torch.randn(20, 2, 3, 3) + 0.5 * x[:, :2, :3, :3]
    values, pixels = z.flatten(1).numpy(), x.flatten(1).numpy()
    both = np.corrcoef(values.T, pixels.T)[: values.shape[1], values.shape[1] :]
    assert input_correlation(x, z).item() == pytest.approx((both**2).mean(), rel=1e-3)


def test_input_correlation_sees_the_image_and_not_the_scale():
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(64, 3, 2, 2), (32, 32))
    told = F.adaptive_avg_pool2d(x, 4)
    blind = torch.randn(64, 3, 4, 4)
    assert input_correlation(x, blind).item() == pytest.approx(1 / 63, rel=0.2)
    assert input_correlation(x, told) > 3 * input_correlation(x, blind)
    assert input_correlation(x, 0.1 * told - 7) == pytest.approx(
        input_correlation(x, told).item(), rel=1e-2
    )


def test_input_correlation_of_constant_values_is_zero_with_a_finite_gradient():
    z = torch.zeros(8, 4, 2, 2, requires_grad=True)
    value = input_correlation(torch.rand(8, 3, 16, 16), z)
    (gradient,) = torch.autograd.grad(value, z)
    assert value == 0
    assert gradient.isfinite().all()


# --- what is reported -------------------------------------------------------------------------


def test_the_record_has_the_cost_of_both_edges():
    split = small_resnet().build((3, 64, 64), TASK, 0)
    own = sum(p.numel() for p in split.client.parameters())
    facts = SiftFunnel(split, SiftFunnel.Params()).describe()
    assert facts["plain_edge_parameters"] == own
    assert facts["plain_edge_macs"] == 3 * 8 * 9 * 32 * 32
    assert facts["mac_reduction"] == facts["plain_edge_macs"] / facts["edge_macs"]
    json.dumps(facts)


def test_on_tokens_the_funnel_is_an_addition(make_defense):
    facts = make_defense("siftfunnel", features="tokens").describe()
    assert facts["edge_macs"] > facts["plain_edge_macs"]
    assert facts["edge_parameters"] > facts["plain_edge_parameters"]


@pytest.mark.parametrize("features", ["map", "class-token"])
def test_examination_counts_what_is_in_use(make_defense, pictures, features):
    defense, images = make_defense("siftfunnel", features=features).eval(), pictures(48)
    kinds = nn.Conv2d if features == "map" else nn.Linear
    last = [m for m in defense.client.modules() if isinstance(m, kinds)]
    last = next(m for m in reversed(last) if m.bias is not None)  # gates have no bias
    with torch.no_grad():
        last.weight[:5], last.bias[:5] = 0, 0
    z = defense.protect(images.images())[0].detach()
    facts = defense.examine(images)
    by_channel = z.transpose(0, 1).flatten(1) if z.ndim == 4 else z.flatten(0, 1).T
    assert facts["examined_images"] == 48
    assert facts["channels"] == 12
    assert facts["dead_channels"] == (by_channel.std(1) < 1e-6).sum() >= 5
    assert facts["nonzero_share"] == pytest.approx((z != 0).float().mean().item(), abs=1e-3)
    assert 1 <= facts["effective_rank"] <= 12 - facts["dead_channels"]
    assert facts["dcor_unbiased"] < facts["dcor_biased"] <= 1
    json.dumps(facts)


def test_examination_changes_nothing(make_defense, pictures):
    defense = make_defense("siftfunnel").eval()
    before = {k: v.clone() for k, v in defense.state_dict().items()}
    defense.examine(pictures(16))
    assert all(torch.equal(v, before[k]) for k, v in defense.state_dict().items())


def test_effective_rank_counts_equally_strong_directions():
    torch.manual_seed(0)
    draws = torch.randn(400, 4)
    base = torch.linalg.qr(draws - draws.mean(0)).Q.T  # four uncorrelated channels
    assert effective_rank(in_places(base)) == pytest.approx(4, rel=1e-3)
    assert effective_rank(in_places(base[[0, 0, 1, 1]])) == pytest.approx(2, rel=1e-3)
    assert effective_rank(in_places(base[[2, 2, 2]])) == pytest.approx(1, rel=1e-2)
    assert effective_rank(torch.zeros(2, 4, 3, 3)) == 0


def test_rank_of_tokens_is_that_of_the_same_map():
    torch.manual_seed(0)
    z = torch.randn(3, 4, 5, 5) * torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1)
    assert effective_rank(z.flatten(2).transpose(1, 2)) == pytest.approx(effective_rank(z))
