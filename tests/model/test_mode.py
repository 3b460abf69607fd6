"""A model in evaluation mode for a while: as `model.eval()` has it, and back to what each module was in."""

import pytest
from torch import nn

from evertune.model.mode import evaluating


def test_inside_nothing_trains_and_after_it_what_trained_before() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)))
    model[1][0].eval()
    before = [one.training for one in model.modules()]
    assert True in before and False in before
    with pytest.raises(ValueError, match="broken off"), evaluating(model):
        assert not any(one.training for one in model.modules())
        raise ValueError("broken off")
    assert [one.training for one in model.modules()] == before
