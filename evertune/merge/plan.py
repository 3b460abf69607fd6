"""A merge worked out from headers: what is read, what is written where, what it costs, and every problem.

Of the weights themselves only the two ends of each tensor are read, for the fingerprints that order the experts; their
digests are remembered between runs.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evertune.errors import EvertuneError, MergeError
from evertune.hashing import digest_bytes, digest_json
from evertune.merge.config import MergeConfig
from evertune.merge.kernels import BINS
from evertune.merge.methods import METHODS, Method, Rule, Settings, copy_of_first
from evertune.merge.sources import FLOATS, Source, fingerprint, head_and_embedding, read_source
from evertune.merge.values import Depths, check_value, resolve
from evertune.model.checkpoint import WEIGHTS, Checkpoint, describe, read_json
from evertune.model.header import DTYPE_BITS

# Changes whenever the same configuration would give other bytes.
VERSION = 4
# What a merged folder says of itself.
MANIFEST = "merge.json"
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
CHUNK_ELEMENTS = 1 << 18
SEGMENT_ELEMENTS = 1 << 20
# Of a tensor that is read more than once, kept from one pass to the next.
KEPT_BYTES = 128 << 20
TOKENIZER_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json",
)  # fmt: skip
IMPORT_BYTES = 90 << 20
# Problems of one model's tensors that are told one by one.
SHOWN_TENSORS = 3
# Integers that stand for weights: GPTQ, AWQ, bitsandbytes and others, also where no config.json says so.
_PACKED = re.compile(
    r"(^|\.)(weight|qweight|qzeros|absmax|quant_map|weight_packed|SCB|\w+_(blocks|scales))$|\.(nested_)?quant_state\."
)
# Nanoseconds of one core for an element of one input, by what a method does; measured by benchmarks/merge.py.
_NANOSECONDS = {"read": 0.3, "sum": 0.2, "gram": 0.6, "sparse": 1.2, "rank": 60.0, "low_rank": 6.0, "write": 2.0}


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the result.

    Attributes:
        name, shape, dtype: as written; dtype in safetensors' word.
        file, begin: where its bytes go: index of the output file, offset in it.
        experts: indices of the sources that count, in canonical order; none for a copy.
        settings: what the method is told; None for a tensor that is copied (integers).
        segment: elements of a unit of work; a multiple of `chunk`, the elements of one computation.
        double: compute in float64, for inputs or results wider than 16 bits.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: int
    begin: int
    experts: tuple[int, ...]
    settings: Settings | None
    chunk: int
    segment: int
    double: bool

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def segments(self) -> int:
        return -(-self.elements // self.segment)

    def span(self, segment: int) -> tuple[int, int]:
        """First element of a segment, and the one after its last."""
        return segment * self.segment, min((segment + 1) * self.segment, self.elements)


@dataclass(frozen=True)
class OutputFile:
    """A weights file: its name, its header's bytes, and its size."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class MergePlan:
    """Everything decided before the first weight is read.

    Attributes:
        sources: the experts, then the base if there is one.
        donor: whose config, tokenizer and template the result gets.
        notes: what a reader should know, such as a copy of a tied head that is left out.
        digest: names the merge: the same digest, the same bytes.
    """

    config: MergeConfig
    sources: tuple[Source, ...]
    base: Source | None
    donor: Source
    tensors: tuple[TensorPlan, ...]
    files: tuple[OutputFile, ...]
    notes: tuple[str, ...]
    digest: str
    merged_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> Method:
        return METHODS[self.config.method]

    def bytes_read(self) -> int:
        """Of all passes over all tensors."""
        return sum(self._tensor_bytes(one) * self._passes(one) for one in self.tensors)

    def bytes_written(self) -> int:
        return sum(one.size for one in self.files)

    def peak_bytes(self, threads: int) -> int:
        """Bound of the memory that is not files: interpreter and libraries, counts, and each thread's buffers."""
        widest = max((len(one.experts) for one in self.tensors), default=0) + 1
        chunk = max((one.chunk * (16 if one.double else 6) for one in self.tensors), default=0)
        counts = widest * (BINS + 1) * 8 * 2 * (1 if self.config.method == "ties" else 2) if self._counts() else 0
        thread = widest * chunk * 2 + max((one.segment * DTYPE_BITS[one.dtype] // 8 for one in self.tensors), default=0)
        kept = min(KEPT_BYTES, self.bytes_read()) if self._passes_of_method() > 1 else 0
        return IMPORT_BYTES + kept + threads * thread + (threads + 2) * (counts + self._factor_bytes())

    def seconds(self, threads: int) -> float:
        """A rough estimate, for files in the page cache and `threads` free cores."""
        inputs = sum(one.elements * (len(one.experts) + 1) for one in self.tensors)
        outputs = sum(one.elements for one in self.tensors)
        passes = self._passes_of_method()
        kind = "sum" if self.method.linear else "gram" if passes == 2 and not self._counts() else "sparse"
        work = inputs * (passes * _NANOSECONDS["read"] + _NANOSECONDS[kind]) + outputs * _NANOSECONDS["write"]
        if self.config.method in ("della", "della_linear"):
            work += inputs * _NANOSECONDS["rank"]
        if any(one.updates for one in self.sources):
            work += inputs * passes * _NANOSECONDS["low_rank"]
        return 0.5 + work * 1e-9 / threads

    def _passes(self, one: TensorPlan) -> int:
        return 1 if one.settings is None else self._passes_of_method()

    def _passes_of_method(self) -> int:
        """Readings of everything: one to merge, and those before it; a band that was guessed wrong is one more."""
        name = self.config.method
        if name == "sce":
            return 3 if self._counts() else 2
        if name == "ram":
            return 2 if self.config.boost else 1
        is_rescaled = self.config.compat == "mergekit" and name in ("dare_linear", "dare_ties")
        return 2 if self._counts() or is_rescaled or name in ("slerp", "model_stock") else 1

    def _counts(self) -> bool:
        """Whether magnitudes are ranked."""
        if self.config.method == "sce":
            return self.config.density not in (None, 1.0)
        return self.config.method in ("ties", "breadcrumbs", "breadcrumbs_ties")

    def _tensor_bytes(self, one: TensorPlan) -> int:
        inputs = {*one.experts, *((len(self.sources) - 1,) if self.base else ())}
        return sum(self.sources[i].tensors[one.name].info.bytes for i in inputs if one.name in self.sources[i].tensors)

    def _factor_bytes(self) -> int:
        sizes = [
            sum(4 * (update.a.info.bytes + update.b.info.bytes) for update in updates)
            for source in self.sources
            for updates in source.updates.values()
        ]
        return max(sizes, default=0)


def plan_merge(config: MergeConfig, *, folder: Path, cache: Path | None = None) -> MergePlan:
    """Work a merge out. Reads headers, configurations and tokenizers; weights only to digest them.

    Args:
        folder: what the configuration's paths are relative to.
        cache: file of known digests, as `model.checkpoint.describe` keeps it.

    Raises:
        MergeError: every problem of the inputs, a line each.
        CheckpointError: an input is not a checkpoint, and that is the only problem.
    """
    errors: list[EvertuneError] = []

    def look(name: str, path: Path) -> Checkpoint | None:
        try:
            found = describe(path, cache=cache)
            read_source(name, found)
        except EvertuneError as error:
            errors.append(error)
            return None
        return found

    models = {name: found for name, one in config.models.items() if (found := look(name, folder / one.path))}
    base = look("base", folder / config.base) if config.base is not None else None
    if not errors:
        return plan_checkpoints(config, models, base)
    # What can be read may have problems of its own: all are told at once.
    problems = [str(one) for one in errors]
    sources = [read_source(name, one) for name, one in models.items()]
    sources += [read_source("base", base)] if base is not None else []
    if len(sources) > 1:
        donor = next((one for one in sources if one.name == config.config_from), sources[-1 if base else 0])
        problems += _fit(config, sources, donor).problems
    raise errors[0] if len(problems) == 1 else MergeError("\n".join(problems))


def plan_checkpoints(config: MergeConfig, models: Mapping[str, Checkpoint], base: Checkpoint | None) -> MergePlan:
    """The same for checkpoints that are already known.

    Raises:
        MergeError: as `plan_merge`.
    """
    experts = [read_source(name, checkpoint) for name, checkpoint in models.items()]
    base_source = read_source("base", base) if base is not None else None
    named = {one.name: one for one in experts}
    donor = named[config.config_from] if config.config_from else base_source or experts[0]
    fit = _fit(config, (*experts, *([base_source] if base_source else [])), donor)
    problems, notes, sources, donor = fit.problems, fit.notes, fit.sources, fit.donor
    if problems:
        shown = problems[:20] + ([f"... and {len(problems) - 20} more."] if len(problems) > 20 else [])
        raise MergeError("\n".join(shown), remedy=fit.remedy)
    experts, base_source = list(sources[: len(models)]), sources[-1] if base_source else None
    tensors = _plan_tensors(config, experts, base_source, donor, sorted(donor.tensors))
    for one in tensors:
        tensor_rule(config, one)
    files, tensors = _lay_out(tensors, round(config.shard_gb * 1e9))
    merged_config = _merged_config(config, donor, tensors)
    identity = _identity(config, experts, base_source, donor, files)
    return MergePlan(
        config, sources, base_source, donor, tuple(tensors), tuple(files), tuple(notes), digest_json(identity),
        merged_config,
    )  # fmt: skip


class _Fit(NamedTuple):
    """How inputs fit together: brought into line with the donor, and what stands against a merge."""

    sources: tuple[Source, ...]
    donor: Source
    notes: list[str]
    problems: list[str]
    remedy: str


def _fit(config: MergeConfig, given: Sequence[Source], donor: Source) -> _Fit:
    problems: list[str] = []
    notes: list[str] = []
    sources = tuple(_with_heads(one, donor, problems, notes) for one in given)
    ours = _vocabulary(donor)
    sources = tuple(_with_vocabulary(one, donor, ours, config, problems, notes) for one in sources)
    donor = next(one for one in sources if one.name == donor.name)
    names = sorted(donor.tensors)
    remedy = "" if _check_tensors(sources, donor, names, problems) else "Merging needs one architecture."
    _check_values(config, names, problems)
    notes += [
        f"{one.name}: is a merge itself, rounded to {numbers_of(one)}, and is rounded again; merge what it was made "
        "of, or make it again with dtype: float32"
        for one in sources
        if is_rounded_merge(one)
    ]
    return _Fit(sources, donor, notes, problems, remedy)


def numbers_of(source: Source) -> str:
    """The dtype in which most of a model's numbers are stored, the base of an adapter for the adapter."""
    return _main_dtype((one.info.dtype, math.prod(one.info.shape)) for one in source.tensors.values())


def is_rounded_merge(source: Source) -> bool:
    """Whether a merge would start from numbers that another merge has rounded to 16 bits."""
    is_merged = (source.checkpoint.base.path / MANIFEST).is_file()
    return is_merged and numbers_of(source) in ("bfloat16", "float16")


def _main_dtype(elements: Iterable[tuple[str, int]]) -> str:
    sizes: dict[str, int] = {}
    for dtype, count in elements:
        if dtype in FLOATS:
            sizes[dtype] = sizes.get(dtype, 0) + count
    return CONFIG_DTYPES[max(sizes, key=lambda one: sizes[one])] if sizes else ""


def _identity(
    config: MergeConfig, experts: Sequence[Source], base: Source | None, donor: Source, files: Sequence[OutputFile]
) -> dict[str, Any]:
    """What the bytes depend on; not names, paths or, where a method has none, the order of the models."""
    models = [
        [one.checkpoint.digest, config.models[one.name].model_dump(mode="json", exclude={"path"})] for one in experts
    ]
    return {
        "version": VERSION,
        "config": config.model_dump(mode="json", exclude={"models", "base", "shard_gb", "config_from", "output"}),
        "models": models if METHODS[config.method].ordered else sorted(models, key=json.dumps),
        "base": base.checkpoint.digest if base else None,
        "donor": donor.checkpoint.digest,
        "files": [digest_bytes(one.header) for one in files],
    }


def kept_chunk_bytes(plan: MergePlan) -> int:
    """Of a chunk of bfloat16 in all models."""
    return len(plan.sources) * max((one.chunk for one in plan.tensors), default=CHUNK_ELEMENTS) * 2


def default_threads() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0))


