"""What the claims of `benchmarks.claims` stand on: one recipe run by `evertune run`, its scores, and intervals."""

# N items, C classes

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.distillation import SKILLS, write_short

Floats = NDArray[np.float64]
Indexes = NDArray[np.int64]
RESAMPLES = 10_000
OPTIONS = (
    "add to playlist",
    "book restaurant",
    "get weather",
    "play music",
    "rate book",
    "search creative work",
    "search screening event",
)
VERIFIER = f'''\
"""An answer is right where it names the right command, and no other."""

OPTIONS = {OPTIONS!r}


def is_named(output, answer):
    return [one for one in OPTIONS if one in output.lower()] == [answer]
'''
PROBES = {
    "commands": "{path: snips-test.jsonl, kind: choice, limit: %(items)d, role: watch, system: Name the command.}",
    "topics": "{path: topics-test.jsonl, kind: choice, limit: %(items)d, role: watch, system: Name the kind of thing.}",
    "c4": "{path: c4-test.jsonl, kind: bits_per_byte, limit: %(texts)d}",
    "named": "{path: asked-test.jsonl, kind: generate, verifier: {function: named:is_named}, max_new_tokens: 12,"
    " limit: %(items)d, role: watch}",
}
RECIPE = """\
evertune: 1
name: claims-{seed}
base: {base}
workspace: seed-{seed}
seed: {seed}
academic: allow
data:
  commands: {{path: snips-train.jsonl, limit: {rows}}}
  topics: {{path: topics-train.jsonl, limit: {rows}}}
  general: {{path: general-train.jsonl, limit: {rows}}}
  asked: {{path: asked-train.jsonl, limit: {asked}, verifier: {{function: named:is_named}}}}
probes:
{probes}
defaults: {{tune: {{lora: {{rank: 8}}}}, replay: {{share: 0.0}}, anchor: {{kl: 0.0}}}}
# Nothing is promoted, so that every round starts from the base.
gate: {{min_items: 100000}}
rescue: [discard]
numerics: {{threads: 1, dtype: {dtype}}}
rounds:
{rounds}"""


