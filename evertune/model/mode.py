"""A model in evaluation mode for a while."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no module of the model is in training mode (no dropout); after it those are that were.

    `model.eval()` and `model.train()` walk through thousands of modules, an adapter's, once each: beside a forward
    pass on a GPU that is time.
    """
    training = [one for one in model.modules() if one.training]
    for one in training:
        object.__setattr__(one, "training", False)
    try:
        yield
    finally:
        for one in training:
            object.__setattr__(one, "training", True)
