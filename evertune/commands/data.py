"""`evertune data`: reading, cleaning and mixing training rows, alone or for a recipe."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from evertune.data.mixed import Mixed
    from evertune.data.rows import BadRows
    from evertune.data.sift import Reader

app = typer.Typer(
    no_args_is_help=True, help="Look at training rows; deduplicate, filter and mix them; trace and remove."
)

BAD_SHOWN = 3

Files = Annotated[
    list[Path], typer.Argument(metavar="FILES", help="JSONL (.gz, .zst), Parquet, Arrow, globs, or datasets:NAME.")
]
FormatName = Literal["messages", "preference", "verifiable", "episode", "choice", "text"]
Format = Annotated[FormatName | None, typer.Option(help="Of the rows; that of the first row when not given.")]
Out = Annotated[
    Path | None, typer.Option("--out", help="A new folder for what stays, what goes and a manifest; else a dry run.")
]
As = Annotated[Literal["jsonl", "parquet"], typer.Option("--as", help="How rows are written.")]
Workers = Annotated[int, typer.Option(min=1, max=256, help="Processes; the result is the same for any number.")]
EngineWorkers = Annotated[int, typer.Option("--workers", min=1, max=256, help="Processes of --engine ray.")]
Engine = Annotated[
    Literal["local", "ray"],
    typer.Option(help="ray: files are read and written by Ray Data, on a cluster where RAY_ADDRESS names one."),
]
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
    extend: Annotated[bool, typer.Option("--extend", help="Keep in the index what stays and is written.")] = False,
    part: Annotated[Part, typer.Option(help="What of a row is compared.")] = "both",
    threshold: Annotated[float, typer.Option(min=0.5, max=1.0, help="Jaccard similarity; 1 finds equal texts.")] = 0.8,
    width: Annotated[int, typer.Option(min=1, max=20, help="Words in a shingle.")] = 3,
    template_share: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="Shingles in more than this share of a source are not compared.")
    ] = 0.5,
    format: Format = None,
    written_as: As = "jsonl",
    workers: Workers = 1,
    engine: Engine = "local",
    as_json: AsJson = False,
) -> None:
    """Remove rows that repeat another one, word for word or nearly."""
    from evertune.data import sift
    from evertune.data.index import IndexSettings, open_index
    from evertune.errors import RecipeError

    if extend and index is None:
        raise RecipeError("--extend needs --index: the folder of the index.")
    if extend and out is None:
        raise RecipeError("--extend needs --out: a row that the index knows and no file holds would be lost.")
    sift.check_out(out)
    sources = sift.sources_of(files, format)
    settings = sift.DedupSettings(part, width, threshold, template_share, workers)
    opened = open_index(index, IndexSettings(part, width, threshold), create=extend) if index is not None else None
    bad = sift.BadRows()
    reader = _reader(engine, workers)
    old = sift.sources_of(against or [], None)
    decide, keep = sift.dedup(sources, settings, against=old, index=opened, bad=bad, reader=reader)
    asked = {name: value for name, value in settings.__dict__.items() if name != "workers"}
    asked |= {"against": [str(one) for one in against or []], "index": str(index) if index else None}
    told = sift.sift(
        sources,
        decide,
        out,
        operation="dedup",
        settings=asked,
        bad=bad,
        suffix=f".{written_as}",
        examples=3,
        reader=reader,
    )
    if extend:
        keep()
    _tell(told.to_json(), out, as_json, bad)


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
    workers: EngineWorkers = 1,
    engine: Engine = "local",
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
    sift.check_out(out)
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
    reader = _reader(engine, workers)
    decide, bounds = sift.filter_rows(sources, rules, scorers=scorers, bad=bad, reader=reader)
    asked = {"rules": texts, "bounds": bounds, "model": model, "classifier": str(classifier) if classifier else None}
    told = sift.sift(
        sources,
        decide,
        out,
        operation="filter",
        settings=asked,
        bad=bad,
        suffix=f".{written_as}",
        examples=samples,
        reader=reader,
    )
    _tell({**told.to_json(), "bounds": bounds}, out, as_json, bad)


@app.command()
def decontaminate(
    files: Files,
    probes: Annotated[list[Path], typer.Option(help="A recipe, whose probes count, or files of probe items.")],
    out: Out = None,
    format: Format = None,
    written_as: As = "jsonl",
    workers: EngineWorkers = 1,
    engine: Engine = "local",
    as_json: AsJson = False,
) -> None:
    """Remove rows that hold probe items: equal, nearly equal, or inside a longer text."""
    from evertune.data import sift

    sources = sift.sources_of(files, format)
    bad = sift.BadRows()
    items = [item for path in probes for item in _items_of(path)]
    reader = _reader(engine, workers)
    decide = sift.decontaminate(sources, items, bad=bad, reader=reader)
    asked = {"probes": [str(one) for one in probes]}
    told = sift.sift(
        sources,
        decide,
        out,
        operation="decontaminate",
        settings=asked,
        bad=bad,
        suffix=f".{written_as}",
        examples=3,
        reader=reader,
    )
    _tell(told.to_json(), out, as_json, bad)


def _reader(engine: str, workers: int) -> "Reader":
    if engine == "local":
        from evertune.data.sift import Here

        return Here()
    from evertune.data.engine import RayEngine
    from evertune.data.spread import Spread

    return Spread(RayEngine(workers))


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


@app.command()
def inspect(
    files: Files,
    model: Annotated[
        str | None, typer.Option(help="Count tokens with this model's tokenizer and chat template.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Rows at random to show.")] = 3,
    seed: Annotated[int, typer.Option(help="Chooses the samples.")] = 0,
    format: Format = None,
    as_json: AsJson = False,
) -> None:
    """Say what the rows are: counts, lengths, repeats, scripts, templates, outliers, rows at random."""
    from dataclasses import replace

    from evertune.data import sift
    from evertune.data.inspect import inspect_rows

    count_tokens = _token_counter(model)
    found = []
    for source in sift.sources_of(files, format):
        bad = sift.BadRows()
        rows = sift.rows_of(source, bad)
        one = inspect_rows(source.name, source.format, rows, samples=samples, seed=seed, count_tokens=count_tokens)
        found.append((replace(one, quarantined=len(bad.found)), bad))
    if as_json:
        typer.echo(json.dumps([one.to_json() for one, _ in found], indent=2, ensure_ascii=False))
        return
    for one, bad in found:
        for line in _inspection_lines(one.to_json(), bad.found):
            typer.echo(line)


@app.command()
def mix(
    sources: Annotated[
        list[str], typer.Argument(metavar="FILE[=WEIGHT]", help="New rows; a weight is a share of the new rows.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="A new file, .jsonl (.gz, .zst) or .parquet.")] = None,
    replay: Annotated[list[Path] | None, typer.Option(help="Old rows to mix in.")] = None,
    share: Annotated[
        float | None, typer.Option(min=0.0, max=0.99, help="Share of all rows that is replay; 0.2 when not given.")
    ] = None,
    by: Annotated[Literal["rows", "tokens"], typer.Option(help="What weights are shares of.")] = "rows",
    temperature: Annotated[
        float | None, typer.Option(help="Instead of weights: above 1 small sources get more.")
    ] = None,
    passes: Annotated[
        list[str] | None, typer.Option(metavar="NAME=N", help="Instead of weights: how often a source is shown.")
    ] = None,
    epochs: Annotated[float, typer.Option(min=0.0, help="How much is written.")] = 1.0,
    rows: Annotated[int | None, typer.Option(min=1, help="How many rows are written, in place of --epochs.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same file.")] = 0,
    model: Annotated[str | None, typer.Option(help="Tokenizer and template for --by tokens.")] = None,
    format: Format = None,
    as_json: AsJson = False,
) -> None:
    """Write rows in the order in which a stage would see them, for any trainer."""
    from evertune.data import sift
    from evertune.data.mixed import mix as write_mix
    from evertune.data.quotas import Mixing
    from evertune.errors import RecipeError

    weighted = [_weighted(one) for one in sources]
    given = [weight for _, weight in weighted if weight is not None]
    if given and len(given) < len(weighted):
        raise RecipeError("found weights for some files, expected them for all or for none.")
    if by == "tokens" and model is None:
        raise RecipeError("--by tokens needs --model: whose tokens are counted.")
    if by == "tokens" and not given:
        raise RecipeError("--by tokens needs weights: write each file as FILE=WEIGHT.")
    if share and not replay:
        raise RecipeError("--share needs --replay: the old rows to mix in.")
    every = sift.sources_of([*(path for path, _ in weighted), *(replay or [])], format)
    new, old = every[: len(weighted)], every[len(weighted) :]
    mixing = Mixing(
        weights={one.name: weight for one, (_, weight) in zip(new, weighted, strict=True) if weight is not None}
        or None,
        by=by,
        temperature=temperature,
        passes=dict(map(_named, passes or [])) or None,
    )
    found = write_mix(
        new,
        out,
        mixing=mixing,
        replay=old,
        share=(0.2 if share is None else share) if old else 0.0,
        epochs=epochs,
        rows=rows,
        seed=seed,
        count_tokens=_token_counter(model if by == "tokens" else None),
    )
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
        return
    for line in _mixed_lines(found, out):
        typer.echo(line)


def _mixed_lines(found: "Mixed", out: Path | None) -> Iterator[str]:
    for name, count in found.rows.items():
        yield f"{count:>9} rows  {found.passes[name]:>6.2f} passes  {name}"
    total = sum(found.rows.values())
    yield f"replay is {found.share:.1%} of {total} rows" if found.share else f"{total} rows, no replay"
    yield from (f"warning: {warning}" for warning in found.warnings)
    if found.quarantined:
        yield f"{found.quarantined} rows could not be read" + (f": see {out}.quarantine.jsonl" if out else "")
    yield f"wrote {out}" if out else "Nothing was written: give --out FILE."


@app.command()
def select(
    files: Files,
    rows: Annotated[int, typer.Option(min=1, help="Rows to keep of each source.")],
    policy: Annotated[
        Literal["reservoir", "class_balanced", "coverage", "highest_loss"], typer.Option(help="Which rows are kept.")
    ] = "reservoir",
    class_field: Annotated[
        str, typer.Option("--class", help="Field with the class; the answer where 'answer'.")
    ] = "answer",
    model: Annotated[str | None, typer.Option(help="Under which the loss is taken, for highest_loss.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed keeps the same rows.")] = 0,
    out: Out = None,
    format: Format = None,
    written_as: As = "jsonl",
    as_json: AsJson = False,
) -> None:
    """Keep a budget of rows for replay, by one of four policies."""
    from evertune.data import sift
    from evertune.errors import RecipeError

    sift.check_out(out)
    scorer = None
    if policy == "highest_loss":
        if model is None:
            raise RecipeError("--policy highest_loss needs --model: the candidate whose loss counts.")
        from evertune.probe.rows import answer_bits

        scorer = answer_bits(model)
    sources = sift.sources_of(files, format)
    bad = sift.BadRows()
    decide = sift.select_rows(sources, rows, policy=policy, class_field=class_field, scorer=scorer, seed=seed, bad=bad)
    asked = {"rows": rows, "policy": policy, "class": class_field, "model": model, "seed": seed}
    told = sift.sift(sources, decide, out, operation="select", settings=asked, bad=bad, suffix=f".{written_as}")
    _tell(told.to_json(), out, as_json, bad)


@app.command()
def record(
    files: Files,
    model: Annotated[str, typer.Option(help="Whose answers are recorded: a bundled name or a folder.")],
    out: Annotated[Path, typer.Option("--out", help="A new file, .jsonl (.gz, .zst) or .parquet.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer; one that does not end is dropped.")] = 256,
    verifier: Annotated[
        Literal["exact", "contains", "math"] | None,
        typer.Option(help="Keep answers that pass against the row's answer."),
    ] = None,
    keep_likely: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of answers kept, the likeliest.")] = 1.0,
    format: Format = None,
) -> None:
    """Write a model's own answers to stored prompts, for replay without stored answers (research: validate it)."""
    from evertune.data import sift
    from evertune.data.write import row_writer
    from evertune.errors import DataError
    from evertune.probe.recordings import record_answers

    if out.exists():
        raise DataError(f"{out}: found something there, expected a new file.", remedy="Choose another --out.")
    bad = sift.BadRows()
    rows = [row for source in sift.sources_of(files, format) for row in sift.rows_of(source, bad)]
    found = record_answers(
        model,
        rows,
        max_new_tokens=max_new_tokens,
        verifier={verifier: {}} if verifier else None,
        keep_likely=keep_likely,
    )
    with row_writer(out) as writer:
        for one in found.rows:
            writer.add(one)
    typer.echo(f"{len(found.rows)} of {len(rows)} prompts answered, written to {out}")
    for reason, count in found.dropped.items():
        typer.echo(f"  {count:>8}  {reason}")
    if bad.found:
        typer.echo(f"{len(bad.found)} rows could not be read, the first: {bad.found[0]['problem']}")
    typer.echo("Self-synthesised rehearsal is a research method: compare it with stored rows on your own probes.")


