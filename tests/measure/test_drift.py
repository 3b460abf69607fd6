"""Drift against distances worked out on paper."""

import math

import pytest
import torch

from evertune.measure.drift import WeightUpdate, between, layer_of, measure_drift


def test_drift_is_the_length_of_the_change_over_the_length_of_the_weights():
    # Layer 0: (3, 4) moved by (0, 1): 1 / 5. Layer 1 untouched, length 12. Total: 1 / 13.
    drift = measure_drift(
        [
            WeightUpdate("model.layers.0.w.weight", torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0])),
            WeightUpdate("model.layers.1.w.weight", torch.tensor([12.0]), None),
        ]
    )
    assert drift.layers == {"model.layers.0": pytest.approx(1 / 5), "model.layers.1": 0.0}
    assert drift.total == pytest.approx(1 / 13)


def test_tensors_of_one_layer_are_measured_together():
    # (3, 4) and (12) form one layer of length 13; changes (0, 3) and (4): length 5.
    drift = measure_drift(
        [
            WeightUpdate("layers.7.a.weight", torch.tensor([3.0, 4.0]), torch.tensor([0.0, 3.0])),
            WeightUpdate("layers.7.b.weight", torch.tensor([12.0]), torch.tensor([4.0])),
        ]
    )
    assert drift.layers == {"layers.7": pytest.approx(5 / 13)}


def test_the_same_weights_have_no_drift():
    state = {"a.weight": torch.randn(4, 4), "b.bias": torch.zeros(4)}
    drift = measure_drift(between(state, state.items()))
    assert drift.total == 0.0
    assert drift.layers == {"a": 0.0, "b.bias": 0.0}


def test_a_layer_of_zeros_is_measured_against_the_whole_model():
    drift = measure_drift(
        [WeightUpdate("a", torch.tensor([2.0]), None), WeightUpdate("b", torch.zeros(1), torch.tensor([1.0]))]
    )
    assert drift.layers["b"] == 0.5
    assert math.isfinite(drift.total)


def test_a_larger_step_never_lowers_the_drift():
    before = {"w": torch.randn(8, 8, generator=torch.Generator().manual_seed(0))}
    step = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    totals = [
        measure_drift(between(before, [("w", before["w"] + scale * step)])).total for scale in (0.0, 0.1, 0.5, 2.0)
    ]
    assert totals == sorted(totals)


def test_bfloat16_weights_are_subtracted_in_float32():
    before = {"w": torch.tensor([256.0]).bfloat16()}
    after = [("w", torch.tensor([258.0]).bfloat16())]
    assert measure_drift(between(before, after)).total == pytest.approx(2 / 256)


def test_models_with_different_tensors_have_no_distance():
    one = {"w": torch.ones(2)}
    for after in ([("w", torch.ones(3))], [("v", torch.ones(2))], [], [("w", torch.ones(2)), ("v", torch.ones(1))]):
        with pytest.raises(ValueError, match=r"^[wv] is"):
            list(between(one, after))


def test_layers_are_named_by_their_number():
    assert layer_of("model.layers.12.self_attn.q_proj.weight") == "model.layers.12"
    assert layer_of("transformer.h.0.attn.c_attn.weight") == "transformer.h.0"
    assert layer_of("model.embed_tokens.weight") == "model.embed_tokens"
    assert layer_of("lm_head.bias") == "lm_head.bias"
