"""The command line, one small file per command; nothing heavy is imported before it is needed."""

from mibench.cli.app import app, main

__all__ = ["app", "main"]
