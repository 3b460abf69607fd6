"""Verifiers that name files beside the recipe: where those are, and what is in them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evertune.verifiers.classifier import found_classifier
from evertune.verifiers.function import with_digest

Change = Callable[[Mapping[str, Any]], dict[str, Any]]


def located(verifier: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A verifier as a recipe has it, with the digest of every file that a score depends on.

    Raises:
        ProbeError: there is no such module, function or classifier.
    """
    return _in_each(
        verifier,
        {
            "function": lambda one: with_digest(one, folder),
            "classifier": lambda one: found_classifier(one, folder),
        },
    )


def placed(verifier: Mapping[str, Any], folder: Path | str) -> dict[str, Any]:
    """A located verifier with the folder that its files are looked for in, ready to be asked."""
    return _in_each(verifier, dict.fromkeys(("function", "classifier"), lambda one: {**one, "folder": str(folder)}))


def _in_each(verifier: Mapping[str, Any], changes: Mapping[str, Change]) -> dict[str, Any]:
    """A copy in which the arguments of some kinds are changed, inside of parts too."""
    ((kind, argument),) = verifier.items()
    if kind == "parts":
        argument = {name: {**part, "check": _in_each(part["check"], changes)} for name, part in argument.items()}
    return {kind: changes[kind](argument) if kind in changes else argument}
