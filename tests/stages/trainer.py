"""Other people's trainers, as scripts: `python trainer.py WHAT MODEL DATA OUTPUT SEED`. No torch: quick to start."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def main(what: str, model: Path, data: Path, output: Path, seed: int) -> int:
    sys.stdout.write(f"trainer {what} with seed {seed}\n")
    rows = [json.loads(line) for file in sorted(data.glob("*.jsonl")) for line in file.read_text().splitlines()]
    if what == "fail":
        sys.stderr.write("CUDA error: the card fell out\n")
        return 7
    if what == "sleep":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(output)])
        (output / "asleep").touch()
        time.sleep(60)
    if what == "pickle":
        (output / "pytorch_model.bin").touch()
    if what in ("pickle", "nothing"):
        return 0
    if what == "adapter":
        return adapter(output, seed)
    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name] + np.float32(0.01 * seed) + np.float32(0.001 * len(rows))
    if what == "nan":
        weights[name][0, 0] = float("nan")
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(model / "config.json", output / "config.json")
    # What trainers leave beside the model: a changed template, and pickles that must not be taken along.
    (output / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (output / "training_args.bin").touch()
    (output / "checkpoint-5").mkdir()
    (output / "checkpoint-5" / "optimizer.pt").touch()
    (output / "environment.txt").write_text("\n".join(sorted(os.environ)))
    return 0


def adapter(output: Path, seed: int) -> int:
    """A LoRA adapter of rank 2, as PEFT writes it."""
    draw = np.random.default_rng(seed)
    tensors = {}
    for layer in (0, 1):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = draw.normal(size=(2, 32)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = draw.normal(size=(32, 2)).astype(np.float32)
    save_file(tensors, output / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (output / "adapter_config.json").write_text(json.dumps(config))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(Path, sys.argv[2:5]), int(sys.argv[5])))
