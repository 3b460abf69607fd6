"""What a step computes, counted instead of timed: multiplications, tokens and positions, with and without an anchor."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from evertune.data.encode import EncodedRow
from evertune.model.adapter import add_adapter
from evertune.model.checkpoint import describe
from evertune.model.open import OpenModel, open_model
from evertune.model.packing import draws_at_random, enable_packing
from evertune.train.anchor import Anchor
from evertune.train.head import split_model
from evertune.train.loop import count_items
from evertune.train.objective import CrossEntropy, Policy
from evertune.train.penalty import Penalty
from evertune.train.reference import ReferenceSource

# The tiny model: vocabulary and width.
V, H = 261, 32


def _row(length: int, counted: range, *, alike: int = 0) -> EncodedRow:
    """Ids of its own behind the first `alike`, which are the same for all."""
    place = np.arange(length)
    ids = np.where(place < alike, place + 5, (place * 7 + length) % 250).astype("<i4")
    mask = np.isin(np.arange(length), counted)
    digest = f"{length} {counted} {alike}"
    return EncodedRow("s", str(length), ids, mask, is_replay=length % 2 == 0, digest=digest)


# Of 12, 40 and 25 tokens; counted to the end, to the last but three, and in two turns.
ROWS = [_row(12, range(6, 12)), _row(40, range(30, 37)), _row(25, range(5, 9))]
COUNTED = 6 + 7 + 4
# A row is read up to the position that predicts its last counted token.
READ = 11 + 36 + 8


@pytest.fixture
def opened(tiny_model: Path) -> OpenModel:
    opened = open_model(describe(tiny_model), dtype="float32")
    trained = add_adapter(opened, rank=4, alpha=8, dropout=0.0, targets="all-linear", seed=1)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1)
    return opened


def _policy(opened: OpenModel, *, is_packed: bool = True) -> Policy:
    assert enable_packing(opened.model)
    return Policy(opened.model, *split_model(opened.model), pad_id=0, is_packed=is_packed)


def _counting() -> FlopCounterMode:
    """Counts products, and torch's fused attention on a CPU, which its own table lacks."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **named: Any) -> int:
        return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={fused: attention})


def _step(policy: Policy, rows: Sequence[EncodedRow], penalties: Sequence[Penalty] = ()) -> tuple[int, dict[str, Any]]:
    """Floating point operations of matrix products in forward and backward, and the gradients."""
    objective = CrossEntropy()
    policy.model.zero_grad()
    with _counting() as counter:
        objective.backward(policy, rows, count_items(rows, objective, penalties), penalties)
    gradients = {name: one.grad for name, one in policy.model.named_parameters() if one.grad is not None}
    return counter.get_total_flops(), gradients


def test_packed_rows_cost_what_each_costs_alone_and_give_the_gradient_of_padded_ones(opened: OpenModel) -> None:
    together, gradients = _step(_policy(opened), ROWS)
    assert together == sum(_step(_policy(opened), [row])[0] for row in ROWS)
    padded, expected = _step(_policy(opened, is_packed=False), ROWS)
    # Padded to 40 tokens each: 120 instead of 55.
    assert together < 0.6 * padded
    assert gradients.keys() == expected.keys()
    for name, one in gradients.items():
        assert torch.allclose(one, expected[name], rtol=1e-4, atol=1e-6), name


def test_what_rows_begin_with_alike_is_read_once_and_the_gradient_is_that_of_padded_ones(opened: OpenModel) -> None:
    read: list[int] = []
    rows = [_row(12, range(6, 12), alike=9), _row(40, range(30, 37), alike=20), _row(25, range(5, 9), alike=20)]
    opened.model.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    together, gradients = _step(_policy(opened), rows)
    # The last row's 8 tokens are all three rows'; the first goes on with 3, the second with 28, of which one is alike
    # and too few to be worth sharing.
    assert read[-1] == 8 + 3 + 28
    assert together < 0.8 * sum(_step(_policy(opened), [row])[0] for row in rows)
    _, expected = _step(_policy(opened, is_packed=False), rows)
    for name, one in gradients.items():
        assert torch.allclose(one, expected[name], rtol=1e-4, atol=1e-6), name


