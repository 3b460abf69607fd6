"""Sources divided among parts and machines: the same rows stay, and go for the same reasons, as in one process."""

import json
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from evertune.data import sift
from evertune.data.engine import Piece, RayEngine
from evertune.data.leak import ProbeText
from evertune.data.quality import parse_rule
from evertune.data.spread import Spread
from evertune.errors import DataError
from tests.data.test_sift import chat, lines, run, write

PROBE = "Which of the two rivers that meet in the old town of Passau is the longer one, measured from its source?"


class InTurn:
    """The plainest engine: one part after the other, and nothing reaches the work that could not be sent to it."""

    def map(self, work: Callable[[Any], Iterable[Any]], parts: Sequence[Any]) -> Iterator[Piece]:
        for i, part in enumerate(parts):
            sent = pickle.loads(pickle.dumps((work, part)))
            yield from (Piece(i, pickle.loads(pickle.dumps(one))) for one in sent[0](sent[1]))


def corpus(folder: Path) -> Path:
    """Three files with repeats within and across, leaks, rows of poor quality, one that is no row, and an empty one."""
    rng = random.Random(3)
    rows: list[dict[str, Any]] = []
    for i in range(240):
        words = " ".join(random.Random(i % 90).choices("abcdefghijklm", k=40))
        rows.append(chat(f"{words} {i % 3}", rng.choice(["", "yes ", "well "]) + "it is so"))
    rng.shuffle(rows)
    for i in range(40, 43):  # one in each file
        rows[i] = chat(f"Tell me this, {'abc'[i - 40]}. {PROBE} Thank you.", "The Inn.")
    rows[170] = chat(PROBE, "The Danube.")
    rows[55] = chat("a b c", "x " * 40)
    for k in range(3):
        write(folder / f"rows-{k}.jsonl", rows[k::3])
    with (folder / "rows-1.jsonl").open("a") as file:
        file.write('{"messages": 3}\n')
    (folder / "rows-3.jsonl").write_text("")
    return folder / "rows-*.jsonl"


def whole(out: Path) -> list[dict[str, Any]]:
    """What stays, of one file or of its parts in order."""
    parts = sorted((out / "rows").glob("*.jsonl")) or [out / "rows.jsonl"]
    return [row for part in parts for row in lines(part)]


def gone(out: Path) -> list[dict[str, Any]]:
    parts = sorted((out / "removed").glob("*.jsonl")) or [out / "removed.jsonl"]
    return [row for part in parts for row in lines(part)]


def both(pattern: Path, tmp_path: Path, decide: Callable[[sift.Reader, sift.BadRows], Any]) -> tuple[Path, Path]:
    """Folders of one process and of an engine."""
    sources = [sift.Source("rows", pattern, "messages")]
    outs = (tmp_path / "here", tmp_path / "spread")
    for out, reader in zip(outs, (sift.Here(), Spread(InTurn())), strict=True):
        bad = sift.BadRows()
        made = decide(reader, bad)
        sift.sift(sources, made, out, operation="o", settings={}, bad=bad, examples=3, reader=reader)
    return outs


def assert_same(here: Path, spread: Path) -> None:
    assert gone(here), "nothing was removed: the comparison would show nothing"
    assert whole(spread) == whole(here)
    assert gone(spread) == gone(here)
    manifests = [json.loads((one / "manifest.json").read_text()) for one in (here, spread)]
    for name in ("sources", "removed", "quarantined", "inputs"):
        assert manifests[0][name] == manifests[1][name]
    assert sum(one["rows"] for one in manifests[1]["outputs"]) == len(whole(here))
    assert (here / "quarantine.jsonl").read_bytes() == (spread / "quarantine.jsonl").read_bytes()


def test_the_same_duplicates_go(tmp_path: Path) -> None:
    pattern = corpus(tmp_path / "in")
    sources = [sift.Source("rows", pattern, "messages")]
    here, spread = both(
        pattern,
        tmp_path,
        lambda reader, bad: sift.dedup(sources, sift.DedupSettings(), bad=bad, reader=reader)[0],
    )
    assert_same(here, spread)
    assert {one["reason"] for one in gone(here)} == {"near-duplicate", "exact duplicate"}


def test_the_same_rows_break_rules_with_quantiles_over_all_parts(tmp_path: Path) -> None:
    pattern = corpus(tmp_path / "in")
    sources = [sift.Source("rows", pattern, "messages")]
    rules = [parse_rule(one, ["words", "repetition"]) for one in ("words<=q0.9", "repetition<=0.3")]
    here, spread = both(
        pattern, tmp_path, lambda reader, bad: sift.filter_rows(sources, rules, bad=bad, reader=reader)[0]
    )
    assert_same(here, spread)


def test_the_same_rows_hold_probe_items_and_a_template_is_one_over_all_parts(tmp_path: Path) -> None:
    pattern = corpus(tmp_path / "in")
    sources = [sift.Source("rows", pattern, "messages")]
    items = [ProbeText("rivers", "r1", PROBE)]
    here, spread = both(
        pattern, tmp_path, lambda reader, bad: sift.decontaminate(sources, items, bad=bad, reader=reader)
    )
    assert_same(here, spread)
    assert {one["reason"] for one in gone(here)} == {"exact: 'rivers'", "contained: 'rivers'"}


def test_ray_decides_as_one_process_does(tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="Ray Data is not installed: pip install 'evertune[scale]'")
    pattern = corpus(tmp_path / "in")
    probes = write(tmp_path / "probes.jsonl", [{"prompt": PROBE, "answer": "Inn"}])
    for name, *more in (("dedup",), ("filter", "--keep", "words<=q0.9"), ("decontaminate", "--probes", probes)):
        here, spread = tmp_path / f"{name}-here", tmp_path / f"{name}-ray"
        run("data", name, pattern, *more, "--out", here)
        run("data", name, pattern, *more, "--out", spread, "--engine", "ray", "--workers", 2)
        assert_same(here, spread)
    with pytest.raises(DataError, match="rows-9.jsonl:2: found malformed JSON"):
        write(tmp_path / "in/rows-9.jsonl", [chat("a", "b")]).open("a").write("{")
        list(RayEngine(2).map(_strict, [tmp_path / "in/rows-9.jsonl"]))


def _strict(path: Path) -> Iterator[int]:
    yield sum(1 for _ in sift.rows_of(sift.Source("s", path, "messages")))


def test_an_engine_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    source = write(tmp_path / "rows.jsonl", [chat("a", "b")])
    with pytest.raises(DataError, match="evertune\\[scale\\]"):
        run("data", "dedup", source, "--engine", "ray")
