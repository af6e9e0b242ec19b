"""docs/submitting.md says what the code does."""

import re
from pathlib import Path

from mibench.board.model import Level
from mibench.submission import sandbox, static
from mibench.submission.schema import LICENCES, RANGES, Submission

TEXT = (Path(__file__).parents[2] / "docs" / "submitting.md").read_text("utf-8")
ROWS = dict(re.findall(r"^\| `(\w+)` \| .* \| (\S.*) \|$", TEXT, re.MULTILINE))


def test_every_field_is_explained_and_whether_it_is_needed():
    for name, field in Submission.model_fields.items():
        assert name in ROWS, name
        assert ROWS[name].startswith("yes" if field.is_required() else ("no", "for attacks")), name


def test_every_level_is_explained():
    assert all(level in ROWS for level in Level)


def test_limits_are_those_of_the_code():
    kib = static.MAX_TEXT // 1024
    assert f"{static.MAX_FILES} files, {kib} KiB" in " ".join(TEXT.split())
    assert f"{static.MAX_WEIGHTS // 2**20} MiB for a file of tensors" in TEXT
    assert f"{static.MAX_FOLDER / 2**20} MiB together" in TEXT
    limits = sandbox.LIMITS
    assert f"{limits.seconds / 3600:.0f} hours by the clock" in TEXT
    assert f"{limits.cpu_seconds / 3600:.0f} hours of processor time" in TEXT
    assert f"{limits.memory_bytes // 2**30} GiB |" in TEXT
    assert f"{sandbox.FOLDER_BYTES // 2**30} GiB, {limits.file_bytes // 2**30} GiB a file" in TEXT
    assert f"{sandbox.MOST_FILES:,} files" in TEXT
    assert f"{limits.output_bytes // 2**20} MiB |" in TEXT


def test_endings_ranges_and_licences_that_it_names():
    for ending in static.ENDINGS:
        assert f"`{ending}`" in TEXT
    for name in ("accuracy", "mse", "recognition", "ssim", "psnr", "lpips"):
        assert f"`{name}`" in TEXT
        assert name in RANGES
    assert {"Apache-2.0", "MIT"} <= set(LICENCES)
