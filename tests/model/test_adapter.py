"""Adapter stacks against PEFT itself and against dense arithmetic."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from evertune.errors import CheckpointError, RecipeError
from evertune.model.adapter import (
    Factor,
    adapter_names,
    add_adapter,
    concatenate,
    new_parameters,
    read_factors,
    save_new,
    scale_adapters,
    scale_new,
    scaled,
    without_new,
    write_adapter,
)
from evertune.model.checkpoint import Checkpoint, describe
from evertune.model.export import export_weights
from evertune.model.open import OpenModel, open_model
from tests.model.folders import write_adapter_folder
from tests.tiny import write_tiny_tokenizer

IDS_BT = torch.arange(40).reshape(2, 20)


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Checkpoint:
    return describe(tiny_model)


@pytest.fixture(scope="module")
def stack(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Two adapters of unlike ranks, scales and targets over the base."""
    root = tmp_path_factory.mktemp("stack")
    first = write_adapter_folder(base, root / "first", seed=1, rank=3)
    return write_adapter_folder(first, root / "second", seed=2, rank=2, alpha=3.0, targets=["q_proj", "down_proj"])


def logits(opened: OpenModel) -> torch.Tensor:
    with torch.no_grad():
        return opened.model(IDS_BT).logits


def add(opened: OpenModel, **options: object) -> dict[str, torch.nn.Parameter]:
    settings = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "seed": 7, **options}
    return add_adapter(opened, **settings)  # type: ignore[arg-type]


def disturb(opened: OpenModel) -> None:
    for parameter in new_parameters(opened).values():
        parameter.data += 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_adapter_changes_nothing_and_switching_it_off_gives_the_start_back_bit_for_bit(
    stack: Checkpoint, dtype: str
) -> None:
    opened = open_model(stack, dtype=dtype, device="cpu")
    start = logits(opened)
    add(opened)
    assert adapter_names(opened.model) == ["s0", "s1", "new"]
    assert torch.equal(logits(opened), start)
    disturb(opened)
    changed = logits(opened)
    assert not torch.equal(changed, start)
    with without_new(opened):
        assert torch.equal(logits(opened), start)
    assert torch.equal(logits(opened), changed)


def test_pefts_own_switch_turns_all_adapters_off(stack: Checkpoint) -> None:
    opened = open_model(stack, dtype="float32", device="cpu")
    adapted = logits(opened)
    for layer in opened.model.modules():
        if hasattr(layer, "lora_A"):
            layer.enable_adapters(False)
    plain = logits(open_model(stack.base, dtype="float32", device="cpu"))
    assert not torch.equal(adapted, plain)
    assert torch.equal(logits(opened), plain)


def test_only_the_new_adapter_learns_and_in_the_dtype_of_the_weights(stack: Checkpoint) -> None:
    opened = open_model(stack, dtype="bfloat16", device="cpu")
    trained = add(opened)
    learning = {id(one) for one in opened.model.parameters() if one.requires_grad}
    assert learning == {id(one) for one in trained.values()}
    assert {one.dtype for one in opened.model.parameters()} == {torch.bfloat16}
    opened.model(IDS_BT, labels=IDS_BT).loss.backward()
    # B is zero at first, so A's gradient is zero and B's is not.
    assert all(one.grad is not None for one in trained.values())
    assert all(bool(one.grad.any()) == name.endswith("lora_B") for name, one in trained.items() if one.grad is not None)


