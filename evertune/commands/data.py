"""`evertune data`: reading, cleaning and mixing training rows, alone or for a recipe."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

app = typer.Typer(
    no_args_is_help=True, help="Look at training rows; deduplicate, filter and mix them; trace and remove."
)

Files = Annotated[
    list[Path], typer.Argument(metavar="FILES", help="JSONL (.gz, .zst), Parquet, Arrow, globs, or datasets:NAME.")
]
FormatName = Literal["messages", "preference", "verifiable", "choice", "text"]
Format = Annotated[FormatName | None, typer.Option(help="Of the rows; that of the first row when not given.")]
Out = Annotated[
    Path | None, typer.Option("--out", help="A new folder for what stays, what goes and a manifest; else a dry run.")
]
As = Annotated[Literal["jsonl", "parquet"], typer.Option("--as", help="How rows are written.")]
Workers = Annotated[int, typer.Option(min=1, max=256, help="Processes; the result is the same for any number.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
Part = Literal["both", "prompt", "answer"]


@app.command()
def dedup(
    files: Files,
    out: Out = None,
    against: Annotated[
        list[Path] | None, typer.Option(help="Rows that win over those of FILES: new ones against replay, say.")
    ] = None,
    index: Annotated[Path | None, typer.Option(help="Folder of an index of all rows kept before.")] = None,
    extend: Annotated[bool, typer.Option("--extend", help="Keep what stays in the index.")] = False,
    part: Annotated[Part, typer.Option(help="What of a row is compared.")] = "both",
    threshold: Annotated[float, typer.Option(min=0.5, max=1.0, help="Jaccard similarity; 1 finds equal texts.")] = 0.8,
    width: Annotated[int, typer.Option(min=1, max=20, help="Words in a shingle.")] = 3,
    template_share: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="Shingles in more than this share of a source are not compared.")
    ] = 0.5,
    format: Format = None,
    written_as: As = "jsonl",
    workers: Workers = 1,
    as_json: AsJson = False,
) -> None:
    """Remove rows that repeat another one, word for word or nearly."""
    from evertune.data import sift
    from evertune.data.index import IndexSettings, open_index
    from evertune.errors import RecipeError

    if extend and index is None:
        raise RecipeError("--extend needs --index: the folder of the index.")
    sources = sift.sources_of(files, format)
    settings = sift.DedupSettings(part, width, threshold, template_share, workers)
    opened = open_index(index, IndexSettings(part, width, threshold), create=extend) if index is not None else None
    bad = sift.BadRows()
    decide = sift.dedup(
        sources, settings, against=sift.sources_of(against or [], None), index=opened, extend=extend, bad=bad
    )
    asked = {name: value for name, value in settings.__dict__.items() if name != "workers"}
    asked |= {"against": [str(one) for one in against or []], "index": str(index) if index else None}
    told = sift.sift(
        sources, decide, out, operation="dedup", settings=asked, bad=bad, suffix=f".{written_as}", examples=3
    )
    _tell(told.to_json(), out, as_json)


@app.command("filter")
def filter_(
    files: Files,
    out: Out = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="RULE", help="Keep rows where this holds: words>=3, repetition<=q0.95, tickets:words>=5."),
    ] = None,
    defaults: Annotated[bool, typer.Option(help="The default rules too.")] = True,
    model: Annotated[
        str | None, typer.Option(help="A language model for the signal answer_bits: bits per byte of what is said.")
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="Folder of a reward model or classifier for the signal classifier.")
    ] = None,
    label: Annotated[int, typer.Option(min=0, help="Class whose probability counts; unused by a reward model.")] = 0,
    signals: Annotated[bool, typer.Option("--signals", help="Only list the signals and the default rules.")] = False,
    samples: Annotated[int, typer.Option(min=0, help="Rows shown of what each rule drops.")] = 3,
    format: Format = None,
    written_as: As = "jsonl",
    as_json: AsJson = False,
) -> None:
    """Keep rows by named signals, with bounds or quantiles of each source."""
    from evertune.data import sift
    from evertune.data.quality import DEFAULT_RULES, SIGNALS, parse_rule

    if signals:
        for name, signal in SIGNALS.items():
            typer.echo(f"{name:<16} {signal.meaning}")
        typer.echo("answer_bits      bits per byte of what is said under --model: high is strange, low is trivial")
        typer.echo("classifier       reward, or probability of --label, under --classifier")
        typer.echo(f"\ndefault rules: {', '.join(DEFAULT_RULES)}")
        return
    scorers: dict[str, Any] = {}
    if model is not None:
        from evertune.probe.rows import answer_bits

        scorers["answer_bits"] = answer_bits(model)
    if classifier is not None:
        from evertune.probe.rows import classifier_score

        scorers["classifier"] = classifier_score(classifier, label)
    texts = [*(DEFAULT_RULES if defaults else ()), *(keep or [])]
    rules = [parse_rule(one, [*SIGNALS, *scorers]) for one in texts]
    sources = sift.sources_of(files, format)
    bad = sift.BadRows()
    decide, bounds = sift.filter_rows(sources, rules, scorers=scorers, bad=bad)
    asked = {"rules": texts, "bounds": bounds, "model": model, "classifier": str(classifier) if classifier else None}
    told = sift.sift(
        sources, decide, out, operation="filter", settings=asked, bad=bad, suffix=f".{written_as}", examples=samples
    )
    _tell({**told.to_json(), "bounds": bounds}, out, as_json)


@app.command()
def decontaminate(
    files: Files,
    probes: Annotated[list[Path], typer.Option(help="A recipe, whose probes count, or files of probe items.")],
    out: Out = None,
    format: Format = None,
    written_as: As = "jsonl",
    as_json: AsJson = False,
) -> None:
    """Remove rows that hold probe items: equal, nearly equal, or inside a longer text."""
    from evertune.data import sift

    sources = sift.sources_of(files, format)
    bad = sift.BadRows()
    items = [item for path in probes for item in _items_of(path)]
    decide = sift.decontaminate(sources, items, bad=bad)
    asked = {"probes": [str(one) for one in probes]}
    told = sift.sift(
        sources, decide, out, operation="decontaminate", settings=asked, bad=bad, suffix=f".{written_as}", examples=3
    )
    _tell(told.to_json(), out, as_json)


def _items_of(path: Path) -> list[Any]:
    """What must not be trained on: of a recipe's probes, or of a file's items."""
    from evertune.data.leak import ProbeText
    from evertune.data.quality import asked_and_said
    from evertune.data.rows import detect_format, iter_rows, messages_of

    if path.suffix in (".yaml", ".yml"):
        from evertune.probe.suite import load_probe
        from evertune.recipe.load import load_recipe

        loaded = load_recipe(path)
        found = [
            load_probe(name, settings=one.model_dump(exclude_none=True), root=loaded.folder)
            for name, one in loaded.recipe.probes.items()
        ]
        return [text for probe in found for text in probe.texts()]
    items = []
    for row in iter_rows(path, format=detect_format(path), source=path.name):
        if row.format == "text":
            text = asked_and_said(row)[1]
        else:
            text = next((one["content"] for one in reversed(messages_of(row.value)) if one["role"] != "assistant"), "")
        items.append(ProbeText(path.name, row.id, text))
    return items


def _tell(body: Mapping[str, Any], out: Path | None, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(body, indent=2, ensure_ascii=False))
        return
    for name, one in body["sources"].items():
        read, kept = one["read"], one["kept"]
        typer.echo(f"{name}: {read} rows, {kept} stay ({kept / read if read else 0:.1%})")
        for reason, count in sorted(one["removed"].items(), key=lambda each: -each[1]):
            typer.echo(f"  {count:>8}  {reason}")
    if body["quarantined"]:
        typer.echo(f"{body['quarantined']} rows could not be read" + (": see quarantine.jsonl" if out else ""))
    for reason, examples in body["examples"].items():
        typer.echo(f"\n{reason}, for example:")
        for one in examples:
            facts = ", ".join(
                f"{key} {value}" for key, value in one.items() if key not in ("row", "source", "file", "line", "reason")
            )
            typer.echo(f"  {one['file']}:{one['line']}  {facts}\n    {_short(one['row'])}")
    typer.echo(f"\nwrote {out}" if out else "\nNothing was written: give --out FOLDER to write what stays.")


def _short(row: Mapping[str, Any], width: int = 160) -> str:
    text = " ".join(json.dumps(row, ensure_ascii=False).split())
    return text if len(text) <= width else text[: width - 3] + "..."
