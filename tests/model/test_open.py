"""The verified door: what comes through computes what transformers computes, and nothing malformed comes through."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from evertune.errors import CheckpointError, IntegrityError
from evertune.model.checkpoint import Checkpoint, describe
from evertune.model.open import open_model
from evertune.workspace import Workspace
from tests.model.folders import change_json, change_tensors, copy, write_adapter_folder
from tests.model.test_checkpoint import shard
from tests.tiny import write_tiny_tokenizer

IDS_BT = torch.arange(40).reshape(2, 20)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
PACKAGE = Path(__file__).parents[2] / "evertune"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_opened_model_computes_what_transformers_computes(tiny_model: Path, dtype: str) -> None:
    opened = open_model(describe(tiny_model), dtype=dtype, device="cpu")
    expected = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=getattr(torch, dtype))
    assert torch.equal(opened.model(IDS_BT).logits, expected(IDS_BT).logits)
    assert not opened.model.training
    assert not any(parameter.requires_grad for parameter in opened.model.parameters())
    assert opened.codec.vocab_size == 261


def test_a_sharded_model_opens_to_the_same_numbers(tiny_model: Path, tmp_path: Path) -> None:
    whole = open_model(describe(tiny_model), dtype="float32", device="cpu")
    parts = open_model(describe(shard(copy(tiny_model, tmp_path / "model"))), dtype="float32", device="cpu")
    assert torch.equal(whole.model(IDS_BT).logits, parts.model(IDS_BT).logits)


def test_opening_is_silent(tiny_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    open_model(describe(tiny_model), dtype="float32", device="cpu")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_files_that_changed_since_they_were_recorded_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy(tiny_model, tmp_path / "model")
    recorded = describe(folder)
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-2] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(IntegrityError, match="expected " + recorded.digest[:12]):
        open_model(recorded, dtype="float32", device="cpu")


@pytest.mark.parametrize("spoil", ["cut", "remove"])
def test_an_object_of_a_workspace_is_held_to_its_manifest(tiny_model: Path, tmp_path: Path, spoil: str) -> None:
    workspace = Workspace.open(tmp_path / "run", create=True)

    def write(folder: Path) -> None:
        copytree(tiny_model, folder, dirs_exist_ok=True)
        (folder / "README.md").write_text("not part of the digest")

    workspace.publish(kind="checkpoint", key="a" * 64, record={}, write=write)
    folder = workspace.path("a" * 64)
    published = describe(folder)
    open_model(published, dtype="float32", device="cpu")
    folder.chmod(0o755)
    (folder / "README.md").unlink()
    if spoil == "cut":
        (folder / "README.md").write_text("not part")
    with pytest.raises(IntegrityError, match=r"README\.md.*22 bytes"):
        open_model(published, dtype="float32", device="cpu")


def poke(name: str, value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    return lambda folder: change_tensors(folder / "model.safetensors", change)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder / "model.safetensors", change)


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", **values)


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, count: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-count])


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def missing_shard(folder: Path) -> None:
    (shard(folder) / "model-2.safetensors").unlink()


def larger_tokenizer(folder: Path) -> None:
    write_tiny_tokenizer(folder)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<|one-too-many|>"])
    tokenizer.save(str(folder / "tokenizer.json"))


MALFORMED: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN in a weight": (poke(Q_PROJ, float("nan")), f"values of {Q_PROJ} are NaN"),
    "Inf in a norm": (poke("model.norm.weight", float("inf")), "model.norm.weight"),
    "-Inf in a norm": (poke("model.norm.weight", float("-inf")), "model.norm.weight"),
    "missing tensor": (tensors(lambda t: t.pop(Q_PROJ)), f"are missing: {Q_PROJ}"),
    "extra tensor": (tensors(lambda t: t.update(extra=torch.ones(2))), "do not belong to the model: extra"),
    "transposed tensor": (
        tensors(lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(32, 64)})),
        "model.layers.0.mlp.up_proj.weight is (32, 64), expected (64, 32)",
    ),
    "renamed tensor": (tensors(lambda t: t.update({"model.layers.0.q.weight": t.pop(Q_PROJ)})), Q_PROJ),
    "config with another width": (config(intermediate_size=128), "mlp"),
    "config with another depth": (config(num_hidden_layers=3), "model.layers.2"),
    "config with fewer layers": (config(num_hidden_layers=1), "model.layers.1"),
    "untied config": (config(tie_word_embeddings=False), "lm_head.weight"),
    "unknown architecture": (config(model_type="no-such-model"), "no-such-model"),
    "no model type": (config(model_type=...), "transformers cannot load it"),
    "not a language model": (config(model_type="vit", architectures=["ViTModel"]), "transformers cannot load it"),
    "heads that do not divide": (config(num_attention_heads="four"), "transformers cannot load it"),
    "code in the folder": (config(auto_map={"AutoModelForCausalLM": "evil.Model"}), "auto_map"),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), "gptq"),
    "config is a list": (write("config.json", b"[]"), "config.json"),
    "config is cut": (cut("config.json", 9), "config.json"),
    "config is missing": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "weights are cut": (cut("model.safetensors", 1), "model.safetensors: broken"),
    "weights are empty": (write("model.safetensors", b""), "model.safetensors: broken"),
    "weights are missing": (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors weights"),
    "weights are pickled": (only_pickle, "pytorch_model.bin"),
    "a shard is missing": (missing_shard, "model-2.safetensors is missing"),
    "tokenizer is missing": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
    "tokenizer is cut": (cut("tokenizer.json", 5), "tokenizer.json"),
    "tokenizer is larger than the model": (larger_tokenizer, "262 tokens, the model embeds 261"),
    "stop token is unknown": (config(eos_token_id=4096), "eos_token_id 4096"),
    "template does not compile": (write("chat_template.jinja", b"{% if %}"), "does not compile"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_model_folder_is_one_clear_error(tiny_model: Path, tmp_path: Path, name: str) -> None:
    spoil, named = MALFORMED[name]
    folder = copy(tiny_model, tmp_path / "model")
    spoil(folder)
    with pytest.raises(CheckpointError, match=re.escape(named)) as caught:
        open_model(describe(folder), dtype="float32", device="cpu")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_adapter_folder(describe(tiny_model), tmp_path_factory.mktemp("adapter") / "one", seed=1)


def adapter_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "adapter_config.json", **values)


def adapter_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder / "adapter_model.safetensors", change)


PREFIX = "base_model.model."
LORA_A = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
LORA_B = LORA_A.replace("lora_A", "lora_B")


def rename_module(t: dict[str, torch.Tensor]) -> None:
    for key in (LORA_A, LORA_B):
        t[key.replace("layers.0", "layers.9")] = t.pop(key)


def adapt_head(t: dict[str, torch.Tensor]) -> None:
    t[f"{PREFIX}lm_head.lora_A.weight"] = torch.ones(3, 32)
    t[f"{PREFIX}lm_head.lora_B.weight"] = torch.ones(261, 3)


MALFORMED_ADAPTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no pair": (adapter_tensors(lambda t: t.pop(LORA_B)), LORA_B),
    "an embedding": (adapter_tensors(lambda t: t.update({"x.lora_embedding_A": torch.ones(1)})), "lora_embedding_A"),
    "no tensors": (adapter_tensors(lambda t: t.clear()), "no tensor"),
    "NaN": (adapter_tensors(lambda t: t[LORA_B].fill_(float("nan"))), "holds NaN"),
    "ranks differ": (adapter_tensors(lambda t: t.update({LORA_B: torch.ones(32, 5)})), "do not multiply"),
    "wrong width": (adapter_tensors(lambda t: t.update({LORA_A: torch.ones(3, 31)})), "(32, 31)"),
    "unknown module": (adapter_tensors(rename_module), "model.layers.9.self_attn.q_proj"),
    "the head": (adapter_tensors(adapt_head), "lm_head"),
    "another rank in the config": (adapter_config(r=8), "rank 8"),
    "alpha is text": (adapter_config(lora_alpha="16"), "alpha '16'"),
    "DoRA": (adapter_config(use_dora=True), "use_dora"),
    "bias": (adapter_config(bias="all"), "bias"),
    "saved modules": (adapter_config(modules_to_save=["embed_tokens"]), "modules_to_save"),
    "PiSSA": (adapter_config(init_lora_weights="pissa"), "init_lora_weights"),
    "a variant of the future": (adapter_config(use_something_new=True), "use_something_new"),
    "another method": (adapter_config(peft_type="IA3"), "IA3"),
    "config is cut": (cut("adapter_config.json", 4), "adapter_config.json"),
    "weights are cut": (cut("adapter_model.safetensors", 4), "adapter_model.safetensors: broken"),
    "weights are missing": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no safetensors weights"),
    "note without a path": (write("evertune.json", b'{"stands_on": {}}'), "evertune.json"),
}


@pytest.mark.parametrize("name", MALFORMED_ADAPTERS)
def test_a_malformed_adapter_folder_is_one_clear_error(adapter: Checkpoint, tmp_path: Path, name: str) -> None:
    spoil, named = MALFORMED_ADAPTERS[name]
    folder = copy(adapter.path, tmp_path / "adapter")
    spoil(folder)
    with pytest.raises(CheckpointError, match=re.escape(named)) as caught:
        open_model(describe(folder), dtype="float32", device="cpu")
    assert "\n" not in str(caught.value)


def calls_and_imports(file: Path) -> set[str]:
    """Names of the methods a file calls and of the modules it imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found.add(
                node.func.attr
                if not isinstance(node.func.value, ast.Name)
                else f"{node.func.value.id}.{node.func.attr}"
            )
            found.add(node.func.attr)
        elif isinstance(node, ast.Import):
            found.update(one.name.partition(".")[0] for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def users(*names: str) -> set[str]:
    files = (file for file in PACKAGE.rglob("*.py") if set(names) & calls_and_imports(file))
    return {str(file.relative_to(PACKAGE)) for file in files}


def test_nothing_else_in_the_package_loads_a_model() -> None:
    # A classifier is no language model: the verifier that asks it reads it.
    doors = {"model/open.py", "model/gguf.py", "verifiers/classifier.py"}
    assert users("from_pretrained", "from_config") == doors


def test_nothing_in_the_package_reads_or_writes_pickles() -> None:
    assert users("torch.load", "torch.save", "pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal") == set()


def test_only_the_adapter_door_imports_peft() -> None:
    # preload only warms the server that children are forked from.
    assert users("peft") - {"preload.py"} == {"model/adapter.py"}
