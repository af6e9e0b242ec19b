"""The words of the run that most tests are about."""

from pathlib import Path

TINY = str(Path(__file__).parent / "tiny.yaml")
PAIR = ("run", "--defense", "privdfs", "--attack", "diffusion", "--protocol", TINY)
