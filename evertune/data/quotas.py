"""How many rows of each source an epoch shows: by rows or tokens, by temperature, or by passes; and what that means."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from evertune.data.stream import quotas_by_weight
from evertune.errors import DataError

# Up to four passes over the same data are worth nearly as much as new data (Muennighoff et al. 2023, arXiv:2305.16264,
# on pre-training); more are told.
MANY_PASSES = 4.0


@dataclass(frozen=True)
class Mixing:
    """How sources are mixed; one of the three.

    Attributes:
        weights: shares of the new rows, or of their tokens.
        by: what the weights are shares of.
        temperature: shares in proportion to rows ** (1 / temperature): 1 as they are, above 1 smaller sources get more
            (Conneau and Lample 2019, arXiv:1901.07291).
        passes: how often each source is shown in an epoch; a source that is not named once.
    """

    weights: Mapping[str, float] | None = None
    by: Literal["rows", "tokens"] = "rows"
    temperature: float | None = None
    passes: Mapping[str, float] | None = None


def quotas_of(mixing: Mixing, rows: Mapping[str, int], tokens: Mapping[str, int] | None = None) -> dict[str, int]:
    """Rows of each source in an epoch, which has as many rows as all sources together unless passes are given.

    By tokens, a source's rows are its share of tokens by its mean tokens of a row: exact over whole passes, and near it
    in every stretch.

    Raises:
        DataError: names that are no sources, a number that is not positive and finite, or two ways at once.
    """
    given = [name for name in ("weights", "temperature", "passes") if getattr(mixing, name) is not None]
    if len(given) > 1:
        raise DataError(f"mix: found {' and '.join(given)}, expected one of them.")
    named = mixing.weights or mixing.passes or {}
    unknown = sorted(set(named) - set(rows))
    if unknown:
        raise DataError(f"mix: found '{unknown[0]}', expected one of the sources {', '.join(rows)}.")
    numbers = [*named.values(), *([] if mixing.temperature is None else [mixing.temperature])]
    if not all(0 < one < math.inf for one in numbers):
        raise DataError(f"mix: found {dict(named) or mixing.temperature}, expected finite numbers above 0.")
    if mixing.passes is not None:
        return {name: max(1, round(count * mixing.passes.get(name, 1.0))) for name, count in rows.items()}
    total = sum(rows.values())
    if mixing.temperature is not None:
        largest = max(rows.values())  # a power of a ratio does not overflow
        shares = {name: (count / largest) ** (1 / mixing.temperature) for name, count in rows.items()}
        return quotas_by_weight(shares, total)
    if mixing.weights is None:
        return dict(rows)
    missing = sorted(set(rows) - set(mixing.weights))
    if missing:
        raise DataError(f"mix: found no weight for '{missing[0]}', expected one for each source.")
    if mixing.by == "tokens":
        if tokens is None:
            raise AssertionError("weights by tokens need tokens")
        means = {name: max(tokens[name], 1) / count for name, count in rows.items()}
        return quotas_by_weight({name: weight / means[name] for name, weight in mixing.weights.items()}, total)
    return quotas_by_weight(mixing.weights, total)


def warnings_of(quotas: Mapping[str, int], rows: Mapping[str, int], epochs: float) -> list[str]:
    """What is odd about a mix over some epochs: sources that are shown very often, or not all of them."""
    found = []
    for name, count in rows.items():
        passes = quotas[name] * epochs / count
        if passes > MANY_PASSES:
            found.append(f"'{name}' is shown {passes:.1f} times: its {count} rows may be learnt by heart.")
        elif passes < 1:
            unseen = count - int(quotas[name] * epochs)
            found.append(f"{unseen} of {count} rows of '{name}' are not shown.")
    return found
