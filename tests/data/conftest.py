"""Image files and tables for the data tests."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def pixels(index, size=32):
    """Image number ``index``, uint8 (size, size, 3)."""
    return np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)


def encode(image, kind="PNG", **how):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, kind, **how)
    return buffer.getvalue()


@pytest.fixture
def draw():
    return pixels


@pytest.fixture
def png():
    return encode
