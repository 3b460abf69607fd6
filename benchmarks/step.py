"""Optimizer steps beside TRL's SFTTrainer and beside a minimal loop; anchored steps beside plain ones; their memory.

    python -m benchmarks.step plain --tune lora      evertune, trl, loop: tokens per second, interleaved step by step
    python -m benchmarks.step plain --tune full
    python -m benchmarks.step trl --tune lora        TRL's settings among themselves: which is its best
    python -m benchmarks.step anchor --tune lora     evertune plain and with each kind of anchor
    python -m benchmarks.step anchor --tune lora --model 128k
    python -m benchmarks.step flops --tune lora      multiplications of the same steps, whatever else the machine does
    python -m benchmarks.step profile --tune lora    where the time of a step goes
    python -m benchmarks.step shared                 share of the rows' tokens that are read; --rows may be pairs, too

Model: smollm2-135m; or of random weights, made here: `128k`, with 128,256 words (8 layers of 576), and `1.7b`, of the
shape of SmolLM2-1.7B, for a GPU. Rows: --rows, a JSONL of chats; each contestant sees the same ones, --batch in a step,
in bfloat16. Adapters: rank 16 on all linear layers.

A step is forward, backward, clipping and AdamW. `loop` is what one writes by hand: rows sorted by length, padded,
transformers' own loss on labels, torch's AdamW on the parameters themselves. Further contestants for `--only`:
`evertune-compiled` has `numerics: {compile: true}`; in `evertune-apart` each row reads for itself what it has in common
with others. TRL runs as it is installed beside this package, with bfloat16 weights and without gradient checkpointing:
its best here, as `trl` shows. Both update bfloat16 weights directly (TRL: adapters too); Evertune updates float32
masters. Tokens are those of the rows, without padding.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contest import Contestant, Turns, interleave, machine, spread, unit_of

RANK = 16
TRL_WAYS: dict[str, dict[str, Any]] = {
    "trl": {"train_sampling_strategy": "group_by_length"},
    "trl-liger": {"train_sampling_strategy": "group_by_length", "use_liger_kernel": True},
    "trl-random": {},
    "trl-packing": {"packing": True, "max_length": 640},
    "trl-checkpointing": {"train_sampling_strategy": "group_by_length", "gradient_checkpointing": True},
    "trl-autocast": {"train_sampling_strategy": "group_by_length", "bf16": True},
}
ANCHORS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "top64-both": {"on": "both", "cache": "top64"},
    "top64-replay": {"on": "replay", "cache": "top64"},
    "hidden-both": {"on": "both", "cache": "hidden"},
    "live-replay": {"on": "replay", "cache": "off"},
    "live-both": {"on": "both", "cache": "off"},
}


# Models of random weights: what differs from the bundled one's config. `1.7b` has the shape of SmolLM2-1.7B.
RANDOM: dict[str, dict[str, Any]] = {
    "128k": {"vocab_size": 128_256, "num_hidden_layers": 8},
    "1.7b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 64,
    },
}  # fmt: skip


def plain(options: argparse.Namespace) -> None:
    names = options.only or ["evertune", "trl", "loop"]
    for one in _contest(names, options):
        print(one, flush=True)


def trl(options: argparse.Namespace) -> None:
    for one in _contest(options.only or [name for name in TRL_WAYS if not name.endswith("liger")], options):
        print(one, flush=True)


def anchor(options: argparse.Namespace) -> None:
    for one in _contest(options.only or list(ANCHORS), options):
        print(one, flush=True)


def _contest(names: Sequence[str], options: argparse.Namespace) -> Iterator[str]:
    """Rounds of all contestants; after each the table so far."""
    folder = Path(tempfile.mkdtemp(prefix="evertune-step-"))
    model_folder(options.model)  # made before all of them ask for it
    yield json.dumps({**machine(), **{name: str(one) for name, one in vars(options).items() if name != "run"}})
    contestants = []
    for name in names:
        command = [sys.executable, "-m", "benchmarks.step", "contestant", "--name", name, "--tune", options.tune]
        for key in ("rows", "model", "batch", "micro", "steps", "rounds", "threads", "device"):
            command += [f"--{key}", str(getattr(options, key))]
        contestants.append(Contestant.start(name, command, threads=options.threads, log=folder / f"{name}.log"))
    for one in contestants:
        one.wait_ready()
    for done in range(options.rounds):
        interleave(contestants, steps=options.steps)
        yield f"round {done + 1} of {options.rounds}"
        yield from table(contestants, steps=options.steps, unit=unit_of(options.device))
    for one in contestants:
        one.stop()
    if options.out:
        first, unit = contestants[0], unit_of(options.device)
        results = {
            f"{one.name} / {first.name}, {unit} time of a token": one.total(unit.lower()) / one.total("tokens")
            * first.total("tokens") / first.total(unit.lower())
            for one in contestants[1:]
        }  # fmt: skip
        results |= {
            f"{one.name} / {first.name}, memory": (
                one.told[0]["ready_mib"] + max(each["peak_mib"] for each in one.told)
            )
            / (first.told[0]["ready_mib"] + max(each["peak_mib"] for each in first.told))
            for one in contestants[1:]
        }
        Path(options.out).write_text(json.dumps(results))


def table(contestants: Sequence[Contestant], *, steps: int, unit: str) -> Iterator[str]:
    """Per round of `steps` steps: tokens per second, and time per token against the first contestant."""
    first = contestants[0]
    rounds = range(len(first.told) // steps)

    def per_token(one: Contestant, kind: str, which: int) -> float:
        told = one.told[which * steps : (which + 1) * steps]
        return sum(each[kind] for each in told) / sum(each["tokens"] for each in told)

    memory = "resident" if unit == "CPU" else "allocated"
    times = f"{unit} time of {first.name}, times"
    yield f"| | tokens per CPU s | per wall s | {times} | highest {memory} MiB | of it in steps |"
    yield "|---|---|---|---|---|---|"
    for one in contestants:
        cpu, wall = ([1 / per_token(one, kind, r) for r in rounds] for kind in ("cpu", "wall"))
        ratios = [per_token(one, unit.lower(), r) / per_token(first, unit.lower(), r) for r in rounds]
        steps_peak = max(each["peak_mib"] for each in one.told)
        peak = one.told[0]["ready_mib"] + steps_peak
        yield (
            f"| {one.name} | {spread(cpu, 0)} | {spread(wall, 0)} | {spread(ratios)} | {peak:.0f} | {steps_peak:.0f} |"
        )


def contestant(options: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(options.threads)
    if options.name.startswith("trl"):
        _trl(options)
    elif options.name == "loop":
        _loop(options)
    else:
        _evertune(options)


def _evertune(options: argparse.Namespace) -> None:
    turns = Turns(options.device)
    if options.name == "evertune-apart":
        from evertune.train import objective

        objective.draws_at_random = lambda model: True  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            options, Path(folder), anchor=ANCHORS.get(options.name), has_replay=options.name in ANCHORS
        )
        trainer.step(0)
        turns.begin()
        step = 1
        while turns.wait():
            metrics = trainer.step(step)
            turns.tell(tokens=metrics["tokens"], counted=metrics["counted_tokens"], loss=metrics["loss"])
            step += 1


def make_trainer(options: argparse.Namespace, folder: Path, *, anchor: Any, has_replay: bool) -> Any:
    """Evertune's own trainer of an sft stage, as its worker makes it."""
    import time

    from evertune.hashing import digest_file
    from evertune.model.checkpoint import describe
    from evertune.train.sft import _Supervised
    from evertune.train.spec import AnchorSpec, RowsRef, SftSpec
    from evertune.train.stage import Setting, make_accelerator, make_trainer, open_trained
    from evertune.workspace import Workspace

    base = describe(model_folder(options.model))
    rows = Path(options.rows)
    count = options.batch * (options.steps + 1)
    new = RowsRef(source="rows", path=str(rows), format="messages", limit=count, digest=digest_file(rows))
    replay = []
    if has_replay:
        pool = rows.with_name("validation.jsonl")
        replay = [RowsRef(source="pool", path=str(pool), format="messages", limit=count // 3, digest=digest_file(pool))]
    spec = SftSpec(
        key="0" * 64, label="benchmark", start=base, base=base, new=[new], weights=None, replay=replay,
        share=0.25 if has_replay else 0.0, dedup=False,
        tune={"lora": {"rank": RANK}} if options.tune == "lora" else {"full": True},
        lr=1e-5, epochs=None, steps=(options.steps + 1) * options.rounds + 1, schedule="constant", warmup=0.0,
        batch_rows=options.batch, micro_batch_rows=options.micro, max_tokens=1024, too_long="error",
        weight_decay=0.0, clip=1.0, gradient_checkpointing=False, ema_decay=None, save_steps=10**6,
        anchor=AnchorSpec(kl=0.1, direction="forward", reference=base, **anchor) if anchor else None,
        plugins=[], seed=1, dtype="bfloat16", device=options.device, threads=options.threads, track=[],
        kernels="liger" if options.name == "evertune-liger" else "torch", compile=options.name == "evertune-compiled",
    )  # fmt: skip
    workspace = Workspace.open(folder / "workspace", create=True)
    accelerator = make_accelerator(device=options.device, track=[], logging_dir=folder)
    opened, trained = open_trained(spec, str(accelerator.device))
    lesson = _Supervised(spec)
    material = lesson.load(opened.codec, world_size=1)
    began = time.process_time()
    trainer = make_trainer(Setting(spec, opened, material, accelerator, workspace, None), trained, lesson)
    size = sum(file.stat().st_size for file in workspace.cache.rglob("*.raw")) if workspace.cache.is_dir() else 0
    print(f"prepared in {time.process_time() - began:.1f} CPU s, {size} bytes of cache", file=sys.stderr, flush=True)
    return trainer


def _trl(options: argparse.Namespace) -> None:
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    folder = model_folder(options.model)
    turns = Turns(options.device)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chats = _chats(options)
    dataset = Dataset.from_list([{"prompt": one[:-1], "completion": one[-1:]} for one in chats])
    ways = {
        "per_device_train_batch_size": options.micro, "gradient_accumulation_steps": options.batch // options.micro,
        "gradient_checkpointing": False, "bf16": False, "max_length": 1024, **TRL_WAYS[options.name],
    }  # fmt: skip
    if ways.get("packing"):  # so many packed sequences as hold the rows of a step
        ways |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": max(1, options.batch * 110 // 640)}
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=(options.steps + 1) * options.rounds + 1, learning_rate=1e-5,
        lr_scheduler_type="constant", use_cpu=options.device == "cpu", report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, seed=1, dataloader_num_workers=0, **ways,
    )  # fmt: skip
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")

    class Timed(SFTTrainer):
        tokens = 0

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            Timed.tokens += int((inputs["input_ids"] >= 0).sum() if mask is None else mask.sum())
            return super().training_step(model, inputs, *args, **kwargs)

    class Wait(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step == 1:
                turns.begin()
            Timed.tokens = 0
            if state.global_step and not turns.wait():
                sys.exit(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step > 1:
                turns.tell(tokens=Timed.tokens)

    trainer = Timed(
        model=model, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[Wait()],
        peft_config=lora if options.tune == "lora" else None,
    )  # fmt: skip
    trainer.train()
    turns.wait()


def _loop(options: argparse.Namespace) -> None:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    folder = model_folder(options.model)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(options.device)
    if options.tune == "lora":
        model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"), autocast_adapter_dtype=False
        )
    model.train()
    trained = [one for one in model.parameters() if one.requires_grad]
    adam = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    rows = sorted(_labelled(options), key=lambda row: -len(row[0]))
    batches = [rows[i : i + options.batch] for i in range(0, len(rows), options.batch)]
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(1)).tolist()
    turns, step = Turns(options.device), 0

    def perform() -> int:
        batch = batches[order[step % len(order)]]
        counted = sum(int((labels[1:] >= 0).sum()) for _, labels in batch)
        for first in range(0, len(batch), options.micro):
            part = batch[first : first + options.micro]
            ids, labels = (
                torch.nn.utils.rnn.pad_sequence([one[i] for one in part], batch_first=True, padding_value=fill)
                for i, fill in ((0, 0), (1, -100))
            )
            ids, labels = ids.to(options.device), labels.to(options.device)
            model(input_ids=ids, labels=labels, num_items_in_batch=counted, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        adam.zero_grad()
        return sum(len(ids) for ids, _ in batch)

    perform()
    turns.begin()
    while turns.wait():
        step += 1
        turns.tell(tokens=perform())


def _chats(options: argparse.Namespace) -> list[list[dict[str, str]]]:
    with Path(options.rows).open(encoding="utf-8") as lines:
        found = [json.loads(line)["messages"] for line in lines]
    return found[: options.batch * (options.steps + 1)]


def _labelled(options: argparse.Namespace) -> list[tuple[Any, Any]]:
    """Token ids and labels, -100 where nothing counts."""
    import torch

    from evertune.model.codec import load_codec

    codec = load_codec(model_folder(options.model))
    found = []
    for chat in _chats(options):
        encoded = codec.encode_chat(chat)
        ids, counted = torch.tensor(encoded.ids), torch.tensor(encoded.counted)
        found.append((ids, torch.where(counted, ids, -100)))
    return found


def model_folder(name: str) -> Path:
    """The bundled model, or one of random weights, made once."""
    from evertune.model.bundled import resolve_base

    if name not in RANDOM:
        return Path(resolve_base(name))
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    place = Path.home() / ".cache/evertune/benchmarks" / name
    if not (place / "model.safetensors").is_file():
        source = Path(resolve_base("smollm2-135m"))
        config = AutoConfig.from_pretrained(source)
        config.update(RANDOM[name])
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(place, max_shard_size="20GB")
        for file in source.iterdir():
            if file.name not in ("config.json", "model.safetensors", "generation_config.json") and file.is_file():
                shutil.copy(file, place / file.name)
    return place


def profile(options: argparse.Namespace) -> None:
    """Self CPU time of a step by operation, from torch's profiler."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if options.device == "cuda" else [])
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(options, Path(folder), anchor=None, has_replay=False)
        trainer.step(0)
        with record(activities=activities) as recorded:
            metrics = trainer.step(1)
    found = sorted(recorded.key_averages(), key=lambda one: -one.self_cpu_time_total)
    whole = sum(one.self_cpu_time_total for one in found)
    print(json.dumps(machine()), metrics["tokens"], "tokens", metrics["counted_tokens"], "counted")
    if options.device == "cuda":
        launches = sum(one.count for one in found if "LaunchKernel" in one.key)
        busy = sum(one.self_device_time_total for one in found if str(one.device_type).endswith("CUDA"))
        print(f"{whole / 1000:.0f} ms, of which the GPU works {busy / 1000:.0f}; {launches} launches")
    print("| operation | share | calls |\n|---|---|---|")
    for one in found[:16]:
        print(f"| {one.key} | {100 * one.self_cpu_time_total / whole:.1f} % | {one.count} |")


def flops(options: argparse.Namespace) -> None:
    """Floating point operations of the matrix products of a step: what anchors cost where time measures the machine."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    # Two operations that torch's counter does not know: a product with weights laid out for the processor, and its
    # fused attention on a CPU, which counts what a mask hides.
    unknown: dict[Any, Any] = {
        torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **named: 2 * math.prod(x) * weight[0],
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **named: (
            2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])
        ),
    }
    found: dict[str, float] = {}
    for name in options.only or list(ANCHORS):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(options, Path(folder), anchor=ANCHORS[name], has_replay=True)
            with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
                metrics = trainer.step(0)
        found[name] = counter.get_total_flops() / metrics["tokens"] / 1e6
    print(json.dumps(machine()), metrics["tokens"], "tokens", metrics["counted_tokens"], "counted")
    print("| | MFLOP a token | times plain |\n|---|---|---|")
    for name, one in found.items():
        print(f"| {name} | {one:.0f} | {one / found['plain']:.3f} |")


