"""What a source holds, in numbers: counts, lengths, repeats, scripts, roles, what stands out, and rows at random."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evertune.data.dedup import resolve
from evertune.data.fingerprint import BATCH_ROWS, Fingerprints, batched, fingerprint, join
from evertune.data.quality import asked_and_said, scripts_of, signals_of
from evertune.data.rows import Row, messages_of

SIGNALS = ("words", "prompt_words", "repetition", "broken", "refusal", "unended", "open_fence", "placeholders")
BINS = 12
OUTLIERS = 3


@dataclass(frozen=True)
class Inspection:
    """Facts of one source.

    Attributes:
        turns: number of rows by their roles, such as `user assistant`.
        starts: rows by the first words of what is asked: a template shows here.
        scripts: share of letters by script.
        duplicates: rows that repeat another word for word, and nearly.
        signals: mean, and values at 0, 5, 50, 95 and 100 %, by signal.
        histogram: of words of what is said: `edges` (one more than `counts`) and `counts`.
        outliers: the rows with the most and fewest words, as `file:line`.
        samples: rows at random.
    """

    name: str
    format: str
    rows: int
    quarantined: int
    characters: int
    tokens: int | None
    turns: dict[str, int]
    starts: dict[str, int]
    scripts: dict[str, float]
    duplicates: dict[str, int]
    signals: dict[str, dict[str, float]]
    histogram: dict[str, list[float]]
    outliers: dict[str, list[str]]
    samples: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_rows(
    name: str,
    format: str,
    rows: Iterable[Row],
    *,
    samples: int,
    seed: int,
    count_tokens: Callable[[Row], int] | None = None,
) -> Inspection:
    """Facts of rows, read once; memory holds a few numbers a row."""
    turns: Counter[str] = Counter()
    starts: Counter[str] = Counter()
    scripts: Counter[str] = Counter()
    prints: list[Fingerprints] = []
    values: list[NDArray[np.float64]] = [np.zeros((0, len(SIGNALS)))]
    places: list[str] = []
    rng = random.Random(seed)
    kept: list[tuple[int, dict[str, Any]]] = []
    characters = tokens = count = 0
    for batch in batched(rows, BATCH_ROWS):
        prints.append(fingerprint(batch))
        values.append(np.array([signals_of(row, SIGNALS) for row in batch]))
        for row in batch:
            asked, said = asked_and_said(row)
            turns["text" if row.format == "text" else " ".join(one["role"] for one in messages_of(row.value))] += 1
            starts[" ".join((asked or said).split()[:4])] += 1
            scripts += scripts_of(f"{asked[:2000]} {said[:2000]}")
            characters += len(asked) + len(said)
            tokens += count_tokens(row) if count_tokens else 0
            places.append(row.place)
            # Algorithm R: every row is equally likely to be among the samples.
            place = count if count < samples else int(rng.random() * (count + 1))
            if place < samples:
                kept[place : place + 1] = [(count, row.value)]
            count += 1
    found = resolve(join(prints))
    table = np.concatenate(values)
    words = table[:, SIGNALS.index("words")]
    return Inspection(
        name=name,
        format=format,
        rows=count,
        quarantined=0,
        characters=characters,
        tokens=tokens if count_tokens else None,
        turns=dict(turns.most_common(8)),
        starts={start: number for start, number in starts.most_common(5) if number > 1},
        scripts={script: round(number / scripts.total(), 4) for script, number in scripts.most_common(6)},
        duplicates={
            "exact": int((found.is_exact & ~found.stays).sum()),
            "near": int((~found.is_exact & ~found.stays).sum()),
        },
        signals={one: _spread(table[:, i]) for i, one in enumerate(SIGNALS)},
        histogram=_histogram(words),
        outliers=_outliers(words, places),
        samples=[value for _, value in sorted(kept, key=lambda one: one[0])],
    )


def bars(counts: Sequence[float], width: int = 40) -> list[str]:
    """A bar for each count, the largest `width` wide, in eighths of a character."""
    most = max(counts, default=0) or 1
    found = []
    for one in counts:
        eighths = round(8 * width * one / most)
        found.append("█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8].strip()))
    return found


def _spread(values: NDArray[np.float64]) -> dict[str, float]:
    if len(values) == 0:
        return {}
    low, five, middle, most, high = np.quantile(values, [0, 0.05, 0.5, 0.95, 1]).round(3).tolist()
    return {"mean": round(float(values.mean()), 3), "min": low, "p5": five, "p50": middle, "p95": most, "max": high}


def _histogram(words: NDArray[np.float64]) -> dict[str, list[float]]:
    """Counts of rows by words of what is said, in bins of equal ratio: lengths spread over powers of ten."""
    if len(words) == 0:
        return {"edges": [], "counts": []}
    top = max(2.0, float(words.max()) + 1)
    edges = np.unique(np.concatenate([[0.0], np.geomspace(1, top, BINS).round()]))
    counts, _ = np.histogram(words, bins=edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _outliers(words: NDArray[np.float64], places: Sequence[str]) -> dict[str, list[str]]:
    order = np.argsort(words, kind="stable")
    return {
        "fewest words": [f"{places[i]} ({int(words[i])})" for i in order[:OUTLIERS]],
        "most words": [f"{places[i]} ({int(words[i])})" for i in order[::-1][:OUTLIERS]],
    }
