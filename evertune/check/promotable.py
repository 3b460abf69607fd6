"""Whether the gate could promote at all: probes too small for its margins, rounds without a target or a guard."""

import math
from statistics import NormalDist

from evertune.check.look import Look
from evertune.probe.suite import Probe
from evertune.recipe.schema import Recipe, Round


def look_at_gate(look: Look) -> None:
    """Warn of rounds and probes that no result could promote."""
    for i, one in enumerate(look.recipe.rounds):
        roles = _roles(look.recipe, one)
        if "target" not in roles.values():
            told = "no probe is a target: only that nothing was lost can be shown."
            look.say("warning", f"rounds[{i}]", told, "Give a probe the role 'target', or set it in 'roles'.")
        if "guard" not in roles.values():
            told = "no probe is a guard: it cannot be promoted, since nothing shows what is lost."
            look.say("warning", f"rounds[{i}]", told, "Give a probe the role 'guard', or set it in 'roles'.")
    for probe in look.probes:
        roles_of = {_roles(look.recipe, one)[probe.name] for one in look.recipe.rounds}
        if not isinstance(probe, Probe):
            told = (
                "how many items it has is known to lm-eval only: whether they are enough for the gate is not looked at."
            )
            look.say("note", f"probes.{probe.name}", told)
        elif roles_of != {"watch"}:
            _look_at_size(look, probe, is_guard="guard" in roles_of)
    _look_at_pool(look)


def _look_at_size(look: Look, probe: Probe, *, is_guard: bool) -> None:
    """Warn where no result of this probe could promote."""
    gate, place, items = look.recipe.gate, f"probes.{probe.name}", len(probe.items)
    clusters = len({item.cluster for item in probe.items})
    for found, needed, what, name in (
        (items, gate.min_items, "items", "min_items"),
        (clusters, gate.min_clusters, "clusters of items", "min_clusters"),
    ):
        if found < needed:
            told = f"{found} {what}, and gate.{name} asks for {needed}: no round can be promoted."
            look.say("warning", place, told, f"Add {needed - found}, or lower gate.{name} and widen the margins.")
            return
    margins = {"form of the answers": gate.margin.format} if probe.kind in ("generate", "episode") else {}
    if is_guard and probe.kind != "bits_per_byte":
        margins["score"] = probe.margin or (gate.margin.safety if probe.safety else gate.margin.probe)
    for what, margin in margins.items():
        needed = minimum_items(margin, gate.alpha)
        if items < needed:
            told = (
                f"{items} items cannot rule out a drop of {margin:g} in the {what} even when no answer changes; that "
                f"takes {needed}: no round can be promoted."
            )
            look.say("warning", place, told, "Add items, or widen the margin.")


def _look_at_pool(look: Look) -> None:
    gate = look.recipe.gate
    needed = minimum_items(gate.margin.pooled, gate.alpha)
    for i, one in enumerate(look.recipe.rounds):
        roles = _roles(look.recipe, one)
        guards = [probe for probe in look.probes if roles[probe.name] == "guard" and probe.kind != "bits_per_byte"]
        if not guards or not all(isinstance(probe, Probe) for probe in guards):
            continue
        items = sum(len(probe.prompts()) for probe in guards)
        if items < needed:
            told = (
                f"its guards have {items} items together, which cannot rule out a pooled drop of "
                f"{gate.margin.pooled:g} even when no answer changes; that takes {needed}: it cannot be promoted."
            )
            look.say("warning", f"rounds[{i}]", told, "Add items to the guards, or widen gate.margin.pooled.")


def minimum_items(margin: float, alpha: float) -> int:
    """Items below which a drop of `margin` cannot be ruled out even when none flips: z^2 (1 - m) / m.

    The closed form of `measure.stats.minimum_items`, without its half second of imports; a test holds them together.
    """
    z = NormalDist().inv_cdf(1 - alpha)
    return math.ceil(z * z * (1 - margin) / margin)


def _roles(recipe: Recipe, one: Round) -> dict[str, str]:
    """Roles of all probes in a round."""
    return {name: one.roles.get(name, probe.role) for name, probe in recipe.probes.items()}
