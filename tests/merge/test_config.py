"""Configurations: values by depth and name, errors with their place, and mergekit's files."""

from pathlib import Path
from typing import Any

import pytest

from evertune.errors import MergeError, RecipeError
from evertune.merge.config import load_config
from evertune.merge.plan import plan_merge
from evertune.merge.values import Depths, check_value, resolve
from evertune.recipe.merging import Blocks, Match
from tests.merge.folders import configure, merge, tensors_of, write_family

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(11)),
    "model.norm.weight",
]


def _value(value: Any, name: str) -> float:
    return resolve(value, name, Depths(NAMES), "weight")


def test_a_gradient_runs_straight_from_the_first_layer_to_the_last() -> None:
    # Eleven layers: layer i lies at depth i / 10.
    assert [_value([0.0, 1.0], NAMES[1 + i]) for i in range(11)] == pytest.approx([i / 10 for i in range(11)])
    assert _value([0.0, 1.0, 0.0], NAMES[1 + 5]) == 1.0
    assert _value([0.2, 0.8], "model.embed_tokens.weight") == 0.2
    assert _value([0.2, 0.8], "model.norm.weight") == 0.8


def test_blocks_share_the_layers_out() -> None:
    blocks = Blocks(blocks=[0.1, 0.5, 0.9])
    assert [_value(blocks, NAMES[1 + i]) for i in range(11)] == [0.1] * 4 + [0.5] * 4 + [0.9] * 3
    assert _value(blocks, "model.norm.weight") == 0.9


def test_globs_are_for_whole_names_and_the_first_match_counts() -> None:
    value = [Match(match="model.layers.1.*", value=0.9), Match(match="*.mlp.*", value=[0.0, 1.0]), Match(value=0.5)]
    assert _value(value, NAMES[2]) == 0.9
    assert _value(value, NAMES[11]) == 1.0  # layer 10 is not layers.1
    assert _value(value, "model.norm.weight") == 0.5
    with pytest.raises(MergeError, match=r"no entry matches model\.norm\.weight"):
        _value(value[:2], "model.norm.weight")
    assert check_value(value, NAMES, "w") == []
    assert "matches no tensor" in check_value([Match(match="layers.1.", value=1.0)], NAMES, "w")[0]
    assert "found 3 blocks, the model has 2 layers" in check_value(Blocks(blocks=[1.0, 2.0, 3.0]), NAMES[:3], "t")[0]
    assert "never reached" in check_value([Match(value=1.0), Match(match="*", value=2.0)], NAMES, "w")[0]


