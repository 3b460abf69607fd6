"""Text to token ids and back, and which tokens of a conversation the model is to learn. Loads no model and no torch.

A turn's *counted* tokens are those the model must produce itself: what the assistant says and the stop token after it,
not the header before and not the newline behind.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from evertune.errors import CheckpointError
from evertune.hashing import digest_bytes, digest_json
from evertune.model.checkpoint import read_json
from evertune.model.spans import assistant_spans
from evertune.model.template import Message, Template

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# In a JSON string the quotes would be escaped, so this is never part of a token.
_TRIM, _TRUE = b'"trim_offsets"', re.compile(rb"\A\s*:\s*true")
# Stands for what the assistant said where only what is around it matters.
_SAID = "Blue."
_TRIAL: tuple[Message, ...] = (
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": _SAID},
)


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as tokens.

    ids: token ids of the whole conversation, through the chat template.
    counted: per token, True where it carries loss.
    text: the rendered conversation.
    """

    ids: list[int]
    counted: list[bool]
    text: str


class Codec:
    """A tokenizer with its chat template and stop tokens. Make one with `load_codec`.

    folder: where it was read from.
    template: the chat template's text, or None (a base model: plain text only).
    stop_ids: tokens that end an answer.
    pad_id: the token that fills up a batch; it never counts.
    parts: what decides how text is read: digest of the tokenizer, template, special tokens, ids of stop tokens.
    digest: SHA-256 over the parts.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tokenizer: Tokenizer,
        tokenizer_json: bytes,
        template: str | None,
        special_tokens: Mapping[str, str],
        stop_ids: frozenset[int],
        pad_id: int,
    ) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.template = template
        self.stop_ids = stop_ids
        self.pad_id = pad_id
        self._special_tokens = special_tokens
        self._tokenizer_json = tokenizer_json

    @cached_property
    def parts(self) -> dict[str, Any]:
        return {
            "tokenizer": _tokenizer_digest(self._tokenizer_json),
            "template": self.template,
            "special_tokens": dict(self._special_tokens),
            "stop_ids": sorted(self.stop_ids),
        }

    @cached_property
    def digest(self) -> str:
        return digest_json(self.parts)

    @cached_property
    def _compiled(self) -> Template:
        if self.template is None:
            raise CheckpointError(
                f"{self.folder}: no chat template, expected chat_template.jinja or tokenizer_config.json with one.",
                remedy="Add the template the model was trained with; without one only rows of plain text can be used.",
            )
        return Template(self.template, self._special_tokens, place=str(self.folder))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        # Found when it is asked for: the words of a large vocabulary take as long as a light command's imports.
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def marks_generation(self) -> bool:
        """True when the template itself marks what the assistant says."""
        return self.template is not None and self._compiled.marks_generation

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as the model reads it, equal to transformers' `apply_chat_template(tokenize=False)`.

        `strftime_now` in a template gives 2026-01-01, so that tokens do not depend on the day.

        Raises:
            CheckpointError: no template, or the template refuses the conversation.
        """
        return self._compiled.render(messages, add_generation_prompt=add_generation_prompt).text

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; `special` adds the tokens that the tokenizer puts around one (such as BOS)."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of the ids; `special` shows special tokens too."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=not special)
        return text

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation up to where the assistant is to speak."""
        return self.encode(self.render(messages, add_generation_prompt=True))

    def encode_chat(self, messages: Sequence[Message], *, answers: int | None = None) -> EncodedChat:
        """Token ids of a conversation with the exact mask of what the assistant says, stop tokens included.

        Args:
            answers: how many of the assistant's turns count, from the last one back; all when not given.

        The text is tokenised once, as at inference. A token that straddles the beginning of an answer does not count.
        Without an assistant turn nothing counts.

        Raises:
            CheckpointError: no template, one for which no exact mask can be found, or, with `answers`, one that does
                not mark each of the assistant's turns once.
            DataError: a message holds something that is not a JSON value.
        """
        rendered = self._compiled.render(messages)
        spans = assistant_spans(self._compiled, messages, rendered, self._stop_texts)
        if answers is not None:
            turns = sum(one.get("role") == "assistant" for one in messages)
            if len(spans) != turns:
                raise CheckpointError(
                    f"the chat template marks {len(spans)} places where the assistant speaks, and there are {turns} of "
                    "its turns, so that the last ones cannot be told apart.",
                    remedy="Put {% generation %}...{% endgeneration %} once around each of them.",
                )
            spans = spans[turns - answers :]
        encoding = self.tokenizer.encode(rendered.text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        return EncodedChat(ids=ids, counted=self._counted(ids, encoding.offsets, spans), text=rendered.text)

    def encode_reply(self, messages: Sequence[Message], reply: Message) -> list[int]:
        """Token ids between two turns of the assistant: what stands behind its stop token where `reply`, such as a
        tool's turn, follows, up to where it is to speak again.

        Args:
            messages: the conversation up to where the assistant spoke; what it said does not matter.

        Raises:
            CheckpointError: the template writes earlier turns in another way once they have an answer, or puts no stop
                token behind the assistant's turn.
        """
        said = {"role": "assistant", "content": _SAID}
        head = self.render(messages, add_generation_prompt=True) + _SAID
        whole = self.render([*messages, said, reply], add_generation_prompt=True)
        stop = next((one for one in self._stop_texts if whole.startswith(head + one)), None)
        if stop is None:
            raise CheckpointError(
                f"{self.folder}: the chat template does not write a conversation so that it can be continued: an "
                "answered turn is not what it was before, or ends without a stop token.",
                remedy="Train on single steps instead (docs/agents.md), or correct the template.",
            )
        return self.encode(whole[len(head + stop) :])

    def _counted(
        self, ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
    ) -> list[bool]:
        """Per token, whether it lies inside one of the spans, which are in order, up to the span's last stop token."""
        counted = [False] * len(ids)
        first = 0
        for start, end in spans:
            while first < len(ids) and offsets[first][0] < start:
                first += 1
            inside = first
            # A stop token may swallow white space after it, and so reach past the span.
            while inside < len(ids) and (
                offsets[inside][1] <= end or (offsets[inside][0] < end and ids[inside] in self.stop_ids)
            ):
                inside += 1
            for i in range(first, self._after_last_stop(ids, first, inside)):
                counted[i] = True
            first = inside
        return counted

    def _after_last_stop(self, ids: Sequence[int], first: int, end: int) -> int:
        """Where counting ends: after the last stop token of the turn, else at the turn's end."""
        return next((i + 1 for i in reversed(range(first, end)) if ids[i] in self.stop_ids), end)

    @cached_property
    def _stop_texts(self) -> tuple[str, ...]:
        return tuple(str(self.tokenizer.id_to_token(one)) for one in sorted(self.stop_ids))

    def trains_stop(self) -> bool:
        """True when the last counted token of an assistant turn is a stop token, so that answers learn to end."""
        encoded = self.encode_chat(_TRIAL)
        counted = [one for one, counts in zip(encoded.ids, encoded.counted, strict=True) if counts]
        return bool(counted) and counted[-1] in self.stop_ids


