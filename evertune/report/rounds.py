"""Rounds as the ledger tells them: verdict, rescues, how each ended; and the line of champions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evertune.ledger import Event

Body = Mapping[str, Any]


@dataclass(frozen=True)
class RoundStory:
    """One round.

    `state` is PROMOTE, HOLD or INCONCLUSIVE as the round ended; PASSED when its promotion is not recorded yet; OPEN
    when it began and has no verdict; PLANNED when nothing of it is in the ledger. `settled` is False while a rescue or
    a promotion may still follow.
    """

    name: str
    state: str
    verdict: Body | None
    rescues: tuple[Body, ...]
    promotion: Body | None
    settled: bool

    @property
    def deciding(self) -> Body | None:
        """The verdict that ended the round: the promoted rescue's, else the candidate's own."""
        if self.promotion is not None:
            for one in self.rescues:
                if one["label"] == self.promotion["label"]:
                    return one
        return self.verdict

    @property
    def rescued(self) -> Body | None:
        """The rescue that was promoted, if one was."""
        return self.deciding if self.deciding is not self.verdict else None


def bodies(events: Sequence[Event], kind: str) -> list[dict[str, Any]]:
    """Bodies of the events of a kind, in order."""
    return [one.body for one in events if one.kind == kind]


def tell_rounds(events: Sequence[Event]) -> tuple[RoundStory, ...]:
    """Every round in the recipe's order, those it does not name first. Work found done may be older than what comes
    before it, so the ledger's order is not the rounds'."""
    began = [one.body["round"] for one in events if one.kind in ("checkpoint", "verdict") and one.body["round"]]
    began += [one["round"] for one in bodies(events, "failure")]
    planned = [name for run in bodies(events, "run")[-1:] for name in run["round_names"]]
    names = list(dict.fromkeys([*(name for name in began if name not in planned), *planned]))
    return tuple(_tell_round(events, name, began=name in began, last=name == names[-1]) for name in names)


def _tell_round(events: Sequence[Event], name: str, *, began: bool, last: bool) -> RoundStory:
    mine = [one for one in events if one.body.get("round") == name]
    verdicts = bodies(mine, "verdict")
    # With an edited recipe a round may be judged otherwise than when it was promoted: the newest verdict stands.
    words = {one.body["label"]: one.body["decision"] for one in mine if one.kind in ("verdict", "rescue")}
    promotions = [one for one in bodies(mine, "promotion") if words.get(one["label"]) == "PROMOTE"]
    verdict = verdicts[-1] if verdicts else None
    promotion = promotions[-1] if promotions else None
    if verdict is None:
        state = "OPEN" if began else "PLANNED"
    elif promotion is not None:
        state = "PROMOTE"
    else:
        state = "PASSED" if verdict["decision"] == "PROMOTE" else verdict["decision"]
    settled = bool(promotion or bodies(mine, "settled")) or (verdict is not None and _followed(events, name))
    return RoundStory(name, state, verdict, tuple(bodies(mine, "rescue")), promotion, settled)


def _followed(events: Sequence[Event], name: str) -> bool:
    """Another round has begun after this one's verdict: the run went on."""
    judged = max(one.seq for one in events if one.kind == "verdict" and one.body["round"] == name)
    return any(one.seq > judged and one.kind == "checkpoint" and one.body["round"] != name for one in events)


def champion_line(events: Sequence[Event]) -> tuple[str, ...]:
    """Labels from the base to the present champion; what was rolled back is not on it."""
    line = ["base"]
    for one in events:
        if one.kind == "promotion":
            line.append(one.body["label"])
        elif one.kind == "rollback":
            label = one.body["label"]
            line = line[: line.index(label) + 1] if label in line else [*line, label]
    return tuple(line)


def champion_before(events: Sequence[Event], label: str) -> str | None:
    """The champion a checkpoint is to be compared with: the one its verdict names, else the one that stood when it was
    made. None for the base."""
    for one in events:
        if one.kind in ("verdict", "rescue") and one.body["label"] == label:
            return str(one.body["champion_label"])
    made = [one.seq for one in events if one.kind == "checkpoint" and one.body["label"] == label]
    if label == "base" or not made:
        return None
    return champion_line([one for one in events if one.seq < made[-1]])[-1]


def judged_labels(rounds: Sequence[RoundStory]) -> dict[str, Body]:
    """The verdict of each checkpoint that has one."""
    found: dict[str, Body] = {}
    for one in rounds:
        for verdict in (one.verdict, *one.rescues):
            if verdict is not None:
                found[verdict["label"]] = verdict
    return found


def open_failures(events: Sequence[Event]) -> tuple[Body, ...]:
    """Failures whose stage has no checkpoint afterwards: what stopped the run. Those made good later are left out."""
    found: dict[str, Body] = {}
    for one in events:
        if one.kind == "failure":
            found[one.body["stage"]] = one.body
        elif one.kind == "checkpoint":
            found.pop(one.body["label"], None)
    return tuple(found.values())
