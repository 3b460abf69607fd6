"""Sample logs of lm-evaluation-harness (`--log_samples`), read without lm-eval.

A side is a folder of an evaluation (`samples_<task>_<date>.jsonl` beside `results_<date>.json`), or such a file. Of
several evaluations in one folder the newest of each task is read.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from evertune.errors import ProbeError
from evertune.probe.logs import LoggedItem, LoggedTask, closest

_SAMPLES = re.compile(r"samples_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT[\d.:-]+)\.jsonl")
# What of `results_*.json` decides how the items were asked.
_SHARED = (
    "chat_template",
    "chat_template_sha",
    "system_instruction",
    "system_instruction_sha",
    "fewshot_as_multiturn",
)
_PER_TASK = ("n-shot", "versions")
_CONFIG = ("generation_kwargs", "output_type", "filter_list", "num_fewshot", "description", "repeats")
# Direction of the usual metrics, for logs without the file of results.
_HIGHER = {"acc", "acc_norm", "acc_bytes", "exact_match", "em", "f1", "bleu", "rouge1", "rouge2", "rougeL", "mcc",
           "pass@1", "pass_at_1", "prompt_level_strict_acc", "prompt_level_loose_acc", "likelihood_diff"}  # fmt: skip
_LOWER = {"bits_per_byte", "byte_perplexity", "perplexity", "word_perplexity", "brier_score", "ter", "wer", "cer"}
_NOT_METRICS = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", "doc_hash",
                "prompt_hash", "target_hash"}  # fmt: skip


def read_lm_eval_logs(place: Path, *, metrics: Mapping[str, str]) -> dict[str, LoggedTask]:
    """The tasks of one side, by name.

    Args:
        place: a folder, searched through, or a `samples_*.jsonl` file.
        metrics: `metric` or `metric,filter` by task, for tasks whose first metric is not the one wanted.

    Raises:
        ProbeError: no sample log is there, a line is malformed, or a metric does not exist.
    """
    found = {}
    for task, file in _newest(place).items():
        results = _results_beside(file)
        found[task] = _read_task(task, file, results, metrics.get(task))
    unknown = sorted(set(metrics) - set(found))
    if unknown:
        raise ProbeError(f"{place}: no task '{unknown[0]}' to take a metric of. {closest(unknown[0], list(found))}")
    return found


def _newest(place: Path) -> dict[str, Path]:
    """The newest file of samples of each task."""
    if not place.exists():
        raise ProbeError(f"{place} does not exist, expected a folder or file of lm-eval's sample logs.")
    files = sorted(place.rglob("samples_*.jsonl")) if place.is_dir() else [place]
    dated: dict[str, list[tuple[str, Path]]] = {}
    for file in files:
        named = _SAMPLES.fullmatch(file.name)
        task, date = (named["task"], named["date"]) if named else (file.stem.removeprefix("samples_"), "")
        dated.setdefault(task, []).append((date, file))
    if not dated:
        raise ProbeError(
            f"{place}: no samples_*.jsonl in it, expected lm-eval's sample logs.",
            remedy="Run lm-eval with --log_samples and --output_path.",
        )
    return {task: max(entries)[1] for task, entries in sorted(dated.items())}


def _results_beside(file: Path) -> dict[str, Any] | None:
    """The file of results of the same evaluation, else None: logs may be passed around without it."""
    named = _SAMPLES.fullmatch(file.name)
    if named is None:
        return None
    place = file.with_name(f"results_{named['date']}.json")
    if not place.is_file():
        return None
    try:
        body = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ProbeError(f"{place}: not JSON: {error}.", remedy="Copy the file again.") from error
    return body if isinstance(body, dict) else None


def _read_task(task: str, file: Path, results: dict[str, Any] | None, wanted: str | None) -> LoggedTask:
    samples = list(_lines(file))
    metric, filter_name = _choose(task, file, samples, wanted)
    chosen = [(place, one) for place, one in samples if one.get("filter", filter_name) == filter_name]
    return LoggedTask(
        name=task,
        place=str(file),
        direction=_direction(task, file, metric, results),
        settings={"metric": metric, "filter": filter_name, **_settings(task, results)},
        items=tuple(_item(place, one, metric) for place, one in chosen),
    )


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(f"{file}: cannot be read: {error}.") from error
    count = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{file}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ProbeError(f"{place}: not JSON: {error.msg}.", remedy="Copy the log again: it may be cut.") from error
        if not isinstance(value, dict) or "doc_id" not in value:
            raise ProbeError(f"{place}: no 'doc_id', expected a sample of lm-eval.")
        count += 1
        yield place, value
    if not count:
        raise ProbeError(f"{file}: no sample in it, expected one line per item.")


def _choose(
    task: str, file: Path, samples: Sequence[tuple[str, dict[str, Any]]], wanted: str | None
) -> tuple[str, str]:
    """Metric and filter: the wanted ones, else the task's first."""
    first = samples[0][1]
    known = first.get("metrics") or [
        name for name, value in first.items() if name not in _NOT_METRICS and isinstance(value, bool | int | float)
    ]
    filters = list(dict.fromkeys(str(one.get("filter", "none")) for _, one in samples))
    if not known:
        raise ProbeError(f"{file}: task '{task}' has no metric with a number per item.")
    metric, _, filter_name = (wanted or str(known[0])).partition(",")
    if metric not in known or (filter_name and filter_name not in filters):
        pairs = [f"{one},{each}" for one in known for each in filters]
        raise ProbeError(f"{file}: task '{task}' has no metric '{wanted}'. {closest(str(wanted), pairs)}")
    return metric, filter_name or filters[0]


