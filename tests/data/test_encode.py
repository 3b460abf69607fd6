"""Encoding: what counts, what is too long, and that nothing is cut."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evertune.data.encode import Encoding, encode_rows
from evertune.data.rows import Row
from evertune.errors import CheckpointError, DataError
from evertune.model.codec import Codec, load_codec
from tests.tiny import TEMPLATES, write_tiny_tokenizer


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    folder = tmp_path_factory.mktemp("codec")
    write_tiny_tokenizer(folder)
    return load_codec(folder)


def text_row(text: str, line: int = 1) -> Row:
    return Row("s", f"r{line}", line, Path("rows.jsonl"), {"text": text}, "text")


def chat_row(answer: str, line: int = 1, question: str = "Hi", **extra: Any) -> Row:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Row("s", f"r{line}", line, Path("rows.jsonl"), {"messages": turns, **extra})


def encode(rows: list[Row], codec: Codec, max_tokens: int = 500, too_long: Any = "error") -> Encoding:
    return encode_rows(rows, codec, max_tokens=max_tokens, too_long=too_long)


def test_every_token_of_a_text_counts_but_the_first(codec: Codec) -> None:
    # The tokenizer is byte-level without merges: five bytes, five tokens.
    (row,) = encode([text_row("abcde")], codec).rows
    assert codec.decode(row.ids.tolist()) == "abcde"
    assert row.counted.tolist() == [False, True, True, True, True]
    assert (row.ids.dtype, row.counted.dtype) == (np.int32, np.bool_)


@pytest.mark.parametrize("template", TEMPLATES)
def test_of_a_conversation_the_answer_and_its_stop_token_count(tmp_path: Path, template: str) -> None:
    write_tiny_tokenizer(tmp_path, template=template)
    codec = load_codec(tmp_path)
    (row,) = encode([chat_row("Blue.")], codec).rows
    counted = row.ids[row.counted].tolist()
    assert codec.decode(counted).strip() == "Blue."
    assert counted[-1] in codec.stop_ids


def test_a_text_row_is_read_as_text_even_with_turns_beside_it(codec: Codec) -> None:
    both = {"text": "abc", "messages": chat_row("x").value["messages"]}
    as_text = encode([Row("s", "a", 1, Path("r"), both, "text")], codec).rows[0]
    as_chat = encode([Row("s", "a", 1, Path("r"), both, "messages")], codec).rows[0]
    assert codec.decode(as_text.ids.tolist()) == "abc"
    assert len(as_chat.ids) > 3


def test_too_long_rows_are_named_with_their_lengths(codec: Codec) -> None:
    rows = [text_row("a" * (n + 1), line=n) for n in (5, 10, 11, 12, 13)]
    with pytest.raises(DataError) as caught:
        encode(rows, codec, max_tokens=8)
    message = str(caught.value)
    assert "rows.jsonl:10 (11 tokens), rows.jsonl:11 (12 tokens), rows.jsonl:12 (13 tokens)" in message
    assert "found 4 of 5 rows longer than expected: max_tokens is 8" in message
    assert "rows.jsonl:13" not in message


def test_dropped_rows_are_named_and_the_others_are_whole(codec: Codec) -> None:
    encoding = encode([text_row("abcdefgh", 1), text_row("abcdefghi", 2)], codec, max_tokens=8, too_long="drop")
    assert [codec.decode(row.ids.tolist()) for row in encoding.rows] == ["abcdefgh"]
    assert [(one.place, one.tokens) for one in encoding.dropped] == [("rows.jsonl:2", 9)]


def test_dropping_every_row_is_an_error(codec: Codec) -> None:
    with pytest.raises(DataError, match="found only rows longer than max_tokens 2, the shortest has 3 tokens"):
        encode([text_row("abc", 1), text_row("abcd", 2)], codec, max_tokens=2, too_long="drop")


def test_a_row_without_a_counted_token_is_an_error(codec: Codec) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:7: found no token that carries loss among 1"):
        encode([text_row("a", line=7)], codec)


def test_a_conversation_the_template_refuses_is_placed(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('Roles must alternate.') }}")
    with pytest.raises(CheckpointError, match=r"^rows\.jsonl:3: .*Roles must alternate"):
        encode([chat_row("x", line=3)], load_codec(tmp_path))


def test_other_formats_are_refused(codec: Codec) -> None:
    row = Row("s", "a", 4, Path("rows.jsonl"), {"prompt": "p", "chosen": "a", "rejected": "b"}, "preference")
    with pytest.raises(
        DataError, match=r"rows\.jsonl:4: found a row of format 'preference', expected messages or text"
    ):
        encode([row], codec)


def test_the_digest_is_of_ids_and_mask(codec: Codec) -> None:
    (row,) = encode([text_row("abc")], codec).rows
    expected = np.array(codec.encode("abc"), "<i4").tobytes() + b"\x00\x01\x01"
    assert row.digest == hashlib.sha256(expected).hexdigest()
    assert row.as_replay().digest == row.digest
    assert (row.is_replay, row.as_replay().is_replay) == (False, True)


def test_fields_a_format_does_not_read_change_nothing(codec: Codec) -> None:
    plain, extra = encode([chat_row("x", 1), chat_row("x", 2, topic="t")], codec).rows
    assert plain.digest == extra.digest
