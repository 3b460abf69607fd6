"""The summaries of R: by hand, against published matrices, and their intervals against a bootstrap and by coverage."""

from typing import Any

import numpy as np
import pytest

from evertune.errors import ProbeError
from evertune.measure import (
    RetentionMatrix,
    backward_transfer,
    backward_transfer_interval,
    chance_corrected,
    forgetting,
    forgetting_per_task,
    forward_transfer,
    retention,
    retention_interval,
    retention_per_task,
    summarise_items,
    worst_task,
)

NAN = np.nan
R3 = np.array([[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.6, 0.9, 0.5]])

# Exact match in per cent, from the all_results.json files that github.com/cmnfriend/O-LoRA published (07117e1), with
# the backward transfer computed there. Of the 15-task runs only the diagonal and the last row enter BWT.
ORDER1 = {
    "order1_icrlora": (
        [[98.7105], [82.4737, 57.0132], [80.7763, 44.9474, 72.3816], [79.5, 40.8158, 64.1447, 90.0132]],
        -14.5483,
    ),
    "order1_olora": (
        [[98.7105], [98.5526, 57.7632], [97.4079, 57.4079, 71.9079], [97.7368, 56.0658, 71.0395, 88.6184]],
        -1.1798,
    ),
}
# fmt: off
LONG = {
    "long_icrlora": (
        [60.5658, 61.9868, 81.5263, 91.0714, 48.0, 82.9342, 86.2816, 94.6974, 94.4954, 98.6974, 89.5921, 73.2105,
         57.632, 72.5382, 55.4859],
        [37.0789, 37.6184, 39.1053, 44.6429, 55.0, 42.5263, 52.7076, 92.9474, 87.9587, 71.6711, 78.2632, 72.2632,
         44.0594, 65.2294, 55.4859],
        -19.4398,
    ),
    "long_olora": (
        [60.5658, 60.7895, 69.4211, 87.5, 54.0, 72.7763, 66.787, 94.3421, 91.7431, 98.7105, 87.2895, 65.4079,
         62.335, 69.1743, 52.0376],
        [62.1447, 60.0, 61.2368, 73.2143, 64.0, 72.7895, 69.6751, 94.9342, 91.9725, 98.4079, 86.4211, 65.1974,
         61.1386, 69.4495, 52.0376],
        -0.7329,
    ),
}
# fmt: on


def _lower(rows: list[list[float]]) -> np.ndarray:
    return np.array([row + [NAN] * (len(rows) - len(row)) for row in rows])


def test_backward_transfer_is_the_mean_change_on_earlier_tasks() -> None:
    # Task 0: learnt at 0.9, ends at 0.6. Task 1: 0.8 to 0.9. Mean of -0.3 and +0.1.
    assert backward_transfer(R3) == pytest.approx(-0.1)


def test_forward_transfer_is_the_score_just_before_learning_less_the_baseline() -> None:
    # Before learning, task 1 scores 0.2 and task 2 0.3; untrained they score 0.15 and 0.05. Mean of 0.05 and 0.25.
    assert forward_transfer(R3, [0.5, 0.15, 0.05]) == pytest.approx(0.15)
    assert forward_transfer(R3) == pytest.approx(0.25)


def test_forgetting_is_the_fall_from_the_best_row_even_one_before_the_task_was_learnt() -> None:
    # Task 0: 0.9 to 0.6. Task 1: best before the end 0.8, ends at 0.9: -0.1.
    assert forgetting_per_task(R3) == pytest.approx([0.3, -0.1])
    assert forgetting(R3) == pytest.approx(0.1)
    assert forgetting_per_task([[0.9, 0.95, 0], [0.7, 0.8, 0], [0.6, 0.9, 0.5]]) == pytest.approx([0.3, 0.05])


def test_retention_is_the_share_left_and_the_worst_task_is_named() -> None:
    assert retention_per_task(R3) == pytest.approx([2 / 3, 9 / 8])
    assert retention(R3) == pytest.approx((2 / 3 + 9 / 8) / 2)
    assert worst_task(R3) == (0, pytest.approx(2 / 3))


