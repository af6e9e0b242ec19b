import shutil

import pytest
import torch
from challenge_runs import make

from mibench.challenge import open_challenge, save_reconstructions


@pytest.fixture(scope="session")
def _made(tmp_path_factory):
    torch.set_num_threads(1)
    return make(tmp_path_factory.mktemp("challenge"))


@pytest.fixture(scope="session")
def _several(tmp_path_factory):
    torch.set_num_threads(1)
    adversary = {"coalition": 1, "transmissions": 2}
    return make(tmp_path_factory.mktemp("several"), "privdfs", {"servers": 3}, adversary=adversary)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test touches the user's cache."""
    monkeypatch.setenv("MIBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def made(_made):
    """One server, a random defense; read-only."""
    return _made


@pytest.fixture
def several(_several):
    """Three servers, of which one is corrupted and sees each image twice; read-only."""
    return _several


@pytest.fixture
def copy(made, tmp_path):
    """The challenge's folder, to be tampered with."""
    return shutil.copytree(made.folder, tmp_path / "challenge")


@pytest.fixture
def sent(made, tmp_path):
    """A folder of grey images that answers the challenge."""
    images = 0.5 + 0.01 * torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    save_reconstructions(images, tmp_path / "sent")
    return tmp_path / "sent"


@pytest.fixture
def opened(made):
    return open_challenge(made.folder)
