"""What a verifier finds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What a verifier found.

    Attributes:
        score: 0 to 1.
        valid: the output has the form that was asked for, right or wrong.
        parsed: the part of the output that was compared, if any.
        error: why the verifier itself failed, or None. Then `score` means nothing.
    """

    score: float
    valid: bool
    parsed: str | None = None
    error: str | None = None