@dataclass(frozen=True)
class Bench:
    """Where recipes are run, and how large.

    Attributes:
        rows: of each task and of general text.
        asked: rows of the questions that the model answers itself.
        items, texts: of each probe.
        characters: at which texts and general rows are cut or left out.
    """

    data: Path
    folder: Path
    base: str
    dtype: str
    rows: int
    asked: int
    items: int
    texts: int
    characters: int

    def write(self) -> None:
        """The rows and items of all recipes, and the verifier."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for skill, (task, system) in SKILLS.items():
            for split in ("train", "test"):
                write_short(self.data / task / f"{split}.jsonl", self.folder / f"{skill}-{split}.jsonl", system)
        rows = self._read("snips7/train")
        self._write("asked-train", [{"id": one["id"], "messages": one["messages"]} for one in rows])
        items = self._read("snips7/test")
        asked = [{"id": one["id"], "prompt": one["prompt"], "answer": one["choices"][one["answer"]]} for one in items]
        self._write("asked-test", asked)
        texts = self._read("text_c4/test")
        self._write("c4-test", [{"id": one["id"], "text": one["text"][: self.characters]} for one in texts])
        general = [{"id": one["id"], "messages": one["messages"]} for one in self._read("replay_dolly/train")]
        short = [one for one in general if sum(len(turn["content"]) for turn in one["messages"]) <= self.characters]
        self._write("general-train", short)
        (self.folder / "named.py").write_text(VERIFIER)

    def _read(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]

    def _write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")

    def sft(self, source: str, *, lr: float = 1.5e-3, epochs: int = 1, **more: str) -> str:
        """A stage as a line of YAML."""
        rest = "".join(f", {name}: {value}" for name, value in more.items())
        pace = f"lr: {lr}, epochs: {epochs}, batch_rows: 8, micro_batch_rows: 8, save_steps: 40"
        return f"sft: {{data: [{source}], {pace}{rest}}}"

    def run(
        self, name: str, rounds: Mapping[str, Sequence[str]], probes: Sequence[str], *, seed: int = 1
    ) -> "Workspace":
        """Run a recipe of these rounds, each from the base, or what is missing of it.

        All recipes of a seed have one workspace: what several claims stand on is made once.
        """
        lines = []
        for title, stages in rounds.items():
            lines += [f"  - name: {title}", "    start: base", "    stages:", *(f"      - {one}" for one in stages)]
        asked = "\n".join(f"  {one}: {PROBES[one] % vars(self)}" for one in probes)
        values = {**vars(self), "seed": seed, "probes": asked, "rounds": "\n".join(lines) + "\n"}
        place = self.folder / f"{name}.yaml"
        place.write_text(RECIPE.format(**values))
        done = subprocess.run([sys.executable, "-m", "evertune", "run", str(place), "--quiet"], check=False)
        if done.returncode not in (0, 2, 4):
            raise SystemExit(f"{place}: evertune ended with {done.returncode}")
        return Workspace(self.folder / f"seed-{seed}", place)


@dataclass(frozen=True)
class Workspace:
    """The workspace of a seed, after a recipe has run in it."""

    place: Path
    recipe: Path

    def event(self, label: str) -> dict[str, Any]:
        """What the ledger says of the newest checkpoint of this label."""
        from evertune.ledger import Ledger

        events = Ledger.open(self.place / "ledger.sqlite", create=False).events("checkpoint")
        return [one.body for one in events if one.body["label"] == label][-1]

    def scores(self, label: str, probe: str) -> Floats:
        """Item scores, higher is better."""
        from evertune.probe.scores import ItemScores
        from evertune.workspace import Workspace as Store

        asked = (self.event(label)["digest"], probe)
        store = Store.open(self.place, create=False)
        (key,) = [
            one.key
            for one in store.manifests()
            if one.kind == "probe" and (one.record["probe"]["checkpoint"], one.record["probe"]["probe"]) == asked
        ]
        found = ItemScores.read_parquet(store.path(key) / "scores.parquet")
        return np.asarray(found.score, dtype=np.float64) * (1.0 if found.direction == "higher" else -1.0)

    def folder(self, label: str) -> Path:
        """Where the newest checkpoint of this label lies."""
        return self.place / "objects" / str(self.event(label)["object"])


def bootstrap(statistic: Callable[[Indexes], float], items: int) -> tuple[float, float, float]:
    """A statistic of item indexes and its 90 % percentile interval; resamples where it is not finite count as worst."""
    draw = np.random.default_rng(0)
    values = np.array([statistic(draw.integers(0, items, items)) for _ in range(RESAMPLES)])
    values = np.where(np.isfinite(values), values, -np.inf)
    low, high = np.quantile(values, [0.05, 0.95], method="nearest")
    return statistic(np.arange(items)), float(low), float(high)


def verdict_of(figure: float, low: float, high: float, threshold: float) -> str:
    """The statement says: above the threshold. Where there is no figure, nothing was lost that could be kept."""
    if not np.isfinite(figure):
        return "undecided"
    return "holds" if low > threshold else "does not" if high < threshold else "undecided"


def spearman(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float:
    """Rank correlation; ties share their mean rank. NaN where one of the two does not vary."""
    from scipy.stats import rankdata

    x, y = (rankdata(one) - (len(one) + 1) / 2 for one in (a, b))
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 0 else float("nan")


def renamed_units(model: Path, to: Path, *, seed: int) -> None:
    """The same function with its units renamed: a network in another basin (Entezari et al. 2021, arXiv:2110.06296).

    Of a Llama-like model (no biases, RMS norms): the residual stream is permuted, in each layer the hidden units of the
    MLP, and the groups of heads that share keys and values. `to` becomes a model folder.
    """
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((model / "config.json").read_text())
    draw = torch.Generator().manual_seed(seed)
    files = sorted(model.glob("*.safetensors"))
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    stream = torch.randperm(config["hidden_size"], generator=draw)
    groups, heads = config["num_key_value_heads"], config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    order: dict[str, torch.Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        order[f"{layer}.mlp"] = torch.randperm(config["intermediate_size"], generator=draw)
        group = torch.randperm(groups, generator=draw)
        for kind, size in (("keys", width), ("queries", width * heads // groups)):
            order[f"{layer}.{kind}"] = (group[:, None] * size + torch.arange(size)).flatten()
    made = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        layer = parts[parts.index("layers") + 1] if "layers" in parts else ""
        kind = parts[-2]
        if tensor.ndim == 1:
            made[name] = tensor[stream]
        elif kind in ("gate_proj", "up_proj"):
            made[name] = tensor[order[f"{layer}.mlp"]][:, stream]
        elif kind == "down_proj":
            made[name] = tensor[stream][:, order[f"{layer}.mlp"]]
        elif kind in ("k_proj", "v_proj"):
            made[name] = tensor[order[f"{layer}.keys"]][:, stream]
        elif kind == "q_proj":
            made[name] = tensor[order[f"{layer}.queries"]][:, stream]
        elif kind == "o_proj":
            made[name] = tensor[stream][:, order[f"{layer}.queries"]]
        elif kind in ("embed_tokens", "lm_head"):
            made[name] = tensor[:, stream]
        else:
            raise SystemExit(f"{model}: found the tensor {name}, expected those of a Llama-like model without biases")
    to.mkdir(parents=True, exist_ok=True)
    save_file({name: one.contiguous() for name, one in made.items()}, to / "model.safetensors", {"format": "pt"})
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model") and "index" not in file.name:
            (to / file.name).write_bytes(file.read_bytes())
