"""A share of replay that rises while a stage runs: guards are asked at fixed steps, and the share follows their scores.

    step      0          50         100        150
    guard     0.62       0.61       0.55       0.60      margin 0.03
    best               0.62       0.62       0.62
    share     0.2        0.2        0.3        0.3      raised by 0.1 where a guard stands below its best by more

The share is a function of the scores that are recorded in the steps' metrics, and of nothing else: a resumed stage
reads them there and shows the same rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from evertune.data.encode import Item
from evertune.data.stream import Stream, Stretches
from evertune.model.open import OpenModel
from evertune.train.material import Material
from evertune.train.sink import Metrics
from evertune.train.spec import AdaptSpec, TrainingSpec

SHARE, GUARD = "replay_share", "guard/"

# Mean score of each guard, of the model in training.
Ask = Callable[[OpenModel], Mapping[str, float]]


def adaptive(material: Material, spec: TrainingSpec) -> Material:
    """The same rows in a stream whose share can be raised; as it is where nothing is asked or nothing replayed."""
    if spec.adapt is None or not material.replay:
        return material
    assert isinstance(material.stream, Stream), "made adaptive twice"
    return replace(material, stream=Stretches(material.stream, spec.adapt.every * material.batch_rows, spec.share))


def fallen(scores: Sequence[Mapping[str, float]], guards: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Guards whose last score is worse than the best before it by more than their margin, and by how much.

    In points where higher is better; relative to the best where lower is.
    """
    found = {}
    for name, guard in guards.items():
        values = [one[name] for one in scores]
        if len(values) < 2:
            continue
        if guard["lower"]:
            best = min(values[:-1])
            drop = (values[-1] - best) / best if best > 0 else 0.0
        else:
            drop = max(values[:-1]) - values[-1]
        if drop > guard["margin"]:
            found[name] = drop
    return found


def shares_of(share: float, scores: Sequence[Mapping[str, float]], adapt: AdaptSpec) -> list[float]:
    """The share after each asking: the first as it was asked for, each next one raised where a guard has fallen.

    Never above `adapt.most`, unless it began there.
    """
    shares = [share]
    for count in range(2, len(scores) + 1):
        rises = bool(fallen(scores[:count], adapt.guards))
        shares.append(max(share, min(adapt.most, shares[-1] + adapt.raise_by)) if rises else shares[-1])
    return shares


class AdaptiveFeed:
    """The stream of a stage whose share of replay follows its guards.

    Args:
        material: with a stream of stretches.
        share: asked for at first.
        ask: scores the model in training.
        opened: that model; each module's mode and all random numbers are left as they were.
        agree: makes the value of the main process that of all.
    """

    def __init__(
        self,
        material: Material,
        share: float,
        adapt: AdaptSpec,
        ask: Ask,
        opened: OpenModel,
        agree: Callable[[Callable[[], dict[str, float]]], dict[str, float]],
    ) -> None:
        self._material, self._share, self._adapt = material, share, adapt
        self._ask, self._opened, self._agree = ask, opened, agree
        self._scores: list[dict[str, float]] = []

    @property
    def steps(self) -> int:
        return self._material.steps

    @property
    def micro_steps(self) -> int:
        return self._material.micro_steps

    @property
    def save_every(self) -> int:
        return self._material.save_every

    def micro_batch(self, step: int, micro_step: int, rank: int) -> Sequence[Item]:
        return self._material.micro_batch(step, micro_step, rank)

    def step_rows(self, step: int) -> Sequence[Item]:
        return self._material.step_rows(step)

    def prepare(self, step: int) -> Metrics:
        """Ask the guards where it is time, and set the share that holds from here on."""
        if step % self._adapt.every:
            return {}
        self._scores.append(self._agree(lambda: asked(self._ask, self._opened)))
        share = self._set_share()
        return {SHARE: share, **{f"{GUARD}{name}": value for name, value in self._scores[-1].items()}}

    def recall(self, history: Sequence[Metrics]) -> None:
        """Go on from the scores in the metrics of the steps that are done."""
        self._scores = [_scores_in(one) for one in history if SHARE in one]
        self._set_share()

    def _set_share(self) -> float:
        shares = shares_of(self._share, self._scores, self._adapt)
        assert isinstance(self._material.stream, Stretches), "made by `adaptive`"
        self._material.stream.set_shares(shares)
        return shares[-1]


def asked(ask: Ask, opened: OpenModel) -> dict[str, float]:
    """Scores of the model in training: in evaluation mode, and with modes and random numbers as they were after."""
    modes = [(module, module.training) for module in opened.model.modules()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    opened.model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            return dict(ask(opened))
    finally:
        for module, mode in modes:
            module.training = mode


def adapt_facts(history: Sequence[Metrics], adapt: AdaptSpec) -> dict[str, Any]:
    """What the ledger keeps: settings, and by step the share and the scores that decided it."""
    told = [one for one in history if SHARE in one]
    return {
        "every": adapt.every,
        "raise_by": adapt.raise_by,
        "most": adapt.most,
        "margins": {name: one["margin"] for name, one in adapt.guards.items()},
        "asked": [{"step": one["step"] - 1, "share": one[SHARE], "scores": _scores_in(one)} for one in told],
    }


def adapt_warnings(history: Sequence[Metrics], adapt: AdaptSpec) -> list[dict[str, str]]:
    """One line for each time the share rose, and why."""
    told = [one for one in history if SHARE in one]
    scores = [_scores_in(one) for one in told]
    found = []
    for i in range(1, len(told)):
        if told[i][SHARE] > told[i - 1][SHARE]:
            names = ", ".join(
                f"'{name}' had fallen by {drop:.3g} (margin {adapt.guards[name]['margin']:g})"
                for name, drop in fallen(scores[: i + 1], adapt.guards).items()
            )
            text = f"after step {told[i]['step'] - 1} the replay share rose to {told[i][SHARE]:.3g}: {names}."
            found.append({"name": "replay_raised", "text": text})
    return found


def _scores_in(metrics: Metrics) -> dict[str, float]:
    return {name.removeprefix(GUARD): value for name, value in metrics.items() if name.startswith(GUARD)}