def _with_heads(source: Source, donor: Source, problems: list[str], notes: list[str]) -> Source:
    """Agree on the head: a tied one is the embedding, and is stored only where the result is untied."""
    donor_head, _ = head_and_embedding(donor)
    head, embedding = head_and_embedding(source)
    tensors = dict(source.tensors)
    if donor.is_tied:
        if not source.is_tied:
            problems.append(
                f"{source.checkpoint.path}: has a head of its own, but the result's configuration (of {donor.name}) "
                f"ties it to the embedding. Set config_from to a model with a head of its own."
            )
        elif head is not None:
            del tensors[head]
            notes.append(f"{source.name}: {head} is a copy of the tied embedding and is left out")
    elif source.is_tied and donor_head is not None and embedding is not None:
        tensors.pop(head or "", None)
        tensors[donor_head] = source.tensors[embedding]
        notes.append(f"{source.name}: its head is tied to {embedding}; the result has a head of its own")
        if embedding in source.updates:
            problems.append(f"{source.checkpoint.path}: an adapter changes the tied embedding {embedding}.")
    return replace(source, tensors=tensors)


def _with_vocabulary(
    source: Source,
    donor: Source,
    ours: Mapping[str, int] | None,
    config: MergeConfig,
    problems: list[str],
    notes: list[str],
) -> Source:
    """Agree on the vocabulary `ours` of the donor: the same tokenizer, or rows by token."""
    donor_file, file = (_tokenizer_file(one) for one in (donor, source))
    if ours is None or not file.is_file() or donor_file.read_bytes() == file.read_bytes():
        return source
    theirs = _vocabulary(source) or {}
    if theirs == ours:
        return source
    if config.vocabulary == "same":
        problems.append(
            f"{source.checkpoint.path}: its tokenizer differs from that of {donor.name} ({len(theirs)} and {len(ours)} "
            "tokens). Set vocabulary: by_token to match rows by token."
        )
        return source
    rows = {}
    for name in (one for one in head_and_embedding(donor) if one is not None and one in source.tensors):
        count = donor.tensors[name].info.shape[0]
        places = np.full(count, -1, np.int64)
        for token, place in ours.items():
            if place < count and theirs.get(token, count * 10**6) < source.tensors[name].info.shape[0]:
                places[place] = theirs[token]
        rows[name] = places
        missing = int((places < 0).sum())
        notes.append(f"{source.name}: {count - missing} of {count} rows of {name} found by token")
    return replace(source, rows=rows)


