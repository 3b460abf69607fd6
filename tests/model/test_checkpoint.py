"""Describing folders without torch: forms, digests, stacks, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from evertune.errors import CheckpointError
from evertune.model import checkpoint as checkpoint_module
from evertune.model.checkpoint import Checkpoint, describe
from tests.model.folders import change_json, copy, write_adapter_folder


@pytest.fixture(scope="module")
def stack(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A base with two adapters, in one folder."""
    root = tmp_path_factory.mktemp("stack")
    copy(tiny_model, root / "base")
    first = write_adapter_folder(describe(root / "base"), root / "first", seed=1)
    return write_adapter_folder(first, root / "second", seed=2)


@pytest.fixture
def moved(stack: Checkpoint, tmp_path: Path) -> Path:
    """A copy of the whole stack elsewhere: base, first, second."""
    return copy(stack.base.path.parent, tmp_path / "moved")


def test_a_stack_is_listed_from_the_base_up(stack: Checkpoint) -> None:
    assert [one.form for one in stack.stack] == ["model", "adapter", "adapter"]
    assert [one.path.name for one in stack.stack] == ["base", "first", "second"]
    assert stack.base.stands_on is None
    assert Checkpoint.from_json(json.loads(json.dumps(stack.to_json()))) == stack


def test_a_moved_stack_keeps_its_digests_and_its_places(stack: Checkpoint, moved: Path) -> None:
    # Adapters beside each other name each other relatively; the digest does not see where anything lies.
    found = describe(moved / "second")
    assert [one.digest for one in found.stack] == [one.digest for one in stack.stack]
    assert found.base.path == moved / "base"


def test_a_moved_workspace_keeps_its_objects_together(tiny_model: Path, tmp_path: Path) -> None:
    # Written in tmp/<name>, then renamed to objects/<key>, over a start that is an object itself.
    (tmp_path / "run" / "objects").mkdir(parents=True)
    first = copy(
        write_adapter_folder(describe(tiny_model), tmp_path / "a", seed=1).path, tmp_path / "run/objects/first"
    )
    write_adapter_folder(describe(first), tmp_path / "run/tmp/x", seed=2)
    (tmp_path / "run/tmp/x").rename(tmp_path / "run/objects/second")
    before = describe(tmp_path / "run/objects/second")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    after = describe(tmp_path / "elsewhere/objects/second")
    assert after.digest == before.digest
    assert after.stack[1].path == tmp_path / "elsewhere/objects/first"
    assert after.base.path == tiny_model


