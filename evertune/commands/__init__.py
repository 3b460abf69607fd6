"""Groups of commands, each a module of typer functions that import what they need when they run."""
