"""`python -m evertune` is the `evertune` command."""

from evertune.cli import main

main()
