"""What must not move by accident: the debug recipe resolved, the ledger's format, and the tiny run's numbers.

`make golden` rewrites the files under `tests/golden/`; read the difference like code.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from evertune.ledger import Event
from evertune.lineage import open_workspace
from evertune.recipe.load import load_recipe
from tests.command import RECIPE, DebugRun

GOLDEN = Path(__file__).parent / "golden"
# Kernels of other processors sum in another order; after a few steps of training that shows in the fourth digit.
ACROSS_MACHINES = 2e-3


def _held(name: str, found: Any) -> Any:
    """The golden value; written first when asked to."""
    place = GOLDEN / name
    if os.environ.get("EVERTUNE_GOLDEN") == "write":
        place.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return json.loads(place.read_text(encoding="utf-8"))


def test_the_resolved_debug_recipe_stands() -> None:
    found = load_recipe(RECIPE).resolved
    assert found == _held("debug-recipe.json", found)


@pytest.mark.path
def test_the_events_of_the_debug_run_have_the_same_kinds_and_fields(debug_run: DebugRun) -> None:
    events = open_workspace(debug_run.workspace).ledger.events()
    found = {
        "order": [
            f"{event.kind} {event.body.get('label') or event.body.get('round') or ''}".strip() for event in events
        ],
        "fields": {event.kind: sorted(event.body) for event in events},
    }
    assert found == _held("debug-ledger.json", found)


@pytest.mark.path
def test_the_losses_and_the_likelihoods_of_the_debug_run_stand(debug_run: DebugRun) -> None:
    events = open_workspace(debug_run.workspace).ledger.events()
    found = _numbers(events)
    held = _held("debug-numbers.json", found)
    assert found.keys() == held.keys()
    for name, values in held.items():
        assert found[name] == pytest.approx(values, rel=ACROSS_MACHINES), name


def _numbers(events: list[Event]) -> dict[str, list[float]]:
    """Losses of each trained stage, and bits per byte of each checkpoint: what no near-tie can flip."""
    losses = {
        f"losses {event.body['label']}": [round(loss, 5) for _, loss in event.body["losses"]]
        for event in events
        if event.kind == "checkpoint" and event.body["losses"]
    }
    prose = {
        f"prose {event.body['label']}": [round(event.body["value"], 5)]
        for event in events
        if event.kind == "probe" and event.body["probe"] == "prose"
    }
    return {**losses, **prose}
