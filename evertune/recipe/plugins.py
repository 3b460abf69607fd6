"""Penalties, gradient rules and objectives from other packages: how a recipe names, finds and checks them.

A package announces one by a Python entry point, `name = "module:PLUGIN"` in the group of its kind. What stands there is
a `Plugin`: a light description, read by `evertune check`; the code behind it is imported where training happens. The
academic methods of this distribution come in by the same door; no other module knows them.
"""

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, create_model

from evertune.methods import Standing, methods, weakest

Kind = Literal["penalties", "gradient_rules", "objective"]
GROUPS: Mapping[Kind, str] = {
    "penalties": "evertune.penalties",
    "gradient_rules": "evertune.gradient_rules",
    "objective": "evertune.objectives",
}
NOUNS: Mapping[Kind, str] = {"penalties": "penalty", "gradient_rules": "gradient rule", "objective": "objective"}


@dataclass(frozen=True)
class Plugin:
    """What an entry point leads to.

    Attributes:
        method: id of its row in the table of methods; of its own choice where the table has none.
        options: what a recipe may say of it. Of these, `sources` are data sources whose rows it remembers (`history`
            among them), `memory_rows` how many of each.
        make: `module:function` of the function that makes it from a `train.plugins.Bench`; imported in the child.
        version: raised by hand when its meaning changes; results are then made anew.
        copies: float32 copies of the trained weights that it keeps in memory; a function of its options and of how
            many sources it remembers where these say.
        full_copies: the same where all weights are trained, if that differs: a frozen start beside them, say.
        more_bytes: of memory that it keeps beside these, at most: from its options and the longest row's tokens.
        refuses: from its options and the stage's settings with all defaults filled in, why it cannot work with them;
            None where it can.
        carries: leaves something beside the checkpoint for its own next stage.
        tunes: kinds of `tune` that it can work with.
        stages: kinds of stages that it can work in.
        own_standing: of a method that the table does not know; it counts as `research` at best.
    """

    method: str
    options: type[BaseModel]
    make: str
    version: int = 1
    copies: float | Callable[[Any, int], float] = 0.0
    full_copies: float | None = None
    more_bytes: Callable[[Any, int], int] | None = None
    refuses: Callable[[Any, Any], str | None] | None = None
    carries: bool = False
    tunes: tuple[str, ...] = ("lora", "full")
    stages: tuple[str, ...] = ("sft", "dpo", "rl", "distill")
    own_standing: Standing = "research"

    def copies_of(self, options: Any, remembered: int, *, full: bool) -> float:
        """Float32 copies of the trained weights that it keeps with these options and so many remembered sources."""
        if full and self.full_copies is not None:
            return self.full_copies
        return self.copies(options, remembered) if callable(self.copies) else self.copies

    @property
    def standing(self) -> Standing:
        """The table's; without a row, nobody but its author has looked at the evidence."""
        row = methods().get(self.method)
        return row.standing if row is not None else weakest([self.own_standing, "research"])


def installed(kind: Kind) -> list[str]:
    """Names of the plug-ins of a kind, sorted."""
    return sorted({one.name for one in importlib.metadata.entry_points(group=GROUPS[kind])})


def find_plugin(kind: Kind, name: str) -> Plugin:
    """The plug-in of a name.

    Raises:
        ValueError: none is installed under the name, several are, or it cannot be read: told in a recipe's words.
    """
    found = list(importlib.metadata.entry_points(group=GROUPS[kind], name=name))
    if not found:
        known = ", ".join(installed(kind)) or "none is installed"
        raise ValueError(f"found the {NOUNS[kind]} '{name}', expected one that is installed: {known}")
    if len({one.value for one in found}) > 1:
        raise ValueError(f"found two packages that bring a {NOUNS[kind]} '{name}', expected one: uninstall the other")
    try:
        plugin = found[0].load()
    except Exception as error:
        raise ValueError(f"the {NOUNS[kind]} '{name}' ({found[0].value}) cannot be loaded: {error!r}") from error
    if not isinstance(plugin, Plugin):
        raise ValueError(f"found {found[0].value} behind the {NOUNS[kind]} '{name}', expected a Plugin")
    return plugin


def check_options(kind: Kind, value: Any) -> Any:
    """Options by plug-in name, each as the plug-in's own model; an empty entry takes its defaults.

    Raises:
        ValueError: a name that is not installed, or options that the plug-in does not have.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping from names to options; installed: {', '.join(installed(kind))}")
    models = {str(name): (find_plugin(kind, str(name)).options, ...) for name in value}
    given = {str(name): {} if one is None else one for name, one in value.items()}
    fields: dict[str, Any] = models
    # Through a model with a field for each, so that an error says where it stands.
    checked = create_model("Named", **fields).model_validate(given)
    return {name: getattr(checked, name) for name in given}