def test_a_value_by_layer_reaches_the_numbers(tmp_path: Path) -> None:
    write_family(tmp_path)
    out = merge(tmp_path, "out", "interpolate", {"e0": {}}, base="base", t={"blocks": [0.0, 1.0]}).checkpoint.path
    found, base, expert = (tensors_of(one) for one in (out, tmp_path / "base", tmp_path / "e0"))
    for name in found:
        first = "layers.0" in name or "embed" in name
        assert found[name].equal(base[name] if first else expert[name]), name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method: tias\nmodels: {a: {path: x}}", r"m\.yaml:1, method: found 'tias', .*Did you mean 'ties'\?"),
        ("method: linear\nmodels:\n  a: {pat: x}", r"m\.yaml:3, models\.a: unknown key 'pat'\. Did you mean 'path'\?"),
        (
            "method: linear\nmodels: {a: {path: x}}\nlamda: 1",
            r"m\.yaml:3: unknown key 'lamda'\. Did you mean 'lambda'\?",
        ),
        ("method: linear\nmodels: {a: {path: x}}\nlambda: 1.0", r"m\.yaml:3, lambda: 'linear' does not read it"),
        ("method: ties\nmodels: {a: {path: x}}", r"base: missing; 'ties' works on differences from a base model"),
        ("method: linear\nbase: b\nmodels: {a: {path: x}}", r"base: 'linear' has no base"),
        ("method: slerp\nmodels: {a: {path: x}}", r"models: found 1, 'slerp' merges 2"),
        (
            "method: ties\nbase: b\nmodels: {a: {path: x, density: 1.5}}",
            r"density: found 1\.5, expected a number above 0",
        ),
        ("method: ema\nmodels: {a: {path: x, weight: 2}}", r"weight: 'ema' does not read it"),
        (
            "method: interpolate\nbase: b\nmodels: {a: {path: x}}\nt: 1.2",
            r"t: found 1\.2, expected a number from 0 to 1",
        ),
        (
            "method: linear\nmodels: {a: {path: x, weight: []}}",
            r"m\.yaml:2, models\.a\.weight: found nothing, expected one",
        ),
        (
            "method: linear\nmodels: {a: {path: x, weight: [{value: []}]}}",
            r"weight\[0\]\.value: found nothing, expected one",
        ),
        (
            "method: linear\nmodels: {a: {path: x, weight: 1.0e308}}",
            r"models\.a\.weight: found 1e\+308, expected a number",
        ),
        (
            "method: linear\nmodels: {a: {path: x}}\nshard_gb: 1.0e300",
            r"shard_gb: found 1e\+300, expected a number at most",
        ),
        ("method: linear\nmodels: {a: {path: x}}\nconfig_from: c", r"config_from: no model 'c'; models has: a"),
    ],
)
def test_a_wrong_configuration_is_named_by_place(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text('{"num_hidden_layers": 8}')
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(RecipeError, match=said):
        load_config(tmp_path / "m.yaml")


def test_a_glob_that_matches_nothing_stops_the_plan(tmp_path: Path) -> None:
    write_family(tmp_path, experts=2)
    weights = [{"match": "layers.1", "value": 0.3}, {"value": 1.0}]
    config = configure("linear", {"e0": {"weight": weights}, "e1": {}})
    with pytest.raises(MergeError, match=r"models\.e0\.weight: 'layers\.1' matches no tensor.*try '\*layers\.1\*'"):
        plan_merge(config, folder=tmp_path)


MERGEKIT = """\
merge_method: ties
base_model: base
models:
  - model: base
  - model: experts/Math-7B
    parameters:
      weight: 0.5
      density: [0.2, 0.5]
  - model: experts/code
    parameters:
      weight:
        - filter: mlp
          value: 0.7
        - value: 0.4
parameters: {normalize: true, int8_mask: true, density: 0.6}
dtype: float32
out_dtype: bfloat16
tokenizer_source: base
"""


def test_a_mergekit_file_is_read_in_our_words(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(MERGEKIT)
    config = load_config(tmp_path / "m.yaml")
    assert (config.method, config.base, config.compat, config.dtype) == ("ties", "base", "mergekit", "bfloat16")
    assert list(config.models) == ["m0-math-7b", "m1-code"]
    one, two = config.models.values()
    assert (one.path, one.weight, one.density) == ("experts/Math-7B", 0.5, [0.2, 0.5])
    assert two.weight == [Match(match="*mlp*", value=0.7), Match(value=0.4)]
    assert config.normalize is True
    assert config.density == 0.6


def test_what_all_entries_of_a_mergekit_file_share_is_the_merges_own_and_a_filter_is_no_glob(tmp_path: Path) -> None:
    text = TIES.replace("ties", "della").replace("weight: 1", "weight: [{filter: 'mlp[0]', value: 1}], epsilon: 0.1")
    (tmp_path / "m.yaml").write_text(text)
    config = load_config(tmp_path / "m.yaml")
    assert config.epsilon == 0.1
    assert config.models["m0-b"].weight == [Match(match="*mlp[[]0]*", value=1.0)]


def test_slices_of_whole_models_and_nuslerp_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(
        "merge_method: slerp\nbase_model: a\nslices:\n  - sources:\n"
        "      - {model: a, layer_range: [0, 4]}\n      - {model: b, layer_range: [0, 4]}\n"
        "parameters: {t: [0, 0.5]}\ndtype: bfloat16\n"
    )
    config = load_config(tmp_path / "m.yaml")
    assert (config.base, config.t, len(config.models)) == ("a", [0.0, 0.5], 1)
    (tmp_path / "n.yaml").write_text(
        "merge_method: nuslerp\nmodels:\n  - {model: a, parameters: {weight: 1.0}}\n"
        "  - {model: b, parameters: {weight: 3.0}}\n"
    )
    assert load_config(tmp_path / "n.yaml").t == 0.75


TIES = "merge_method: ties\nbase_model: a\nmodels:\n  - {model: b, parameters: {weight: 1}}\n"


@pytest.mark.parametrize(
    ("method", "density", "normalize"),
    [("ties", 1.0, True), ("dare_ties", 1.0, False), ("della", 1.0, True), ("breadcrumbs", 1.0, False)],
)
def test_what_a_mergekit_file_leaves_out_is_mergekits_default(
    tmp_path: Path, method: str, density: float, normalize: bool
) -> None:
    # Ours keep a fifth with ties, half with dare and della: another merge.
    (tmp_path / "m.yaml").write_text(TIES.replace("ties", method))
    config = load_config(tmp_path / "m.yaml")
    assert (config.density, config.normalize) == (density, normalize)


def test_a_slices_own_parameters_win_and_a_base_that_is_averaged_gives_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(
        "merge_method: ties\nbase_model: a\nparameters: {density: 0.9, lambda: 0.5}\nslices:\n  - sources:\n"
        "      - {model: a, layer_range: [0, 4]}\n      - {model: b, layer_range: [0, 4]}\n"
        "    parameters: {density: 0.3}\n"
    )
    config = load_config(tmp_path / "m.yaml")
    assert (config.density, config.scale) == (0.3, 0.5)
    (tmp_path / "n.yaml").write_text("merge_method: linear\nbase_model: b\nmodels: [{model: a}, {model: b}]\n")
    assert load_config(tmp_path / "n.yaml").config_from == "base-model"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: karcher\nmodels: []", r"merge_method: 'karcher' is not among"),
        ("merge_method: linear\nslices: [{sources: []}, {sources: []}]", r"layers from several ranges are stacked"),
        ("merge_method: linear\nmodels: [{model: a}]\ntokenizer_source: union", r"tokenizer_source: tokens of several"),
        ("merge_method: linear\nmodels: [{model: a+b}]", r"'a\+b' is a model with an adapter"),
        ("merge_method: linear\nmodels: [{model: a}]\nmodules: {}", r"m\.yaml:3, modules: this mergekit setting"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {scale: 2}}]", r"'scale' has no counterpart"),
        ("merge_method: [linear]\nmodels: []", r"merge_method: '\['linear'\]' is not among"),
        (
            "merge_method: linear\nmodels: [a, b]",
            r"models: found \['a', 'b'\], expected a list of entries with 'model' or 'parameters'",
        ),
        ("merge_method: linear\nmodels: [{model: a}]\nparameters: [1]", r"parameters: found \[1\], expected settings"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filter: x}]}}]", r"entries with 'value'"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [{value: 1}, 2]}}]", r"entries with 'value'"),
        ("merge_method: linear\nmodels: [{model: a}]\nchat_template: chatml", r"chat_template: the result has the"),
        (
            "merge_method: linear\nslices: [{sources: [], base_model: a}]",
            r"m\.yaml:2, slices\[0\]\.base_model: entry 1 has 'base_model', expected 'parameters' or",
        ),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [1, 4]}]}]", r"the layers \[1, 4\] of 'a'"),
        ("merge_method: linear\nslices: [{sources: [{model: m, layer_range: [0, 4]}]}]", r"the layers \[0, 4\] of 'm'"),
        ("merge_method: tise\nmodels: [{model: a}]", r"Did you mean 'ties'\?"),
        ("merge_method: linear", r"m\.yaml, models: found nothing, expected a list of entries"),
        (TIES.replace("base_model: a", "base_model: 3"), r"m\.yaml:2, base_model: found 3, expected a model's folder"),
        (
            TIES + "  - {model: c, weight: 1}",
            r"m\.yaml:5, models\[1\]\.weight: entry 2 has 'weight'.* Put it under 'parameters'",
        ),
        (TIES + "  - {model: c, parametres: {density: 1}}", r"entry 2 has 'parametres'.*Did you mean 'parameters'\?"),
        (
            TIES + "  - {model: c, parameters: {density: 2}}",
            r"m\.yaml:5, models\.m1-c\.density: found 2, expected a number",
        ),
        (
            TIES + "  - {model: c, parameters: {weight: [{filter: q, value: x}]}}",
            r"m\.yaml:5, .*weight\[0\]\.value: found 'x'",
        ),
        (TIES + "  - {model: c, parameters: {lambda: 2}}", r"m\.yaml:5, .*lambda: 'lambda' is one for all models here"),
        (TIES + "parameters: {density: high}", r"m\.yaml:5, density: found 'high', expected a number"),
        (TIES + "parameters: {rescale: true}", r"'rescale: true' has no counterpart"),
        (TIES.replace("ties", "dare_ties") + "parameters: {rescale: false}", r"'rescale: false' has no counterpart"),
        (
            "merge_method: nuslerp\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"
            "  - {model: b, parameters: {weight: -1}}",
            r"whose sum is not 0",
        ),
    ],
)
def test_what_mergekit_has_and_we_have_not_is_said(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text('{"num_hidden_layers": 8}')
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(RecipeError, match=said):
        load_config(tmp_path / "m.yaml")


def test_weights_that_add_up_to_nothing_stop_the_plan_and_name_the_tensor(tmp_path: Path) -> None:
    write_family(tmp_path, experts=2)
    for weight in (-1.0, [{"match": "*.norm.*", "value": -1.0}, {"value": 1.0}]):
        config = configure("linear", {"e0": {}, "e1": {"weight": weight}})
        with pytest.raises(MergeError, match=r"^model\.\S+: the weights \[-?1\.0, -?1\.0\] add up to 0"):
            plan_merge(config, folder=tmp_path)
