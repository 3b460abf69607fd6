"""Probes beside lm-eval's Hugging Face backend on the same items, tokens and weights: time, and the same scores.

    python -m benchmarks.probes choice --items-file arc_easy/test.jsonl              zero-shot, four choices
    python -m benchmarks.probes choice --items-file arc_easy/test.jsonl --shots 4    behind four solved items
    python -m benchmarks.probes generate --items-file gsm8k/test.jsonl [--shots 5]   greedy answers, early stop
    python -m benchmarks.probes close --items-file arc_easy/test.jsonl               what float32 for close items costs

Items are asked through the model's chat template; shots are earlier turns of the same conversation, the same for all
items. lm-eval 0.4 gets the same token ids at its batch size --batch. Both run on --threads threads, interleaved in
parts of --part items. Ratios are of processor time, with --device cuda of the clock's. `close` compares the choices
made in bfloat16, with and without a second look in float32, with those of float32 throughout.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contest import Contestant, Turns, interleave, machine, spread, unit_of


def choice(options: argparse.Namespace) -> None:
    _contest(options)


def generate(options: argparse.Namespace) -> None:
    _contest(options)


def _contest(options: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp(prefix="evertune-probes-"))
    print(json.dumps({**machine(), **{key: str(one) for key, one in vars(options).items()}}), flush=True)
    contestants = []
    for name in ("evertune", "lm-eval"):
        command = [sys.executable, "-m", "benchmarks.probes", "contestant", "--name", name, "--kind", options.run]
        for key in ("items_file", "model", "shots", "items", "part", "dtype", "threads", "tokens", "device", "batch"):
            command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
        contestants.append(Contestant.start(name, command, threads=options.threads, log=folder / f"{name}.log"))
    for one in contestants:
        one.wait_ready()
    interleave(contestants, steps=options.items // options.part)
    ours, theirs = contestants
    unit = unit_of(options.device)
    kind = unit.lower()
    for one in contestants:
        print(f"{one.name:<10} {options.items / one.total(kind):6.2f} items per {unit} s")
    ratios = [other[kind] / own[kind] for own, other in zip(ours.told, theirs.told, strict=True)]
    ratio = theirs.total(kind) / ours.total(kind)
    print(f"ratio {ratio:.2f}, of single parts {spread(ratios)}")
    found = [[value for part in one.told for value in part["found"]] for one in contestants]
    if options.run == "choice":
        furthest = max(abs(a - b) for one, other in zip(*found, strict=True) for a, b in zip(one, other, strict=True))
        same = sum(_best(one) == _best(other) for one, other in zip(*found, strict=True))
        print(f"scores differ by {furthest:.2g} nats at most; the same choice on {same} of {len(found[0])} items")
    else:
        same = sum(one == other for one, other in zip(*found, strict=True))
        print(f"the same answer to {same} of {len(found[0])} questions")
    for one in contestants:
        one.stop()
    if options.out:
        Path(options.out).write_text(json.dumps({f"lm-eval / evertune, {unit} time": ratio}))


def close(options: argparse.Namespace) -> None:
    """Choices in bfloat16 with and without a second look, against float32."""
    import time

    import torch

    from evertune.model.forward import Forward, score_branches
    from evertune.model.open import open_model
    from evertune.model.precision import in_float32
    from evertune.probe.score import CLOSE_NATS

    torch.set_num_threads(options.threads)
    opened = open_model(_checkpoint(options), dtype="bfloat16")
    groups, forward = _groups(options, opened.codec), Forward(opened)

    def sums(chosen: Sequence[Any]) -> list[list[float]]:
        return [[sum(one) for one in group] for group in score_branches(forward, chosen)]

    began = time.process_time()
    narrow = sums(groups)
    plain = time.process_time() - began
    leads = [sorted(one)[-1] - sorted(one)[-2] for one in narrow]
    near = [i for i, lead in enumerate(leads) if lead < CLOSE_NATS]
    began = time.process_time()
    with in_float32(opened.model):
        again = dict(zip(near, sums([groups[i] for i in near]), strict=True))
        more = time.process_time() - began
        wide = sums(groups)
    looked = [again.get(i, one) for i, one in enumerate(narrow)]
    errors = [abs(a - b) for one, other in zip(narrow, wide, strict=True) for a, b in zip(one, other, strict=True)]
    print(json.dumps(machine()))
    mean = sum(errors) / len(errors)
    print(f"{len(groups)} items; bfloat16 is off by {mean:.2f} nats on average, {max(errors):.2f} at most")
    for name, found in (("bfloat16", narrow), ("with a second look", looked)):
        other = sum(_best(one) != _best(true) for one, true in zip(found, wide, strict=True))
        print(f"{name}: {other} of {len(groups)} choices are not those of float32")
    print(f"second look at {len(near)} items: {more / plain:.2f} of the time of the first")


def contestant(options: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(options.threads)
    score = (_ours if options.name == "evertune" else _theirs)(options)
    turns = Turns(options.device)
    next(score)
    turns.begin()
    while turns.wait():
        found = next(score)
        turns.tell(found=found)


def _ours(options: argparse.Namespace) -> Iterator[Any]:
    from evertune.model.forward import Forward, score_branches
    from evertune.model.open import open_model
    from evertune.model.packed_weights import constant_weights
    from evertune.probe.generate import generate_answers

    opened = open_model(_checkpoint(options), dtype=options.dtype, device=options.device)
    forward = Forward(opened)
    if options.kind == "generate":
        prompts = _prompts(options, opened.codec)
        yield generate_answers(forward, prompts[:1], max_new_tokens=2, stop_ids=opened.codec.stop_ids)
        with constant_weights(opened.model):  # as over the parts of a suite
            for part in _parts(prompts, options.part):
                answers = generate_answers(forward, part, max_new_tokens=options.tokens, stop_ids=opened.codec.stop_ids)
                yield [opened.codec.decode(one.ids) for one in answers]
        return
    groups = _groups(options, opened.codec)
    yield score_branches(forward, groups[:1])
    for part in _parts(groups, options.part):
        yield [[sum(one) for one in group] for group in score_branches(forward, part)]


def _theirs(options: argparse.Namespace) -> Iterator[Any]:
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evertune.model.codec import load_codec

    folder = _checkpoint(options).path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype))
    harness: Any = HFLM(
        pretrained=model.to(options.device),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=options.batch,
        add_bos_token=False,
    )
    codec = load_codec(folder)
    if options.kind == "generate":
        prompts = [harness.tok_decode(one, skip_special_tokens=False) for one in _prompts(options, codec)]
        stops = [harness.tok_decode([one], skip_special_tokens=False) for one in sorted(codec.stop_ids)]

        def said(part: Sequence[str], tokens: int) -> list[str]:
            wanted = {"until": stops, "max_gen_toks": tokens, "do_sample": False}
            asked = [Instance("generate_until", {}, (one, dict(wanted)), i) for i, one in enumerate(part)]
            return list(harness.generate_until(asked, disable_tqdm=True))

        yield said(prompts[:1], 2)
        for part in _parts(prompts, options.part):
            yield said(part, options.tokens)
        return
    groups = _groups(options, codec)

    def scored(part: Sequence[Any]) -> list[list[float]]:
        asked = [
            (("", str(i)), list(row.ids[: row.first]), list(row.ids[row.first :]))
            for i, row in enumerate(row for group in part for row in group)
        ]
        values = iter(harness._loglikelihood_tokens(asked, disable_tqdm=True))
        return [[float(next(values)[0]) for _ in group] for group in part]

    yield scored(groups[:1])
    for part in _parts(groups, options.part):
        yield scored(part)


def _groups(options: argparse.Namespace, codec: Any) -> list[list[Any]]:
    """Per item, its choices as texts to score; the first items of the file are the shots."""
    from evertune.model.forward import Tokens

    rows = _rows(options)
    shots = [
        turn
        for row in rows[: options.shots]
        for turn in (
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["choices"][row["answer"]]},
        )
    ]
    found = []
    for row in rows[options.shots :]:
        question = [*shots, {"role": "user", "content": row["prompt"]}]
        start = codec.encode_prompt(question)
        group = []
        for text in row["choices"]:
            ids = codec.encode_chat([*question, {"role": "assistant", "content": text}]).ids
            end = max(i for i, one in enumerate(ids) if one in codec.stop_ids)
            assert ids[: len(start)] == start, "the template's prompt is no prefix"
            group.append(Tokens(tuple(ids[:end]), tuple(i >= len(start) for i in range(end))))
        found.append(group)
    return found


def _prompts(options: argparse.Namespace, codec: Any) -> list[list[int]]:
    rows = _rows(options)
    shots = [
        turn
        for row in rows[: options.shots]
        for turn in (*row["messages"], {"role": "assistant", "content": row["solution"]})
    ]
    return [list(codec.encode_prompt([*shots, *row["messages"]])) for row in rows[options.shots :]]


def _rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    with Path(options.items_file).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][: options.items + options.shots]


def _parts(whole: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (whole[i : i + size] for i in range(0, len(whole), size))


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])


def _checkpoint(options: argparse.Namespace) -> Any:
    from evertune.model.bundled import resolve_base
    from evertune.model.checkpoint import describe

    return describe(resolve_base(options.model))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", choices=["choice", "generate", "close", "contestant"])
    parser.add_argument("--items-file", required=True)
    parser.add_argument(
        "--model", default="smollm2-135m", help="a bundled name or a folder, such as an exported champion"
    )
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--part", type=int, default=8, help="items scored in one turn")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=8, help="lm-eval's batch size")
    parser.add_argument("--tokens", type=int, default=48, help="of a generated answer at most")
    parser.add_argument("--out", help="a JSON file for the ratio")
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    options = parser.parse_args()
    {"choice": choice, "generate": generate, "close": close, "contestant": contestant}[options.run](options)


if __name__ == "__main__":
    main()
