"""The verifier `classifier`: a text classifier in a Hugging Face folder says what kind of answer an output is.

Words give a refusal away only where it is said in so many words; a classifier that a team trusts sees the others.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from evertune.errors import ProbeError
from evertune.hashing import digest_file, digest_json
from evertune.verifiers.outcome import Outcome

# What an output's class depends on; a pickled weight file is none of these.
PARTS = ("*.json", "*.safetensors", "*.txt", "*.model")


def same_class(argument: Mapping[str, Any], output: str, answer: Any) -> Outcome:
    """1 where the class with the largest logit is the answer's, else 0. Valid: always."""
    tokenizer, model = _opened(str(Path(argument["folder"], argument["path"])), argument["digest"])
    import torch

    asked = tokenizer(output, return_tensors="pt", truncation=True, max_length=argument["max_tokens"])
    with torch.inference_mode():
        best = int(model(**asked).logits[0].argmax())
    return Outcome(float(model.config.id2label[best] == _class_of(argument, answer)), True)


def check_class(argument: Any, answer: Any, *, place: str) -> None:
    """Refuse an answer that is no class of the classifier's.

    Raises:
        ProbeError: with the place.
    """
    classes, wanted = argument["classes"], _class_of(argument, answer)
    if wanted not in classes:
        told = f" ({answer!r} in 'labels')" if wanted != answer else ""
        raise ProbeError(
            f"{place}: found {wanted!r}{told} as 'answer', expected a class of {argument['path']}: "
            f"{', '.join(classes)}.",
            remedy="Write such a class, or give 'labels: {ANSWER: CLASS}'.",
        )


def found_classifier(argument: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The argument with the names of its classes, and the digest of what they depend on; where it lies is left out.

    Raises:
        ProbeError: it is no folder of a text classifier with weights in safetensors.
    """
    path = (folder / argument["path"]).absolute()
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        names = config.get("id2label") or {}
        classes = [str(names[key]) for key in sorted(names, key=int)]
    except (OSError, ValueError, AttributeError) as error:
        raise ProbeError(
            f"the verifier 'classifier' names {path}, which is no folder of a classifier: {error}.",
            remedy="Give the folder of a transformers sequence classifier, with config.json and tokenizer.",
        ) from error
    if len(classes) < 2 or not any(path.glob("*.safetensors")):
        raise ProbeError(
            f"the verifier 'classifier' names {path}, with {len(classes)} classes in 'id2label' and "
            f"{len(list(path.glob('*.safetensors')))} safetensors files, expected two or more and one or more.",
            remedy="Save it with transformers: model.save_pretrained(FOLDER), its classes named in the config.",
        )
    files = sorted(file for part in PARTS for file in path.glob(part))
    digest = digest_json([[file.name, digest_file(file)] for file in files])
    return {**argument, "classes": classes, "digest": digest}


def _class_of(argument: Mapping[str, Any], answer: Any) -> Any:
    return argument["labels"].get(answer, answer) if isinstance(answer, str) else answer


@lru_cache(maxsize=2)
def _opened(path: str, digest: str) -> tuple[Any, Any]:
    """The tokenizer and the model, read once for a digest."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    model = AutoModelForSequenceClassification.from_pretrained(path, use_safetensors=True, dtype="float32", **options)
    return AutoTokenizer.from_pretrained(path, **options), model.eval()
