"""The kinds of stages: how each is ordered and performed.

    sft.py        supervised fine-tuning        dpo.py        preferences
    rl.py         verifiable rewards            distill.py    teachers into a student
    external.py   another trainer's command     federated.py  clients that keep their rows
    place.py      where a stage stands          training.py   what trained kinds have in common

To add a kind: a settings class and a key of `Stage` in recipe/schema.py, its resolver in recipe/presets.py, a file
here with `order` and `perform` and its line in the table below, and what a check can say of it in check/stages.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evertune.stages import distill, dpo, external, federated, merge, rl, sft
from evertune.stages.place import Order, Past, Place
from evertune.workspace import Workspace

__all__ = ["KINDS", "Order", "Past", "Place", "StageKind"]


@dataclass(frozen=True)
class StageKind:
    """One kind of stage.

    Attributes:
        order: makes the order from the place; light, called in the parent.
        perform: carries an order out in a child, and publishes a checkpoint under its key with the record
            `{"checkpoint": the ledger's fields, "volatile": {"time", "seconds", ...}}`. Called again after an
            interruption, it goes on or begins anew, to the same result.
        is_launched: starts under the recipe's `launch` command, on several processes.
    """

    order: Callable[[Place], Order]
    perform: Callable[[dict[str, Any], Workspace], dict[str, Any]]
    is_launched: bool = False


KINDS: dict[str, StageKind] = {
    "sft": StageKind(sft.order, sft.perform, is_launched=True),
    "dpo": StageKind(dpo.order, dpo.perform, is_launched=True),
    "rl": StageKind(rl.order, rl.perform, is_launched=True),
    "distill": StageKind(distill.order, distill.perform, is_launched=True),
    "external": StageKind(external.order, external.perform),
    "merge": StageKind(merge.order, merge.perform),
    "federated": StageKind(federated.order, federated.perform),
}
