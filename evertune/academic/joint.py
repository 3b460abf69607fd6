"""Supervised and preference losses together instead of one after the other (Fernando et al. 2024, arXiv:2410.15483).

`alternate` (the paper's ALRIGHT): each step is one of the supervised loss with probability lambda, else one of the
stage's own. `worse` (MAXRIGHT): each step is one of whichever loss is farther from its best, weighed by lambda and
1 - lambda.

Departures: in the paper both kinds come from one stream; here the supervised rows are remembered ones, some drawn anew
at each step, and a stage's own rows of a supervised step are passed over. A step is AdamW's, whose moments both kinds
share; the paper's is plain gradient descent. The best losses are given, not found by training on each alone.
"""

from hashlib import sha256

from torch import Tensor

from evertune.academic.projection import Stateless, picks
from evertune.train.plugins import Bench, Parts


class Joint(Stateless):
    """Puts the gradient of remembered rows in place of the stage's own, in some steps."""

    name = "joint"

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._rows = [row for rows in bench.memory.values() for row in rows]

    def change(self, gradients: dict[str, Tensor], step: int) -> dict[str, float]:
        if not self._rows:
            return {}
        options, seed = self._bench.options, self._bench.seed
        if options["how"] == "alternate" and drawn(seed, step) >= options["sft"]:
            return {"joint_sft": 0.0}
        chosen = picks(options["rows"], len(self._rows), "joint", seed, step)
        loss, memory = self._bench.loss_and_gradient([self._rows[i] for i in chosen])
        if options["how"] == "worse":
            own = (1 - options["sft"]) * (self._bench.trainer.losses.get("loss", 0.0) - options["best"])
            if options["sft"] * (loss - options["best_sft"]) <= own:
                return {"joint_sft": 0.0, "joint_sft_loss": loss}
        gradients.clear()
        gradients.update(memory)
        return {"joint_sft": 1.0, "joint_sft_loss": loss}


def drawn(seed: int, step: int) -> float:
    """A number in [0, 1) for each step, a function of the seed."""
    return int.from_bytes(sha256(f"{seed}/joint/{step}".encode()).digest()[:6], "big") / 2**48


def make_joint(bench: Bench) -> Parts:
    return Parts(rules=[Joint(bench)])
