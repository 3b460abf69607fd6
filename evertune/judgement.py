"""A candidate judged against a baseline, as one JSON value that replays to the same verdict without either model."""

import importlib.metadata
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evertune.errors import IntegrityError, ProbeError
from evertune.gate import GateSettings, Look, ProbeFacts, Verdict, judge
from evertune.hashing import digest_json
from evertune.probe.scores import ItemScores

VERSION = 1
MADE_BY = f"evertune {importlib.metadata.version('evertune')}"
# Numbers of one verdict may differ in their last digits between two builds of numpy and scipy.
RELATIVE, ABSOLUTE = 1e-6, 1e-9
_COLUMNS = ("score", "valid", "stopped")


@dataclass(frozen=True)
class Judged:
    """One use of the gate, with everything that decided.

    Attributes:
        candidate, baseline: names as the user gave them.
        digests: of both, by the same two words; None where there is only a log.
        source: where the probes, or the scores, come from.
        facts: role, safety and margin by probe.
        settings: the gate as the recipe has it.
        before, after: item scores of baseline and candidate by probe.
        flips: the items that changed most, by probe.
        look, items_asked, items_in_all: how far batches went; the counts are None where all items were asked at once.
    """

    candidate: str
    baseline: str
    digests: Mapping[str, str | None]
    source: str
    facts: Mapping[str, ProbeFacts]
    settings: Mapping[str, Any]
    before: Mapping[str, ItemScores]
    after: Mapping[str, ItemScores]
    verdict: Verdict
    flips: Mapping[str, list[Any]]
    look: Look = "whole"
    items_asked: int | None = None
    items_in_all: int | None = None
    next: str = ""

    def to_json(self) -> dict[str, Any]:
        """The verdict's fields, and under `items` what it was made from; `digest` covers all but itself."""
        body = {
            **self.verdict.to_json(),
            "evertune_evidence": VERSION,
            "made_by": MADE_BY,
            "label": self.candidate,
            "champion_label": self.baseline,
            "candidate": self.digests.get("candidate"),
            "champion": self.digests.get("baseline"),
            "source": self.source,
            "roles": [{"probe": name, **asdict(one)} for name, one in self.facts.items()],
            "settings": dict(self.settings),
            "tried": 1,
            "look": self.look,
            "items_asked": self.items_asked,
            "items_in_all": self.items_in_all,
            "flips": {name: list(items) for name, items in self.flips.items()},
            "next": self.next,
            "items": {name: _items(self.before[name], self.after[name]) for name in self.facts},
        }
        return {**body, "digest": digest_json(body)}


def judged(
    *,
    candidate: str,
    baseline: str,
    digests: Mapping[str, str | None],
    source: str,
    facts: Mapping[str, ProbeFacts],
    settings: Mapping[str, Any],
    before: Mapping[str, ItemScores],
    after: Mapping[str, ItemScores],
    flips: Mapping[str, list[Any]],
    look: Look = "whole",
    items_asked: int | None = None,
    items_in_all: int | None = None,
) -> Judged:
    """Judge a candidate against a baseline that stands for both references, champion and best."""
    verdict = judge(after, before, before, facts, GateSettings.from_json(settings), look=look)
    return Judged(
        candidate=candidate,
        baseline=baseline,
        digests=digests,
        source=source,
        facts=facts,
        settings=settings,
        before=before,
        after=after,
        verdict=verdict,
        flips=flips,
        look=look,
        items_asked=items_asked,
        items_in_all=items_in_all,
    )


def replay(path: Path) -> dict[str, Any]:
    """The body of an evidence file, after its verdict was worked out anew from its item scores and found the same.

    Raises:
        ProbeError: not an evidence file, or of another version.
        IntegrityError: the file was altered, or its items give another verdict than it says.
    """
    body = _read(path)
    told = body.pop("digest", None)
    found = digest_json(body)
    if told != found:
        raise IntegrityError(
            f"{path}: its digest is {str(told)[:12]}, its content has {found[:12]}: it was altered after it was made.",
            remedy="Ask for the file again, or judge the checkpoints yourself.",
        )
    try:
        facts = {
            one["probe"]: ProbeFacts(role=one["role"], safety=one["safety"], margin=one["margin"])
            for one in body["roles"]
        }
        sides = [{name: _scores(name, body["items"][name], side) for name in facts} for side in ("before", "after")]
        settings, look = GateSettings.from_json(body["settings"]), body["look"]
        verdict = judge(sides[1], sides[0], sides[0], facts, settings, look=look).to_json()
        _check_shown(body)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ProbeError(f"{path}: not evidence of this version: {type(error).__name__}: {error}.") from error
    for name, value in verdict.items():
        difference = _difference(body.get(name), value, name)
        if difference:
            raise IntegrityError(
                f"{path}: replayed, the verdict is not the one it tells: {difference}.",
                remedy=f"It was made by {body.get('made_by')}; this is {MADE_BY}.",
            )
    if _texts(verdict) != _texts(body):
        # Another version's words, or altered ones with a digest made anew: what is shown is what was found here.
        body = {**body, **verdict}
        told = digest_json(body)
    return {**body, "digest": told}


