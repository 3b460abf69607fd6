"""The page in a real browser, hostile strings in every field: nothing runs, nothing is fetched, nothing complains.

A deliberately naive page with the same strings, unescaped, fires the canary and fetches: the watch itself works.
Skipped where no Chromium is installed; with `CI` set that is a failure.
"""

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from evertune.report import build_report, render
from tests.report.hostile import HOSTILE, poisoned

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-default-apps"),
    # Console messages go to standard error; the page gets two seconds of its own time to do its worst.
    *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000"),
)

pytestmark = pytest.mark.skipif(BROWSER is None and not os.environ.get("CI"), reason="no Chromium is installed")


@dataclass
class Listener:
    """A server on loopback that counts what is asked of it."""

    url: str
    asked: list[str]


@dataclass(frozen=True)
class Visit:
    """What a page did: which canaries fired, what it asked for, what the console said, and the page afterwards."""

    fired: tuple[int, ...]
    asked: tuple[str, ...]
    console: tuple[str, ...]
    page: str


@pytest.fixture
def listener() -> Iterator[Listener]:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Listener(f"http://127.0.0.1:{server.server_port}", asked)
    server.shutdown()
    server.server_close()


def test_hostile_strings_do_nothing_in_a_browser(listener: Listener, tmp_path: Path) -> None:
    # One page per string would take minutes: each field holds all of them in a row.
    visit = _visit(render(build_report(poisoned(" ".join(_armed(listener))))), listener, tmp_path)
    assert visit.fired == ()
    assert visit.asked == ()
    assert visit.console == ()
    # The browser's own reading of the page has no element of theirs.
    assert not re.search(r"<(script|img|iframe|object|embed|video|audio|form|input|base|link|animate)\b", visit.page)
    assert len(re.findall(r"<style\b", visit.page)) == 1


def test_a_naive_page_with_the_same_strings_fires_fetches_and_complains(listener: Listener, tmp_path: Path) -> None:
    visit = _visit(_naive_page(listener, head=""), listener, tmp_path)
    assert len(visit.fired) >= 8
    assert visit.asked
    assert any("heard" in line for line in visit.console)


def test_the_policy_alone_stops_them_too(listener: Listener, tmp_path: Path) -> None:
    # The second line of defence, by itself: were the escaping broken one day, this would still hold.
    (policy,) = re.findall(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", render(build_report([])))
    visit = _visit(_naive_page(listener, head=policy), listener, tmp_path)
    assert (visit.fired, visit.asked) == ((), ())
    assert any("Content Security Policy" in line for line in visit.console)


def _naive_page(listener: Listener, *, head: str) -> str:
    """The strings as markup. A refresh would leave the page before it is read: it and a base are left out."""
    strings = [one for one in _armed(listener) if not one.startswith(("<meta", "<base"))]
    body = "".join(f"<div><svg></svg>{one}</div>" for one in ["<script>console.error('heard')</script>", *strings])
    return f"<!DOCTYPE html><html><head>{head}</head><body>{body}</body></html>"


def _armed(listener: Listener) -> list[str]:
    """The strings with a canary of their own each: it leaves a mark on the page that a dump shows."""
    return [
        one.format(fire=f"document.documentElement.setAttribute(`data-fired-{i}`,1)", url=listener.url)
        for i, one in enumerate(HOSTILE)
    ]


def _visit(html: str, listener: Listener, folder: Path) -> Visit:
    assert BROWSER, "CI is set and no Chromium is installed: apt-get install chromium"
    place = folder / "page.html"
    place.write_text(html, encoding="utf-8")
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", place.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    page, log = done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
    assert "</html>" in page
    fired = tuple(sorted({int(i) for i in re.findall(r'data-fired-(\d+)="1"', page)}))
    return Visit(fired, tuple(listener.asked), tuple(line for line in log.splitlines() if "CONSOLE" in line), page)
