"""Published weights: they arrive, are fitted, and say clearly when they cannot."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from mibench.backbones.base import BackboneSpec
from mibench.errors import DataError, UnavailableError
from mibench.task import Classification

SMALL, LARGE = (3, 32, 32), (3, 64, 64)
FEW, ALL = Classification(tuple("abc")), Classification(tuple(map(str, range(1000))))


def saved(arch, folder):
    torch.manual_seed(5)
    net = timm.create_model(arch)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    save_file(net.state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return saved("vit_tiny_patch16_224", tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return saved("resnet18", tmp_path_factory.mktemp("resnet"))


@pytest.fixture
def hub(monkeypatch):
    """A hub that hands out one local file, and the list of what was asked of it."""
    asked = []

    def serve(path):
        def download(*what):
            asked.append(what)
            return str(path)

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        return asked

    return serve


def split(name, shape, task, point="embed", seed=0, **params):
    spec = BackboneSpec(name, {"pretrained": True, **params}, point)
    return spec.build(shape, task, seed).eval()


def test_the_weights_of_a_transformer_arrive(hub, vit):
    asked = hub(vit)
    built = split("vit-tiny", (3, 224, 224), ALL)
    assert asked == [("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "model.safetensors")]
    net = timm.create_model("vit_tiny_patch16_224").eval()
    net.load_state_dict(load_file(vit))
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected = net((images - 0.5) / 0.5)
        assert torch.allclose(built.server(built.client(images)), expected, atol=1e-5)


def test_a_transformer_is_fitted_to_image_and_classes(hub, vit):
    hub(vit)
    weights = load_file(vit)
    one, other = (split("vit-tiny", SMALL, FEW, seed=seed) for seed in (1, 2))
    embed, head = one.client[0], one.server[-1][-1]
    assert embed.patches.proj.weight.shape == (192, 3, 4, 4)
    assert torch.equal(embed.class_token, weights["cls_token"])
    assert torch.equal(embed.positions[:, 0], weights["pos_embed"][:, 0])
    assert torch.equal(embed.positions, other.client[0].positions)
    assert torch.equal(one.server[0].mlp.fc1.weight, weights["blocks.0.mlp.fc1.weight"])
    assert head.weight.shape == (3, 192)
    assert not torch.equal(head.weight, other.server[-1][-1].weight)


def test_a_transformer_without_class_token_takes_the_rest(hub, vit):
    hub(vit)
    weights = load_file(vit)
    built = split("vit-tiny", (3, 224, 224), FEW, pool="avg")
    assert built.feature_shape == (196, 192)
    assert torch.equal(built.client[0].positions, weights["pos_embed"][:, 1:])
    assert torch.equal(built.server[-1][0].weight, weights["norm.weight"])


def test_the_weights_of_a_residual_network_arrive(hub, resnet):
    asked = hub(resnet)
    built = split("resnet18", LARGE, ALL, "stem", stem="imagenet", padding="replicate")
    assert asked == [("timm/resnet18.a1_in1k", "model.safetensors")]
    weights = load_file(resnet)
    assert torch.equal(built.client[0][1].weight, weights["conv1.weight"])
    assert torch.equal(built.client[0][2].running_mean, weights["bn1.running_mean"])
    assert torch.equal(built.server[0][0].conv1.weight, weights["layer1.0.conv1.weight"])
    assert torch.equal(built.server[-1][1].weight, weights["fc.weight"])


def test_the_small_stem_and_the_head_are_fresh(hub, resnet):
    hub(resnet)
    one, other = (split("resnet18", SMALL, FEW, "stem", seed=seed) for seed in (1, 2))
    assert one.client[0][1].weight.shape == (64, 3, 3, 3)
    assert not torch.equal(one.client[0][1].weight, other.client[0][1].weight)
    assert torch.equal(one.client[0][2].weight, torch.ones(64))
    assert not torch.equal(one.server[-1][1].weight, other.server[-1][1].weight)
    weights = load_file(resnet)
    assert torch.equal(one.server[3][1].conv2.weight, weights["layer4.1.conv2.weight"])


def told(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("content", [b"", b"no tensors at all", b"\x80\x04cos\nsystem\n."])
def test_a_damaged_file_is_named(hub, tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    link = tmp_path / "link"
    link.symlink_to(path)
    hub(link)
    with pytest.raises(DataError) as caught:
        split("resnet18", SMALL, FEW, "stem")
    assert f"{path} are damaged; delete that file" in told(caught)


@pytest.mark.parametrize("task", [FEW, ALL])
@pytest.mark.parametrize("lost", ["layer3.1.bn2.running_var", "layer1.0.conv1.weight"])
def test_a_file_that_leaves_weights_at_random_is_refused(hub, resnet, tmp_path, task, lost):
    weights = load_file(resnet)
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors")
    hub(tmp_path / "model.safetensors")
    with pytest.raises(DataError) as caught:
        split("resnet18", SMALL, task, "stem")
    assert "does not hold the weights of resnet18" in told(caught)


def test_the_file_of_another_network_is_refused(hub, resnet):
    hub(resnet)
    with pytest.raises(DataError) as caught:
        split("resnet50", SMALL, FEW, "stem")
    assert "does not hold the weights of resnet50" in told(caught)
    with pytest.raises(DataError) as caught:
        split("vit-tiny", SMALL, FEW)
    assert "does not hold the weights of vit_tiny_patch16_224" in told(caught)


def test_without_internet_the_message_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnavailableError) as caught:
        split("vit-small", SMALL, FEW)
    assert "timm/vit_small_patch16_224.augreg_in21k_ft_in1k" in told(caught)
    assert "HF_HUB_OFFLINE is set); connect to the internet once, or leave" in told(caught)


def test_a_failed_download_gives_its_reason(monkeypatch):
    def broken(*_):
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", broken)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UnavailableError) as caught:
        split("resnet50", SMALL, FEW, "stem")
    assert "from the hub (no route to host); connect" in told(caught)
