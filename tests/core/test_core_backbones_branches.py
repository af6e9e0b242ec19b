"""Branches: server parts that read shares of any layout and size."""

import pytest
import torch

from mibench.backbones.residual import residual_branch
from mibench.backbones.transformer import token_branch
from mibench.registry import backbones
from mibench.task import Classification

MAPS = [(5, 32, 32), (3, 8, 8), (4, 2, 2), (6, 1, 1), (2, 7, 3)]
TOKENS = [(64, 6), (65, 5), (7, 4), (1, 8)]
HELPERS = [residual_branch, token_branch]


@pytest.mark.parametrize("name", backbones.names())
def test_every_family_has_branches_for_maps_and_tokens(name):
    cls = backbones.load(name)
    backbone = cls(cls.Params(), (3, 32, 32), Classification(("a", "b")))
    for share in ((3, 8, 8), (16, 6), (17, 6)):
        branch = backbone.branch(share, outputs=9, width=4)
        assert branch(torch.rand(2, *share)).shape == (2, 9)


@pytest.mark.parametrize("share", [*MAPS, *TOKENS])
@pytest.mark.parametrize("helper", HELPERS)
def test_a_branch_reads_shares_of_any_size(helper, share):
    branch = helper(share, outputs=9, width=4).eval()
    x = torch.rand(3, *share)
    replies = branch(x)
    assert replies.shape == (3, 9)
    assert torch.allclose(branch(x[1:2])[0], replies[1], atol=1e-5), "one row reads another"


@pytest.mark.parametrize("share", [(5, 8, 8), (16, 6), (17, 6)])
@pytest.mark.parametrize("helper", HELPERS)
def test_every_parameter_of_a_branch_learns(helper, share):
    torch.manual_seed(0)
    branch = helper(share, outputs=3, width=40)
    branch(torch.rand(4, *share)).square().sum().backward()
    for name, parameter in branch.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("helper", HELPERS)
def test_a_branch_sees_where_a_token_lies(helper):
    torch.manual_seed(0)
    branch = helper((16, 6), outputs=3, width=8).eval()
    tokens = torch.rand(1, 16, 6)
    assert not torch.allclose(branch(tokens), branch(tokens.flip(1)), atol=1e-6)


def test_tokens_on_a_square_grid_are_read_like_maps():
    torch.manual_seed(0)
    from_tokens = residual_branch((16, 6), outputs=3, width=8).eval()
    from_maps = residual_branch((6, 4, 4), outputs=3, width=8).eval()
    weights = from_tokens.state_dict().values()
    for mine, theirs in zip(from_maps.state_dict().values(), weights, strict=True):
        mine.copy_(theirs)
    tokens = torch.rand(2, 16, 6)
    maps = tokens.transpose(1, 2).reshape(2, 6, 4, 4)
    assert torch.allclose(from_tokens(tokens), from_maps(maps), atol=1e-6)


def test_a_large_share_does_not_blow_the_width_up():
    count = sum(p.numel() for p in residual_branch((3, 256, 256), 2, width=4).parameters())
    assert count < 100_000


@pytest.mark.parametrize("width", [1, 31, 33, 70, 128])
def test_the_width_of_a_transformer_is_rounded_up_to_its_heads(width):
    branch = token_branch((4, 5), outputs=2, width=width)
    heads = branch.blocks[0].attn.num_heads
    built = branch.embed.out_features
    assert built % heads == 0
    assert width <= built < width + heads
