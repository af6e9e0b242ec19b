"""LPIPS without its weights, and the plumbing around it with locally made ones.

The official weights are not part of the tests: a backbone made here proves that loading, scaling
and batching work, and says nothing about LPIPS values.
"""

import hashlib
import socket
import warnings

import pytest
import torch
from torch import nn

from mibench.errors import UnavailableError
from mibench.metrics import perceptual
from mibench.metrics.perceptual import LearnedPerceptualDistance

FILE_NAME = "alexnet-owt-7be5be79.pth"


def images(n, side, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _fresh_network():
    perceptual._network.cache_clear()
    yield
    perceptual._network.cache_clear()


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    """An empty torch hub folder and no network."""

    def refuse(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    return tmp_path / "checkpoints"


@pytest.fixture(scope="module")
def random_backbone(tmp_path_factory):
    """A hub folder that holds an AlexNet with random weights under the official file's name."""
    from torchvision.models import alexnet

    hub = tmp_path_factory.mktemp("hub")
    (hub / "checkpoints").mkdir()
    file = hub / "checkpoints" / FILE_NAME
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(alexnet(weights=None).state_dict(), file)
    with file.open("rb") as opened:
        return hub, hashlib.file_digest(opened, "sha256").hexdigest()


@pytest.fixture
def hub_with_random_backbone(empty_hub, random_backbone, monkeypatch):
    hub, digest = random_backbone
    monkeypatch.setattr(torch.hub, "_hub_dir", str(hub))
    monkeypatch.setattr(perceptual, "_BACKBONE_SHA256", digest[:8])
    return hub / "checkpoints" / FILE_NAME


def assert_names_the_remedy(message, folder):
    assert FILE_NAME in message
    assert str(folder) in message
    assert "\n" not in message


def test_names_the_file_that_torchvision_loads():
    from torchvision.models import AlexNet_Weights

    assert AlexNet_Weights.IMAGENET1K_V1.url == perceptual._BACKBONE_URL
    assert perceptual._BACKBONE_URL.endswith(FILE_NAME)


def test_without_weights_and_network_the_metric_is_unavailable(empty_hub, capfd):
    with pytest.raises(UnavailableError, match="lpips") as caught:
        LearnedPerceptualDistance()(images(1, 32), images(1, 32))
    assert_names_the_remedy(str(caught.value), empty_hub)
    assert capfd.readouterr() == ("", "")


def test_the_reason_does_not_tell_whose_home_it_is(tmp_path, monkeypatch):
    hub = tmp_path / "somebody" / ".cache" / "torch" / "hub"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))

    def refused(_, path, **__):
        raise PermissionError(13, f"refuses to write '{path}.0123.partial'")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refused)
    with pytest.raises(UnavailableError) as caught:
        LearnedPerceptualDistance()(images(1, 32), images(1, 32))
    assert "somebody" not in str(caught.value)
    assert f"refuses to write '~/.cache/torch/hub/checkpoints/{FILE_NAME}'" in str(caught.value)


def test_a_failed_load_is_tried_again(empty_hub):
    metric = LearnedPerceptualDistance()
    for _ in range(2):
        with pytest.raises(UnavailableError):
            metric(images(1, 32), images(1, 32))


def test_refuses_another_file_under_the_official_name(empty_hub):
    empty_hub.mkdir(parents=True)
    (empty_hub / FILE_NAME).write_bytes(b"half a download")
    with pytest.raises(UnavailableError, match="SHA-256") as caught:
        LearnedPerceptualDistance()(images(1, 32), images(1, 32))
    assert_names_the_remedy(str(caught.value), empty_hub)


def test_refuses_a_file_that_runs_code_when_unpickled(empty_hub, monkeypatch):
    class Payload:
        def __reduce__(self):
            return print, ("code ran",)

    empty_hub.mkdir(parents=True)
    file = empty_hub / FILE_NAME
    torch.save({"features.0.weight": Payload()}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(perceptual, "_BACKBONE_SHA256", digest[:8])
    with pytest.raises(UnavailableError) as caught:
        LearnedPerceptualDistance()(images(1, 32), images(1, 32))
    assert_names_the_remedy(str(caught.value), empty_hub)


def test_images_under_64_px_are_enlarged_in_shape_and_mapped_to_minus_one_to_one():
    assert perceptual._network_input(images(1, 32)).shape == (1, 3, 64, 64)
    assert perceptual._network_input(torch.rand(1, 3, 32, 48)).shape == (1, 3, 64, 96)
    assert perceptual._network_input(torch.rand(1, 3, 64, 80)).shape == (1, 3, 64, 80)
    mapped = perceptual._network_input(torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1))
    assert mapped.amax((2, 3)).tolist() == [[-1.0, 0.0, 1.0]]


def test_plumbing_with_a_random_backbone(hub_with_random_backbone, capfd, monkeypatch):
    metric = LearnedPerceptualDistance()
    originals = images(5, 32)
    noise = torch.linspace(0, 1, 5).view(-1, 1, 1, 1)
    reconstructions = (1 - noise) * originals + noise * images(5, 32, seed=1)

    torch.manual_seed(3)
    expected_draw = torch.rand(1)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = metric(reconstructions, originals)
    assert torch.equal(torch.rand(1), expected_draw), "loading disturbed the random stream"
    assert capfd.readouterr() == ("", ""), "loading printed"

    assert scores.shape == (5,)
    assert scores.dtype == torch.float64
    assert scores[0] == 0
    assert (scores.diff() > 0).all()

    # Every layer holds what the files say, none its random initial weights.
    network = perceptual._network()
    saved = torch.load(hub_with_random_backbone, weights_only=True)
    convolutions = [m for m in network.net.modules() if isinstance(m, nn.Conv2d)]
    kernels = [v for k, v in saved.items() if k.startswith("features") and k.endswith("weight")]
    assert len(convolutions) == len(kernels) == 5
    for convolution, kernel in zip(convolutions, kernels, strict=True):
        assert torch.equal(convolution.weight, kernel)
    for lin in network.lins:
        assert lin.model[-1].weight.min() >= 0, "a trained head has no negative weight"
    assert not network.training

    # A batch is its single images, in any order and in any chunks, and loading happened once.
    monkeypatch.setattr(perceptual, "_obtain_backbone", lambda: pytest.fail("loaded again"))
    singles = [
        LearnedPerceptualDistance()(a[None], b[None])
        for a, b in zip(reconstructions, originals, strict=True)
    ]
    torch.testing.assert_close(torch.cat(singles), scores, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(LearnedPerceptualDistance, "chunk", 2)
    torch.testing.assert_close(
        metric(reconstructions.flip(0), originals.flip(0)), scores.flip(0), rtol=1e-4, atol=1e-6
    )
    with pytest.raises(ValueError, match="lpips"):
        metric(originals * 255, originals)


def test_name_and_direction():
    metric = LearnedPerceptualDistance()
    assert (metric.name, metric.version) == ("lpips", 1)
    assert metric.more_leakage == "lower"
    assert not metric.higher_is_better
