"""Malformed recipes, data, probes, models and adapters, through the command line as a user meets them.

Each gives one clear error that names the place, exit code 3 or 5, no traceback, and nothing written anywhere.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from evertune import cli

GOOD = """\
evertune: 1
name: good
base: model
workspace: run
data:
  rows: {path: rows.jsonl}
  general: {path: general.jsonl}
probes:
  asked: {path: asked.jsonl, kind: generate, verifier: exact, max_new_tokens: 8, role: target}
  choices: {path: choices.jsonl, kind: choice}
gate: {min_items: 2, min_clusters: 2, margin: {probe: 0.9, pooled: 0.9}}
rounds:
  - name: first
    stages:
      - sft:
          data: [rows]
          epochs: 1
          lr: 1e-3
          replay: {share: 0.2, from: [general]}
"""


def _chat(prompt: str, answer: str) -> str:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


ROWS = "\n".join(_chat(f"ask {i}", f"say {i}") for i in range(8)) + "\n"
GENERAL = "\n".join(_chat(f"old {i}", f"yes {i}") for i in range(4)) + "\n"
ASKED = "\n".join(json.dumps({"prompt": f"probe {i}", "answer": f"out {i}"}) for i in range(4)) + "\n"
CHOICES = "\n".join(json.dumps({"prompt": f"which {i}", "choices": ["a", "b"], "answer": 0}) for i in range(4)) + "\n"


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path) -> Path:
    """A folder in which everything is right."""
    shutil.copytree(tiny_model, tmp_path / "model")
    for name, text in (("recipe.yaml", GOOD), ("rows.jsonl", ROWS), ("general.jsonl", GENERAL)):
        (tmp_path / name).write_text(text)
    (tmp_path / "asked.jsonl").write_text(ASKED)
    (tmp_path / "choices.jsonl").write_text(CHOICES)
    return tmp_path


def _listing(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def _evertune(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["evertune", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def _in_recipe(old: str, new: str) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        text = (place / "recipe.yaml").read_text()
        assert old in text
        (place / "recipe.yaml").write_text(text.replace(old, new, 1))

    return change


def _in_file(name: str, data: str | bytes) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        (place / name).write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))

    return change


def _in_model(name: str, change_json: Callable[[dict], None]) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        path = place / "model" / name
        body = json.loads(path.read_text())
        change_json(body)
        path.write_text(json.dumps(body))

    return change


def _without(name: str) -> Callable[[Path], None]:
    return lambda place: (place / "model" / name).unlink()


def _bombs(place: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    (place / "recipe.yaml").write_text("\n".join(lines))


def _pickled(place: Path) -> None:
    (place / "model" / "model.safetensors").rename(place / "model" / "pytorch_model.bin")


def _truncated(place: Path) -> None:
    path = place / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _adapter(place: Path, **changes: object) -> None:
    folder = place / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
              "base_model_name_or_path": str(place / "model"), **changes}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    _in_recipe("base: model", "base: adapter")(place)


# What is wrong -> (how to make it so, a word of the message).
CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    # recipes
    "unknown key": (_in_recipe("replay:", "replya:"), "Did you mean 'replay'"),
    "unknown top key": (_in_recipe("probes:", "probs:"), "probs"),
    "key twice": (_in_recipe("name: good", "name: good\nname: again"), "twice"),
    "missing key": (_in_recipe("base: model\n", ""), "base"),
    "wrong version": (_in_recipe("evertune: 1", "evertune: 2"), "expected 1"),
    "bad name": (_in_recipe("name: good", "name: Good Name"), "small letters"),
    "path as name": (_in_recipe("name: good", "name: ../good"), "small letters"),
    "number as text": (_in_recipe("epochs: 1", "epochs: one"), "epochs"),
    "negative epochs": (_in_recipe("epochs: 1", "epochs: -3"), "above 0"),
    "nan learning rate": (_in_recipe("lr: 1e-3", "lr: .nan"), "lr"),
    "huge learning rate": (_in_recipe("lr: 1e-3", "lr: 1e30"), "at most"),
    "share of one": (_in_recipe("share: 0.2", "share: 1.0"), "below 1"),
    "negative share": (_in_recipe("share: 0.2", "share: -0.1"), "at least 0"),
    "both lengths": (_in_recipe("epochs: 1", "epochs: 1\n          steps: 3"), "not both"),
    "unknown source": (_in_recipe("data: [rows]", "data: [raws]"), "no data source 'raws'"),
    "unknown replay source": (_in_recipe("from: [general]", "from: [genral]"), "no data source 'genral'"),
    "empty data list": (_in_recipe("data: [rows]", "data: []"), "one entry"),
    "two stage kinds": (_in_recipe("      - sft:", "      - dpo: {}\n        sft:"), "dpo"),
    "unknown stage": (_in_recipe("- sft:", "- sfft:"), "Did you mean 'sft'"),
    "no rounds": (_in_recipe(GOOD[GOOD.index("rounds:") :], "rounds: []\n"), "one entry"),
    "probe without kind": (_in_recipe("kind: choice", "limit: 3"), "kind"),
    "probe without verifier": (_in_recipe("verifier: exact, ", ""), "verifier"),
    "unknown verifier": (_in_recipe("verifier: exact", "verifier: exakt"), "exakt"),
    "bad regex": (_in_recipe("verifier: exact", "verifier: {regex: '('}"), "regular expression"),
    "bad schema": (_in_recipe("verifier: exact", "verifier: {json_schema: {type: 7}}"), "JSON Schema"),
    "unknown role": (_in_recipe("role: target", "role: gaurd"), "Did you mean 'guard'"),
    "role of no probe": (_in_recipe("- name: first", "- name: first\n    roles: {nope: guard}"), "no probe 'nope'"),
    "margin of zero": (_in_recipe("probe: 0.9", "probe: 0"), "above 0"),
    "alpha too large": (_in_recipe("gate: {", "gate: {alpha: 0.9, "), "at most"),
    "tag": (_in_recipe("name: good", "name: !!python/object:os.system x"), "tag"),
    "bad yaml": (_in_recipe("data:\n", "data: [\n"), "not valid YAML"),
    "tab": (_in_recipe("  rows:", "\trows:"), "YAML"),
    "two documents": (_in_recipe("evertune: 1", "evertune: 1\n---\na: 1"), "document"),
    "a list": (_in_file("recipe.yaml", "- a\n- b\n"), "one mapping"),
    "empty recipe": (_in_file("recipe.yaml", ""), "empty"),
    "recipe not utf-8": (_in_file("recipe.yaml", b"name: \xff\xfe"), "UTF-8"),
    "alias bomb": (_bombs, "recipe"),
    "deep nesting": (_in_file("recipe.yaml", "a: " + "[" * 300 + "]" * 300), "levels"),
    "preference rows in sft": (_in_recipe("path: rows.jsonl", "path: rows.jsonl, format: preference"), "preference"),
    # data
    "raws.jsonl": (_in_recipe("rows.jsonl", "raws.jsonl"), "raws.jsonl"),
    "glob without match": (_in_recipe("rows.jsonl", "r*s.json"), "r*s.json"),
    "folder as file": (lambda place: (place / "rows.jsonl").unlink() or (place / "rows.jsonl").mkdir(), "folder"),
    "empty file": (_in_file("rows.jsonl", ""), "rows"),
    "cut last line": (_in_file("rows.jsonl", ROWS[:-20]), ":8"),
    "not json": (_in_file("rows.jsonl", ROWS + "hello\n"), ":9"),
    "bad utf-8": (_in_file("rows.jsonl", ROWS.encode() + b'{"a": "\xff"}\n'), "UTF-8"),
    "nan in a row": (_in_file("rows.jsonl", ROWS + '{"messages": NaN}\n'), "NaN"),
    "key twice in a row": (_in_file("rows.jsonl", ROWS + '{"a": 1, "a": 2}\n'), ":9"),
    "row is a list": (_in_file("rows.jsonl", ROWS + "[1]\n"), ":9"),
    "no messages": (_in_file("rows.jsonl", ROWS + '{"text": "x"}\n'), "messages"),
    "empty messages": (_in_file("rows.jsonl", ROWS + '{"messages": []}\n'), "messages"),
    "unknown role in a row": (_in_file("rows.jsonl", ROWS.replace('"user"', '"human"', 1)), "human"),
    "content is a number": (_in_file("rows.jsonl", ROWS.replace('"ask 0"', "7", 1)), "content"),
    "ends with the user": (
        _in_file("rows.jsonl", ROWS + '{"messages": [{"role": "user", "content": "x"}]}\n'),
        "last turn",
    ),
    "lone surrogate": (_in_file("rows.jsonl", ROWS + _chat("x", "y").replace('"x"', '"\\ud800"') + "\n"), ":9"),
    "row too long": (_in_recipe("epochs: 1", "epochs: 1\n          max_tokens: 16"), "max_tokens"),
    "bad parquet": (
        lambda place: (_in_recipe("rows.jsonl", "rows.parquet")(place), _in_file("rows.parquet", "x")(place)),
        "Parquet",
    ),
    # probes
    "leak": (
        _in_file("asked.jsonl", ASKED + json.dumps({"prompt": "ask 3", "answer": "x"}) + "\n"),
        "measures nothing",
    ),
    "normalised leak": (
        _in_file("asked.jsonl", ASKED + json.dumps({"prompt": " ASK,  3! ", "answer": "x"}) + "\n"),
        "normalised",
    ),
    "answer out of range": (_in_file("choices.jsonl", CHOICES.replace('"answer": 0', '"answer": 2', 1)), "answer"),
    "one choice": (_in_file("choices.jsonl", CHOICES.replace('["a", "b"]', '["a"]', 1)), "choices"),
    "same choice twice": (_in_file("choices.jsonl", CHOICES.replace('["a", "b"]', '["a", "a"]', 1)), "choices"),
    "item without answer": (_in_file("asked.jsonl", ASKED + '{"prompt": "x"}\n'), "answer"),
    "empty probe": (_in_file("asked.jsonl", ""), "asked"),
    # models and adapters
    "no model": (lambda place: shutil.rmtree(place / "model"), "model"),
    "pickled weights": (_pickled, "pytorch_model.bin"),
    "truncated weights": (_truncated, "model.safetensors"),
    "no config": (_without("config.json"), "config.json"),
    "no tokenizer": (_without("tokenizer.json"), "tokenizer.json"),
    "no template": (_without("chat_template.jinja"), "chat template"),
    "broken template": (_in_file("model/chat_template.jinja", "{% for %}"), "template"),
    "template that raises": (_in_file("model/chat_template.jinja", "{{ raise_exception('no') }}"), "no"),
    "broken config": (_in_file("model/config.json", "{"), "config.json"),
    "broken tokenizer": (_in_file("model/tokenizer.json", "{}"), "tokenizer.json"),
    "quantised": (_in_model("config.json", lambda one: one.update(quantization_config={"bits": 4})), "quantis"),
    "remote code": (_in_model("config.json", lambda one: one.update(auto_map={"AutoModel": "x.Y"})), "code"),
    "adapter without weights": (lambda place: _adapter(place), "adapter_model.safetensors"),
    "adapter over a hub name": (lambda place: _adapter(place, base_model_name_or_path="org/name"), "adapter"),
    "adapter over nothing": (lambda place: _adapter(place, base_model_name_or_path=None), "adapter"),
}


def test_what_is_right_passes(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _evertune(monkeypatch, "check", place / "recipe.yaml") == 0, capsys.readouterr().out


def test_there_are_at_least_sixty() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize("case", CASES)
def test_malformed_input_is_refused_with_one_clear_error(
    case: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, word = CASES[case]
    change(place)
    before = _listing(place)
    code = _evertune(monkeypatch, "run", place / "recipe.yaml", "--quiet")
    said = capsys.readouterr()
    assert code in (3, 5), said
    assert "Traceback" not in said.out + said.err
    assert "This is a bug" not in said.err
    assert word in said.err, said.err
    assert _listing(place) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "nowhere.yaml"],
        ["check", "."],
        ["run", "recipe.yaml", "--set", "rounds[0].stages[0].sft.lrr=1"],
        ["run", "recipe.yaml", "--set", "rounds[7].name=x"],
        ["run", "recipe.yaml", "--set", "novalue"],
        ["log", "nowhere"],
        ["verify", "model"],
        ["report", "nowhere", "--out", "x.html"],
        ["show", "nowhere"],
        ["export", "nowhere", "--out", "x"],
        ["promote", "nowhere", "label", "--reason", "x"],
        ["rollback", "nowhere"],
        ["init", "."],
        ["nonsense"],
        ["check"],
    ],
)
def test_a_wrong_command_line_is_refused_in_a_process_of_its_own(arguments: list[str], place: Path) -> None:
    before = _listing(place)
    command = [sys.executable, "-m", "evertune", *arguments]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=60)
    assert done.returncode in (3, 5), done
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.strip()
    assert _listing(place) == before
