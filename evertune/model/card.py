"""The model card of an export: README.md with the front matter that model hubs read. Loads no torch."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import yaml

from evertune.methods import methods, standing_of
from evertune.model.checkpoint import Checkpoint

Relation = Literal["adapter", "finetune"]


def model_card(checkpoint: Checkpoint, *, relation: Relation, card: Mapping[str, Any]) -> str:
    """The text of README.md.

    Args:
        relation: `adapter` for an adapter over the base, `finetune` for whole weights.
        card: what is known of the checkpoint, each part optional: `base_model` (what the weights were tuned from, or
            what the adapter goes over; the base folder's name when not given), `label`, `data` (names of sources),
            `methods` (ids of all that went into it), `standing` (of the weakest), `probes` ({name: {"value",
            "ci90": [low, high] | None, "n"}}).
    """
    base = str(card.get("base_model") or checkpoint.base.path.name)
    front = {
        "base_model": base,
        "base_model_relation": relation,
        "library_name": "peft" if relation == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["evertune", *([str(one) for one in card.get("methods") or ()])],
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]
    lines += [f"# {_line(card.get('label') or checkpoint.path.name)}", ""]
    lines += _made_from(checkpoint, relation, base)
    if card.get("standing") and card["standing"] != "production":
        lines += ["", f"Made with methods of standing **{_line(card['standing'])}**: {_caution(card['standing'])}."]
    if card.get("data"):
        lines += ["", "## Data", "", *[f"- {_line(source)}" for source in card["data"]]]
    if card.get("probes"):
        lines += ["", "## Probes", "", *_probe_table(card["probes"])]
    if card.get("methods"):
        lines += ["", "## Methods", "", *_method_table(card["methods"])]
    lines += ["", "## Use", "", "```python", *_use(base, relation), "```"]
    return "\n".join(lines) + "\n"


def _made_from(checkpoint: Checkpoint, relation: Relation, base: str) -> list[str]:
    adapters = len(checkpoint.stack) - 1
    if relation == "adapter":
        what = f"One LoRA adapter for `{_line(base)}`"
        what += f": {adapters} stacked adapters with concatenated factors." if adapters > 1 else "."
    else:
        what = f"A fine-tune of `{_line(base)}`"
        what += f": {adapters} adapter(s) added to its weights in float32, rounded once." if adapters else "."
    return [
        what,
        "",
        f"- checkpoint `{checkpoint.digest}`",
        f"- weights below the adapters `{checkpoint.base.digest}`",
    ]


def _probe_table(probes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = ["| probe | value | 90% interval | items |", "|---|---|---|---|"]
    for name, one in probes.items():
        ci90 = one.get("ci90")
        interval = f"{ci90[0]:.3f} to {ci90[1]:.3f}" if ci90 else ""
        rows.append(f"| {_line(name)} | {one['value']:.3f} | {interval} | {one.get('n', '')} |")
    return rows


def _method_table(ids: Iterable[str]) -> list[str]:
    rows = ["| method | standing | papers |", "|---|---|---|"]
    for one in ids:
        row = methods().get(one)
        name, papers = (f"{row.name} ({row.id})", "; ".join(row.papers)) if row else (str(one), "")
        rows.append(f"| {_line(name)} | {standing_of([one])} | {_line(papers)} |")
    return rows


def _caution(standing: str) -> str:
    if standing == "research":
        return "no published report shows them all in production. Validate it yourself before use"
    return "not production-validated. Validate it yourself before use"


def _use(base: str, relation: Relation) -> list[str]:
    if relation == "finetune":
        return [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("this-folder")',
            'tokenizer = AutoTokenizer.from_pretrained("this-folder")',
        ]
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({base!r})",
        'model = PeftModel.from_pretrained(base, "this-folder")',
    ]


def _line(value: Any) -> str:
    """Text from data, on one line and without what Markdown or HTML would act on."""
    flat = " ".join(str(value).split())
    for mark in ("&", "<", ">", "|", "`", "[", "]"):
        flat = flat.replace(mark, f"&#{ord(mark)};")
    return flat
