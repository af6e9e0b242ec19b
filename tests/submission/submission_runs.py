"""Submissions under the protocol for tests."""

from pathlib import Path

from mibench.submission.new import create

TINY = str(Path(__file__).parents[1] / "cli" / "tiny.yaml")


def made(parent, name="channel-noise", kind="defense"):
    """A new submission that names the protocol for tests."""
    folder = create(name, parent / "submissions", kind, "Channel noise", "Ada L.")
    path = folder / "submission.yaml"
    path.write_text(
        path.read_text().replace("protocols: [cifar10-lite-v1]", f"protocols: [{TINY}]")
    )
    return folder
