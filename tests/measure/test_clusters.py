import numpy as np

from evertune.measure.clusters import cluster_vectors, count_clusters


def test_directions_that_differ_are_told_apart_and_the_largest_group_is_first() -> None:
    rng = np.random.default_rng(0)
    X = np.concatenate([[[5.0, 0.0, 0.0]] * 4, [[0.0, 3.0, 0.0]] * 9, [[0.0, 0.0, 9.0]] * 6])
    X = X + rng.normal(0, 0.05, X.shape)
    order = rng.permutation(len(X))
    group = cluster_vectors(X[order], 3)
    back = group[np.argsort(order)]
    assert [set(back[:4]), set(back[4:13]), set(back[13:])] == [{2}, {0}, {1}]


def test_equal_vectors_are_one_group_and_few_rows_are_not_told_apart() -> None:
    assert set(cluster_vectors(np.ones((7, 3)), 3)) == {0}
    assert (count_clusters(3), count_clusters(16), count_clusters(500)) == (1, 2, 6)
