"""Exports: the same function in another form, whole or not at all, never over anything."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evertune.errors import CheckpointError
from evertune.model import export as export_module
from evertune.model.adapter import read_factors
from evertune.model.card import model_card
from evertune.model.checkpoint import Checkpoint, describe
from evertune.model.export import export_adapter, export_weights, save_dense
from evertune.model.open import open_model
from evertune.model.show import describe_for_humans
from tests.model.folders import change_tensors, copy, write_adapter_folder
from tests.model.test_checkpoint import shard

IDS_BT = torch.arange(40).reshape(2, 20)
CARD = {
    "label": "june/1-sft",
    "data": ["tickets", "<script>alert(1)</script>"],
    "methods": ["lora"],
    "standing": "production",
    "probes": {
        "arith|metic": {"value": 0.5, "ci90": [0.4, 0.6], "n": 300},
        "prose": {"value": 1.25, "ci90": None, "n": 40},
    },
}


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Checkpoint:
    return describe(tiny_model)


@pytest.fixture(scope="module")
def stack(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = tmp_path_factory.mktemp("stack")
    first = write_adapter_folder(base, root / "first", seed=1, rank=3)
    return write_adapter_folder(first, root / "second", seed=2, rank=2, alpha=3.0, targets=["q_proj", "down_proj"])


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    with torch.no_grad():
        return open_model(checkpoint, dtype="float32", device="cpu").model(IDS_BT).logits


def test_a_stack_exported_as_one_adapter_is_the_same_function_here_and_in_peft(
    stack: Checkpoint, tmp_path: Path
) -> None:
    exported = export_adapter(stack, tmp_path / "one", card=CARD)
    assert len(exported.stack) == 2
    assert exported.base == stack.base
    torch.testing.assert_close(logits(exported), logits(stack), rtol=1e-5, atol=1e-6)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stack.base.path), exported.path)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS_BT).logits, logits(stack), rtol=1e-5, atol=1e-6)


def test_exported_weights_are_the_base_plus_every_update_rounded_once(stack: Checkpoint, tmp_path: Path) -> None:
    half = copy(stack.base.path, tmp_path / "half")
    change_tensors(half / "model.safetensors", lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    below = write_adapter_folder(describe(half), tmp_path / "a", seed=1)
    top = write_adapter_folder(below, tmp_path / "b", seed=2)
    exported = export_weights(top, tmp_path / "out")
    found, start = load_file(exported.path / "model.safetensors"), load_file(half / "model.safetensors")
    assert found.keys() == start.keys()
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    updates = [read_factors(one.path) for one in top.stack[1:]]
    for name, value in start.items():
        expected = value.double()
        for factors in updates:
            if name.removesuffix(".weight") in factors:
                one = factors[name.removesuffix(".weight")]
                expected = expected + one.b_OR.double() @ one.a_RI.double() * one.scale
        # One rounding: at most half a unit in the last of bfloat16's 8 bits, and a float32 sum before it.
        assert ((found[name].double() - expected).abs() <= expected.abs() * 2.0**-8).all()
        if not any(name.removesuffix(".weight") in factors for factors in updates):
            assert torch.equal(found[name], value)


def test_exported_weights_open_in_transformers_alone(stack: Checkpoint, tmp_path: Path) -> None:
    exported = export_weights(stack, tmp_path / "out", card=CARD)
    assert exported.form == "model"
    plain = AutoModelForCausalLM.from_pretrained(exported.path)
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS_BT).logits, logits(stack), rtol=1e-5, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(exported.path)
    assert tokenizer.chat_template == (stack.base.path / "chat_template.jinja").read_text()


def test_exporting_a_sharded_base_keeps_its_shards(base: Checkpoint, tmp_path: Path) -> None:
    parts = describe(shard(copy(base.path, tmp_path / "parts")))
    adapter = write_adapter_folder(parts, tmp_path / "adapter", seed=1)
    exported = export_weights(adapter, tmp_path / "out")
    assert sorted(file.name for file in exported.path.glob("*.safetensors")) == [
        "model-1.safetensors",
        "model-2.safetensors",
    ]
    torch.testing.assert_close(logits(exported), logits(adapter), rtol=1e-5, atol=1e-6)


def test_a_base_exported_without_adapters_keeps_every_weight(base: Checkpoint, tmp_path: Path) -> None:
    exported = export_weights(base, tmp_path / "out")
    found, start = (load_file(one / "model.safetensors") for one in (exported.path, base.path))
    assert all(torch.equal(found[name], start[name]) for name in start)
    assert exported.digest == base.digest


def test_whole_weights_cannot_be_exported_as_an_adapter(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter to export"):
        export_adapter(base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_nothing_half_written_stays(
    stack: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        export_weights(stack, out)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        export_weights(stack, tmp_path / "other")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out"]


def test_an_adapter_with_an_infinite_update_is_not_exported(stack: Checkpoint, tmp_path: Path) -> None:
    huge = copy(stack.stack[1].path, tmp_path / "huge")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    change_tensors(huge / "adapter_model.safetensors", lambda t: [t[name.format(side)].fill_(1e30) for side in "AB"])
    with pytest.raises(CheckpointError, match=r"q_proj\.weight holds NaN or Inf after folding"):
        export_weights(describe(huge), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dense_model_is_saved_with_the_tokenizer_of_its_base_and_opens_to_the_same_bits(
    stack: Checkpoint, tmp_path: Path, dtype: str
) -> None:
    opened = open_model(stack, dtype=dtype, device="cpu", fold=True)
    save_dense(opened.model, tmp_path, stack)
    saved = describe(tmp_path)
    again = open_model(saved, dtype=dtype, device="cpu")
    with torch.no_grad():
        assert torch.equal(again.model(IDS_BT).logits, opened.model(IDS_BT).logits)
    assert again.codec.digest == opened.codec.digest
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype


def test_the_same_dense_model_is_saved_to_the_same_digest(stack: Checkpoint, tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_dense(open_model(stack, dtype="float32", device="cpu", fold=True).model, tmp_path / name, stack)
        digests.add(describe(tmp_path / name).digest)
    assert len(digests) == 1


def test_a_dense_model_with_nan_is_not_saved(base: Checkpoint, tmp_path: Path) -> None:
    opened = open_model(base, dtype="float32", device="cpu")
    opened.model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        save_dense(opened.model, tmp_path, base)
    assert list(tmp_path.iterdir()) == []


def test_the_card_says_what_hubs_read_and_escapes_what_data_says(stack: Checkpoint) -> None:
    text = model_card(stack, relation="adapter", card=CARD)
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "tiny"
    assert front["base_model_relation"] == "adapter"
    assert front["library_name"] == "peft"
    assert stack.digest in text
    assert "| arith&#124;metic | 0.500 | 0.400 to 0.600 | 300 |" in text
    assert "| prose | 1.250 |  | 40 |" in text
    assert "<script>" not in text
    assert (
        yaml.safe_load(model_card(stack, relation="finetune", card={}).split("---")[1])["library_name"]
        == "transformers"
    )


def test_a_method_without_production_standing_says_so_on_the_card(stack: Checkpoint) -> None:
    assert "Validate it yourself" not in model_card(stack, relation="adapter", card=CARD)
    assert "**research**: no published" in model_card(stack, relation="adapter", card={**CARD, "standing": "research"})
    academic = {**CARD, "methods": ["lora", "ewc", "their<own>"], "standing": "academic"}
    text = model_card(stack, relation="adapter", card=academic)
    assert "**academic**: not production-validated" in text
    assert "| EWC (ewc) | academic | arXiv:1612.00796 |" in text
    assert "| their&#60;own&#62; | research |  |" in text


def test_show_says_what_is_in_a_checkpoint_what_it_stands_on_and_what_to_deploy(stack: Checkpoint) -> None:
    facts = describe_for_humans(stack)
    assert facts["parameters"] == sum(t.numel() for t in load_file(stack.base.path / "model.safetensors").values())
    assert (facts["layers"], facts["hidden"], facts["vocabulary"], facts["tokenizer_tokens"]) == (2, 32, 261, 261)
    assert facts["stop"] == ["<|im_end|>"]
    assert facts["trains_stop"] is True
    assert [one.get("rank") for one in facts["stack"]] == [None, 3, 2]
    assert facts["stack"][2]["targets"] == ["down_proj", "q_proj"]
    assert facts["stack"][2]["parameters"] == 2 * 2 * ((32 + 32) + (64 + 32))
    assert "2 adapters as one" in facts["deploy"]
    assert str(stack.base.path) in describe_for_humans(stack.base)["deploy"]
    json.dumps(facts, allow_nan=False)
