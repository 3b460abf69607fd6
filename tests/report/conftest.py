from collections.abc import Callable, Sequence

import pytest

from evertune.ledger import Event
from evertune.report import build_report, render


@pytest.fixture
def rendered() -> Callable[[Sequence[Event]], str]:
    """Events to a page."""
    return lambda events: render(build_report(events))
