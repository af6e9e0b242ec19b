"""The survey of split points says what a real split would."""

import textwrap

import pytest
import torch

from mibench.backbones.base import BackboneSpec
from mibench.backbones.survey import survey
from mibench.errors import InvalidParamsError, PluginError
from mibench.metrics.cost import client_cost, count_parameters
from mibench.task import Classification

TASK = Classification(tuple("abcdefg"))

BACKBONES = [
    ("small-resnet", {"stem": 6, "width": 8}, 24),
    ("resnet18", {"stem": "imagenet"}, 32),
    ("he-cnn", {}, 16),
    ("small-vit", {"width": 24, "depth": 2, "heads": 3}, 32),
]


@pytest.mark.parametrize(("name", "params", "size"), BACKBONES)
def test_the_survey_agrees_with_real_splits(name, params, size):
    shape = (3, size, size)
    cuts = survey(name, params, shape, TASK)
    for cut in cuts[:: max(1, len(cuts) // 4)]:
        split = BackboneSpec(name, params, cut.split_point).build(shape, TASK, 0).eval()
        values = split.client(torch.rand(1, *shape)).numel()
        assert cut.feature_shape == split.feature_shape
        assert cut.parameters == count_parameters([split.client])
        assert cut.flops == client_cost(split.client, torch.rand(1, *shape))
        assert cut.expansion == values / (3 * size * size)


def test_the_survey_by_hand():
    stem, layer1, *_ = survey("resnet18", {}, (3, 32, 32), TASK)
    assert (stem.split_point, stem.feature_shape) == ("stem", (64, 32, 32))
    assert stem.parameters == 27 * 64 + 2 * 64
    assert stem.flops == 2 * 27 * 64 * 32 * 32
    assert stem.expansion == pytest.approx(64 / 3)
    assert layer1.flops == stem.flops + 4 * 2 * 9 * 64 * 64 * 32 * 32


def test_the_survey_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    survey("small-resnet", {}, (3, 32, 32), TASK)
    assert torch.equal(torch.rand(3), expected)


def test_an_image_size_that_does_not_fit_is_refused():
    with pytest.raises(InvalidParamsError, match="multiple of 8"):
        survey("he-cnn", {}, (3, 20, 20), TASK)


def test_the_survey_of_a_broken_plugin_names_the_plugin(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        textwrap.dedent("""
        from torch import nn
        from mibench.backbones.base import Backbone

        class Mine(Backbone):
            def stages(self):
                return {"first": nn.Linear(5, 5), "head": nn.Flatten()}

            def branch(self, share_shape, outputs, width):
                return nn.Flatten()
        """)
    )
    with pytest.raises(PluginError, match=r"Mine\.stages\(\)"):
        survey(f"{path}:Mine", {}, (3, 32, 32), TASK)