def test_gradients_survive_a_look_at_the_start_between_forward_and_backward(base: Checkpoint) -> None:
    gradients = []
    for look in (False, True):
        opened = open_model(base, dtype="float32", device="cpu")
        trained = add(opened)
        disturb(opened)
        loss = opened.model(IDS_BT, labels=IDS_BT).loss
        if look:
            with without_new(opened):
                logits(opened)
        loss.backward()
        gradients.append([one.grad for one in trained.values()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_the_start_comes_back_when_an_error_leaves_the_block(base: Checkpoint) -> None:
    opened = open_model(base, dtype="float32", device="cpu")
    add(opened)
    disturb(opened)
    before = logits(opened)
    with pytest.raises(RuntimeError, match="out of here"), without_new(opened):
        raise RuntimeError("out of here")
    assert torch.equal(logits(opened), before)


def test_the_first_values_come_from_the_seed_and_not_from_the_global_generator(base: Checkpoint) -> None:
    def draw(global_seed: int, seed: int, targets: object = "all-linear") -> dict[str, torch.Tensor]:
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        opened = open_model(base, dtype="float32", device="cpu")
        values = {name: one.detach().clone() for name, one in add(opened, seed=seed, targets=targets).items()}
        assert torch.equal(torch.get_rng_state(), state)
        return values

    one, two, other, fewer = draw(0, 7), draw(99, 7), draw(0, 8), draw(0, 7, ["q_proj"])
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(one[name], fewer[name]) for name in fewer)
    downs = [name for name in one if name.endswith("lora_A")]
    assert not any(torch.equal(one[name], other[name]) for name in downs)
    assert all(not value.any() for name, value in one.items() if name.endswith("lora_B"))


def test_the_first_values_spread_as_peft_s_do(base: Checkpoint) -> None:
    # Kaiming-uniform with a = sqrt(5): uniform in +-1/sqrt(inputs), standard deviation 1/sqrt(3 * inputs).
    opened = open_model(base, dtype="float32", device="cpu")
    values = add(opened, rank=512, targets=["q_proj"])["model.layers.0.self_attn.q_proj.lora_A"]
    assert values.shape == (512, 32)
    assert values.abs().max() <= 1 / math.sqrt(32)
    assert values.std().item() == pytest.approx(1 / math.sqrt(3 * 32), rel=0.02)


def test_all_linear_is_every_linear_layer_but_the_head(base: Checkpoint) -> None:
    opened = open_model(base, dtype="float32", device="cpu")
    names = {name.rpartition(".")[0] for name in add(opened)}
    assert len(names) == 14
    assert not any("lm_head" in name or "embed" in name for name in names)


def test_an_unknown_target_is_named_with_those_that_exist(base: Checkpoint) -> None:
    opened = open_model(base, dtype="float32", device="cpu")
    with pytest.raises(RecipeError, match=r"'q_pro'.*q_proj"):
        add(opened, targets=["q_pro"])
    with pytest.raises(RecipeError, match="lm_head"):
        add(opened, targets=["lm_head"])
    add(opened)
    with pytest.raises(CheckpointError, match="already carries"):
        add(opened)


def test_a_saved_adapter_opens_to_the_same_bits(stack: Checkpoint, tmp_path: Path) -> None:
    opened = open_model(stack, dtype="bfloat16", device="cpu")
    add(opened, dropout=0.25)
    disturb(opened)
    save_new(opened, tmp_path, stack)
    again = open_model(describe(tmp_path), dtype="bfloat16", device="cpu")
    assert torch.equal(logits(again), logits(opened))
    assert adapter_names(again.model) == ["s0", "s1", "s2"]


def test_dropout_acts_in_training_and_not_in_evaluation(base: Checkpoint) -> None:
    opened = open_model(base, dtype="float32", device="cpu")
    add(opened, dropout=0.5)
    disturb(opened)
    assert torch.equal(logits(opened), logits(opened))
    opened.model.train()
    assert not torch.equal(logits(opened), logits(opened))


def test_the_same_training_writes_the_same_bytes(base: Checkpoint, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        opened = open_model(base, dtype="float32", device="cpu")
        add(opened)
        disturb(opened)
        save_new(opened, folder, base)
    for name in ("adapter_model.safetensors", "adapter_config.json", "evertune.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_peft_itself_loads_the_first_adapter_over_the_base(stack: Checkpoint) -> None:
    first = stack.stack[1]
    plain = AutoModelForCausalLM.from_pretrained(first.base.path, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, first.path)
    with torch.no_grad():
        expected = theirs(IDS_BT).logits
    assert torch.equal(logits(open_model(first, dtype="float32", device="cpu")), expected)


def test_peft_itself_loads_a_later_adapter_over_its_start_folded(stack: Checkpoint, tmp_path: Path) -> None:
    start = stack.stack[1]
    export_weights(start, tmp_path / "folded")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, stack.path)
    with torch.no_grad():
        expected = theirs(IDS_BT).logits
    torch.testing.assert_close(logits(open_model(stack, dtype="float32", device="cpu")), expected, rtol=1e-5, atol=1e-6)


def random_factors(seed: int, rank: int, scale: float, names: list[str], dtype: torch.dtype) -> dict[str, Factor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factor(
            torch.randn(rank, 5, generator=generator).to(dtype),
            torch.randn(7, rank, generator=generator).to(dtype),
            scale,
        )
        for name in names
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", [None, [1.0, 0.3, -2.0]])
def test_concatenated_factors_are_the_sum_of_the_stack(dtype: torch.dtype, scales: list[float] | None) -> None:
    stack = [
        random_factors(1, 3, 2.0, ["a", "b"], dtype),
        random_factors(2, 4, 1.0 / 3.0, ["b"], dtype),
        random_factors(3, 2, 0.7, ["a", "b", "c"], dtype),
    ]
    one = concatenate(stack, scales)
    assert {name: factor.rank for name, factor in one.items()} == {"a": 5, "b": 9, "c": 2}
    for name, factor in one.items():
        expected = np.zeros((7, 5))
        for part, scale in zip(stack, scales or [1.0] * 3, strict=True):
            if name in part:
                a, b = (t.double().numpy() for t in (part[name].a_RI, part[name].b_OR))
                expected += scale * part[name].scale * (b @ a)
        found = factor.b_OR.double().numpy() @ factor.a_RI.double().numpy() * factor.scale
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_concatenation_keeps_the_dtype_only_where_that_is_exact() -> None:
    stack = [random_factors(1, 3, 2.0, ["a"], torch.bfloat16)]
    assert concatenate(stack)["a"].b_OR.dtype == torch.bfloat16
    assert concatenate(stack, [0.3])["a"].b_OR.dtype == torch.float32


def test_scaling_walks_the_straight_line_in_weights_from_start_to_trained(base: Checkpoint, tmp_path: Path) -> None:
    opened = open_model(base, dtype="float32", device="cpu")
    start = logits(opened)
    add(opened)
    disturb(opened)
    trained = logits(opened)
    scale_new(opened, 0.0)
    assert torch.equal(logits(opened), start)
    scale_new(opened, 0.3)
    walked = logits(opened)
    save_new(opened, tmp_path, base)
    scale_new(opened, 1.0)
    assert torch.equal(logits(opened), trained)
    # The same as 0.7 of the start's weights and 0.3 of the trained ones, added up by hand.
    factors = read_factors(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    for name, factor in factors.items():
        plain.get_submodule(name).weight.data += factor.b_OR @ factor.a_RI * (8.0 / 4 * 0.3)
    with torch.no_grad():
        torch.testing.assert_close(walked, plain(IDS_BT).logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(open_model(describe(tmp_path), dtype="float32", device="cpu")), walked)


def test_frozen_adapters_of_a_stack_can_be_scaled_and_written(stack: Checkpoint, tmp_path: Path) -> None:
    opened = open_model(stack, dtype="float32", device="cpu")
    scale_adapters(opened, ["s1"], 0.6)
    walked = logits(opened)
    write_adapter(scaled(read_factors(stack.path), 0.6), tmp_path, stack.stack[1])
    assert torch.equal(logits(open_model(describe(tmp_path), dtype="float32", device="cpu")), walked)


def test_folding_equals_adding_every_update_in_float64(stack: Checkpoint) -> None:
    folded = open_model(stack, dtype="float32", device="cpu", fold=True)
    assert adapter_names(folded.model) == []
    plain = AutoModelForCausalLM.from_pretrained(stack.base.path, dtype=torch.float64)
    for one in stack.stack[1:]:
        for name, factor in read_factors(one.path).items():
            plain.get_submodule(name).weight.data += factor.b_OR.double() @ factor.a_RI.double() * factor.scale
    for name, weight in folded.model.state_dict().items():
        torch.testing.assert_close(weight.double(), plain.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_folding_rounds_once_to_bfloat16(stack: Checkpoint) -> None:
    exact = open_model(stack, dtype="float32", device="cpu", fold=True).model.state_dict()
    rounded = open_model(stack, dtype="bfloat16", device="cpu", fold=True).model.state_dict()
    assert all(torch.equal(value.to(torch.bfloat16), rounded[name]) for name, value in exact.items())


def test_folding_to_bfloat16_keeps_the_rotary_frequencies_in_float32(stack: Checkpoint) -> None:
    folded = open_model(stack, dtype="bfloat16", device="cpu", fold=True).model
    direct = open_model(stack.base, dtype="bfloat16", device="cpu").model
    assert folded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(folded.model.rotary_emb.inv_freq, direct.model.rotary_emb.inv_freq)


def test_ranks_and_scales_that_differ_by_module_survive_the_file(base: Checkpoint, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = {
        f"model.layers.{layer}.self_attn.q_proj": Factor(
            torch.randn(rank, 32, generator=generator), torch.randn(32, rank, generator=generator), scale
        )
        for layer, rank, scale in ((0, 2, 0.5), (1, 5, 1.7))
    }
    write_adapter(factors, tmp_path, base)
    again = read_factors(tmp_path)
    assert {name: (one.rank, one.scale) for name, one in again.items()} == {
        name: (one.rank, pytest.approx(one.scale, rel=1e-15)) for name, one in factors.items()
    }
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, tmp_path)
    with torch.no_grad():
        expected = theirs(IDS_BT).logits
    torch.testing.assert_close(
        logits(open_model(describe(tmp_path), dtype="float32", device="cpu")), expected, rtol=1e-5, atol=1e-6
    )


def test_layers_that_store_their_weights_transposed_are_adapted_and_folded(tmp_path: Path) -> None:
    # GPT-2 keeps (inputs, outputs); its attention projection is square, so a wrong transposition has the right shape.
    folder = tmp_path / "gpt2"
    folder.mkdir()
    write_tiny_tokenizer(folder)
    config = GPT2Config(
        vocab_size=261, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=256, eos_token_id=258
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    adapter = write_adapter_folder(describe(folder), tmp_path / "adapter", seed=3, targets=["c_attn", "c_proj"])
    stacked = logits(open_model(adapter, dtype="float32", device="cpu"))
    assert not torch.allclose(stacked, logits(open_model(adapter.base, dtype="float32", device="cpu")), atol=1e-3)
    folded = open_model(adapter, dtype="float32", device="cpu", fold=True)
    torch.testing.assert_close(logits(folded), stacked, rtol=1e-5, atol=1e-5)
    exported = export_weights(adapter, tmp_path / "exported")
    assert torch.equal(logits(open_model(exported, dtype="float32", device="cpu")), logits(folded))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter.path)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS_BT).logits, stacked)
