"""The gate on real weights with known damage, beside a gate on mean token probability. `python -m benchmarks.gate_real`

The bundled SmolLM2-135M-Instruct against copies of itself: saved again by transformers, and with normal noise on every
matrix, of the standard deviation in the first column; the matrices' own are 0.05 to 0.40, most near 0.19, and with `x`
it is a multiple of each matrix's own. The general suite is asked in batches, and as `answers` (watched) the likelihood
of its right answers. From these and from the prose the other gate's numbers are made: the mean over items of the
geometric mean probability of their tokens; it calls a model healthy unless that fell by 0.10. What it says depends on
what it is asked, so both are printed.

`--twins 4 --data DATA --folder FOLDER` asks instead how often an equal model is held: as many models are tuned from the
base with one recipe and different seeds, which are twins: none is better than another but by luck. In each of 200
repeats two are drawn, in random order, and half of the items of three probes; every HOLD is an error.
"""

import argparse
import datetime
import json
import os
import platform
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers

from evertune.display import Display
from evertune.gate import judge
from evertune.judging import judge_models
from evertune.lineage import find_checkpoint, open_workspace
from evertune.model.bundled import resolve_base
from evertune.model.codec import load_codec
from evertune.probe.scores import ItemScores
from evertune.process import Workers
from evertune.recipe.load import load_recipe
from evertune.run import run_recipe
from evertune.scoring import score_checkpoint
from evertune.suites import GENERAL, load_suite
from evertune.workspace import Workspace

BASE = "smollm2-135m"
THRESHOLD = 0.10