def load_codec(folder: Path) -> Codec:
    """The codec of a model folder.

    Raises:
        CheckpointError: tokenizer.json is missing or malformed, the configuration disagrees with it, the chat
            template does not compile, or there is no stop token.
    """
    tokenizer, tokenizer_json = _exact_tokenizer(folder / "tokenizer.json")
    config = _read_json(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(folder, config)
    _check_added_tokens(folder, config, tokenizer)
    stop_ids = _stop_ids(folder, special_tokens, tokenizer)
    codec = Codec(
        folder,
        tokenizer=tokenizer,
        tokenizer_json=tokenizer_json,
        template=_template_text(folder, config),
        special_tokens=special_tokens,
        stop_ids=stop_ids,
        pad_id=_pad_id(special_tokens, tokenizer, stop_ids),
    )
    if codec.template is not None:
        codec._compiled  # noqa: B018  a template that does not compile is refused here, not at the first row
    return codec


def _exact_tokenizer(file: Path) -> tuple[Tokenizer, bytes]:
    """The tokenizer without truncation and padding, with offsets that include the white space of a token;
    and its JSON."""
    if not file.is_file():
        raise CheckpointError(
            f"{file.parent}: no {file.name}.",
            remedy="Save the tokenizer with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...).",
        )
    try:
        body = file.read_bytes()
        # Millions of characters: the key is found far sooner than the pattern would be.
        before, *after = body.split(_TRIM)
        tokenizer = Tokenizer.from_buffer(_TRIM.join([before, *(_TRUE.sub(b": false", one, count=1) for one in after)]))
    except Exception as error:  # the tokenizers library raises bare Exception
        told = str(error).removeprefix("Cannot instantiate Tokenizer from buffer: ")
        raise CheckpointError(f"{file}: not a tokenizer: {told}.", remedy="Fetch the model folder again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, body


@lru_cache(maxsize=1)  # a worker opens one model after the other, and most have one tokenizer
def _tokenizer_digest(text: bytes) -> str:
    """Digest of what a tokenizer does: the file saved again by another library version has the same one.

    Order and white space do not count, nor whether a merge is written as a pair or as one text; truncation and padding
    do not, which are never used.
    """
    body = json.loads(text)
    for name in ("truncation", "padding", "version"):
        body.pop(name, None)
    model = body.get("model") or {}
    if isinstance(model.get("merges"), list):
        model["merges"] = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    return digest_bytes(json.dumps(body, sort_keys=True, ensure_ascii=True).encode())


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens; tokenizer_config.json stands over the older special_tokens_map.json."""
    merged = {**_read_json(folder / "special_tokens_map.json"), **config}
    found = {}
    for name in SPECIAL_NAMES:
        value = merged.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _check_added_tokens(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    added = config.get("added_tokens_decoder") or {}
    for key, token in added.items():
        content = token.get("content") if isinstance(token, dict) else token
        found = tokenizer.id_to_token(int(key)) if str(key).isdigit() else None
        if found != content:
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'}: token {key} is {content!r}, but {found!r} in tokenizer.json.",
                remedy="Save the tokenizer again with transformers, so that both files agree.",
            )


def _template_text(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: not UTF-8: {error}.") from error
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: chat_template is {type(value).__name__}, expected text or a list "
            "with an entry named 'default'."
        )
    return value


def _stop_ids(folder: Path, special_tokens: Mapping[str, str], tokenizer: Tokenizer) -> frozenset[int]:
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        for one in value if isinstance(value, list) else [value]:
            if one is None:
                continue
            if isinstance(one, bool) or not isinstance(one, int) or tokenizer.id_to_token(one) is None:
                raise CheckpointError(
                    f"{folder / name}: eos_token_id {one!r} is no token of tokenizer.json.",
                    remedy="Correct the id, or fetch the model folder again.",
                )
            found.add(one)
    eos = special_tokens.get("eos_token")
    eos_id = None if eos is None else tokenizer.token_to_id(eos)
    if eos_id is not None:
        found.add(eos_id)
    if not found:
        raise CheckpointError(
            f"{folder}: no stop token: neither generation_config.json, config.json nor tokenizer_config.json has one.",
            remedy="Set eos_token_id in generation_config.json.",
        )
    return frozenset(found)


def _pad_id(special_tokens: Mapping[str, str], tokenizer: Tokenizer, stop_ids: frozenset[int]) -> int:
    pad = special_tokens.get("pad_token")
    pad_id = None if pad is None else tokenizer.token_to_id(pad)
    return min(stop_ids) if pad_id is None else int(pad_id)
