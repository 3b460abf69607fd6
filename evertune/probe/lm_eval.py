"""Tasks of lm-evaluation-harness on the model already in memory: the only door to lm-eval (extra `eval`).

Prompts, few-shot examples, scoring and metrics are lm-eval's own; the model, the tokenizer and the chat template are
those of the checkpoint. Nothing is downloaded, and nothing is cut to fit the context.
"""

import contextlib
import io
import logging
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_DATASETS_OFFLINE"] = "1"  # read once, when datasets is imported

import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import PreTrainedTokenizerFast

from evertune.errors import ProbeError
from evertune.hashing import digest_json
from evertune.model.open import OpenModel
from evertune.probe.scores import ItemScores
from evertune.probe.suite import LmEvalProbe
from evertune.probe.task_files import data_patterns

BATCH_ROWS = 8
# lm-eval's own defaults, so that its command line gives the same items and few-shot examples.
PYTHON_SEED, NUMPY_SEED, FEWSHOT_SEED = 0, 1234, 1234


def score_lm_eval(opened: OpenModel, probe: LmEvalProbe) -> ItemScores:
    """Run a task or a group of tasks, and keep one metric per item.

    `probe.metric` is a metric's name, or `metric,filter` where the task filters its answers in several ways; the
    task's first when not given. The chat template is applied where the model has one.

    Raises:
        ProbeError: the task or its data is not on this machine, an item does not fit the context, or the task has no
            such metric with a number per item.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        with _seeded(), tempfile.TemporaryDirectory() as cache, contextlib.redirect_stderr(io.StringIO()):
            results = _run(_Model(opened, probe.name), probe, Path(cache))
    except ProbeError:
        raise
    except Exception as error:  # whatever a task or a library raises, the probe has no score
        raise ProbeError(
            f"probe '{probe.name}': the lm-eval task {probe.task!r} failed: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}.",
            remedy="A task by name needs its data set in the local cache of 'datasets', or write a YAML with local "
            "data files.",
        ) from error
    return _scores(opened, probe, results)


class _Model(HFLM):  # type: ignore[misc]
    """lm-eval's view of an open model: our chat template, float32 log-softmax, an error where lm-eval would cut."""

    def __init__(self, opened: OpenModel, probe: str) -> None:
        self._codec = opened.codec
        self._probe = probe
        super().__init__(
            pretrained=opened.model,
            tokenizer=_tokenizer(opened),
            batch_size=BATCH_ROWS,
            softmax_dtype=torch.float32,
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if add_generation_prompt:
            return self._codec.render(chat_history, add_generation_prompt=True)
        text: str = super().apply_chat_template(chat_history, add_generation_prompt=False)
        return text

    def _loglikelihood_tokens(self, requests: Sequence[Any], **options: Any) -> list[tuple[float, bool]]:
        for _, context, continuation in requests:
            self._check_length(len(context) + len(continuation) - 1)
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **options)
        return found

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids_BT, mask_BT = super().tok_batch_encode(strings, padding_side=padding_side, **options)
        if left_truncate_len is not None:
            self._check_length(ids_BT.shape[1] + self.max_length - left_truncate_len)
        return ids_BT, mask_BT

    def _check_length(self, tokens: int) -> None:
        if tokens > self.max_length:
            raise ProbeError(
                f"probe '{self._probe}': an item needs {tokens} tokens, and the model's context has {self.max_length}.",
                remedy="Use fewer few-shot examples or fewer new tokens, or leave the item out: items are never cut.",
            )


def task_texts(probe: LmEvalProbe) -> list[tuple[str, str]]:
    """Id and text of each item that the task asks: its prompt without few-shot examples, and the longest field of the
    item that stands in it, such as the bare question.

    Raises:
        ProbeError: the task or its data is not on this machine.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = []
    try:
        with _seeded(), tempfile.TemporaryDirectory() as cache, contextlib.redirect_stderr(io.StringIO()):
            tasks = _load(probe, Path(cache))["tasks"]
            for name in sorted(tasks):
                for number, doc in tasks[name].doc_iterator(limit=probe.limit):
                    label = f"{name}/{number}" if len(tasks) > 1 else str(number)
                    found += [(label, text) for text in _texts_of(tasks[name].doc_to_text(doc), doc)]
    except Exception as error:  # whatever a task or a library raises, its items are not known
        raise ProbeError(
            f"probe '{probe.name}': the items of the lm-eval task {probe.task!r} cannot be read, so that training rows "
            f"cannot be searched for them: {type(error).__name__}: {' '.join(str(error).split())[:300]}.",
            remedy="A task by name needs its data set in the local cache of 'datasets', or write a YAML with local "
            "data files.",
        ) from error
    return found


def _texts_of(prompt: Any, doc: Any) -> list[str]:
    """The prompt, where it is a text, and the longest text among the item's fields that stands in it."""
    fields = [one for one in (doc.values() if isinstance(doc, Mapping) else ()) if isinstance(one, str) and one.strip()]
    if not isinstance(prompt, str):
        return [max(fields, key=len)] if fields else []
    inside = [one for one in fields if one.strip() in prompt and one.strip() != prompt.strip()]
    return [one for one in (prompt, *([max(inside, key=len)] if inside else [])) if one.strip()]