def _direction(task: str, file: Path, metric: str, results: dict[str, Any] | None) -> Literal["higher", "lower"]:
    told = ((results or {}).get("higher_is_better") or {}).get(task, {}).get(metric)
    if isinstance(told, bool):
        return "higher" if told else "lower"
    if metric in _HIGHER or metric in _LOWER:
        return "higher" if metric in _HIGHER else "lower"
    raise ProbeError(
        f"{file}: nothing says whether a higher '{metric}' is better: no results_*.json of the same evaluation beside "
        "it, or it does not say.",
        remedy="Keep lm-eval's results file beside the samples, or choose another metric with --metric.",
    )


def _settings(task: str, results: dict[str, Any] | None) -> dict[str, Any]:
    if results is None:
        return {}
    config = (results.get("configs") or {}).get(task) or {}
    found = {name: results.get(name) for name in _SHARED}
    found |= {name: (results.get(name) or {}).get(task) for name in _PER_TASK}
    return found | {name: config.get(name) for name in _CONFIG}


def _item(place: str, sample: Mapping[str, Any], metric: str) -> LoggedItem:
    value = sample.get(metric)
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise ProbeError(f"{place}: found {value!r} in '{metric}', expected a finite number.")
    doc = sample.get("doc")
    cluster = doc.get("cluster") if isinstance(doc, dict) else None
    prompt = _prompt(sample)
    asked = {
        "prompt": prompt if prompt is not None else sample.get("prompt_hash"),
        "target": str(sample.get("target")),
        "document": sample.get("doc_hash"),
    }
    return LoggedItem(
        id=str(sample["doc_id"]),
        asked=asked,
        score=float(value),
        prompt=prompt or "",
        prediction=str(sample.get("filtered_resps", "")),
        expected=str(sample.get("target", "")),
        cluster=cluster if isinstance(cluster, str) else str(sample["doc_id"]),
    )


def _prompt(sample: Mapping[str, Any]) -> str | None:
    """The first request's context; the log keeps it in one of two shapes."""
    arguments = sample.get("arguments")
    if isinstance(arguments, dict):
        arguments = [list(one.values()) for one in arguments.values() if isinstance(one, dict)]
    if isinstance(arguments, list) and arguments and isinstance(arguments[0], list) and arguments[0]:
        first = arguments[0][0]
        return first if isinstance(first, str) else json.dumps(first, ensure_ascii=False, sort_keys=True)
    return None
