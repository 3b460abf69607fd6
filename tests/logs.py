"""Logs of evaluations, written in the shapes that lm-eval and Inspect write."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DATE = "2026-01-02T03-04-05.678901"


def write_lm_eval(
    folder: Path,
    right: Sequence[float],
    *,
    task: str = "facts",
    date: str = DATE,
    prompt: str = "Question {i}?",
    chat_template: str | None = None,
    results: bool = True,
    **changes: Any,
) -> Path:
    """One task's samples, and the results beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, score in enumerate(right):
        sample = {
            "doc_id": i,
            "doc": {"question": f"Question {i}?"},
            "target": i % 4,
            "arguments": [[prompt.format(i=i), " yes"], [prompt.format(i=i), " no"]],
            "resps": [[["-1.0", "False"]], [["-2.0", "False"]]],
            "filtered_resps": [["-1.0", "False"], ["-2.0", "False"]],
            "filter": "none",
            "metrics": ["acc", "acc_norm"],
            "doc_hash": f"d{i}",
            "prompt_hash": f"p{i}",
            "target_hash": f"t{i}",
            "acc": score,
            "acc_norm": 1.0,
        }
        lines.append(json.dumps({**sample, **changes}))
    (folder / f"samples_{task}_{date}.jsonl").write_text("\n".join(lines) + "\n")
    if results:
        body = {
            "higher_is_better": {task: {"acc": True, "acc_norm": True}},
            "n-shot": {task: 0},
            "versions": {task: 1.0},
            "configs": {task: {"output_type": "multiple_choice"}},
            "chat_template": chat_template,
        }
        (folder / f"results_{date}.json").write_text(json.dumps(body))
    return folder


def inspect_log(
    values: Sequence[Any], *, epochs: int = 1, system: str = "Answer.", status: str = "success", **config: Any
) -> dict[str, Any]:
    """A log as Inspect keeps it; values are of item 1 in every epoch, then of item 2, and so on."""
    samples = []
    for k, value in enumerate(values):
        i, epoch = divmod(k, epochs)
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": f"Question {i}?", "source": "input"},
            {"role": "assistant", "content": "said", "source": "generate"},
        ]
        samples.append(
            {
                "id": i,
                "epoch": epoch + 1,
                "input": f"Question {i}?",
                "target": "yes",
                "messages": messages,
                "scores": {"match": {"value": value, "answer": "said"}, "other": {"value": 1}},
            }
        )
    return {
        "version": 2,
        "status": status,
        "eval": {"task": "facts", "task_version": 0, "created": "2026-01-02T03:04:05+00:00", "model": "m"},
        "plan": {"steps": [{"solver": "generate", "params": {}}], "config": config},
        "samples": samples,
    }


def write_inspect(place: Path, log: dict[str, Any]) -> Path:
    """The log as `.json`, or as the `.eval` archive."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.suffix == ".json":
        place.write_text(json.dumps(log))
        return place
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", json.dumps({name: log[name] for name in log if name != "samples"}))
        for one in log["samples"]:
            archive.writestr(f"samples/{one['id']}_epoch_{one['epoch']}.json", json.dumps(one))
    return place
