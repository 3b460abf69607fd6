"""The gate alone: any two checkpoints, the probes and margins of a recipe, no training."""

from pathlib import Path
from typing import Any

from evertune.display import Display
from evertune.gate import judge
from evertune.model.checkpoint import describe
from evertune.plan import make_plan
from evertune.process import Workers
from evertune.recipe.load import LoadedRecipe
from evertune.scoring import score_checkpoint
from evertune.workspace import Workspace


def judge_folders(
    candidate: Path, baseline: Path, loaded: LoadedRecipe, folder: Path, *, display: Display
) -> dict[str, Any]:
    """Score both checkpoints on the recipe's probes and judge the candidate against the baseline.

    Args:
        candidate: folder of a model or adapter.
        baseline: folder of the model it must not be worse than; it stands for the champion and for the best.
        loaded: the recipe whose probes and gate apply.
        folder: workspace in which the scores are kept, so that the same question is answered at once next time.
        display: where the evidence is printed.

    Returns:
        The verdict as plain values: `decision`, `reasons`, `pooled`, `probes`, `flips`, `settings`, `candidate`,
        `champion`, `label`, `champion_label`, `tried`.
    """
    plan = make_plan(loaded)
    workspace = Workspace.open(folder, create=True)
    after, before = describe(candidate), describe(baseline)
    with workspace.lock(purpose="gate"):
        workspace.recover()
        workers = Workers()
        scores = {
            one.digest: score_checkpoint(plan, workspace, workers, one, label=one.path.name, display=display).scores
            for one in (before, after)
        }
    verdict = judge(
        scores[after.digest], scores[before.digest], scores[before.digest], plan.facts(), plan.gate_settings
    )
    body = {
        **verdict.to_json(),
        "label": str(candidate),
        "candidate": after.digest,
        "champion": before.digest,
        "champion_label": str(baseline),
        "settings": plan.gate_body,
        "tried": 1,
        "flips": plan.flips(scores[after.digest], scores[before.digest]),
    }
    display.verdict(str(candidate), verdict, body, next_command=f"evertune show {candidate}")
    return body
