"""What a child is asked to follow into the data; without torch."""

from dataclasses import dataclass

# Raised by hand when the meaning of a push changes.
VERSION = 3


@dataclass(frozen=True)
class SourceOrder:
    """A source whose rows are sampled.

    Attributes:
        shown: how many of its rows the stage has shown, repeats counted.
        beta: of preferences, what their log-ratio is multiplied with at the start of training, where its slope is
            -beta / 2; None for rows with one answer.
    """

    source: str
    path: str
    format: str
    limit: int | None
    is_replay: bool
    shown: float
    beta: float | None = None
