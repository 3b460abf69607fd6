"""What a model or adapter folder is: its form, its digest, and what it stands on. Loads no torch.

A checkpoint's digest covers what it computes: weights, configuration and tokenizer, and the digest of what it stands
on; not where it lies, not its README.
"""

import json
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evertune.errors import CheckpointError
from evertune.hashing import canonical_json, digest_file, digest_json
from evertune.model.header import DTYPE_BITS, read_header

Form = Literal["model", "adapter"]

NOTE = "evertune.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Besides the weights, the files of a model folder that change what it computes.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# Types of numbers that are no integers, as safetensors names them.
_FLOATS = ("BF16", "F16", "F32", "F64")
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".h5")
_SHARD = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$")
# Fields of adapter_config.json that say where something lies, not what the adapter computes.
_PLACES = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "auto_mapping")


@dataclass(frozen=True)
class Checkpoint:
    """An immutable folder: a model, or an adapter that stands on a checkpoint. Compare by `digest`."""

    path: Path
    digest: str
    form: Form
    stands_on: "Checkpoint | None" = None

    @property
    def stack(self) -> tuple["Checkpoint", ...]:
        """The base model first, then each adapter in the order they were trained."""
        return (self,) if self.stands_on is None else (*self.stands_on.stack, self)

    @property
    def base(self) -> "Checkpoint":
        """The model at the bottom of the stack."""
        return self.stack[0]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` is the way back."""
        below = None if self.stands_on is None else self.stands_on.to_json()
        return {"path": str(self.path), "digest": self.digest, "form": self.form, "stands_on": below}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Checkpoint":
        """The checkpoint that `to_json` wrote. Reads no file."""
        below = None if value["stands_on"] is None else cls.from_json(value["stands_on"])
        return cls(path=Path(value["path"]), digest=value["digest"], form=value["form"], stands_on=below)


def describe(path: Path, *, cache: Path | None = None, known: Mapping[Path, str] | None = None) -> Checkpoint:
    """Check the files of a checkpoint and of all it stands on, and digest them.

    Args:
        path: folder of a Hugging Face model or of a PEFT adapter.
        cache: JSON file of known digests, keyed by path, size, modification time and inode; made when missing. A
            speed-up only: `evertune verify` reads every byte.
        known: SHA-256 of files that the caller has just written, so that they are not read again.

    Raises:
        CheckpointError: the folder is missing, holds no safetensors weights, names files outside itself, is cut, or
            stands on something that is missing, has changed, or stands on it in turn.
    """
    digests = _Digests(cache, known or {})
    checkpoint = _describe(Path(path).resolve(), digests, above=())
    digests.save()
    return checkpoint


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, checked to lie inside it, in order of their names.

    Raises:
        CheckpointError: none is there, one is missing, or the index names a file elsewhere.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not index.is_file():
        raise _no_weights(folder)
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{index}: no weight_map.", remedy="Fetch the model folder again.")
    names = set()
    for tensor, name in mapping.items():
        if not isinstance(name, str) or not _SHARD.match(name):
            raise CheckpointError(
                f"{index}: tensor {tensor!r} is said to lie in {name!r}, expected the plain name of a safetensors file "
                "in this folder.",
                remedy="Do not use this folder: an index must not reach outside it.",
            )
        names.add(name)
    files = [folder / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{folder}: shard {file.name} is missing.", remedy="Fetch the model folder again.")
    return files


def is_stored_wide(checkpoint: Checkpoint) -> bool:
    """Whether most numbers of a model, or of the one an adapter stands on, are stored in float32 or wider.

    Raises:
        CheckpointError: as `weight_files`, or a header contradicts its file.
    """
    bits = [
        (DTYPE_BITS[info.dtype], info.bytes * 8 // DTYPE_BITS[info.dtype])
        for file in weight_files(checkpoint.base.path)
        for info in read_header(file).values()
        if info.dtype in _FLOATS
    ]
    return 2 * sum(count for width, count in bits if width >= 32) > sum(count for _, count in bits)


def vocabulary_of(checkpoint: Checkpoint) -> int:
    """Words of a model's vocabulary: the length of its logits, which may exceed the tokenizer's tokens.

    Raises:
        CheckpointError: its config.json does not say.
    """
    config = read_json(checkpoint.base.path / "config.json")
    text = config.get("text_config")
    found = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    if not isinstance(found, int):
        raise CheckpointError(
            f"{checkpoint.base.path / 'config.json'}: vocab_size is {found!r}, expected a number.",
            remedy="Fetch or copy the folder again.",
        )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        CheckpointError: the file is missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name}.", remedy="Fetch or copy the folder again.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}.", remedy="Fetch or copy the folder again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: found {type(value).__name__}, expected an object.")
    return value


def write_note(folder: Path, stands_on: Checkpoint) -> None:
    """Record beside an adapter what it stands on: `{"stands_on": {"digest", "path"}}` in evertune.json."""
    note = {"stands_on": {"digest": stands_on.digest, "path": place_seen_from(folder, stands_on.path)}}
    (folder / NOTE).write_bytes(canonical_json(note))


def place_seen_from(folder: Path, below: Path) -> str:
    """Where `below` lies, as a folder that stands on it writes it down.

    The path is relative between neighbours: two folders in one, or a workspace's `objects/` and the `tmp/` that
    objects are written in. So a workspace can be moved, and the same run leaves the same bytes wherever it lies.
    """
    folder = folder.resolve()
    objects = below.parent.name == "objects" and below.parent.parent == folder.parent.parent
    return os.path.relpath(below, folder) if objects or below.parent == folder.parent else str(below)


class _Digests:
    """SHA-256 of files, remembered between runs."""

    def __init__(self, cache: Path | None, given: Mapping[Path, str]) -> None:
        self._cache = cache
        self._given = given
        self._known: dict[str, str] = {}
        self._changed = False
        if cache is not None and cache.is_file():
            try:
                known = json.loads(cache.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, json.JSONDecodeError):
                known = {}  # a speed-up that cannot be read is made again
            self._known = known if isinstance(known, dict) else {}

    def of(self, path: Path) -> str:
        if path in self._given:
            return self._given[path]
        key = _key_of(path)
        if self._cache is None:
            return digest_file(path)
        if key not in self._known:
            self._known[key] = digest_file(path)
            self._changed = True
        return self._known[key]

    def save(self) -> None:
        if self._cache is None or not self._changed:
            return
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._cache.with_name(f"{self._cache.name}.{uuid.uuid4().hex}")
        # Of files as they are now: else the cache grows with every run.
        kept = {key: one for key, one in self._known.items() if _is_now(key)}
        temporary.write_bytes(canonical_json(kept))
        temporary.replace(self._cache)


def _key_of(path: Path) -> str:
    facts = path.stat()
    return f"{path}|{facts.st_size}|{facts.st_mtime_ns}|{facts.st_ino}"


def _is_now(key: str) -> bool:
    try:
        return _key_of(Path(key.rsplit("|", 3)[0])) == key
    except (OSError, ValueError):
        return False


def _describe(path: Path, digests: _Digests, above: tuple[Path, ...]) -> Checkpoint:
    if path in above:
        chain = " -> ".join(one.name for one in (*above, path))
        raise CheckpointError(
            f"{path}: this adapter stands on itself: {chain}.", remedy=f"Correct {ADAPTER_CONFIG} or {NOTE}."
        )
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder.", remedy="Give the folder of a model or an adapter.")
    if (path / ADAPTER_CONFIG).is_file():
        return _describe_adapter(path, digests, above)
    return _describe_model(path, digests)


def _describe_model(path: Path, digests: _Digests) -> Checkpoint:
    weights = weight_files(path)
    config = read_json(path / "config.json")
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{path / 'config.json'}: the weights are quantised ({_quantisation(config)}), which cannot be trained, "
            "merged or measured exactly.",
            remedy="Use the model's bfloat16 or float32 weights.",
        )
    if config.get("auto_map"):
        raise CheckpointError(
            f"{path / 'config.json'}: auto_map asks to run Python code from the folder, which is never done.",
            remedy="Use a model that transformers supports itself, and remove auto_map.",
        )
    for file in weights:
        read_header(file)
    files = [*(path / name for name in MODEL_FILES if (path / name).is_file()), *weights]
    if (path / INDEX).is_file() and weights != [path / WEIGHTS]:
        files.append(path / INDEX)
    named = {file.name: digests.of(file) for file in files}
    return Checkpoint(path=path, digest=digest_json({"form": "model", "files": named}), form="model")


def _describe_adapter(path: Path, digests: _Digests, above: tuple[Path, ...]) -> Checkpoint:
    config = read_json(path / ADAPTER_CONFIG)
    weights = path / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise _no_weights(path)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path / ADAPTER_CONFIG}: peft_type is {config.get('peft_type')!r}, expected 'LORA'.",
            remedy="Merge the adapter into its base with the tool that made it.",
        )
    read_header(weights)
    below = _below(path, config, digests, (*above, path))
    _check_same_text(path, below.base.path)
    facts = {key: value for key, value in config.items() if key not in _PLACES}
    digest = digest_json(
        {"form": "adapter", "config": facts, "weights": digests.of(weights), "stands_on": below.digest}
    )
    return Checkpoint(path=path, digest=digest, form="adapter", stands_on=below)


def _check_same_text(adapter: Path, base: Path) -> None:
    """An adapter folder may carry a tokenizer and a template, but only its base's: the base's are used."""
    for name in ("tokenizer.json", "chat_template.jinja"):
        if not (adapter / name).is_file():
            continue
        contents = [(folder / name).read_bytes() if (folder / name).is_file() else b"" for folder in (adapter, base)]
        if contents[0] != contents[1] and _without_limits(contents[0]) != _without_limits(contents[1]):
            raise CheckpointError(
                f"{adapter / name}: differs from {base / name}.",
                remedy=f"The base's {name} is used: copy the adapter's over it in a copy of the base, if the adapter "
                "was trained with it, else remove it.",
            )


def _without_limits(content: bytes) -> Any:
    """A tokenizer as values, without truncation and padding, which are not applied; other text as it is."""
    try:
        value = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError):
        return content.strip()
    return {**value, "truncation": None, "padding": None} if isinstance(value, dict) else value


def _below(path: Path, config: dict[str, Any], digests: _Digests, above: tuple[Path, ...]) -> Checkpoint:
    """What an adapter stands on: as evertune.json says, else as PEFT's configuration says."""
    note = read_json(path / NOTE).get("stands_on") if (path / NOTE).is_file() else None
    if note is not None:
        if not isinstance(note, dict) or not isinstance(note.get("path"), str):
            raise CheckpointError(f"{path / NOTE}: stands_on has no path.", remedy="Copy the adapter folder again.")
        below = _describe((path / note["path"]).resolve(), digests, above)
        if below.digest != note.get("digest"):
            raise CheckpointError(
                f"{path}: stands on checkpoint {str(note.get('digest'))[:12]}, but {below.path} is now "
                f"{below.digest[:12]}.",
                remedy="Restore the checkpoint this adapter was trained on.",
            )
        return below
    named = config.get("base_model_name_or_path")
    if isinstance(named, str) and named:
        for candidate in (path / named, Path(named)):
            if candidate.is_dir():
                return _describe(candidate.resolve(), digests, above)
    raise CheckpointError(
        f"{path / ADAPTER_CONFIG}: base_model_name_or_path is {named!r}, which is no folder here.",
        remedy="Set it to the folder of the model that the adapter was trained on.",
    )


def _quantisation(config: dict[str, Any]) -> str:
    settings = config["quantization_config"]
    return str(settings.get("quant_method", "unknown method")) if isinstance(settings, dict) else str(settings)


def _no_weights(folder: Path) -> CheckpointError:
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if pickled:
        return CheckpointError(
            f"{folder}: only pickled weights ({pickled[0]}), which can run code when loaded.",
            remedy="Load them with the tool that wrote them, in a place where nothing can be harmed, and save with "
            "save_pretrained(..., safe_serialization=True).",
        )
    return CheckpointError(
        f"{folder}: no safetensors weights, expected {WEIGHTS}, {INDEX} or {ADAPTER_WEIGHTS}.",
        remedy="Give the folder of a model or an adapter.",
    )
