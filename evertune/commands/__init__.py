"""Commands with many flags, one file each; `cli.py` registers them."""
