"""Sequence-level distillation: the teacher writes the answers that the student learns (Kim and Rush 2016,
arXiv:1606.07947), several to each prompt, of which the best is kept.

A teacher with the student's tokenizer is asked and learnt in tokens. One with another reads the turns and writes text,
each through its own template, and the student's tokenizer reads that text.
"""

# G answers to one prompt, N counted positions

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from evertune.data.encode import EncodedPrompt, EncodedRow, Encoding, encode_prompts, question_of
from evertune.data.rows import Row
from evertune.errors import DataError
from evertune.hashing import digest_json
from evertune.model.codec import Codec
from evertune.model.forward import Forward
from evertune.train.distill_spec import DistillSpec
from evertune.train.distill_targets import Targets
from evertune.train.distill_teachers import Teachers, mean_logp
from evertune.train.reference import LiveReference
from evertune.train.sample import sample_answers

Check = Callable[[str, str, Any], bool]
"""(source, output, answer) -> whether the source's verifier accepts it."""
# Stands before each stored answer, so that one that is missing takes a place too.
START = -1


class Questions:
    """Encodes rows as prompts, and remembers their turns for a teacher with another tokenizer."""

    def __init__(self) -> None:
        self.turns: dict[tuple[str, str], list[dict[str, str]]] = {}

    def encode(
        self, rows: Sequence[Row], codec: Codec, *, max_tokens: int, too_long: Literal["error", "drop"]
    ) -> Encoding[EncodedPrompt]:
        """As `encode_prompts`."""
        self.turns.update({(row.source, row.id): question_of(row)[0] for row in rows})
        return encode_prompts(rows, codec, max_tokens=max_tokens, too_long=too_long)


def write_answers(
    spec: DistillSpec,
    prompts: Sequence[EncodedPrompt],
    teachers: Teachers,
    *,
    targets: Targets,
    codec: Codec,
    check: Check,
    turns: Mapping[tuple[str, str], list[dict[str, str]]],
) -> None:
    """Let the teachers answer the prompts that they have not answered yet.

    Args:
        turns: of each prompt, by source and id.
    """
    for source in dict.fromkeys(one.source for one in prompts):
        (teacher,) = spec.of(source)
        own = {asked(spec, one).digest: one for one in prompts if one.source == source}

        def author(
            forward: Forward, live: LiveReference, teachers_codec: Codec, row: EncodedRow, own: Any = own
        ) -> dict[str, Tensor]:
            prompt = own[row.digest]
            if teachers_codec.digest == codec.digest:
                ids = _best(spec, prompt, forward, live, codec, check)
            else:
                asked_in = turns[prompt.source, prompt.id]
                ids = _translated(spec, prompt, asked_in, forward, live, teachers_codec, codec, check)
            return {"ids": torch.tensor([START, *ids]).int()}

        rows = [asked(spec, one) for one in own.values()]
        teachers.write(teacher, rows, targets.written(teacher, source), author)


def asked(spec: DistillSpec, prompt: EncodedPrompt) -> EncodedRow:
    """The prompt as the store knows it. Which answer is kept depends on the right one too, where it is verified."""
    assert spec.answers is not None, "nobody writes answers"
    if spec.answers.keep != "verified":
        return prompt.prompt
    return replace(prompt.prompt, digest=digest_json([prompt.prompt.digest, prompt.answer]))


def with_answers(spec: DistillSpec, targets: Targets) -> Callable[..., Encoding[EncodedRow]]:
    """Encodes rows with the answers that were written to them; those without an answer are left out.

    Raises, when called:
        DataError: no row of a source has an answer.
    """

    def encode(
        rows: Sequence[Row], codec: Codec, *, max_tokens: int, too_long: Literal["error", "drop"]
    ) -> Encoding[EncodedRow]:
        found = encode_prompts(rows, codec, max_tokens=max_tokens, too_long=too_long)
        source = rows[0].source
        (teacher,) = spec.of(source)
        store = targets.written(teacher, source)
        answers = [store.read(asked(spec, one))["ids"][1:].tolist() for one in found.rows]
        kept = [_conversation(one, ids) for one, ids in zip(found.rows, answers, strict=True) if ids]
        if not kept:
            raise DataError(
                f"source '{source}': teacher '{teacher.name}' has written no answer that is kept to any of its "
                f"{len(answers)} rows.",
                remedy="Raise 'samples' or 'max_new_tokens', set 'keep: likeliest', or take another teacher.",
            )
        return Encoding(tuple(kept), found.dropped)

    return encode


def _best(
    spec: DistillSpec, prompt: EncodedPrompt, forward: Forward, live: LiveReference, codec: Codec, check: Check
) -> Sequence[int]:
    """The answer that is kept, with its stop token; nothing where none is good enough."""
    how = spec.answers
    assert how is not None, "nobody writes answers"
    seeds = [_seed(spec.seed, prompt, g) for g in range(how.samples)]
    (said,) = sample_answers(
        forward,
        [prompt.prompt.ids.tolist()],
        seeds=[seeds],
        max_new_tokens=how.max_new_tokens,
        temperature=how.temperature,
        stop_ids=codec.stop_ids,
    )
    ended = list(dict.fromkeys(one.ids for one in said if one.stopped and len(one.ids) > 1))
    if how.keep == "verified":
        texts = {ids: codec.decode([one for one in ids if one not in codec.stop_ids]) for ids in ended}
        ended = [ids for ids in ended if check(prompt.source, texts[ids], prompt.answer)]
    likelihoods = [float(mean_logp(live, _conversation(prompt, ids))) for ids in ended]
    # Of equals the first: the order of samples is that of their seeds.
    return ended[int(np.argmax(likelihoods))] if ended else ()


def _translated(
    spec: DistillSpec,
    prompt: EncodedPrompt,
    turns: Sequence[dict[str, str]],
    forward: Forward,
    live: LiveReference,
    theirs: Codec,
    ours: Codec,
    check: Check,
) -> Sequence[int]:
    """The answer that is kept of a teacher with another tokenizer, in the student's tokens."""
    ids_T = np.array(theirs.encode_prompt(turns), dtype="<i4")
    counted_T = np.zeros(len(ids_T), dtype=np.bool_)
    read = replace(prompt, prompt=replace(prompt.prompt, ids=ids_T, counted=counted_T))
    said = _best(spec, read, forward, live, theirs, check)
    if not said:
        return ()
    text = theirs.decode([one for one in said if one not in theirs.stop_ids])
    heard = ours.encode_chat([*turns, {"role": "assistant", "content": text}], answers=1)
    return [one for one, counts in zip(heard.ids, heard.counted, strict=True) if counts]


def _conversation(prompt: EncodedPrompt, answer: Sequence[int]) -> EncodedRow:
    ids = np.concatenate([prompt.prompt.ids, np.array(answer, dtype="<i4")]).astype("<i4")
    counted = np.arange(len(ids)) >= len(prompt.prompt.ids)
    digest = hashlib.sha256(ids.tobytes() + counted.tobytes()).hexdigest()
    return replace(prompt.prompt, id=prompt.id, ids=ids, counted=counted, digest=digest)


def _seed(seed: int, prompt: EncodedPrompt, answer: int) -> int:
    digest = hashlib.sha256(f"{seed}/answer/{prompt.prompt.digest}/{answer}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
