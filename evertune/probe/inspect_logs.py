"""Logs of Inspect (`.eval` or `.json`), read without Inspect.

Letters are scores as Inspect's own `value_to_float` reads them: C is 1, P is 0.5, I and N are 0. The epochs of an item
are its samples.
"""

import contextlib
import json
import math
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evertune.errors import ProbeError
from evertune.probe.logs import LoggedItem, LoggedTask, closest

LETTERS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}
WORDS = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}
# Sampling settings that decide what a model says; the rest of the configuration is about the server.
_SAMPLING = ("temperature", "top_p", "top_k", "max_tokens", "stop_seqs", "seed", "num_choices", "system_message",
             "frequency_penalty", "presence_penalty", "reasoning_effort", "reasoning_tokens")  # fmt: skip


def read_inspect_logs(place: Path, *, metrics: Mapping[str, str]) -> dict[str, LoggedTask]:
    """The tasks of one side, by name.

    Args:
        place: a log, or a folder searched through; of several logs of a task the newest.
        metrics: scorer by task, for logs with several scorers.

    Raises:
        ProbeError: no log is there, one did not finish, a sample failed or has no number, or there is no such scorer.
    """
    if not place.exists():
        raise ProbeError(f"{place} does not exist, expected a folder or file of Inspect's logs.")
    files = sorted([*place.rglob("*.eval"), *place.rglob("*.json")]) if place.is_dir() else [place]
    newest: dict[str, tuple[str, Path, dict[str, Any]]] = {}
    for file in files:
        log = _read(file)
        if log is None:
            continue
        task, created = str(log["eval"]["task"]), str(log["eval"].get("created", ""))
        if task not in newest or created > newest[task][0]:
            newest[task] = (created, file, log)
    if not newest:
        raise ProbeError(f"{place}: no log of Inspect in it, expected .eval or .json files with an 'eval' entry.")
    unknown = sorted(set(metrics) - set(newest))
    if unknown:
        raise ProbeError(f"{place}: no task '{unknown[0]}' to take a scorer of. {closest(unknown[0], list(newest))}")
    return {task: _task(task, file, log, metrics.get(task)) for task, (_, file, log) in sorted(newest.items())}


def _read(file: Path) -> dict[str, Any] | None:
    """A log with its samples; None for JSON that is no log."""
    try:
        if zipfile.is_zipfile(file):
            return _read_archive(file)
        body = json.loads(file.read_text(encoding="utf-8"))
    except NotImplementedError as error:
        raise ProbeError(
            f"{file}: packed with a method that this Python cannot unpack ({error}).",
            remedy=f"Convert it: inspect log convert {file} --to json --output-dir converted.",
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, zipfile.BadZipFile, KeyError) as error:
        raise ProbeError(
            f"{file}: not a readable log of Inspect: {type(error).__name__}: {error}.", remedy="Copy the log again."
        ) from error
    return body if isinstance(body, dict) and isinstance(body.get("eval"), dict) and "task" in body["eval"] else None


def _read_archive(file: Path) -> dict[str, Any] | None:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if "header.json" not in names:
            raise ProbeError(
                f"{file}: no header.json in it: the evaluation did not finish.", remedy="Run it again, or retry it."
            )
        header: dict[str, Any] = json.loads(archive.read("header.json"))
        samples = [
            json.loads(archive.read(name)) for name in names if name.startswith("samples/") and name.endswith(".json")
        ]
    return {**header, "samples": samples}


def _task(task: str, file: Path, log: Mapping[str, Any], wanted: str | None) -> LoggedTask:
    if log.get("status") != "success":
        raise ProbeError(
            f"{file}: the evaluation of task '{task}' has the status {log.get('status')!r}, expected 'success'.",
            remedy="Judge finished evaluations only: what is missing is not missing at random.",
        )
    samples = log.get("samples") or []
    if not samples:
        raise ProbeError(f"{file}: no samples in the log of task '{task}'.", remedy="Log with samples.")
    scorer = _scorer(task, file, samples, wanted)
    by_item = defaultdict(list)
    for one in sorted(samples, key=lambda one: int(one.get("epoch", 1))):
        by_item[str(one["id"])].append(one)
    counts = {len(entries) for entries in by_item.values()}
    if len(counts) > 1:
        raise ProbeError(
            f"{file}: items of task '{task}' have {min(counts)} to {max(counts)} epochs, expected as many."
        )
    epochs = counts.pop()
    items = [
        _item(file, one, scorer, name if epochs == 1 else f"{name}#{k}", name)
        for name, entries in sorted(by_item.items())
        for k, one in enumerate(entries, start=1)
    ]
    return LoggedTask(
        name=task,
        place=str(file),
        direction="higher",
        settings={"scorer": scorer, **_settings(log)},
        items=tuple(items),
        samples=epochs,
    )


def _scorer(task: str, file: Path, samples: Sequence[Mapping[str, Any]], wanted: str | None) -> str:
    known = list(samples[0].get("scores") or {})
    if not known:
        raise ProbeError(f"{file}: the samples of task '{task}' have no scores.")
    if wanted is not None and wanted not in known:
        raise ProbeError(f"{file}: task '{task}' has no scorer '{wanted}'. {closest(wanted, known)}")
    return wanted or known[0]


def _settings(log: Mapping[str, Any]) -> dict[str, Any]:
    evaluation, plan = log["eval"], log.get("plan") or {}
    config = plan.get("config") or {}
    return {
        "task version": evaluation.get("task_version"),
        "task arguments": evaluation.get("task_args"),
        "solvers": [[step.get("solver"), step.get("params")] for step in plan.get("steps") or []],
        "sampling": {name: config[name] for name in _SAMPLING if config.get(name) is not None},
    }


def _item(file: Path, sample: Mapping[str, Any], scorer: str, name: str, cluster: str) -> LoggedItem:
    if sample.get("error"):
        raise ProbeError(
            f"{file}: sample {name!r} ended in an error, which is no score.", remedy="Run the failed samples again."
        )
    score = (sample.get("scores") or {}).get(scorer) or {}
    prompt = _text(sample.get("input"))
    metadata = sample.get("metadata") or {}
    return LoggedItem(
        id=name,
        asked={
            "prompt": prompt,
            "target": sample.get("target"),
            "choices": sample.get("choices"),
            "turns before the answer": _turns(sample.get("messages")),
        },
        score=_number(file, name, score.get("value")),
        prompt=prompt,
        prediction=str(score.get("answer") or ""),
        expected=_text(sample.get("target")),
        cluster=metadata["cluster"] if isinstance(metadata.get("cluster"), str) else cluster,
    )


def _turns(messages: Any) -> list[list[str]]:
    """Role and text of what stands before the model's first own turn: the system turn and the rendered question."""
    turns = []
    for one in messages or []:
        if one.get("role") == "assistant" and one.get("source") == "generate":
            break
        turns.append([str(one.get("role")), _text(one.get("content"))])
    return turns


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _number(file: Path, name: str, value: Any) -> float:
    if isinstance(value, str):
        found = LETTERS.get(value, WORDS.get(value.lower()))
        if found is not None:
            return found
        with contextlib.suppress(ValueError):
            value = float(value)
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise ProbeError(f"{file}: the score of sample {name!r} is {value!r}, expected a finite number or C, P, I, N.")
    return float(value)
