"""Attention gates against their definitions, written out."""

import pytest
import torch
from torch.nn import functional as F

from mibench.defenses.parts.attention import CBAM, SqueezeExcite, TripletAttention


def count(module):
    return sum(p.numel() for p in module.parameters())


def two_layers(network, values):
    first, _, second = network
    return F.linear(F.relu(F.linear(values, first.weight)), second.weight)


def plane_gate(maps, weight):
    seen = torch.cat([maps.max(1, keepdim=True).values, maps.mean(1, keepdim=True)], 1)
    return F.conv2d(seen, weight, padding=3)


@pytest.mark.parametrize(
    ("module", "parameters"),
    [
        (SqueezeExcite(64, 32), 2 * 64 * 2),
        (SqueezeExcite(4, 8), 2 * 4),  # one hidden unit at least
        (TripletAttention(), 3 * (2 * 49 + 2)),
        (CBAM(12, 6), 2 * 12 * 2 + 2 * 49),
    ],
)
def test_parameters_are_those_of_the_definition(module, parameters):
    assert count(module) == parameters


def test_squeeze_and_excite_scales_channels_by_what_their_means_say():
    torch.manual_seed(0)
    gate, maps = SqueezeExcite(6, 3), torch.rand(2, 6, 4, 5)
    factor = two_layers(gate.excite, maps.flatten(2).mean(2)).sigmoid()
    expected = torch.stack([f[:, None, None] * m for f, m in zip(factor, maps, strict=True)])
    torch.testing.assert_close(gate(maps), expected)


def test_squeeze_and_excite_reads_tokens_as_the_map_that_they_are():
    torch.manual_seed(0)
    gate, maps = SqueezeExcite(6, 3), torch.rand(2, 6, 4, 5)
    tokens = gate(maps.flatten(2).transpose(1, 2))
    torch.testing.assert_close(tokens.transpose(1, 2).view_as(maps), gate(maps))


def test_triplet_attention_is_the_mean_of_three_rotated_gates():
    torch.manual_seed(0)
    attention, maps = TripletAttention().eval(), torch.randn(2, 3, 5, 7)
    with torch.no_grad():
        for _, norm in attention.gates:
            norm.weight.uniform_(0.5, 2)
            norm.bias.uniform_(-1, 1)
    expected = torch.zeros_like(maps)
    # Channels lead, then rows, then columns; each rotation is undone behind its gate.
    for (conv, norm), order in zip(
        attention.gates, [(0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 2, 1)], strict=True
    ):
        rotated = maps.permute(order)
        gated = rotated * norm(plane_gate(rotated, conv.weight)).sigmoid()
        expected = expected + gated.permute(order) / 3
    torch.testing.assert_close(attention(maps), expected)


def test_triplet_attention_keeps_slow_statistics():
    assert all(norm.momentum == 0.01 for _, norm in TripletAttention().gates)


def test_cbam_gates_channels_by_mean_and_maximum_and_then_places():
    torch.manual_seed(0)
    attention, maps = CBAM(6, 3), torch.rand(2, 6, 5, 7)
    flat = maps.flatten(2)
    told = two_layers(attention.channels, flat.mean(2))
    told = told + two_layers(attention.channels, flat.max(2).values)
    gated = maps * told.sigmoid()[..., None, None]
    expected = gated * plane_gate(gated, attention.places.weight).sigmoid()
    torch.testing.assert_close(attention(maps), expected)


@pytest.mark.parametrize("build", [lambda: SqueezeExcite(4, 4), lambda: CBAM(4, 4)])
@pytest.mark.parametrize("seed", range(8))
def test_no_gate_on_activations_is_dead_from_the_start(build, seed):
    torch.manual_seed(seed)
    gate, activations = build(), torch.randn(8, 4, 6, 6).relu()
    gate(activations).square().sum().backward()
    for name, weight in gate.named_parameters():
        assert weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "build", [lambda: SqueezeExcite(4, 2), TripletAttention, lambda: CBAM(4, 2)]
)
def test_gates_only_weaken(build):
    torch.manual_seed(0)
    maps = torch.randn(3, 4, 6, 6)
    changed = build()(maps)
    assert changed.shape == maps.shape
    assert (changed.abs() <= maps.abs()).all()
    assert (changed.sign() == maps.sign()).all()
