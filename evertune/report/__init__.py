"""From a ledger's events to one self-contained HTML file: no script, no request, everything from data escaped."""

from evertune.report.page import render, write_report
from evertune.report.story import Report, build_report

__all__ = ["Report", "build_report", "render", "write_report"]
