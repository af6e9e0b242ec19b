"""Submissions under the protocol for tests."""

import pytest
from submission_runs import TINY, made

from mibench.protocol import released
from mibench.submission import static


@pytest.fixture(scope="session")
def tiny():
    """The protocol for tests is released, as far as submissions are concerned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static, "released", lambda: [*released(), TINY])
        yield TINY


@pytest.fixture
def tiny_submission(tiny, tmp_path):
    """A submission under the protocol for tests."""
    return made(tmp_path)
