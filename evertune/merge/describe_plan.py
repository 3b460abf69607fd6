"""What `--dry-run` prints: what a merge would read and write, its memory, its time, and what a reader should know."""

from typing import Any

from evertune.merge.factored import common_base
from evertune.merge.plan import MergePlan


def plan_body(plan: MergePlan, threads: int) -> dict[str, Any]:
    """The plan as JSON values."""
    as_adapter = common_base(plan) is not None
    return {
        "plan": plan.digest,
        "method": plan.method.name,
        "standing": plan.method.standing,
        "paper": plan.method.paper,
        "output": "adapter" if as_adapter else "model",
        "models": {
            one.name: {"path": str(one.checkpoint.path), "digest": one.checkpoint.digest} for one in plan.sources
        },
        "config_from": plan.donor.name,
        "tensors": len(plan.tensors),
        "files": [] if as_adapter else [{"name": one.name, "bytes": one.size} for one in plan.files],
        "bytes_read": plan.bytes_read(),
        "bytes_written": plan.bytes_written(),
        "peak_memory_bytes": plan.peak_bytes(threads),
        "seconds": plan.seconds(threads),
        "threads": threads,
        "notes": list(plan.notes),
    }  # fmt: skip


def plan_lines(plan: MergePlan, threads: int) -> list[str]:
    """The plan for a person."""
    body = plan_body(plan, threads)
    lines = [f"{body['method']} ({body['standing']}; {body['paper']})"]
    for name, one in body["models"].items():
        lines.append(f"  {name:<12} {one['digest'][:12]}  {one['path']}")
    if body["output"] == "adapter":
        lines.append("result: one adapter over the common base, exact; no weight of the base is read")
    else:
        count = len(body["files"])
        lines.append(
            f"result: {body['tensors']} tensors in {count} file{'s' if count > 1 else ''}, "
            f"{_size(body['bytes_written'])}; config and tokenizer of {body['config_from']}"
        )
        lines.append(
            f"reads {_size(body['bytes_read'])}, needs about {body['peak_memory_bytes'] / 1e6:.0f} MB of memory "
            f"and {body['seconds']:.0f} s with {threads} threads"
        )
    lines += [f"note: {one}" for one in body["notes"]]
    return [*lines, f"plan {body['plan'][:12]}: nothing was written"]


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