def test_rows_with_dropout_share_nothing(tiny_model: Path) -> None:
    """Each token of each row has a mask of its own; without training there is none, and they share."""
    opened = open_model(describe(tiny_model), dtype="float32")
    add_adapter(opened, rank=4, alpha=8, dropout=0.5, targets="all-linear", seed=1)
    read: list[int] = []
    opened.model.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    rows, policy = [_row(20, range(15, 20), alike=12), _row(30, range(15, 30), alike=12)], _policy(opened)
    for is_training, tokens in ((True, 19 + 29), (False, 19 + 29 - 12)):
        opened.model.train(is_training)
        _step(policy, rows)
        assert read[-1] == tokens


@pytest.mark.parametrize(("key", "draws"), [("attention_dropout", True), ("rms_norm_eps", False)])
def test_dropout_that_the_config_names_counts_too(opened: OpenModel, key: str, draws: bool) -> None:
    setattr(opened.model.config, key, 0.1)
    assert draws_at_random(opened.model) == draws


def test_a_row_is_read_up_to_the_position_that_predicts_its_last_counted_token(opened: OpenModel) -> None:
    read: list[int] = []
    opened.model.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    _step(_policy(opened), ROWS)
    assert read[-1] == READ


def test_no_dtype_or_size_of_logits_but_the_counted_positions_chunk_is_made(opened: OpenModel) -> None:
    """The largest result of any operation of a step is that chunk: (17, 261) of float32."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest: list[int] = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.is_floating_point():
                largest.append(found.untyped_storage().nbytes())
            return found

    rows, policy = ROWS * 4, _policy(opened)
    weights = max(one.untyped_storage().nbytes() for one in opened.model.parameters())
    with Largest():
        _step(policy, rows)
    assert max(largest) == max(4 * COUNTED * V * 4, weights)


@pytest.mark.parametrize("on", ["both", "replay"])
def test_what_an_anchor_adds_is_nothing_or_one_product_with_the_head_or_one_forward_pass(
    opened: OpenModel, tmp_path: Path, on: Any
) -> None:
    (tmp_path / "tmp").mkdir()
    source = ReferenceSource(opened.checkpoint, opened, is_start=True, cache=tmp_path / "cache", tmp=tmp_path / "tmp")
    policy = _policy(opened)
    plain, _ = _step(policy, ROWS)
    anchored = [row for row in ROWS if on == "both" or row.is_replay]
    counted = sum(int(row.counted[1:].sum()) for row in anchored)
    added = {}
    for kind in ("top64", "hidden"):
        assert source.complete(kind, ROWS) == len(ROWS)
        assert source.complete(kind, ROWS) == 0, "a second use computes nothing"
        added[kind] = _step(policy, ROWS, [Anchor(0.1, on, "forward", source.from_cache(kind))])[0] - plain
    live = source.live()
    added["live"] = _step(policy, ROWS, [Anchor(0.1, on, "forward", live)])[0] - plain
    assert live.forwards == 1
    assert added["top64"] == 0
    assert added["hidden"] == 2 * counted * V * H
    with _counting() as counter:
        live.hidden(anchored, fast=True)
    assert added["live"] == added["hidden"] + counter.get_total_flops()


def test_stored_outputs_take_258_bytes_a_position_or_the_hidden_state_s(opened: OpenModel, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    source = ReferenceSource(opened.checkpoint, opened, is_start=True, cache=tmp_path / "cache", tmp=tmp_path / "tmp")
    for kind, each in (("top64", 64 * 2 + 65 * 2), ("hidden", H * 4)):
        source.complete(kind, ROWS)
        size = sum(file.stat().st_size for file in source.stored(kind).folder.rglob("*.raw"))
        assert size == COUNTED * each
