"""Seconds as people say them, for estimates; what was measured is told more exactly in the report."""


def duration(seconds: int) -> str:
    """`80 s`, `12 min` or `3.5 h`."""
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
