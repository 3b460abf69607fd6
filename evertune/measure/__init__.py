"""What a run is measured by: the matrix R[i, j] and its summaries, statistics on item scores, drift."""

from evertune.measure.matrix import (
    Interval,
    ItemSummary,
    Kept,
    RetentionMatrix,
    backward_transfer,
    backward_transfer_interval,
    chance_corrected,
    forgetting,
    forgetting_per_task,
    forward_transfer,
    retention,
    retention_interval,
    retention_per_task,
    summarise_items,
    worst_task,
)

__all__ = [
    "Interval",
    "ItemSummary",
    "Kept",
    "RetentionMatrix",
    "backward_transfer",
    "backward_transfer_interval",
    "chance_corrected",
    "forgetting",
    "forgetting_per_task",
    "forward_transfer",
    "retention",
    "retention_interval",
    "retention_per_task",
    "summarise_items",
    "worst_task",
]
