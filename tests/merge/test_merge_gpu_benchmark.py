"""The benchmark of a merge through a GPU, on the CPU: plain torch operations give the bytes that the kernels give."""

import numpy as np

from benchmarks.merge_gpu import METHODS, differences, generate, measure, planned, tables


def test_every_way_runs_and_torch_gives_the_bytes_of_the_kernels(tmp_path):
    generate(tmp_path, 3, 64, 96, threads=2)
    found = measure(tmp_path, "cpu", threads=2, rounds=1, elements=64 * 96)
    for method in METHODS:
        assert found[method]["elements"] == found[method]["equal"] == 3 * 64 * 96
        assert found[method]["largest"] == 0
    assert tables(found).count("| ties |") == 3


def test_a_difference_is_counted_in_steps_of_bfloat16_across_zero(tmp_path):
    generate(tmp_path, 1, 2, 4, threads=1)
    plan = planned(tmp_path, "linear")
    for name, first in (("evertune", 0x0001), ("gpu", 0x8002)):
        (tmp_path / name).mkdir()
        words = np.array([first, 5, 6, 7, 8, 9, 10, 11], np.uint16)
        content = plan.files[0].header + words.tobytes()
        (tmp_path / name / plan.files[0].name).write_bytes(content)
    assert differences(plan, tmp_path) == {"elements": 8, "equal": 7, "largest": 3}
