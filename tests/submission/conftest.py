"""Submissions under the protocol for tests."""

from pathlib import Path

import pytest
from submission_runs import TINY, made

from mibench.checks.process import of_python
from mibench.protocol import released
from mibench.submission import sandbox, static


@pytest.fixture(scope="session")
def tiny():
    """The protocol for tests is released, as far as submissions are concerned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static, "released", lambda: [*released(), TINY])
        # Released protocols come with mibench, which the sandbox may read.
        patch.setattr(sandbox, "of_python", lambda: [*of_python(), Path(TINY)])
        yield TINY


@pytest.fixture
def tiny_submission(tiny, tmp_path):
    """A submission under the protocol for tests."""
    return made(tmp_path)
