"""A .gguf file made into a verified model folder, once: dense bfloat16 weights, tokenizer, template, stop token.

Unpacking is transformers' own. What is added here is what the import loses or leaves open: how the tokenizer splits
digits, what cannot be known is refused, and the result must pass the verified door before it is used.
"""

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from evertune.errors import CheckpointError
from evertune.hashing import canonical_json, digest_file
from evertune.model.checkpoint import NOTE, Checkpoint, describe
from evertune.model.codec import SPECIAL_NAMES
from evertune.model.open import open_model, quiet

# How byte-level vocabularies split text before merging, by the name the file gives (tokenizer.ggml.pre).
# GPT-2's own pattern, which is what transformers builds when it does not know the name:
_PLAIN_SPLIT = ("gpt-2", "phi-2", "olmo", "mpt")
# Each digit on its own first, then GPT-2's pattern; transformers leaves the first step out:
_DIGIT_SPLIT = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")


def import_gguf(path: Path, folder: Path) -> Checkpoint:
    """Write the model of a .gguf file into an empty folder as bfloat16 safetensors, and verify it.

    Quantised values are unpacked in float32 and rounded once to bfloat16. The file's name and SHA-256 go into
    evertune.json.

    Raises:
        CheckpointError: the file is no model that transformers unpacks, its tokenizer splits text in an unknown way,
            or the result does not pass the verified door.
    """
    fields = _fields(path)
    with quiet(), redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True, **_dense()
            )
        except Exception as error:  # whatever the readers raise, the file is at fault
            raise CheckpointError(
                f"{path}: transformers cannot unpack it: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                remedy="Use the model's Hugging Face folder instead.",
            ) from error
        _check_dense(model, path)
        model.config.quantization_config = None
        del model.config.quantization_config
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        model.config.dtype = torch.bfloat16
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    _set_split(folder / "tokenizer.json", fields, path)
    _compact(folder / "tokenizer.json")
    _set_names(folder / "tokenizer_config.json", max_tokens=model.config.max_position_embeddings)
    note = {
        "source": {
            "file": path.name,
            "sha256": digest_file(path),
            "transformers": transformers.__version__,
            "rounded_to": "bfloat16",
        }
    }
    (folder / NOTE).write_bytes(canonical_json(note))
    checkpoint = describe(folder)
    opened = open_model(checkpoint, dtype="bfloat16", device="cpu")
    _check_tokens(opened.codec.tokenizer, fields, path)
    return checkpoint


def _fields(path: Path) -> dict[str, Any]:
    """What the file says of its tokenizer."""
    names = ("model", "pre", "tokens", "token_type")
    try:
        reader = GGUFReader(path)
        found = {name: reader.get_field(f"tokenizer.ggml.{name}") for name in names}
        return {name: field.contents() for name, field in found.items() if field is not None}
    except Exception as error:  # the reader raises whatever the bytes lead it to
        raise CheckpointError(
            f"{path}: not a readable GGUF file: {error}.", remedy="Fetch or copy the file again."
        ) from error


def _dense() -> dict[str, Any]:
    """Ask for unpacked weights, where this transformers can also keep them packed."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _check_dense(model: Any, path: Path) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise CheckpointError(f"{path}: {name} was unpacked as {parameter.dtype}, expected float32.")


def _set_split(file: Path, fields: dict[str, Any], path: Path) -> None:
    """Correct how the tokenizer splits text before merging, where transformers leaves GPT-2's pattern standing."""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    before = tokenizer.get("pre_tokenizer") or {}
    if fields.get("model") != "gpt2" or before.get("type") != "ByteLevel":
        return
    pre = fields.get("pre")
    if pre in _PLAIN_SPLIT:
        return
    if pre not in _DIGIT_SPLIT:
        raise CheckpointError(
            f"{path}: its tokenizer splits text as {pre!r}, which transformers does not know.",
            remedy="Use the model's Hugging Face folder, whose tokenizer.json says how.",
        )
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, before]}
    file.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")


def _compact(file: Path) -> None:
    """The same tokenizer without white space, and a merge as one text instead of a pair where no token has a space.

    Each command that encodes something reads it in less time.
    """
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    pairs = [one for one in tokenizer["model"].get("merges") or () if not isinstance(one, str)]
    if pairs and not any(" " in token for pair in pairs for token in pair):
        tokenizer["model"]["merges"] = [" ".join(pair) for pair in pairs]
    file.write_text(json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def _set_names(file: Path, *, max_tokens: int) -> None:
    """Keep of tokenizer_config.json what every version of transformers reads, not what this one noted for itself."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    kept = {name: settings[name] for name in SPECIAL_NAMES if settings.get(name) is not None}
    kept |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    kept["model_max_length"] = max_tokens
    file.write_text(json.dumps(kept, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_tokens(tokenizer: Any, fields: dict[str, Any], path: Path) -> None:
    """Every token of the file keeps its id; byte-level tokens may be spelt in the byte alphabet."""
    for i, token in enumerate(fields["tokens"]):
        found = tokenizer.id_to_token(i)
        if found != token and fields.get("model") == "gpt2":
            raise CheckpointError(
                f"{path}: token {i} is {token!r} in the file but {found!r} in the tokenizer made of it."
            )