def test_the_digest_sees_weights_configuration_and_tokenizer_but_not_the_readme(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = copy(tiny_model, tmp_path / "model")
    before = describe(folder).digest
    (folder / "README.md").write_text("new words")
    assert describe(folder).digest == before
    seen = {before}
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
        seen.add(describe(folder).digest)
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    seen.add(describe(folder).digest)
    assert len(seen) == 6


def test_a_sharded_model_is_described_by_all_its_shards(tiny_model: Path, tmp_path: Path) -> None:
    folder = shard(copy(tiny_model, tmp_path / "sharded"))
    before = describe(folder).digest
    raw = bytearray((folder / "model-2.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model-2.safetensors").write_bytes(raw)
    assert describe(folder).digest != before


def shard(folder: Path) -> Path:
    """Split model.safetensors in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / file, metadata={"format": "pt"})
    mapping = {key: file for file, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    (folder / "model.safetensors").unlink()
    return folder


def test_known_digests_are_not_computed_again_until_the_file_changes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(tiny_model, tmp_path / "model")
    read: list[str] = []
    real = checkpoint_module.digest_file

    def counted(path: Path) -> str:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(checkpoint_module, "digest_file", counted)
    cache = tmp_path / "cache" / "digests.json"
    first = describe(folder, cache=cache)
    read.clear()
    assert describe(folder, cache=cache) == first
    assert read == []
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert describe(folder, cache=cache).digest != first.digest
    assert read == ["model.safetensors"]
    assert len(json.loads(cache.read_text())) == len(list(folder.iterdir())), "what the changed file was before is gone"
    cache.write_text("not json")
    assert describe(folder, cache=cache) == describe(folder)


def test_describing_a_model_imports_no_torch(tiny_model: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from evertune.model.checkpoint import describe; "
        "from evertune.model.codec import load_codec; from evertune.model import bundled, card, show; "
        f"c = describe(Path({str(tiny_model)!r})); show.describe_for_humans(c); "
        "heavy = {'torch', 'transformers', 'peft', 'accelerate'} & set(sys.modules); "
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_adapter_of_another_tool_is_found_through_peft_s_own_field(moved: Path) -> None:
    (moved / "first" / "evertune.json").unlink()
    for named in (str(moved / "base"), "../base"):
        change_json(moved / "first" / "adapter_config.json", base_model_name_or_path=named)
        assert describe(moved / "first").base.path == moved / "base"


def test_an_adapter_s_digest_sees_what_it_stands_on_but_not_where_that_lies(moved: Path) -> None:
    before = describe(moved / "first").digest
    change_json(moved / "first" / "adapter_config.json", base_model_name_or_path="/somewhere/else")
    assert describe(moved / "first").digest == before
    (moved / "first" / "evertune.json").unlink()
    change_json(moved / "first" / "adapter_config.json", base_model_name_or_path="../base")
    change_json(moved / "base" / "generation_config.json", temperature=0.5)
    assert describe(moved / "first").digest != before


def test_an_adapter_that_stands_on_itself_is_refused(moved: Path) -> None:
    for name in ("first", "second"):
        (moved / name / "evertune.json").unlink()
    change_json(moved / "first" / "adapter_config.json", base_model_name_or_path="../second")
    change_json(moved / "second" / "adapter_config.json", base_model_name_or_path="../first")
    with pytest.raises(CheckpointError, match="second -> first -> second"):
        describe(moved / "second")


def test_a_base_that_has_changed_under_its_adapter_is_noticed(moved: Path) -> None:
    change_json(moved / "base" / "generation_config.json", temperature=0.5)
    with pytest.raises(CheckpointError, match="is now"):
        describe(moved / "second")


def test_a_base_that_is_gone_is_named(moved: Path) -> None:
    shutil.rmtree(moved / "base")
    with pytest.raises(CheckpointError, match="base: no such folder"):
        describe(moved / "second")


def test_a_hub_name_is_not_looked_up(moved: Path) -> None:
    (moved / "first" / "evertune.json").unlink()
    change_json(moved / "first" / "adapter_config.json", base_model_name_or_path="someone/some-model")
    with pytest.raises(CheckpointError, match="someone/some-model"):
        describe(moved / "first")


def test_an_adapter_may_carry_its_base_s_tokenizer_and_template_but_no_others(moved: Path) -> None:
    tokenizer = json.loads((moved / "base" / "tokenizer.json").read_text())
    padded = {**tokenizer, "padding": {"strategy": "BatchLongest"}}
    (moved / "first" / "tokenizer.json").write_text(json.dumps(padded, indent=1))
    template = (moved / "base" / "chat_template.jinja").read_text()
    (moved / "first" / "chat_template.jinja").write_text(template + "\n")
    describe(moved / "second")
    (moved / "first" / "chat_template.jinja").write_text(template.replace("helpful", "rude"))
    with pytest.raises(CheckpointError, match=r"first/chat_template\.jinja: differs"):
        describe(moved / "second")
    (moved / "first" / "chat_template.jinja").unlink()
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:-1]
    (moved / "first" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"first/tokenizer\.json: differs"):
        describe(moved / "second")


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "a/b.safetensors",
        "model.bin",
        "",
        3,
        ".hidden.safetensors",
    ],
)
def test_an_index_that_reaches_outside_its_folder_is_refused(tiny_model: Path, tmp_path: Path, name: object) -> None:
    folder = shard(copy(tiny_model, tmp_path / "model"))
    shutil.copy(folder / "model-1.safetensors", tmp_path / "outside.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json: tensor 'model\.norm\.weight'"):
        describe(folder)


def test_hidden_and_foreign_files_do_not_matter(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy(tiny_model, tmp_path / "model")
    (folder / ".cache").mkdir()
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "pytorch_model.bin").write_bytes(b"pickle that nobody reads")
    assert describe(folder).digest == describe(tiny_model).digest