def write_copy(folder: Path, noise: str, seed: int) -> Path:
    """The base saved again, with noise on its matrices: of this standard deviation, or `0.02x` of their own."""
    size, is_relative = float(noise.removesuffix("x")), noise.endswith("x")
    source = resolve_base(BASE)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor in sorted(model.named_parameters()):
            if size and tensor.ndim == 2:
                tensor += torch.randn(tensor.shape, generator=generator) * size * (tensor.std() if is_relative else 1.0)
    model.to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def write_suite(folder: Path) -> Path:
    """The general suite, and its right answers as a watched probe of their likelihood."""
    rows = []
    for name in ("knowledge", "copying"):
        for line in (GENERAL.parent / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            answer = item["choices"][item["answer"]] if "choices" in item else item["answer"]
            turns = [{"role": "user", "content": item["prompt"]}, {"role": "assistant", "content": answer}]
            rows.append({"messages": turns})
    (folder / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    text = GENERAL.read_text(encoding="utf-8").replace("path: ", f"path: {GENERAL.parent}/")
    line = f"  answers:    {{path: {folder}/answers.jsonl, kind: bits_per_byte, role: watch}}\n"
    (folder / "suite.yaml").write_text(text.replace("\ngate:", f"{line}\ngate:"), encoding="utf-8")
    return folder / "suite.yaml"


def mean_probability(scores: ItemScores, texts: list[str]) -> float:
    """Mean over items of the geometric mean probability of the item's tokens."""
    codec = load_codec(resolve_base(BASE))
    tokens = np.array([len(codec.encode(one)) for one in texts])
    assert scores.weight is not None
    return float(np.mean(2.0 ** (-scores.score * scores.weight / tokens)))


def read_texts(path: Path) -> list[str]:
    """What is said in each row."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["messages"][1]["content"] if "messages" in row else row["text"] for row in rows]


TWIN = """\
evertune: 1
name: twin
base: smollm2-135m
workspace: {folder}/twin-{seed}
seed: {seed}
data: {{general: {{path: {data}/replay_dolly/train.jsonl, limit: 400}}}}
probes: {{prose: {{path: {general}/prose.jsonl, kind: bits_per_byte, limit: 4}}}}
gate: {{min_items: 2, min_clusters: 2}}
rescue: [discard]
rounds:
  - name: twin
    stages:
      - sft: {{data: [general], steps: 10, lr: 3.0e-4, batch_rows: 8, micro_batch_rows: 8, max_tokens: 160,
               too_long: drop, tune: {{lora: {{rank: 8}}}}, replay: {{share: 0.0}}, anchor: {{kl: 0.0}}}}
numerics: {{threads: 1}}
"""
TWIN_PROBES = ("knowledge", "arithmetic", "prose")


def judge_twins(count: int, data: Path, folder: Path, *, repeats: int) -> None:
    """Tune twins, score each once, and judge pairs on halves of the items."""
    suite = load_suite()
    asked = replace(suite, probes=tuple(one for one in suite.probes if one.name in TWIN_PROBES))
    workspace, workers = Workspace.open(folder / "scores", create=True), Workers()
    scores = []
    for seed in range(count):
        recipe = folder / f"twin-{seed}.yaml"
        recipe.write_text(TWIN.format(folder=folder, seed=seed, data=data, general=GENERAL.parent), encoding="utf-8")
        run_recipe(load_recipe(recipe))
        _, model = find_checkpoint(open_workspace(folder / f"twin-{seed}"), "twin/1-sft")
        with workspace.lock(purpose="twins"):
            name = f"twin {seed}"
            found = score_checkpoint(asked, workspace, workers, model, label=name, display=Display(quiet=True))
        scores.append(found.scores)
        print(f"{name}: {', '.join(f'{key} {one.value:.3f}' for key, one in found.scores.items())}", flush=True)
    facts = {name: one for name, one in suite.facts.items() if name in TWIN_PROBES}
    rng = np.random.default_rng(0)
    decisions: Counter[str] = Counter()
    for _ in range(repeats):
        one, other = rng.choice(count, size=2, replace=False)
        half = {name: _half(len(scores[0][name].ids), rng) for name in facts}
        after, before = ({name: subset(scores[k][name], half[name]) for name in facts} for k in (one, other))
        decisions[judge(after, before, before, facts, suite.gate_settings).decision] += 1
    print(f"{repeats} repeats of two of {count} twins, half of the items: {dict(decisions)}")


def subset(scores: ItemScores, chosen: np.ndarray) -> ItemScores:
    """The chosen items of a table."""
    arrays = {name: getattr(scores, name) for name in ("score", "valid", "stopped", "gap", "weight")}
    texts = {name: getattr(scores, name) for name in ("ids", "cluster", "prediction", "expected")}
    return replace(
        scores,
        **{name: None if one is None else one[chosen] for name, one in arrays.items()},
        **{name: tuple(one[i] for i in chosen) for name, one in texts.items()},
    )


def _half(n: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.choice(n, size=n // 2, replace=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", nargs="*", default=["0", "0.02", "0.25", "0.02x", "0.25x"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[1])
    parser.add_argument("--twins", type=int, default=0)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--folder", type=Path, help="Where twins are kept.")
    given = parser.parse_args()
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, "
          f"transformers {transformers.__version__}")  # fmt: skip
    if given.twins:
        given.folder.mkdir(parents=True, exist_ok=True)
        judge_twins(given.twins, given.data.absolute(), given.folder.absolute(), repeats=200)
        return
    heads = ["noise", "seed", "verdict", "items asked", "knowledge", "arithmetic", "copying", "prose, %",
             "probability of answers", "a gate on it", "probability of prose", "a gate on it", "seconds"]  # fmt: skip
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        suite = load_suite([write_suite(folder)])
        for noise in given.noise:
            for seed in given.seeds:
                copy = write_copy(folder / f"copy-{noise}-{seed}", noise, seed)
                began = time.monotonic()
                done = judge_models(str(copy), BASE, suite, folder / "w", display=Display(quiet=True), in_batches=True)
                change = {one.probe: one.difference for one in done.verdict.probes if one.reference == "champion"}
                others = []
                for name, home in (("answers", folder), ("prose", GENERAL.parent)):
                    texts = read_texts(home / f"{name}.jsonl")
                    old, new = (mean_probability(side[name], texts) for side in (done.before, done.after))
                    others += [f"{old:.3f} → {new:.3f}", "degraded" if old - new > THRESHOLD else "healthy"]
                cells = [f"{100 * change[name]:+.1f}" for name in ("knowledge", "arithmetic", "copying", "prose")]
                asked = f"{done.items_asked:,} of {done.items_in_all:,}"
                seconds = f"{time.monotonic() - began:.0f}"
                row = [noise, f"{seed}", done.verdict.decision, asked, *cells, *others, seconds]
                print(f"| {' | '.join(row)} |", flush=True)
                for reason in done.verdict.reasons:
                    print(f"<!-- {reason} -->", flush=True)


if __name__ == "__main__":
    main()
