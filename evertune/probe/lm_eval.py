"""Tasks of lm-evaluation-harness on the model already in memory. The only door to lm-eval (extra `eval`)."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evertune.errors import ProbeError
from evertune.model.open import OpenModel
from evertune.probe.scores import ItemScores
from evertune.probe.suite import LmEvalProbe

BATCH_ROWS = 8


def score_lm_eval(opened: OpenModel, probe: LmEvalProbe) -> ItemScores:
    """Run one task through the model's chat template and keep a metric per item.

    A YAML task is looked up alone; its `data_files` are relative to the YAML. A task by name needs its data set on
    this machine: nothing is downloaded.

    Raises:
        ProbeError: the extra is not installed, the task or its data is missing, or it has no such metric per item.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ProbeError(
            f"probe '{probe.name}' runs the lm-eval task {probe.task!r}, and lm-eval is not installed.",
            remedy='Install it: pip install "evertune[eval]".',
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    manager, task = _task(probe)
    wrapped = HFLM(pretrained=opened.model, tokenizer=_tokenizer(opened), batch_size=BATCH_ROWS)
    try:
        results = simple_evaluate(
            wrapped,
            tasks=[task],
            task_manager=manager,
            limit=probe.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=opened.codec.template is not None,
        )
    except Exception as error:
        raise ProbeError(
            f"probe '{probe.name}': the lm-eval task {probe.task!r} failed: {type(error).__name__}: {error}.",
            remedy="A task by name needs its data set in the local cache; a YAML task its data files beside it.",
        ) from error
    return _scores(opened, probe, results)


def _task(probe: LmEvalProbe) -> tuple[Any, Any]:
    from lm_eval.tasks import TaskManager

    if not probe.task.endswith((".yaml", ".yml")):
        return TaskManager(), probe.task
    place = Path(probe.task)
    return TaskManager(include_defaults=False), _config(place)


def _config(place: Path) -> dict[str, Any]:
    """The task's own YAML with data files found beside it, whatever the working directory."""
    from lm_eval.utils import load_yaml_config

    config: dict[str, Any] = load_yaml_config(str(place), mode="full")
    kwargs = dict(config.get("dataset_kwargs") or {})
    files = kwargs.get("data_files")
    if isinstance(files, Mapping):
        kwargs["data_files"] = {split: str(place.parent / name) for split, name in files.items()}
    elif isinstance(files, str):
        kwargs["data_files"] = str(place.parent / files)
    return {**config, "dataset_kwargs": kwargs} if kwargs else config


def _tokenizer(opened: OpenModel) -> Any:
    """A transformers tokenizer around the codec's own, which lm-eval asks for."""
    from transformers import PreTrainedTokenizerFast

    codec = opened.codec
    stop = codec.tokenizer.id_to_token(min(codec.stop_ids)) if codec.stop_ids else None
    pad = codec.tokenizer.id_to_token(codec.pad_id)
    return PreTrainedTokenizerFast(
        tokenizer_object=codec.tokenizer, eos_token=stop, pad_token=pad, chat_template=codec.template
    )


def _scores(opened: OpenModel, probe: LmEvalProbe, results: Mapping[str, Any]) -> ItemScores:
    ((name, samples),) = results["samples"].items()
    higher = results["higher_is_better"][name]
    metric = probe.metric or next(iter(higher))
    if metric not in samples[0]:
        known = ", ".join(one for one in higher if one in samples[0])
        raise ProbeError(f"probe '{probe.name}': the task has no metric {metric!r} per item; it has: {known}.")
    ordered = sorted(samples, key=lambda one: one["doc_id"])
    return ItemScores(
        probe=probe.name,
        kind=probe.kind,
        direction="higher" if higher[metric] else "lower",
        ids=tuple(f"{one['doc_id']}-{one['doc_hash'][:8]}" for one in ordered),
        score=np.array([float(one[metric]) for one in ordered]),
        cluster=tuple(str(one["doc_id"]) for one in ordered),
        prediction=tuple(str(one["filtered_resps"]) for one in ordered),
        expected=tuple(str(one["target"]) for one in ordered),
        weight=np.ones(len(ordered)),
        valid=None,
        stopped=None,
        gap=None,
        items_digest=probe.digest,
        template_digest=opened.codec.digest,
    )