def _load(probe: LmEvalProbe, cache: Path) -> dict[str, Any]:
    is_file = probe.task.endswith((".yaml", ".yml"))
    manager = TaskManager(include_defaults=not is_file)
    loaded: dict[str, Any] = manager.load([_config(Path(probe.task), cache) if is_file else probe.task])
    return loaded


def _run(model: _Model, probe: LmEvalProbe, cache: Path) -> dict[str, Any]:
    loaded = _load(probe, cache)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    results: dict[str, Any] = evaluate(
        lm=model,
        task_dict=loaded,
        limit=probe.limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=model._codec.template is not None,
        fewshot_as_multiturn=model._codec.template is not None,
    )
    return results


def _config(place: Path, cache: Path) -> dict[str, Any]:
    """The task's YAML with its data files found from its own folder, whatever the working directory."""
    config: dict[str, Any] = load_yaml(place)
    files: dict[str, list[str]] = {}
    for split, path in data_patterns(config, place.parent.absolute()):
        files.setdefault(split, []).append(str(path))
    if not files:
        return config
    return {**config, "dataset_kwargs": {**config["dataset_kwargs"], "data_files": files, "cache_dir": str(cache)}}


def _tokenizer(opened: OpenModel) -> Any:
    """A transformers tokenizer around the codec's own: what lm-eval asks for."""
    codec = opened.codec
    return PreTrainedTokenizerFast(
        tokenizer_object=codec.tokenizer, chat_template=codec.template, **dict(codec._special_tokens)
    )


def _scores(opened: OpenModel, probe: LmEvalProbe, results: Mapping[str, Any]) -> ItemScores:
    samples = results["samples"]
    found = [
        (task, one, metric)
        for task in sorted(samples)
        for one, metric in _of_one_filter(probe, task, sorted(samples[task], key=lambda one: one["doc_id"]))
    ]
    directions = {results["higher_is_better"][task][metric] for task, _, metric in found}
    if len(directions) != 1:
        raise ProbeError(f"probe '{probe.name}': the tasks of {probe.task!r} disagree on which direction is better.")
    group = len(samples) > 1
    ids = tuple(f"{task}/{one['doc_id']}" if group else str(one["doc_id"]) for task, one, _ in found)
    hashes = [[one["doc_hash"], one["prompt_hash"], one["target_hash"]] for _, one, _ in found]
    return ItemScores(
        probe=probe.name,
        kind=probe.kind,
        direction="higher" if directions.pop() else "lower",
        ids=ids,
        score=np.array([_number(probe, one, metric) for _, one, metric in found]),
        cluster=tuple(_cluster(one, name) for name, (_, one, _) in zip(ids, found, strict=True)),
        prediction=tuple(str(one["filtered_resps"]) for _, one, _ in found),
        expected=tuple(str(one["target"]) for _, one, _ in found),
        items_digest=digest_json({"probe": probe.digest, "ids": ids, "hashes": hashes}),
        template_digest=opened.codec.digest,
    )


def _cluster(sample: Mapping[str, Any], otherwise: str) -> str:
    """The item's `cluster` field, if it has one that is a text."""
    doc = sample["doc"]
    found = doc.get("cluster") if isinstance(doc, Mapping) else None
    return found if isinstance(found, str) else otherwise


def _of_one_filter(probe: LmEvalProbe, task: str, samples: Sequence[dict[str, Any]]) -> Iterator[tuple[Any, str]]:
    """The task's samples under one filter, each with the name of its metric."""
    metric, _, wanted = (probe.metric or samples[0]["metrics"][0]).partition(",")
    filters = list(dict.fromkeys(one["filter"] for one in samples))
    if metric not in samples[0]["metrics"] or (wanted and wanted not in filters):
        known = ", ".join(f"{one},{each}" for one in samples[0]["metrics"] for each in filters)
        raise ProbeError(
            f"probe '{probe.name}': task '{task}' has no metric {probe.metric!r} per item, it has: {known}.",
            remedy="Set 'metric' to one of them.",
        )
    return ((one, metric) for one in samples if one["filter"] == (wanted or filters[0]))


def _number(probe: LmEvalProbe, sample: Mapping[str, Any], metric: str) -> float:
    value = sample[metric]
    if not isinstance(value, bool | int | float | np.number | np.bool_):
        raise ProbeError(
            f"probe '{probe.name}': metric '{metric}' gives {value!r} for an item, expected a number.",
            remedy="Choose a metric that is a mean over items.",
        )
    return float(value)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Seeds lm-eval's own way, for tasks that draw while they load; the global states are put back."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
