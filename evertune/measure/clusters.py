"""Groups of vectors that lie close together."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 50


def count_clusters(n: int, *, most: int = 6) -> int:
    """How many groups are worth telling apart in n rows: about eight rows each, and no more than a person reads."""
    return max(1, min(most, n // 8))


def cluster_vectors(vectors_NH: ArrayLike, count: int) -> NDArray[np.int64]:
    """The group of each vector, (N,) in [0, count): k-means on directions (Lloyd 1982), vectors at length 1.

    The first centre is the vector nearest the mean, each next one the vector farthest from all before: no random
    numbers, so equal vectors give equal groups. Groups are numbered by size, the largest first.
    """
    X = np.asarray(vectors_NH, dtype=np.float64)
    X = X - X.mean(axis=0)
    X = X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12)
    centres = [X[int(np.argmax(X @ X.mean(axis=0)))]]
    while len(centres) < min(count, len(X)):
        nearest = np.max(X @ np.array(centres).T, axis=1)
        centres.append(X[int(np.argmin(nearest))])
    C = np.array(centres)
    group = np.argmax(X @ C.T, axis=1)
    for _ in range(ROUNDS):
        for k in range(len(C)):
            if (group == k).any():
                mean = X[group == k].mean(axis=0)
                C[k] = mean / max(float(np.linalg.norm(mean)), 1e-12)
        moved = np.argmax(X @ C.T, axis=1)
        if np.array_equal(moved, group):
            break
        group = moved
    sizes = np.bincount(group, minlength=len(C))
    rank = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
    return rank[group].astype(np.int64)