def _texts(verdict: Mapping[str, Any]) -> list[str]:
    """What is said in a verdict, beside its numbers."""
    rows = [*([verdict["pooled"]] if verdict["pooled"] else []), *verdict["probes"]]
    return [*verdict["reasons"], *(one["reason"] for one in rows)]


def _check_shown(body: Mapping[str, Any]) -> None:
    """Raise unless what a person is shown beside the verdict is there."""
    texts = [body[name] for name in ("label", "champion_label", "source", "made_by", "next")]
    for one in (one for items in body["flips"].values() for one in items):
        texts += [one[name] for name in ("id", "prompt", "expected", "before", "after")]
        numbers = float(one["before_score"]), float(one["after_score"])
        if not all(map(math.isfinite, numbers)):
            raise ValueError("a score that is not finite")
    counts = [body[name] for name in ("items_asked", "items_in_all") if body[name] is not None]
    if not all(isinstance(one, str) for one in texts) or not all(isinstance(one, int) for one in counts):
        raise TypeError("a text or a count is something else")


def _read(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ProbeError(f"{path}: cannot be read as JSON: {error}.") from error
    version = body.get("evertune_evidence") if isinstance(body, dict) else None
    if version != VERSION:
        raise ProbeError(
            f"{path}: found version {version!r} in 'evertune_evidence', expected {VERSION}.",
            remedy="'evertune gate ... --evidence FILE' writes such a file.",
        )
    found: dict[str, Any] = body
    return found


def _items(before: ItemScores, after: ItemScores) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "kind": before.kind,
        "direction": before.direction,
        "items_digest": before.items_digest,
        "template_digest": before.template_digest,
        "samples": before.samples,
        "ids": list(before.ids),
        "cluster": None if before.cluster == before.ids else list(before.cluster),
        "weight": None if before.weight is None else before.weight.tolist(),
    }
    for side, scores in (("before", before), ("after", after)):
        facts[side] = {
            name: None if (value := getattr(scores, name)) is None else [_short(one) for one in value.tolist()]
            for name in _COLUMNS
        }
    return facts


def _short(value: float | bool) -> float | int:
    """0 and 1 without a point: most scores are these."""
    return int(value) if value in (0, 1) else value


def _scores(name: str, body: Mapping[str, Any], side: str) -> ItemScores:
    shared = {key: body[key] for key in ("kind", "direction", "items_digest", "template_digest", "samples", "weight")}
    ids = tuple(body["ids"])
    return ItemScores(probe=name, ids=ids, cluster=tuple(body["cluster"] or ids), **shared, **body[side])


def _difference(told: Any, found: Any, place: str) -> str:
    """Where two values part, "" where they agree to the precision above. Texts are told anew and not compared."""
    if isinstance(found, Mapping) and isinstance(told, Mapping):
        return next((one for key in found if (one := _difference(told.get(key), found[key], f"{place}.{key}"))), "")
    if isinstance(found, list | tuple) and isinstance(told, list | tuple):
        if len(found) != len(told):
            return f"{place} has {len(told)} entries, replayed {len(found)}"
        pairs = enumerate(zip(told, found, strict=True))
        return next((one for i, (a, b) in pairs if (one := _difference(a, b, f"{place}[{i}]"))), "")
    if isinstance(found, float) and isinstance(told, int | float) and not isinstance(told, bool):
        return (
            ""
            if math.isclose(told, found, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
            else f"{place} is {told}, replayed {found}"
        )
    is_text = isinstance(found, str) and isinstance(told, str) and ("reason" in place)
    return "" if is_text or told == found else f"{place} is {told!r}, replayed {found!r}"
