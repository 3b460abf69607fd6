"""The codec against transformers: the same text, the same tokens, the same mask."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from evertune.errors import CheckpointError, DataError
from evertune.model.codec import Codec, EncodedChat, load_codec
from evertune.model.template import TEMPLATE_DATE, Template
from tests.tiny import SPECIAL_TOKENS, TEMPLATES, write_tiny_tokenizer

MULTI_TURN = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hi! 🙂"},
    {"role": "user", "content": "  Grüße?\n"},
    {"role": "assistant", "content": "naïve café, 你好\nsecond line"},
]
CONVERSATIONS = [
    MULTI_TURN,
    [{"role": "system", "content": "Be brief."}, *MULTI_TURN],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": " padded "}],
]
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Earlier answers lose their reasoning, the last one gains an empty block: no turn is a prefix of the next.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALL_FEATURES = (
    "{%- set ns = namespace(n=0) %}\n"
    "{%- if messages[0].role == 'tool' %}{{ raise_exception('no tool first') }}{% endif %}\n"
    "  {% for m in messages %}\n"
    "    {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
    "    {% if loop.index > 6 %}{% break %}{% endif %}\n"
    "    {% set ns.n = ns.n + 1 %}\n"
    "{{ ns.n }} {{ m | tojson }} {{ m.content | upper }} {{ eos_token }}{{ tools is none }}\n"
    "{% generation %}<{{ m['content'] }}>{% endgeneration %}\n"
    "  {% endfor %}\n"
    "{{ strftime_now('%d %b %Y') }}{{ documents }}{{ {'a': 'ü<&'} | tojson(indent=2) }}"
)


def make_codec(folder: Path, template: str, *, stop: str = "chatml") -> Codec:
    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_tokenizer(folder, template=stop)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return load_codec(folder)


def said(codec: Codec, encoded: EncodedChat) -> str:
    return codec.decode([one for one, counts in zip(encoded.ids, encoded.counted, strict=True) if counts], special=True)


@pytest.fixture
def frozen_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return TEMPLATE_DATE

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


@pytest.mark.parametrize("template", [*TEMPLATES.values(), TRIMMING, REASONING, ALL_FEATURES])
@pytest.mark.parametrize("prompt", [False, True])
def test_text_and_tokens_equal_those_of_transformers(
    tmp_path: Path, template: str, prompt: bool, frozen_clock: None
) -> None:
    codec = make_codec(tmp_path, template)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for messages in CONVERSATIONS:
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert codec.render(messages, add_generation_prompt=prompt) == expected
        assert codec.encode(expected) == tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_keys_that_are_none_and_reasoning_names_are_treated_as_in_transformers(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m | tojson }}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}"
    codec = make_codec(tmp_path, template)
    messages = [
        {"role": "user", "content": "q", "name": None},
        {"role": "assistant", "content": "a", "reasoning": "because"},
        {"role": "assistant", "content": "a", "thinking": "hm", "nested": {"kept": None, "list": [1, 2.5, True]}},
    ]
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False)
    assert codec.render(messages) == expected


def test_the_date_in_a_template_does_not_move(tmp_path: Path) -> None:
    codec = make_codec(tmp_path, "{{ strftime_now('%Y-%m-%d') }}")
    assert codec.render([{"role": "user", "content": "x"}]) == "2026-01-01"


def test_chatml_counts_the_answers_and_their_stop_tokens_and_nothing_else(tmp_path: Path) -> None:
    codec = make_codec(tmp_path, TEMPLATES["chatml"])
    assert said(codec, codec.encode_chat(MULTI_TURN)) == "Hi! 🙂<|im_end|>naïve café, 你好\nsecond line<|im_end|>"


def test_llama2_counts_what_follows_the_prompt_of_each_turn(tmp_path: Path) -> None:
    codec = make_codec(tmp_path, TEMPLATES["llama2"], stop="llama2")
    assert said(codec, codec.encode_chat(MULTI_TURN)) == " Hi! 🙂 </s> naïve café, 你好\nsecond line </s>"


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_a_template_that_marks_generation_gives_the_mask_of_transformers(tmp_path: Path, messages: list[Any]) -> None:
    codec = make_codec(tmp_path, TEMPLATES["generation"])
    encoded = codec.encode_chat(messages)
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    assert encoded.ids == expected["input_ids"]
    assert encoded.counted == [bool(one) for one in expected["assistant_masks"]]


def test_marks_inside_macros_and_blocks_are_found_where_their_text_ends_up(tmp_path: Path) -> None:
    template = (
        "{% macro turn(m) %}[{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}]{% endmacro %}"
        "{% set all %}{% for m in messages %}{{ turn(m) }}{% endfor %}{% endset %}>>{{ all }}"
    )
    codec = make_codec(tmp_path, template)
    assert said(codec, codec.encode_chat(MULTI_TURN[:2])) == "Hi! 🙂<|im_end|>"


def test_a_filter_that_changes_marked_text_afterwards_is_refused(tmp_path: Path) -> None:
    template = (
        "{% set all %}{% for m in messages %}{% generation %} {{ m.content }} {% endgeneration %}{% endfor %}"
        "{% endset %}{{ all | trim }}"
    )
    with pytest.raises(CheckpointError, match="inside"):
        make_codec(tmp_path, template).encode_chat(MULTI_TURN)


@pytest.mark.parametrize("name", ["chatml", "llama2", "generation"])
def test_the_prompt_is_a_strict_prefix_of_the_conversation_up_to_the_first_counted_token(
    tmp_path: Path, name: str
) -> None:
    codec = make_codec(tmp_path, TEMPLATES[name], stop=name)
    for messages in CONVERSATIONS:
        encoded = codec.encode_chat(messages)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = codec.encode_prompt(messages[:i])
                assert encoded.ids[: len(prompt)] == prompt
                assert not encoded.counted[len(prompt) - 1]
                assert encoded.counted[len(prompt)]


def test_a_template_that_trims_and_prompts_with_more_than_the_header_is_taken_apart_by_placeholders(
    tmp_path: Path,
) -> None:
    codec = make_codec(tmp_path, TRIMMING)
    messages = [*MULTI_TURN[:3], {"role": "assistant", "content": "  spaced \n"}]
    assert said(codec, codec.encode_chat(messages)) == "Hi! 🙂<|im_end|>spaced<|im_end|>"


def test_a_template_that_renders_the_last_turn_differently_counts_what_the_prompt_leaves_open(tmp_path: Path) -> None:
    codec = make_codec(tmp_path, REASONING)
    expected = "Hi! 🙂<|im_end|><think>\n\n</think>\n\nnaïve café, 你好\nsecond line<|im_end|>"
    assert said(codec, codec.encode_chat(MULTI_TURN)) == expected


def test_contents_that_repeat_each_other_are_not_confused(tmp_path: Path) -> None:
    codec = make_codec(tmp_path, TRIMMING)
    messages = [{"role": role, "content": "a"} for role in ("user", "assistant") * 3]
    encoded = codec.encode_chat(messages)
    assert said(codec, encoded) == "a<|im_end|>" * 3
    # Exactly the second, fourth and sixth "a": each counted run follows "assistant\n".
    runs = [i for i in range(1, len(encoded.ids)) if encoded.counted[i] and not encoded.counted[i - 1]]
    assert all(codec.decode(encoded.ids[:i]).endswith("assistant\n") for i in runs)


def test_an_answer_without_a_stop_token_does_not_reach_into_the_next_turn(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content | trim }}{% if m.role == 'user' %}<|im_end|>{% endif %}|"
        "{% endfor %}{% if add_generation_prompt %}a:<think>{% endif %}"
    )
    codec = make_codec(tmp_path, template)
    assert said(codec, codec.encode_chat(MULTI_TURN)) == "Hi! 🙂naïve café, 你好\nsecond line"


# Each is not a prefix of itself with a turn more, so that placeholders are tried; and none can be taken apart exactly.
EACH, DONE = "{% for m in messages %}{{ m.content", "{% endfor %}"
PROMPTED = "{% if add_generation_prompt %}a<think>{% endif %}"
INEXACT = {
    "letters are changed": EACH + " | replace('i', 'j') }}" + DONE,
    "what follows depends on the words": EACH + " }}{{ '!' if '🙂' in m.content else '?' }}" + DONE,
    "the end depends on the words": EACH + " }}|" + DONE + "{{ '!' if '你' in messages[-1].content }}",
    "words are repeated": EACH + " }}{{ '' if loop.last else m.content }}|" + DONE,
    "words are left out": EACH + " if m.role == 'user' }}|" + DONE,
}


@pytest.mark.parametrize("name", INEXACT)
def test_a_template_that_cannot_be_taken_apart_exactly_is_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    codec = make_codec(tmp_path, INEXACT[name] + PROMPTED)
    with pytest.raises(CheckpointError, match="generation"):
        codec.encode_chat(MULTI_TURN)


def test_a_conversation_without_an_answer_counts_nothing(tmp_path: Path) -> None:
    codec = make_codec(tmp_path, TEMPLATES["chatml"])
    assert not any(codec.encode_chat(MULTI_TURN[:1]).counted)


def test_an_answer_that_contains_the_stop_token_counts_through_its_own_end(tmp_path: Path) -> None:
    codec = make_codec(tmp_path, TEMPLATES["chatml"])
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a<|im_end|>b"}]
    assert said(codec, codec.encode_chat(messages)) == "a<|im_end|>b<|im_end|>"


def test_trains_stop_tells_whether_answers_learn_to_end(tmp_path: Path) -> None:
    assert make_codec(tmp_path / "with", TEMPLATES["chatml"]).trains_stop()
    outside = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>{% endfor %}"
    assert not make_codec(tmp_path / "outside", outside).trains_stop()
    assert not make_codec(
        tmp_path / "without", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    ).trains_stop()


def make_merging_codec(folder: Path, template: str, merges: list[tuple[str, str]], **special: Any) -> Codec:
    """A byte-level tokenizer that knows a few merges, and an <|im_end|> with the given properties."""
    from tokenizers import AddedToken

    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    from tokenizers import processors

    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", **special)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text(template)
    return load_codec(folder)


SPACED = "{% for m in messages %}{{ m.role[0] }}:{% if m.role == 'assistant' %} {% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"  # noqa: E501


def test_a_token_that_straddles_the_beginning_of_an_answer_does_not_count(tmp_path: Path) -> None:
    # "a: hi": the marked span is "hi", but the tokenizer merges " h", which the prompt would already end inside of.
    codec = make_merging_codec(tmp_path / "m", SPACED, [("Ġ", "h")])
    encoded = codec.encode_chat([{"role": "user", "content": "q"}, {"role": "assistant", "content": "hi"}])
    assert said(codec, encoded) == "i"


def test_a_stop_token_that_swallows_the_newline_after_it_still_counts(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}#{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}{% endfor %}"
    )
    codec = make_merging_codec(tmp_path / "m", template, [], rstrip=True)
    encoded = codec.encode_chat([{"role": "assistant", "content": "hi"}] * 2)
    counted = [one for one, counts in zip(encoded.ids, encoded.counted, strict=True) if counts]
    assert encoded.text == "#hi<|im_end|>\n" * 2
    assert len(encoded.ids) == 2 * len("#hi.")  # no token for the newline
    assert [one in codec.stop_ids for one in counted] == [False, False, True] * 2


def test_every_byte_of_an_emoji_counts(tmp_path: Path) -> None:
    codec = make_codec(tmp_path, TEMPLATES["chatml"])
    encoded = codec.encode_chat([{"role": "user", "content": "🙂"}, {"role": "assistant", "content": "👩‍👩‍👧"}])
    assert sum(encoded.counted) == len("👩‍👩‍👧".encode()) + 1


def test_truncation_and_padding_saved_in_the_tokenizer_are_not_applied(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(load_codec(tmp_path).encode("longer than four")) == len("longer than four")


def test_stop_tokens_come_from_every_file_that_names_them(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 257]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 259}))
    assert load_codec(tmp_path).stop_ids == {256, 257, 259, 256 + SPECIAL_TOKENS.index("<|im_end|>")}


def test_a_template_in_tokenizer_config_is_found_alone_or_as_the_default_of_a_list(tmp_path: Path) -> None:
    for i, value in enumerate(
        ["A{{ bos_token }}", [{"name": "tools", "template": "B"}, {"name": "default", "template": "A{{ bos_token }}"}]]
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        write_tiny_tokenizer(folder)
        (folder / "chat_template.jinja").unlink()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": value}))
        assert load_codec(folder).render([]) == "A<|endoftext|>"


def test_a_base_without_a_template_still_encodes_text(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    codec = load_codec(tmp_path)
    assert codec.decode(codec.encode("héllo 🙂")) == "héllo 🙂"
    with pytest.raises(CheckpointError, match="no chat template"):
        codec.encode_chat(MULTI_TURN)


def test_the_digest_changes_with_tokenizer_template_and_stop_tokens_only(tmp_path: Path) -> None:
    digests = {
        make_codec(tmp_path / "a", TEMPLATES["chatml"]).digest,
        make_codec(tmp_path / "same", TEMPLATES["chatml"]).digest,
        make_codec(tmp_path / "b", TEMPLATES["generation"]).digest,
        make_codec(tmp_path / "c", TEMPLATES["chatml"], stop="llama2").digest,
    }
    assert len(digests) == 3


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 'x' * 10**9 }}",
        "{{ 10 ** (10 ** 9) }}",
        "{% for a in range(9999) %}{% for b in range(9999) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}",
        "{{ raise_exception('not today') }}",
        "{{ messages.append(1) }}",
        "{{ nothing.at.all }}",
    ],
)
def test_a_hostile_or_refusing_template_is_an_error_not_a_hang(tmp_path: Path, template: str) -> None:
    with pytest.raises(CheckpointError):
        make_codec(tmp_path, template).render(MULTI_TURN)


def test_a_message_with_an_object_in_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Path"):
        make_codec(tmp_path, TEMPLATES["chatml"]).render([{"role": "user", "content": tmp_path}])


def test_the_generation_mark_cannot_be_forged_by_a_message(tmp_path: Path) -> None:
    template = Template(TEMPLATES["generation"], {}, place="test")
    with pytest.raises(DataError, match="U\\+10FFFC"):
        template.render([{"role": "user", "content": "\U0010fffcmine\U0010fffd"}])


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("tokenizer.json", None, "tokenizer.json"),
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tokenizer.json", "[]", "tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("tokenizer_config.json", "\xff", "tokenizer_config.json"),
        ("tokenizer_config.json", '{"eos_token": null}', "no stop token"),
        ("tokenizer_config.json", '{"eos_token": "<|im_end|>", "chat_template": 3}', "chat_template"),
        ("tokenizer_config.json", '{"eos_token": "x", "added_tokens_decoder": {"7": {"content": "<odd>"}}}', "<odd>"),
        ("generation_config.json", '{"eos_token_id": 99999}', "eos_token_id"),
        ("generation_config.json", '{"eos_token_id": "two"}', "eos_token_id"),
        ("chat_template.jinja", "{% for %}", "does not compile"),
        ("chat_template.jinja", "{% break %}", "does not compile"),
    ],
)
def test_a_malformed_tokenizer_folder_is_refused_by_file(
    tmp_path: Path, file: str, text: str | None, named: str
) -> None:
    write_tiny_tokenizer(tmp_path)
    if named == "chat_template":
        (tmp_path / "chat_template.jinja").unlink()
    if text is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=named):
        load_codec(tmp_path)