def test_a_task_never_learnt_has_no_retention() -> None:
    R = [[0.0, NAN], [0.4, 0.5]]
    assert np.isnan(retention(R))
    with pytest.raises(ProbeError, match="ever learnt"):
        worst_task(R)
    with pytest.raises(ProbeError, match="task 0 was never learnt"):
        retention_interval(R, np.zeros((2, 2)))


def test_chance_correction_shows_a_loss_that_the_plain_ratio_hides() -> None:
    # Four choices: from 0.35 to 0.25 is all that was known; the plain ratio calls it 71 % kept.
    R = [[0.35, NAN], [0.25, 0.9]]
    assert retention(R) == pytest.approx(0.25 / 0.35)
    assert retention(chance_corrected(R, [0.25, 0.25])) == pytest.approx(0.0)
    with pytest.raises(ProbeError, match="chance levels"):
        chance_corrected(R, [0.25, 1.0])


@pytest.mark.parametrize("run", ORDER1)
def test_published_four_task_matrices_have_their_published_backward_transfer(run: str) -> None:
    rows, published = ORDER1[run]
    assert backward_transfer(_lower(rows)) == pytest.approx(published, abs=5e-5)


@pytest.mark.parametrize("run", LONG)
def test_published_fifteen_task_matrices_have_their_published_backward_transfer(run: str) -> None:
    diagonal, last, published = LONG[run]
    R = np.diag(diagonal)
    R[-1] = last
    assert backward_transfer(R) == pytest.approx(published, abs=5e-5)


def test_published_run_loses_most_on_one_task_that_the_mean_hides() -> None:
    rows, _ = ORDER1["order1_icrlora"]
    # By hand: 98.7105 - 79.5, 57.0132 - 40.8158, 72.3816 - 64.1447; every task was best when just learnt.
    assert forgetting_per_task(_lower(rows)) == pytest.approx([19.2105, 16.1974, 8.2369])
    assert worst_task(_lower(rows)) == (1, pytest.approx(40.8158 / 57.0132))


@pytest.mark.parametrize(
    ("R", "message"),
    [
        ([[0.1, 0.2]], "shape"),
        ([[0.1], [0.1, 0.2]], "different lengths"),
        ([[0.5]], "two or more"),
        ([[0.5, NAN], [NAN, 0.5]], r"R\[1, 0\] is nan"),
        ([[0.5, None], [np.inf, 0.5]], r"R\[1, 0\] is inf"),
    ],
)
def test_a_malformed_matrix_is_refused(R: Any, message: str) -> None:
    for summary in (backward_transfer, forgetting, retention):
        with pytest.raises(ProbeError, match=message):
            summary(R)


def test_forward_transfer_needs_the_superdiagonal_and_a_baseline_that_fits() -> None:
    with pytest.raises(ProbeError, match=r"R\[0, 1\] is nan"):
        forward_transfer([[0.5, NAN], [0.5, 0.5]])
    for baseline in ([0.1, 0.2], [0.1, NAN, 0.1]):
        with pytest.raises(ProbeError, match="baseline"):
            forward_transfer(R3, baseline)


def test_interval_from_standard_errors_is_the_delta_method() -> None:
    errors = np.full((3, 3), 0.02)
    # BWT averages two differences of two scores: sqrt(4) * 0.02 / 2; 90 % is 1.6449 of it.
    moved = backward_transfer_interval(R3, errors)
    assert moved.high - moved.value == pytest.approx(1.644854 * 0.02, rel=1e-6)
    # Numerically: retention's gradient by central differences in each of the four scores it reads.
    step, variance = 1e-6, 0.0
    for place in ((2, 0), (0, 0), (2, 1), (1, 1)):
        up, down = R3.copy(), R3.copy()
        up[place] += step
        down[place] -= step
        variance += ((retention(up) - retention(down)) / (2 * step) * 0.02) ** 2
    kept = retention_interval(R3, errors)
    assert kept.high - kept.value == pytest.approx(1.644854 * variance**0.5, rel=1e-5)
    with pytest.raises(ProbeError, match="standard errors"):
        backward_transfer_interval(R3, errors[:2])