@app.command()
def trace(
    workspace: Annotated[Path, typer.Argument(metavar="WORKSPACE", help="The folder of a run.")],
    text: Annotated[str, typer.Argument(help="A turn or text of the row, or the whole row as JSON.")],
    as_json: AsJson = False,
) -> None:
    """Say which stages were given a row, and which checkpoints stand on those."""
    from evertune.lineage import open_workspace
    from evertune.provenance import trace as find

    found = find(open_workspace(workspace), text)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
        return
    for line in _trace_lines(found.to_json()):
        typer.echo(line)


@app.command()
def remove(
    workspace: Annotated[Path, typer.Argument(metavar="WORKSPACE", help="The folder of a run.")],
    text: Annotated[list[str] | None, typer.Option("--text", help="A turn or text of the rows to remove.")] = None,
    rows: Annotated[Path | None, typer.Option("--rows", help="A file of rows to remove.")] = None,
    reason: Annotated[str, typer.Option(help="Why: it is kept in the ledger.")] = "",
    as_json: AsJson = False,
) -> None:
    """Leave rows out of every round from the next one on, and name what was trained on them."""
    from evertune.data.rows import detect_format
    from evertune.lineage import open_workspace
    from evertune.provenance import remove as record
    from evertune.provenance import texts_of_file

    texts = [*(text or []), *(texts_of_file(rows, detect_format(rows)) if rows else ())]
    event, traces = record(open_workspace(workspace), texts, reason=reason)
    if as_json:
        typer.echo(json.dumps({**event.body, "traces": [one.to_json() for one in traces]}, indent=2))
        return
    typer.echo(f"{len(texts)} texts are left out of every round from the next one on.")
    trained = event.body["checkpoints"]
    typer.echo(f"trained on them, or standing on what was: {', '.join(trained) or 'no checkpoint'}")
    if trained:
        typer.echo("A checkpoint cannot unlearn them: retrain from one that is not named, or from the base.")
    for file in sorted({file for one in traces for file in one.files}):
        typer.echo(f"still holds them: {file}")