def _tokenizer_file(source: Source) -> Path:
    return source.checkpoint.base.path / "tokenizer.json"


def _vocabulary(source: Source) -> dict[str, int] | None:
    """Token -> id, added tokens included; None without a tokenizer.json."""
    file = _tokenizer_file(source)
    if not file.is_file():
        return None
    content = read_json(file)
    model = content.get("model") or {}
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):  # unigram models list (piece, score)
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    found = {str(token): int(place) for token, place in vocabulary.items()}
    for one in content.get("added_tokens") or []:
        found[str(one["content"])] = int(one["id"])
    return found


def _check_tensors(sources: Sequence[Source], donor: Source, names: Sequence[str], problems: list[str]) -> bool:
    """Whether all have tensors of the same names and shapes."""
    is_one = True
    for source in sources:
        place = source.checkpoint.path
        missing, extra = sorted(set(names) - set(source.tensors)), sorted(set(source.tensors) - set(names))
        for verb, found in (("lacks", missing), ("has", extra)):
            if found:
                more = f" and {len(found) - 1} more" if len(found) > 1 else ""
                problems.append(
                    f"{place}: {verb} {found[0]}{more}, which {donor.name} {'has' if verb == 'lacks' else 'lacks'}."
                )
        shared = sorted(set(names) & set(source.tensors))
        is_one &= not missing and not extra and all(_same_shape(name, source, donor) for name in shared)
        odd = [f"{place}: {told}" for name in shared if (told := _oddity(name, source, donor)) is not None]
        problems += odd[:SHOWN_TENSORS]
        if len(odd) > SHOWN_TENSORS:
            problems.append(f"{place}: and {len(odd) - SHOWN_TENSORS} more tensors.")
    return is_one


