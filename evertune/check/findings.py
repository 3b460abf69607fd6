"""What a check says."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing to know: an `error` stops a run, a `warning` should not be missed, a `note` explains.

    Attributes:
        place: path in the recipe, such as `data.tickets`; the message names file and line where there is one.
        remedy: what to do, or "".
    """

    severity: Severity
    place: str
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class StageEstimate:
    """What a stage would do, if every round before it is promoted.

    Attributes:
        new_rows, replay_rows: rows seen in all steps, repeats counted.
        tokens, counted_tokens: of these rows; counted ones carry loss.
        seconds: of training, on the CPU of this machine; within a factor of two where nothing else runs. 0 where
            nothing is known.
        disk_bytes: of the checkpoint it leaves.
        done: the workspace has this stage, made by this recipe from these rows.
        summary: what it would do, in words, without label, time and state.
    """

    label: str
    new_rows: int
    replay_rows: int
    steps: int
    tokens: int
    counted_tokens: int
    seconds: int
    disk_bytes: int
    done: bool
    summary: str


@dataclass(frozen=True)
class Disk:
    """Bytes that the stages not yet done need, resume points included, and bytes that are free."""

    needed_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Sample:
    """A row as the model reads it, in pieces of text that carry loss (True) or do not."""

    source: str
    id: str
    segments: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class CheckReport:
    """What `evertune check` found; `stages` are those that could be worked out."""

    recipe: str
    findings: tuple[Finding, ...]
    stages: tuple[StageEstimate, ...]
    disk: Disk
    samples: tuple[Sample, ...] = field(default=())

    @property
    def has_errors(self) -> bool:
        """A run would not start."""
        return any(one.severity == "error" for one in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The shape of `evertune check --json`:

        {"recipe": path, "ok": bool,
         "findings": [{"severity": "error" | "warning" | "note", "place", "message", "remedy"}],
         "stages": [{"label", "new_rows", "replay_rows", "steps", "tokens", "counted_tokens", "seconds",
                     "disk_bytes", "done", "summary"}],
         "disk": {"needed_bytes", "free_bytes"},
         "samples": [{"source", "id", "segments": [[text, counted], ...]}]}
        """
        return {"ok": not self.has_errors, **asdict(self)}