def _trace_lines(body: Mapping[str, Any]) -> list[str]:
    lines = []
    for one in body["sightings"]:
        numbers = ", ".join(map(str, one["lines"][:5])) + (", ..." if len(one["lines"]) > 5 else "")
        lines.append(f"{one['label']}: {one['role']}, '{one['source']}' line {numbers}, shown {one['shown']:g} times")
    lines += [f"left out of '{one}'" for one in body["kept_out"]]
    if not lines:
        return ["No stage of this workspace was given it, as a whole turn, text or row."]
    if body["standing"]:
        lines.append(f"trained on it, or standing on what was: {', '.join(body['standing'])}")
    return [*lines, *(f"held in {one}" for one in body["files"])]


def _weighted(text: str) -> tuple[Path, float | None]:
    """A file and its weight, where `=` and a number stand behind it."""
    path, sign, _ = text.rpartition("=")
    if not sign or Path(text).exists():
        return Path(text), None
    return Path(path), _named(text)[1]


def _named(text: str) -> tuple[str, float]:
    from evertune.errors import RecipeError

    name, _, value = text.rpartition("=")
    try:
        return name, float(value)
    except ValueError:
        raise RecipeError(f"found {text!r}, expected a name, '=' and a number.") from None


def _token_counter(model: str | None) -> Any:
    """Tokens of a row through a model's chat template; None without a model."""
    if model is None:
        return None
    from evertune.data.encode import encode_rows
    from evertune.data.quality import asked_and_said
    from evertune.model.bundled import resolve_base
    from evertune.model.checkpoint import describe
    from evertune.model.codec import load_codec

    codec = load_codec(describe(resolve_base(model, folder=Path())).base.path)

    def count(row: Any) -> int:
        if row.format in ("messages", "text"):
            return len(encode_rows([row], codec, max_tokens=1 << 30, too_long="drop").rows[0].ids)
        return len(codec.encode("\n".join(asked_and_said(row))))

    return count