def shared(options: argparse.Namespace) -> None:
    """What rows of a forward pass have in common at their start is read once: how much is left."""
    from evertune.model.codec import load_codec
    from evertune.model.tree import grow

    codec = load_codec(model_folder(options.model))
    groups: list[list[list[int]]] = []
    with Path(options.rows).open(encoding="utf-8") as lines:
        for line in lines:
            one = json.loads(line)
            chats = (
                [one["prompt"] + one[side] for side in ("chosen", "rejected")] if "chosen" in one else [one["messages"]]
            )
            groups.append([list(codec.encode_chat(chat).ids) for chat in chats])
    tokens = read = 0
    for first in range(0, len(groups), options.micro):
        rows = [row for group in groups[first : first + options.micro] for row in group]
        tokens += sum(map(len, rows))
        read += sum(len(tree.ids) for tree in grow(rows, budget=sys.maxsize))
    print(f"{options.rows}, {options.micro} at a time: {len(groups)} rows, {tokens} tokens, {read / tokens:.3f} read")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", choices=["plain", "trl", "anchor", "flops", "profile", "shared", "contestant"])
    parser.add_argument("--tune", choices=["lora", "full"], default="lora")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", required=True, help="a JSONL of chats, such as replay_dolly/train.jsonl")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--micro", type=int, default=4, help="rows of a forward pass")
    parser.add_argument("--steps", type=int, default=6, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs="*", help="these contestants, the first one is compared with")
    parser.add_argument("--out", help="a JSON file for the ratios")
    parser.add_argument("--name", help=argparse.SUPPRESS)
    options = parser.parse_args()
    runs = {
        "plain": plain, "trl": trl, "anchor": anchor, "flops": flops, "profile": profile, "shared": shared,
        "contestant": contestant,
    }  # fmt: skip
    runs[options.run](options)


if __name__ == "__main__":
    main()
