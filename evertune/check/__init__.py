"""Everything that can be known before training, in about a second: no torch, and no weight is read.

look.py        what the recipe names: data, probes, models, leaks
promotable.py  whether the gate could promote at all
stages.py      what each stage would do      estimate.py  rows, steps, tokens, time and disk
lengths.py     how long rows are in tokens, remembered between checks
samples.py     rows as the model reads them
findings.py    what comes out, as objects and JSON      printing.py  as text
"""

from evertune.check.findings import CheckReport, Disk, Finding, Sample, StageEstimate
from evertune.check.look import (
    Look,
    look_at_history,
    look_at_leaks,
    look_at_numerics,
    read_data,
    read_models,
    read_probes,
)
from evertune.check.printing import print_report
from evertune.check.promotable import look_at_gate
from evertune.check.samples import render_samples
from evertune.check.stages import look_at_disk, look_at_stages
from evertune.recipe.load import LoadedRecipe

__all__ = [
    "CheckReport",
    "Disk",
    "Finding",
    "Sample",
    "StageEstimate",
    "check_recipe",
    "print_report",
    "render_samples",
]


def check_recipe(loaded: LoadedRecipe, *, sample: int = 0) -> CheckReport:
    """Look at everything a recipe names.

    Args:
        sample: rows of each new source to render with the counted tokens marked.
    """
    look = Look(loaded)
    look_at_numerics(look)
    read_data(look)
    read_probes(look)
    read_models(look)
    look_at_leaks(look)
    look_at_history(look)
    look_at_gate(look)
    planned = look_at_stages(look)
    disk = look_at_disk(look, planned)
    samples: list[Sample] = []
    if sample and look.words is not None:
        samples = look.attempt("samples", render_samples, loaded, sample) or []
    stages = tuple(one.estimate for one in planned)
    return CheckReport(str(loaded.path), tuple(look.findings), stages, disk, tuple(samples))