def _draw_items(rng: np.random.Generator, groups: int, size: int) -> list[list[np.ndarray | None]]:
    """Two tasks. Task 0 is answered twice: skill 0.8 when learnt, 0.7 at the end, items of a cluster alike."""
    hardness = np.repeat(rng.uniform(size=groups), size)
    learnt = (0.7 * hardness + 0.3 * rng.uniform(size=groups * size) < 0.8).astype(float)
    end = (0.7 * hardness + 0.3 * rng.uniform(size=groups * size) < 0.7).astype(float)
    other = (rng.uniform(size=50) < 0.9).astype(float)
    return [[learnt, np.zeros(50)], [end, other]]


def test_intervals_from_items_agree_with_a_paired_cluster_bootstrap() -> None:
    rng = np.random.default_rng(5)
    items = _draw_items(rng, groups=80, size=4)
    clusters = [[f"g{i // 4}" for i in range(320)], [str(i) for i in range(50)]]
    found = summarise_items(items, clusters, baseline=[None, np.zeros(50)])
    learnt, end = items[0][0].reshape(80, 4), items[1][0].reshape(80, 4)
    picked = rng.integers(80, size=(4000, 80))
    before, after = learnt[picked].mean(axis=(1, 2)), end[picked].mean(axis=(1, 2))
    for interval, draws in ((found.backward_transfer, after - before), (found.retention, after / before)):
        assert interval is not None
        assert interval.high - interval.low == pytest.approx(np.diff(np.quantile(draws, [0.05, 0.95]))[0], rel=0.1)
    assert found.forgetting.value == pytest.approx(-found.backward_transfer.value)
    assert found.forward_transfer == (0.0, 0.0, 0.0)


def test_ninety_per_cent_intervals_cover_in_ninety_per_cent_of_draws() -> None:
    rng = np.random.default_rng(6)
    clusters = [[f"g{i // 4}" for i in range(160)], [str(i) for i in range(50)]]
    # True means by integration over a million items.
    u, v = rng.uniform(size=(2, 1_000_000))
    truth = [(0.7 * u + 0.3 * v < limit).mean() for limit in (0.8, 0.7)]
    wanted = np.array([truth[1] - truth[0], truth[1] / truth[0]])
    found = [summarise_items(_draw_items(rng, groups=40, size=4), clusters) for _ in range(400)]
    for true, name in zip(wanted, ("backward_transfer", "retention"), strict=True):
        covered = np.mean([getattr(one, name).low <= true <= getattr(one, name).high for one in found])
        assert 0.86 < covered < 0.94


def test_pairing_items_gives_a_narrower_interval_than_two_standard_errors() -> None:
    items = _draw_items(np.random.default_rng(7), groups=300, size=1)
    errors = np.array([[np.std(one) / np.sqrt(len(one)) for one in row] for row in items])
    R = np.array([[np.mean(one) for one in row] for row in items])
    paired, alone = summarise_items(items).backward_transfer, backward_transfer_interval(R, errors)
    assert paired.value == pytest.approx(alone.value)
    assert paired.high - paired.low < 0.85 * (alone.high - alone.low)


def test_items_without_change_have_an_interval_of_no_width_and_lone_clusters_an_endless_one() -> None:
    same = [[np.array([1.0, 0.0]), None], [np.array([1.0, 0.0]), np.array([1.0])]]
    assert summarise_items(same).backward_transfer == (0.0, 0.0, 0.0)
    moved = [[np.array([1.0, 0.0]), None], [np.array([0.0, 0.0]), np.array([1.0])]]
    assert summarise_items(moved, [["a", "a"], ["b"]]).backward_transfer == (-0.5, -np.inf, np.inf)


def test_rows_with_other_items_are_refused() -> None:
    with pytest.raises(ProbeError, match="task 0 has item scores of shapes"):
        summarise_items([[np.ones(3), None], [np.ones(4), np.ones(2)]])


