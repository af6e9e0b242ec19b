"""The two controls: another defense's architecture without its loss, and a deeper plain split."""

import pytest
import torch
from small_splits import SHAPE, build_split

from mibench.artifacts import Checkpoint
from mibench.backbones.base import BackboneSpec
from mibench.errors import InvalidParamsError, UnknownNameError
from mibench.metrics.cost import client_cost
from mibench.protocol import Recipe
from mibench.registry import defenses
from mibench.task import Classification
from mibench.training import Step

TASK = Classification(tuple("abcde"))


def step(index=0):
    return Step(index, 100, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("of", "params"),
    [("siftfunnel", {}), ("siftfunnel", {"edge": "vgg"}), ("privdfs", {"servers": 2}), ("vib", {})],
)
def test_the_bottleneck_has_the_other_ones_architecture_and_the_task_alone(
    make_defense, pictures, of, params
):
    control = make_defense("bottleneck", {"of": of, "params": params})
    other = make_defense(of, params)
    shapes = {k.removeprefix("other."): v.shape for k, v in control.state_dict().items()}
    assert shapes == {k: v.shape for k, v in other.state_dict().items()}
    batch = pictures(8)
    assert set(control.loss(batch.images(), batch.labels, step())) == {"task"}
    assert set(other.loss(batch.images(), batch.labels, step())) > {"task"}
    assert control.servers == other.servers


def test_no_penalty_moves_the_bottleneck(make_defense, pictures, tmp_path):
    """Whatever the weights of the other one's penalties are, the control learns the same."""
    how = Recipe(steps=4, batch=16, lr=0.05, crop=2, precision="fp32")
    found = []
    for beta in (0.0, 5.0):
        control = make_defense("bottleneck", {"of": "nopeek", "params": {"strength": beta}})
        control.fit(pictures(64), how, 0, Checkpoint(tmp_path / str(beta)))
        found.append(control)
    for one, other in zip(found[0].parameters(), found[1].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("of", "plain"),
    [
        ("shredder", {"strength": 0.0}),
        ("privdfs", {"leakage": 0.0, "branch": 0.0}),
        ("privdfs", {"leakage": 0.0, "branch": 0.0, "masks": "information"}),
        ("privdfs-kd", {"leakage": 0.0, "branch": 0.0, "key": "known", "density": 0.0625}),
        ("dropout", {"training": "post_hoc"}),
        ("siftfunnel", {"beta": 0.0, "gamma": 0.0, "sparsity": 0.0, "smoothing": 0.0}),
        ("cem", {"strength": 0.0}),
    ],
)
def test_the_bottleneck_is_the_other_one_without_its_penalties(
    make_defense, pictures, tmp_path, of, plain
):
    """Phases, keys, masks and noise stay: the weights end where those without penalties end."""
    how = Recipe(steps=24, batch=16, lr=0.05, crop=2, precision="fp32")
    found = [make_defense("bottleneck", {"of": of, "params": plain}), make_defense(of, plain)]
    for number, defense in enumerate(found):
        defense.fit(pictures(64), how, 0, Checkpoint(tmp_path / str(number)))
    control = found[0].other.state_dict()
    for name, value in found[1].state_dict().items():
        torch.testing.assert_close(control[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["bottleneck", "deeper"])
def test_controls_of_themselves_or_of_nothing_are_refused(make_defense, name):
    with pytest.raises(InvalidParamsError, match=f"{name}.of is {name}"):
        make_defense(name, {"of": name})
    with pytest.raises(UnknownNameError, match="unknown defense 'sift'"):
        make_defense(name, {"of": "sift"})
    with pytest.raises(InvalidParamsError, match=r"defense noise\.loud"):
        make_defense(name, {"of": "noise", "params": {"loud": 3}})


@pytest.mark.parametrize("features", ["map", "tokens", "class-token"])
def test_the_deeper_split_computes_the_same_model(make_defense, features):
    split = build_split(features, TASK)
    whole = torch.nn.Sequential(split.client, split.server).eval()
    images = torch.rand(2, *SHAPE)
    expected = whole(images)
    defense = make_defense("deeper", {"of": "noise"}, features=features).eval()
    torch.testing.assert_close(defense(images), expected, rtol=1e-5, atol=1e-6)
    facts = defense.describe()
    assert facts["split_point"] in split.later_points
    assert facts["client_flops"] == client_cost(defense.client, images[:1])
    assert facts["client_flops"] > client_cost(split.client.eval(), images[:1])


def test_the_deeper_split_is_the_nearest_in_cost(make_defense):
    """Of all later split points, none has a client whose FLOPs are nearer by ratio."""
    spec = BackboneSpec("small-resnet", {"stem": 8, "width": 8}, "stem")
    split = spec.build((3, 64, 64), TASK, 0)
    cls = defenses.load("deeper")
    facts = cls(split, cls.Params(of="siftfunnel")).describe()
    costs = {}
    for point in ("layer1", "layer2", "layer3"):
        one = BackboneSpec(spec.name, spec.params, point).build((3, 64, 64), TASK, 0)
        costs[point] = client_cost(one.client.eval(), torch.zeros(1, 3, 64, 64))
    wanted = facts["flops_of_the_other"]
    nearest = min(costs, key=lambda p: max(costs[p] / wanted, wanted / costs[p]))
    assert facts["split_point"] == nearest
    assert facts["client_flops"] == costs[nearest]


def test_behind_the_last_split_point_there_is_none_deeper():
    last = BackboneSpec("small-resnet", {"stem": 8, "width": 8}, "layer3").build(SHAPE, TASK, 0)
    cls = defenses.load("deeper")
    with pytest.raises(InvalidParamsError, match="no split point behind 'layer3'"):
        cls(last, cls.Params(of="noise"))
