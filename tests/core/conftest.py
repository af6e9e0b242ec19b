"""Settings for the tests of this folder."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors this small gain nothing from threads, which on a busy machine cost seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
