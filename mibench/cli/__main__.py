"""``python -m mibench.cli``: the command line without an installed script."""

from mibench.cli.app import main

main()
