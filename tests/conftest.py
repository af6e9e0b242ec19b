"""Settings for all tests: one thread, and no test waits for a network."""

import os

# Before the hub's library is imported anywhere.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

from mibench import progress

# No test is timed: a busy machine proves nothing. The same examples in every CI run: what it finds
# must be found again.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors this small gain nothing from threads, which on a busy machine cost seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def narrow_decoder():
    """The small decoder with fewer channels, for tests that train many of them."""
    from mibench.attacks.inverse import SIZES, Size

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "small", Size(16, 1))
        yield


class Notes:
    """A display that keeps what the user is told, and shows no bars."""

    def __init__(self):
        self.said = []

    def start(self, title, total):
        return self

    def advance(self, steps=1, **figures):
        pass

    def finish(self, task):
        pass

    def note(self, text):
        self.said.append(text)


@pytest.fixture
def noted():
    """Everything that is noted while a test runs."""
    display = Notes()
    with progress.shown_by(display):
        yield display.said
