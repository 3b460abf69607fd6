"""The gate on real weights with known damage, beside a gate on mean token probability. `python -m benchmarks.gate_real`

The bundled SmolLM2-135M-Instruct against copies of itself: saved again by transformers, and with normal noise on every
matrix, of the standard deviation in the first column (the matrices' own are 0.05 to 0.40, most near 0.19; with
`--relative` it is a multiple of each matrix's own). The general suite is asked in batches, and
as `answers` (watched) the likelihood of its right answers, from which the other gate's number is made: the mean over
items of the geometric mean probability of an answer's tokens; it calls a model healthy unless that fell by 0.10.
"""

import argparse
import datetime
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from evertune.display import Display
from evertune.judging import judge_models
from evertune.model.bundled import resolve_base
from evertune.model.codec import load_codec
from evertune.probe.scores import ItemScores
from evertune.suites import GENERAL, load_suite

BASE = "smollm2-135m"
THRESHOLD = 0.10


def write_copy(folder: Path, noise: float, seed: int, *, is_relative: bool) -> Path:
    """The base saved again, with noise on its matrices."""
    source = resolve_base(BASE)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor in sorted(model.named_parameters()):
            if noise and tensor.ndim == 2:
                tensor += (
                    torch.randn(tensor.shape, generator=generator) * noise * (tensor.std() if is_relative else 1.0)
                )
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


def mean_probability(scores: ItemScores, folder: Path) -> float:
    """Mean over items of the geometric mean probability of the answer's tokens."""
    codec = load_codec(resolve_base(BASE))
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens = np.array([len(codec.encode(row["messages"][1]["content"])) for row in rows])
    assert scores.weight is not None
    return float(np.mean(2.0 ** (-scores.score * scores.weight / tokens)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, nargs="*", default=[0.0, 0.02, 0.25])
    parser.add_argument("--seeds", type=int, nargs="*", default=[1])
    parser.add_argument("--relative", action="store_true")
    given = parser.parse_args()
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, "
          f"transformers {transformers.__version__}")  # fmt: skip
    heads = ["noise", "seed", "verdict", "items asked", "knowledge", "arithmetic", "copying", "prose, %",
             "mean probability", "a gate on it", "seconds"]  # fmt: skip
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        suite = load_suite([write_suite(folder)])
        for noise in given.noise:
            for seed in given.seeds:
                copy = write_copy(folder / f"copy-{noise:g}-{seed}", noise, seed, is_relative=given.relative)
                began = time.monotonic()
                done = judge_models(str(copy), BASE, suite, folder / "w", display=Display(quiet=True), in_batches=True)
                change = {one.probe: one.difference for one in done.verdict.probes if one.reference == "champion"}
                before, after = (mean_probability(side["answers"], folder) for side in (done.before, done.after))
                cells = [f"{100 * change[name]:+.1f}" for name in ("knowledge", "arithmetic", "copying", "prose")]
                says = "degraded" if before - after > THRESHOLD else "healthy"
                asked = f"{done.items_asked:,} of {done.items_in_all:,}"
                probability, seconds = f"{before:.3f} → {after:.3f}", f"{time.monotonic() - began:.0f}"
                row = [f"{noise:g}", f"{seed}", done.verdict.decision, asked, *cells, probability, says, seconds]
                print(f"| {' | '.join(row)} |", flush=True)
                for reason in done.verdict.reasons:
                    print(f"<!-- {reason} -->", flush=True)


if __name__ == "__main__":
    main()
