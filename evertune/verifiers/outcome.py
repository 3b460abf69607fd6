"""What a verifier finds."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Outcome:
    """What a verifier found.

    Attributes:
        score: 0 to 1.
        valid: the output has the form that was asked for, right or wrong.
        parsed: the part of the output that was compared, if any.
        error: why the verifier itself failed, or None. Then `score` means nothing.
        parts: scores by part of a verifier that has several.
    """

    score: float
    valid: bool
    parsed: str | None = None
    error: str | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
