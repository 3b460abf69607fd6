"""Estimates: rows and steps as the run itself counts them, time and disk by hand."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evertune.check.estimate import RESUME_BYTES, amounts, shapes_of
from evertune.check.lengths import Length
from evertune.data.quotas import Mixing
from evertune.data.stream import Stream
from evertune.hashing import digest_json
from evertune.ledger import Ledger, record_event
from evertune.model.checkpoint import describe
from evertune.plan import make_plan
from evertune.recipe.load import load_recipe
from evertune.stages import KINDS, Place
from evertune.train.spec import SftSpec
from evertune.workspace import Workspace
from tests.check.folders import RECIPE, chat, check, said, write_rows

SECOND = """\
  - name: second
    roles: {cards: guard, facts: target}
    stages:
      - sft: {data: {routes: 3, cards: 1}, steps: 5, lr: 1e-3, batch_rows: 8, replay: {share: 0.3, from: [history]}}
"""


@given(
    new=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    pool=st.integers(0, 30),
    share=st.sampled_from([0.0, 0.2, 0.3, 0.7]),
    epochs=st.one_of(st.none(), st.floats(0.1, 4)),
    steps=st.integers(1, 30),
    batch_rows=st.integers(1, 20),
)
@settings(max_examples=60, deadline=None)
def test_rows_and_steps_are_those_of_the_stream(
    new: list[int], pool: int, share: float, epochs: float | None, steps: int, batch_rows: int
) -> None:
    row = Length("s", "s:1", tokens=4, counted=1)
    sizes = {f"s{i}": count for i, count in enumerate(new)}
    stage: Any = SimpleNamespace(
        replay=SimpleNamespace(share=share),
        epochs=epochs,
        steps=None if epochs else steps,
        batch_rows=batch_rows,
    )
    found = amounts(
        {name: [row] * count for name, count in sizes.items()}, {"old": [row] * pool} if pool else {}, Mixing(), stage
    )
    stream = Stream(new=sizes, weights=None, replay={"old": pool}, share=share if pool else 0.0, seed=5)
    picks = [stream.pick(position) for position in range(found.steps * batch_rows)]
    assert found.replay_rows == sum(one.is_replay for one in picks)
    assert found.new_rows == len(picks) - found.replay_rows
    assert found.new_tokens == pytest.approx(4 * found.new_rows)
    if epochs:
        assert found.steps == max(1, math.ceil(epochs * stream.rows_per_epoch / batch_rows))


def _facts(recipe: Path, index: int) -> dict[str, Any]:
    """What the training itself would record of a round's one stage."""
    from evertune.data.history import write_history
    from evertune.data.rows import read_rows
    from evertune.model.codec import load_codec
    from evertune.train.material import load_material
    from evertune.train.spec import RowsRef

    plan = make_plan(load_recipe(recipe))
    one = plan.recipe.rounds[index]
    spec = KINDS["sft"].order(Place(plan, one, 0, made=[plan.base], champion=plan.base))
    assert isinstance(spec, SftSpec)
    if index:
        path = recipe.parent / "kept.jsonl"
        write_history(path, read_rows(recipe.parent / "cards.jsonl", format="messages", source="cards"))
        ref = RowsRef(source="history/first/cards", path=str(path), format="messages", limit=None, digest="0" * 64)
        spec = type(spec)(**{**vars(spec), "replay": [ref], "share": 0.3})
    return load_material(spec, load_codec(plan.base.path), world_size=1).facts(spec)


def test_the_estimate_is_what_the_training_counts(recipe: Path) -> None:
    # Rows of one source differ in length here, so the mean is exact over whole epochs only.
    write_rows(recipe.parent / "cards.jsonl", [chat(f"card {'x' * i}", f"kind {i}") for i in range(24)])
    write_rows(recipe.parent / "routes.jsonl", [chat(f"route {i}", f"desk {i}") for i in range(16)])
    general = [chat(f"say {i}", f"word {i}") for i in range(12)] + [chat("card xx", "kind 2")] * 2
    write_rows(recipe.parent / "general.jsonl", general)
    recipe.write_text(RECIPE.replace("data:\n", "data:\n  routes: {path: routes.jsonl}\n", 1) + SECOND)
    for index, found in enumerate(check(recipe).stages):
        facts = _facts(recipe, index)
        assert (found.steps, found.new_rows, found.replay_rows) == (
            facts["steps"],
            facts["new_rows"],
            facts["replay_rows"],
        )
        assert found.tokens == pytest.approx(facts["tokens"], rel=0.05)
        assert found.counted_tokens == pytest.approx(facts["counted_tokens"], rel=0.05)


def test_shapes_are_read_from_the_headers(tiny_model: Path) -> None:
    # 2 layers of 32 wide: q, o 32x32; k, v 16x32; gate, up 64x32; down 32x64; norms of 32. 261 tokens, tied.
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32
    found = shapes_of(describe(tiny_model), 261)
    assert found.body == 2 * (layer + 2 * 32) + 32
    assert found.head == 261 * 32
    assert found.weights == found.body + found.head
    assert found.sides == 2 * (2 * 64 + 2 * 48 + 3 * 96)


