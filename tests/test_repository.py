"""What lies in git: small files of known kinds, nothing that runs when it is read, no links."""

import re
import subprocess
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
WHOLE = 14 * 2**20
"""Bytes of all files together."""
LARGEST = 2**20
LARGER = {}
"""Files that may be larger than `LARGEST`: by path, how large in bytes. State the reason here."""
RUN_WHEN_READ = {
    "ckpt", "dill", "h5", "joblib", "jar", "npy", "npz", "pickle", "pkl", "pt", "pth", "pyc", "so",
}  # fmt: skip
ARCHIVES = {
    "7z", "bz2", "egg", "gz", "lz4", "rar", "tar", "tgz", "whl", "xz", "zip", "zst",
}  # fmt: skip
BEGINNINGS = {
    "an archive (zip), as PyTorch writes it": rb"PK\x03\x04",
    "an archive (gzip)": rb"\x1f\x8b",
    "an archive (bzip2)": rb"BZh[1-9]1AY&SY",
    "an archive (xz)": rb"\xfd7zXZ\x00",
    "an archive (zstd)": rb"\x28\xb5\x2f\xfd",
    "an archive (7z)": rb"7z\xbc\xaf\x27\x1c",
    # Not the eight bytes with which safetensors say how long their header is.
    "a pickle": rb"\x80[\x02-\x05](?!.\x00{5})",
    "HDF5": rb"\x89HDF\r\n",
    "NumPy's format": rb"\x93NUMPY",
    "a program": rb"\x7fELF|MZ.{30,60}PE",
}
"""What the content of files begins with that may not lie here under any name."""
PICTURES = {"png", "webp", "jpg", "jpeg", "gif", "svg", "bmp", "tiff", "avif"}
PLACES_OF_PICTURES = re.compile(r"docs/images/[\w.-]+|leaderboard/v\d+/records/[0-9a-f]+/[\w.-]+")
"""Figures of the docs, and one sprite of reconstructions for each record."""
WEB = {"js", "mjs", "css", "woff", "woff2"}
PLACES_OF_WEB = re.compile(r"mibench/board/templates/[\w.-]+")
"""The page's own script and style: written here, no copies of other projects."""


def listed():
    """Path, git's mode and content's place of every file that git holds or would add."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        held = subprocess.run([*git, "--stage"], check=True, capture_output=True).stdout.decode()
        new = subprocess.run(
            [*git, "--others", "--exclude-standard"], check=True, capture_output=True
        ).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        return {}
    found = {}
    for line in filter(None, held.split("\0")):
        heading, _, name = line.partition("\t")
        found[name] = heading.split()[0]
    for name in filter(None, new.split("\0")):
        found[name] = "120000" if (ROOT / name).is_symlink() else "100644"
    return {
        name: mode for name, mode in found.items() if (ROOT / name).exists() or mode != "100644"
    }


FILES = listed()
pytestmark = pytest.mark.skipif(not FILES, reason="not a checkout of git: an archive of the source")


def ending(name):
    return PurePosixPath(name).suffix.removeprefix(".").lower()


def sizes():
    return {name: (ROOT / name).lstat().st_size for name in FILES}


def test_the_repository_is_small():
    found = sizes()
    assert sum(found.values()) < WHOLE, sorted(found, key=found.get)[-10:]


def test_no_file_is_large():
    large = {name: size for name, size in sizes().items() if size > LARGER.get(name, LARGEST)}
    assert not large
    assert set(LARGER) <= set(FILES), "an exception whose file is gone"


def test_every_file_is_a_plain_file():
    assert {name: mode for name, mode in FILES.items() if not mode.startswith("100")} == {}


def test_no_two_names_differ_in_case_only():
    # They would be one file on most Macs and on Windows.
    folded = sorted(name.casefold() for name in FILES)
    assert len(folded) == len(set(folded))


def test_names_are_plain():
    strange = [name for name in FILES if not re.fullmatch(r"[A-Za-z0-9._/+-]+", name)]
    assert not strange


def test_nothing_runs_when_it_is_read_and_nothing_is_packed():
    assert not [name for name in FILES if ending(name) in RUN_WHEN_READ | ARCHIVES]


def kind(content):
    """What a content is that may not be here, or None."""
    for said, pattern in BEGINNINGS.items():
        if re.match(pattern, content, re.DOTALL):
            return said
    return None


def test_contents_are_what_their_names_say():
    found = {}
    for name in FILES:
        path = ROOT / name
        if path.is_file():
            with path.open("rb") as file:
                found[name] = kind(file.read(512))
    assert {name: said for name, said in found.items() if said} == {}


def test_forbidden_contents_are_recognised():
    import gzip
    import io
    import pickle
    import zipfile

    import numpy as np
    import torch

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a", "b")
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    saved = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, saved)
    old = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, old, _use_new_zipfile_serialization=False)
    assert kind(packed.getvalue()) == "an archive (zip), as PyTorch writes it"
    assert kind(saved.getvalue()) == "an archive (zip), as PyTorch writes it"
    assert kind(gzip.compress(b"a")) == "an archive (gzip)"
    assert kind(array.getvalue()) == "NumPy's format"
    assert kind(old.getvalue()) == "a pickle"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        for value in ({"a": 1}, [1.5], (1, 2), "text", Path("a"), 7):
            assert kind(pickle.dumps(value, protocol)) == "a pickle", (protocol, value)
    header = (640).to_bytes(8, "little") + b'{"weight"'
    for honest in (
        header,
        b"PAR1\x15\x04",
        b"RIFF\x10\x00\x00\x00WEBP",
        b"\x89PNG\r\n",
        b"{}",
        b"",
        b"PK",
    ):
        assert kind(honest) is None


def test_pictures_lie_where_pictures_belong():
    # Images of data sets are not ours to give away.
    elsewhere = [n for n in FILES if ending(n) in PICTURES and not PLACES_OF_PICTURES.fullmatch(n)]
    assert not elsewhere


def test_scripts_and_styles_of_others_are_not_copied():
    assert not [n for n in FILES if ending(n) in WEB and not PLACES_OF_WEB.fullmatch(n)]


def test_no_line_end_is_converted():
    # A record is named by its bytes; a checkout that changed them would break every name.
    told = subprocess.run(
        [
            "git",
            "-C",
            str(ROOT),
            "check-attr",
            "text",
            "--",
            "leaderboard/v1/records/x/record.json",
        ],
        check=True,
        capture_output=True,
        encoding="utf-8",
    )
    assert told.stdout.strip().endswith("text: unset")
