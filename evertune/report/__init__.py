"""From a ledger's events to one self-contained HTML file: no script, no request, everything from data escaped.

`story` works out what happened, `scores` the matrix, `skills` what was kept, `stages` how it was made and what it cost,
`charts` where the lines of each drawing go; the templates only place what these found.
"""

from evertune.report.page import render, write_report
from evertune.report.story import Report, build_report

__all__ = ["Report", "build_report", "render", "write_report"]