def test_untied_embeddings_take_disk_but_no_time(tmp_path: Path) -> None:
    from tests.tiny import write_tiny_model

    found = shapes_of(describe(write_tiny_model(tmp_path / "untied", tied=False)), 261)
    assert found.weights == found.body + 2 * found.head


def test_disk_is_checkpoints_a_rescue_and_resume_points(recipe: Path, tiny_model: Path) -> None:
    shapes = shapes_of(describe(tiny_model), 261)
    full = check(recipe, "rounds[0].stages[0].sft.tune=full", "numerics.dtype=float32")
    assert full.stages[0].disk_bytes == 4 * shapes.weights
    assert full.disk.needed_bytes == 2 * 4 * shapes.weights + RESUME_BYTES * shapes.weights
    lora = check(recipe, "rounds[0].stages[0].sft.tune={lora: {rank: 8}}", "rescue=[discard]")
    assert lora.stages[0].disk_bytes == 2 * 8 * shapes.sides
    assert lora.disk.needed_bytes == 2 * 8 * shapes.sides + RESUME_BYTES * 8 * shapes.sides


def test_too_little_disk_is_an_error(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    [(place, told)] = said(check(recipe), "error")
    assert place == "workspace"
    assert "0.0 GB are free" in told


def test_training_every_weight_an_anchor_and_fewer_threads_take_longer(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evertune.check.estimate.CORE_FLOPS", {"bfloat16": 1e5, "float32": 5e4})

    def seconds(*overrides: str) -> int:
        off = "rounds[0].stages[0].sft.anchor={kl: 0}"
        return check(recipe, "numerics.threads=2", off, *overrides).stages[0].seconds

    plain = seconds()
    assert seconds("rounds[0].stages[0].sft.tune=full") == pytest.approx(1.5 * plain, rel=0.01)
    assert seconds("numerics.threads=1") == pytest.approx(2 * plain, rel=0.01)
    assert seconds("numerics.dtype=float32") == pytest.approx(2 * plain, rel=0.01)
    assert seconds("rounds[0].stages[0].sft.anchor={kl: 0.1, on: both}") == pytest.approx(1.5 * plain, rel=0.01)
    assert plain < seconds("rounds[0].stages[0].sft.anchor={kl: 0.1, on: replay}") < 1.2 * plain


def test_a_source_that_is_both_new_and_replayed_is_a_warning(recipe: Path) -> None:
    warnings = said(check(recipe, "rounds[0].stages[0].sft.replay.from=[cards]"), "warning")
    assert [place for place, _ in warnings] == ["rounds[0].stages[0].sft.replay.from", "rounds[0].stages[0].sft"]
    assert "both new data and replay" in warnings[0][1]
    assert "nothing to replay here, so the share is 0 and not 0.2" in warnings[1][1]


def test_replay_of_history_in_the_first_round_is_fine(recipe: Path) -> None:
    report = check(recipe, "rounds[0].stages[0].sft.replay={from: [history]}")
    assert {place for place, _ in said(report, "note")} == {"rounds[0].stages[0].sft"}
    assert not said(report, "warning")
    assert report.stages[0].replay_rows == 0


def test_steps_that_do_not_show_every_row_are_noted(recipe: Path) -> None:
    report = check(recipe, "rounds[0].stages[0].sft.epochs=", "rounds[0].stages[0].sft.steps=1")
    assert said(report, "note") == [
        ("rounds[0].stages[0].sft", "1 steps show 7 of 24 new rows; the others are not seen.")
    ]


def _record_run(recipe: Path) -> None:
    """What a run of this recipe leaves in the ledger, as far as a check reads it."""
    plan = make_plan(load_recipe(recipe))
    workspace = Workspace.open(recipe.parent / "run", create=True)
    with workspace.lock(purpose="test"):
        ledger = Ledger.open(workspace.root / "ledger.sqlite", create=True)
        record_event(workspace, ledger, "run", digest_json(plan.run_body), plan.run_body, {})
        data = [{"source": "cards", "sha256": plan.data_digest("cards")}]
        body = {"label": "first/1-sft", "data": data}
        record_event(workspace, ledger, "checkpoint", digest_json(body), body, {})


def test_stages_that_the_workspace_has_are_done(recipe: Path) -> None:
    assert not check(recipe).stages[0].done
    _record_run(recipe)
    report = check(recipe)
    assert report.stages[0].done
    assert report.disk.needed_bytes == 0
    # Another setting, or other rows, and it is to be done again.
    assert not check(recipe, "rounds[0].stages[0].sft.lr=1e-4").stages[0].done
    write_rows(recipe.parent / "cards.jsonl", [chat(f"card {i}", "other") for i in range(24)])
    assert not check(recipe).stages[0].done


def test_a_workspace_that_is_no_workspace_is_an_error(recipe: Path) -> None:
    (recipe.parent / "run").mkdir()
    (recipe.parent / "run" / "ledger.sqlite").write_text("not a database")
    assert [place for place, _ in said(check(recipe), "error")] == ["workspace"]