def _same_shape(name: str, source: Source, donor: Source) -> bool:
    """As far as rows are not matched by token."""
    shape, like = source.tensors[name].info.shape, donor.tensors[name].info.shape
    return shape == like or (name in source.rows and shape[1:] == like[1:])


def _oddity(name: str, source: Source, donor: Source) -> str | None:
    """What stands against merging a tensor that both have."""
    info, like = source.tensors[name].info, donor.tensors[name].info
    if info.dtype.startswith("F8") or (info.dtype not in FLOATS and _PACKED.search(name)):
        return (
            f"{name} is {info.dtype}, a quantised type whose scales lie elsewhere. Use the model's bfloat16 or float32 "
            "weights."
        )
    if not _same_shape(name, source, donor):
        return f"{name} is {info.shape}, in {donor.name} it is {like.shape}."
    is_float, like_float = info.dtype in FLOATS, like.dtype in FLOATS
    if is_float != like_float or (not is_float and info.dtype != like.dtype):
        return f"{name} is {info.dtype}, in {donor.name} it is {like.dtype}."
    return None


def _check_values(config: MergeConfig, names: Sequence[str], problems: list[str]) -> None:
    settings = {"lambda": config.scale, "t": config.t, "density": config.density}
    settings |= {f"models.{name}.weight": one.weight for name, one in config.models.items()}
    settings |= {f"models.{name}.density": one.density for name, one in config.models.items()}
    for setting, value in settings.items():
        problems += check_value(value, names, setting)


