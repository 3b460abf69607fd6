"""What a run is measured by: the matrix R[i, j] and its summaries, statistics on item scores, drift."""

from evertune.measure.matrix import (
    backward_transfer,
    backward_transfer_interval,
    chance_corrected,
    forgetting,
    forgetting_per_task,
    forward_transfer,
    retention,
    retention_per_task,
    worst_task,
)

__all__ = [
    "backward_transfer",
    "backward_transfer_interval",
    "chance_corrected",
    "forgetting",
    "forgetting_per_task",
    "forward_transfer",
    "retention",
    "retention_per_task",
    "worst_task",
]
