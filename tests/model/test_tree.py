"""Trees of rows that begin alike: every row is found in them whole, and what is shared is there once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evertune.model import packing
from evertune.model.forward import Tokens, score_branches
from evertune.model.tree import LEAST_SHARED, RUN_TOKENS, AtOnce, ByRuns, Paths, Tree, grow
from tests.probe.models import architecture, naive_log_probabilities

ROW = st.lists(st.integers(0, 2), min_size=1, max_size=3 * LEAST_SHARED)


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=8), st.integers(1, 80))
def test_every_row_is_in_its_tree_and_at_its_positions(rows: list[list[int]], budget: int) -> None:
    trees = grow(rows, budget=budget)
    assert sorted(i for tree in trees for i in tree.places) == list(range(len(rows)))
    for tree in trees:
        ids, positions = tree.ids, tree.positions
        for i, places in tree.places.items():
            assert [ids[place] for place in places] == list(rows[i])
            assert [positions[place] for place in places] == list(range(len(rows[i])))
        assert sorted(q for run in tree.runs() for q in range(run.queries.start, run.queries.stop)) == list(
            range(len(ids))
        )
        assert len(ids) <= sum(len(rows[i]) for i in tree.places)


def _one(rows: list[list[int]]) -> Tree:
    (tree,) = grow(rows, budget=10**6)
    return tree


def test_what_is_shared_is_there_once_and_branches_hang_on_it() -> None:
    shots, first, second = list(range(100, 140)), list(range(20)), list(range(50, 70))
    rows = [[*shots, *context, choice] for context in (first, second) for choice in (7, 8, 9)]
    tree = _one(rows)
    # 40 tokens of shots, 20 of each context, one of each choice.
    assert len(tree.ids) == 40 + 2 * 20 + 6
    assert [one.parent for one in tree.segments][:2] == [None, 0]
    # The shots, and for each context itself and its three choices together.
    assert len(tree.runs()) == 1 + 2 * 2


def test_too_little_in_common_is_read_again() -> None:
    rows = [[*range(LEAST_SHARED - 1), 50], [*range(LEAST_SHARED - 1), 60]]
    assert len(_one(rows).ids) == 2 * LEAST_SHARED
    rows = [[*range(LEAST_SHARED), 50], [*range(LEAST_SHARED), 60]]
    assert len(_one(rows).ids) == LEAST_SHARED + 2


def test_long_siblings_do_not_attend_in_one_call() -> None:
    context = list(range(30))
    rows = [[*context, *[choice] * (RUN_TOKENS // 2)] for choice in (40, 41, 42)]
    assert len(_one(rows).runs()) == 1 + 2


def test_rows_that_are_equal_or_begin_each_other_need_no_tokens_of_their_own() -> None:
    whole = list(range(40))
    assert len(_one([whole, whole, whole[:20]]).ids) == 40


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("way", [ByRuns, AtOnce])
def test_scores_in_a_tree_are_those_of_rows_alone(
    way: type[Paths], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "ByRuns", way)
    changes = {"sliding_window": window} if window else {}
    model, forward = architecture("mistral" if window else "llama", **changes)
    assert forward.can_pack
    generator = torch.Generator().manual_seed(2)
    shots = torch.randint(3, 60, (30,), generator=generator).tolist()
    groups = []
    for _ in range(3):
        context = torch.randint(3, 60, (20,), generator=generator).tolist()
        choices = [torch.randint(3, 60, (n,), generator=generator).tolist() for n in (1, 3, 3, 9)]
        groups.append(
            [Tokens((*shots, *context, *choice), (False,) * 50 + (True,) * len(choice)) for choice in choices]
        )
    found = score_branches(forward, groups)
    for group, values in zip(groups, found, strict=True):
        for row, value in zip(group, values, strict=True):
            assert value == pytest.approx(naive_log_probabilities(model, row), abs=3e-6)