def _body(label: str, probe: str, value: float, **more: Any) -> dict[str, Any]:
    facts = {"direction": "higher", "role": "guard", "chance": None, "ci90": [value - 0.0329, value + 0.0329]}
    return {"label": label, "probe": probe, "value": value, **facts, **more}


def _run() -> RetentionMatrix:
    loss = {"direction": "lower"}
    bodies = [
        *(_body("base", *one) for one in (("facts", 0.4), ("cards", 0.0), ("routes", 0.0), ("spare", 0.5))),
        *(_body("one", *one) for one in (("facts", 0.42), ("cards", 0.9), ("routes", 0.1), ("spare", 0.1))),
        *(_body("held", *one) for one in (("facts", 0.1), ("cards", 0.1), ("routes", 0.9), ("spare", 0.1))),
        *(_body("two", *one) for one in (("facts", 0.38), ("cards", 0.81), ("routes", 0.8), ("spare", 0.1))),
        *(_body(label, "prose", value, **loss) for label, value in (("base", 1.0), ("one", 1.01), ("two", 1.05))),
    ]
    for one in bodies:
        if one["probe"] == "facts":
            one["chance"] = 0.25
        if one["probe"] == "spare":
            one["role"] = "watch"
    return RetentionMatrix.from_bodies(bodies, ["base", "one", "two"], {"cards": "one", "routes": "two"})


def test_a_runs_matrix_counts_each_probe_from_where_it_was_taught() -> None:
    kept = {one.probe: one for one in _run().kept()}
    # routes was taught by the last row itself, so nothing of it can have been kept or lost; the held row is no part.
    assert set(kept) == {"facts", "cards", "spare", "prose"}
    assert (kept["cards"].start, kept["cards"].before, kept["cards"].after) == ("one", 0.9, 0.81)
    assert kept["cards"].change == pytest.approx(-0.09)
    assert kept["cards"].retention == pytest.approx(0.9)
    assert kept["facts"].start == "base"
    assert kept["facts"].retention == pytest.approx(0.13 / 0.15)
    # A loss that rose from 1.00 to 1.05 bits per byte: 5 % worse, without a share.
    assert kept["prose"].change == pytest.approx(-0.05)
    assert kept["prose"].retention is None


def test_a_runs_means_leave_out_losses_and_watched_probes_and_show_the_worst() -> None:
    run = _run()
    moved, kept, worst = run.backward_transfer(), run.retention(), run.worst()
    assert moved is not None
    assert kept is not None
    assert worst is not None
    assert moved.value == pytest.approx((-0.02 - 0.09) / 2)
    # Each score has a standard error of 0.02 and each change one of 0.02 sqrt 2; the mean of two changes one of 0.02.
    assert moved.high - moved.value == pytest.approx(0.0329, rel=1e-3)
    assert kept.value == pytest.approx((0.13 / 0.15 + 0.9) / 2)
    assert worst.probe == "facts"


def test_a_skill_at_chance_has_no_share_to_keep() -> None:
    bodies = [_body("base", "facts", 0.25, chance=0.25), _body("one", "facts", 0.2, chance=0.25)]
    run = RetentionMatrix.from_bodies(bodies, ["base", "one"], {})
    assert run.retention() is None
    assert run.worst() is None
    assert run.backward_transfer() == (
        pytest.approx(-0.05),
        pytest.approx(-0.0965, abs=1e-4),
        pytest.approx(-0.0035, abs=1e-4),
    )


def test_a_run_with_only_its_base_has_no_summaries() -> None:
    run = RetentionMatrix.from_bodies([_body("base", "facts", 0.4)], ["base"], {})
    assert (run.kept(), run.backward_transfer(), run.retention(), run.worst()) == ((), None, None, None)


def test_a_matrix_whose_parts_do_not_fit_is_refused() -> None:
    good = _run()
    with pytest.raises(ProbeError, match="starts are"):
        RetentionMatrix(**{**vars(good), "starts": (9,) * 5})
    with pytest.raises(ProbeError, match="scores of shape"):
        RetentionMatrix(**{**vars(good), "values": good.values[:2]})
