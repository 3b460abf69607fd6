"""The gate on real weights with known damage, beside a gate on mean token probability. `python -m benchmarks.gate_real`

The bundled SmolLM2-135M-Instruct against copies of itself: saved again by transformers, and with normal noise on every
matrix, of the standard deviation in the first column; the matrices' own are 0.05 to 0.40, most near 0.19, and with `x`
it is a multiple of each matrix's own. The general suite is asked in batches, and as `answers` (watched) the likelihood
of its right answers. From these and from the prose the other gate's numbers are made: the mean over items of the
geometric mean probability of their tokens; it calls a model healthy unless that fell by 0.10. What it says depends on
what it is asked, so both are printed.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", nargs="*", default=["0", "0.02", "0.25", "0.02x", "0.25x"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[1])
    given = parser.parse_args()
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, "
          f"transformers {transformers.__version__}")  # fmt: skip
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
