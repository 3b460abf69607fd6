"""A stage trained by TRL, for `external`: full fine-tuning, with our probes inside the loop.

python train.py --model MODEL --data FOLDER --output FOLDER --seed 7 --probes guards.yaml --steps 12
"""

import argparse
import json
import sys
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from evertune.hooks import ProbeCallback


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "data", "output", "probes"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("seed", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args()
    conversations = [
        json.loads(line)["messages"] for file in sorted(given.data.glob("*.jsonl")) for line in file.open()
    ]
    rows = Dataset.from_list([{"prompt": turns[:-1], "completion": turns[-1:]} for turns in conversations])
    probes = ProbeCallback(given.probes, every_steps=given.steps // 2)
    trainer = SFTTrainer(
        model=str(given.model),
        args=SFTConfig(
            output_dir=str(given.output / "trl"),
            max_steps=given.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-4,
            seed=given.seed,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            model_init_kwargs={"dtype": "bfloat16"},
        ),
        train_dataset=rows,
        callbacks=[probes],
    )
    trainer.train()
    for step, verdict in probes.verdicts.items():
        sys.stdout.write(f"probes at step {step}: {verdict.decision}\n")
    trainer.save_model(str(given.output))


if __name__ == "__main__":
    main()