def _inspection_lines(one: Mapping[str, Any], bad: list[dict[str, Any]]) -> list[str]:
    from evertune.data.inspect import bars

    tokens = f", {one['tokens']:,} tokens" if one["tokens"] is not None else ""
    lines = [f"{one['name']}: {one['rows']:,} rows of format {one['format']}, {one['characters']:,} characters{tokens}"]
    for problem in bad[:BAD_SHOWN]:
        lines.append(f"  cannot be read: {problem['file']}:{problem['line']}: {problem['problem']}")
    if len(bad) > BAD_SHOWN:
        lines.append(f"  cannot be read: {len(bad) - BAD_SHOWN} more rows")
    exact, near = one["duplicates"]["exact"], one["duplicates"]["near"]
    lines.append(f"  duplicates   {exact} exact, {near} near (Jaccard 0.8)")
    lines.append("  turns        " + ", ".join(f"{name} {count}" for name, count in one["turns"].items()))
    lines.append("  scripts      " + ", ".join(f"{name.lower()} {share:.1%}" for name, share in one["scripts"].items()))
    if one["starts"]:
        lines.append("  begin alike  " + ", ".join(f"'{start}' {count}" for start, count in one["starts"].items()))
    lines.append(f"  {'signal':<14}{'mean':>10}{'min':>10}{'5 %':>10}{'50 %':>10}{'95 %':>10}{'max':>10}")
    for name, each in one["signals"].items():
        lines.append(f"  {name:<14}" + "".join(f"{value:>10.4g}" for value in each.values()))
    edges, counts = one["histogram"]["edges"], one["histogram"]["counts"]
    lines.append("  words of what is said")
    for low, high, count, bar in zip(edges, edges[1:], counts, bars(counts), strict=False):
        lines.append(f"  {int(low):>7} to {int(high) - 1:<7} {count:>8} {bar}")
    for name, places in one["outliers"].items():
        lines.append(f"  {name:<13}" + ", ".join(places))
    lines += [f"  at random    {_short(value)}" for value in one["samples"]]
    return [*lines, ""]


def _tell(body: Mapping[str, Any], out: Path | None, as_json: bool, bad: "BadRows") -> None:
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
        for one in bad.found[:BAD_SHOWN]:
            typer.echo(f"  {one['file']}:{one['line']}: {one['problem']}")
    shown = {reason: examples for reason, examples in body["examples"].items() if examples}
    for reason, examples in shown.items():
        typer.echo(f"\n{reason}, for example:")
        for one in examples:
            facts = ", ".join(
                f"{key} {f'{value:.4g}' if isinstance(value, float) else value}"
                for key, value in one.items()
                if key not in ("row", "source", "file", "line", "reason")
            )
            typer.echo(f"  {one['file']}:{one['line']}  {facts}\n    {_short(one['row'])}")
    typer.echo(f"\nwrote {out}" if out else "\nNothing was written: give --out FOLDER to write what stays.")


def _short(row: Mapping[str, Any], width: int = 160) -> str:
    """A row on one line: what is said by whom, or its fields."""
    if isinstance(row.get("messages"), list):
        text = "  ".join(f"{one['role']}: {one['content']}" for one in row["messages"])
    else:
        text = json.dumps({name: value for name, value in row.items() if name != "id"}, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