def _plan_tensors(
    config: MergeConfig, experts: Sequence[Source], base: Source | None, donor: Source, names: Sequence[str]
) -> list[TensorPlan]:
    depths = Depths(names)
    method = METHODS[config.method]
    prints = [fingerprint(one) for one in experts]
    planned = []
    for name in names:
        info = donor.tensors[name].info
        if info.dtype not in FLOATS:
            planned.append(_tensor(name, info.shape, info.dtype, (), None, double=False, rows=False))
            continue
        dtype = DTYPES[config.dtype] if config.dtype else info.dtype
        chosen, settings = _settings(config, method, experts, prints, name, info.shape, depths)
        read = [experts[i] for i in chosen] + ([base] if base else [])
        wide = {one.tensors[name].info.dtype for one in read} | {dtype}
        double = bool(wide & {"F32", "F64"}) or any(name in one.updates for one in read)
        rows = config.method in ("della", "della_linear") or any(name in one.rows for one in read)
        planned.append(_tensor(name, info.shape, dtype, chosen, settings, double=double, rows=rows))
    return planned


def _tensor(
    name: str, shape: tuple[int, ...], dtype: str, experts: tuple[int, ...], settings: Settings | None,
    *, double: bool, rows: bool,
) -> TensorPlan:  # fmt: skip
    columns = shape[-1] if rows and shape else 1
    chunk = max(columns, CHUNK_ELEMENTS // columns * columns)
    segment = max(chunk, SEGMENT_ELEMENTS // chunk * chunk)
    return TensorPlan(name, shape, dtype, 0, 0, experts, settings, chunk, segment, double)


def _settings(
    config: MergeConfig,
    method: Method,
    experts: Sequence[Source],
    prints: Sequence[str],
    name: str,
    shape: tuple[int, ...],
    depths: Depths,
) -> tuple[tuple[int, ...], Settings]:
    """The experts that count for a tensor, in canonical order, and the method's settings for it."""

    def value(given: Any, default: float, setting: str) -> float:
        return default if given is None else resolve(given, name, depths, setting)

    shared_density = value(config.density, method.defaults.get("density", 1.0), "density")
    found = []
    for i, one in enumerate(experts):
        model = config.models[one.name]
        weight = value(model.weight, 1.0, f"models.{one.name}.weight")
        density = value(model.density, shared_density, f"models.{one.name}.density")
        found.append((prints[i], weight, density, i))
    if not method.ordered:
        found.sort(key=lambda one: (*one[:3], experts[one[3]].checkpoint.digest))
    if "weight" in method.per_model and any(weight != 0.0 for _, weight, _, _ in found):
        found = [one for one in found if one[1] != 0.0]
    keys = [int(digest_bytes(f"{config.seed}|{print_}|{name}".encode())[:16], 16) for print_, *_ in found]
    t = config.decay if config.method == "ema" else None
    normalize = config.normalize if config.normalize is not None else method.defaults.get("normalize", True)
    settings = Settings(
        weights=np.array([weight for _, weight, _, _ in found]),
        densities=np.array([density for _, _, density, _ in found]),
        keys=np.array(keys, np.uint64),
        elements=math.prod(shape),
        columns=shape[-1] if shape else 1,
        dims=len(shape),
        scale=value(config.scale, 1.0, "lambda"),
        t=t if t is not None else value(config.t, 0.5, "t"),
        normalize=normalize,
        epsilon=0.15 if config.epsilon is None else config.epsilon,
        gamma=0.01 if config.gamma is None else config.gamma,
        boost=config.boost or 0.0,
        boost_limit=0.2 if config.boost_limit is None else config.boost_limit,
        mergekit=config.compat == "mergekit",
    )
    return tuple(i for *_, i in found), settings


def tensor_rule(config: MergeConfig, tensor: TensorPlan) -> Rule:
    """The method's rule for a tensor; without an expert that counts, the base as it is.

    Raises:
        MergeError: a mean whose weights add up to nothing.
    """
    if tensor.settings is None or not tensor.experts:
        return copy_of_first()
    try:
        return METHODS[config.method].rule(tensor.settings)
    except MergeError as error:
        raise MergeError(f"{tensor.name}: {error.message}", remedy=error.remedy) from None


def _lay_out(tensors: Sequence[TensorPlan], limit: int) -> tuple[list[OutputFile], list[TensorPlan]]:
    """Divide tensors, in order of name, among files of at most `limit` bytes; every tensor gets its place."""
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for one in tensors:
        width = one.elements * DTYPE_BITS[one.dtype] // 8
        if shards[-1] and size + width > limit:
            shards.append([])
            size = 0
        shards[-1].append(one)
        size += width
    files, placed = [], []
    for i, shard in enumerate(shards):
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        place = 0
        for one in shard:
            end = place + one.elements * DTYPE_BITS[one.dtype] // 8
            entries[one.name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [place, end]}
            place = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        name = WEIGHTS if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        files.append(OutputFile(name, header, len(header) + place))
        for one in shard:
            begin = len(header) + entries[one.name]["data_offsets"][0]
            placed.append(replace(one, file=i, begin=begin))
    return files, placed


def index_json(plan: MergePlan) -> dict[str, Any] | None:
    """model.safetensors.index.json, or None for one file."""
    if len(plan.files) == 1:
        return None
    total = sum(one.elements * DTYPE_BITS[one.dtype] // 8 for one in plan.tensors)
    return {
        "metadata": {"total_size": total},
        "weight_map": {one.name: plan.files[one.file].name for one in plan.tensors},
    }


def _merged_config(config: MergeConfig, donor: Source, tensors: Iterable[TensorPlan]) -> dict[str, Any]:
    """The donor's config.json with the dtype that is written."""
    merged = dict(donor.config)
    written = _main_dtype((one.dtype, one.elements) for one in tensors)
    if written:
        merged.pop("torch_dtype", None)
        merged["dtype"] = written
    return merged
