"""Where in a rendered conversation the assistant speaks, for any chat template.

Three exact ways, tried in order; each checks itself against the full text, and a template that fits none is refused:

1. the template marks it: `{% generation %}`;
2. prefixes: turn i lies between the prompt for it and the text through it, when both are prefixes of the full text;
3. placeholders: the conversation is rendered with unique contents; what surrounds them must, with the real contents
   put back, give the full text. This also serves templates that render the last turn unlike the earlier ones.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from evertune.errors import CheckpointError
from evertune.hashing import digest_bytes
from evertune.model.template import Message, Rendered, Template, TemplateError

Span = tuple[int, int]

# How a template may change a content before writing it.
_CHANGES: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip)


def assistant_spans(
    template: Template, messages: Sequence[Message], rendered: Rendered, stop_texts: Sequence[str]
) -> list[Span]:
    """Character ranges [start, end) of `rendered.text` that the assistant says, in order.

    A range begins where the generation prompt ends and runs through the stop token; it may include white space that
    the template writes after that.

    Raises:
        CheckpointError: no exact way fits; says what to do.
    """
    if rendered.spans is not None:
        return list(rendered.spans)
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not turns:
        return []
    spans = _by_prefixes(template, messages, rendered.text, turns)
    if spans is None:
        spans = _by_placeholders(template, messages, rendered.text, turns, stop_texts)
    if spans is None:
        raise CheckpointError(
            "the chat template changes the conversation so that the assistant's words cannot be found in it exactly.",
            remedy="Put {% generation %}...{% endgeneration %} around them in the template, or give each assistant "
            "turn its own row.",
        )
    return spans


def _by_prefixes(template: Template, messages: Sequence[Message], text: str, turns: Sequence[int]) -> list[Span] | None:
    spans = []
    for i in turns:
        before = _try_render(template, messages[:i], prompt=True)
        through = text if i == len(messages) - 1 else _try_render(template, messages[: i + 1], prompt=False)
        if before is None or through is None or not text.startswith(through) or not through.startswith(before):
            return None
        spans.append((len(before), len(through)))
    ordered = all(one[1] <= two[0] for one, two in pairwise(spans))
    return spans if ordered else None


def _by_placeholders(
    template: Template, messages: Sequence[Message], text: str, turns: Sequence[int], stop_texts: Sequence[str]
) -> list[Span] | None:
    """Spans of the contents, widened to the generation prompt before and to the first stop token behind."""
    contents = _contents(template, messages, text)
    if contents is None or any(i not in contents for i in turns):
        return None
    starts = sorted(start for start, _ in contents.values())
    spans = []
    for i in turns:
        start, end = contents[i]
        before = _try_render(template, messages[:i], prompt=True)
        if before is not None and len(before) <= start and text.startswith(before):
            start = len(before)
        next_start = next((one for one in starts if one >= end and one > contents[i][0]), len(text))
        spans.append((start, _through_stop(text, end, next_start, stop_texts)))
    return spans


def _through_stop(text: str, end: int, limit: int, stop_texts: Sequence[str]) -> int:
    found = [(text.find(stop, end, limit), len(stop)) for stop in stop_texts]
    return min((place + length for place, length in found if place >= 0), default=end)


def _contents(template: Template, messages: Sequence[Message], text: str) -> dict[int, Span] | None:
    """Message index -> range of its content in the text; None when the text cannot be taken apart exactly."""
    if any(not isinstance(message.get("content"), str) for message in messages):
        return None
    digest = digest_bytes(text.encode("utf-8", "surrogatepass"))[:16]
    marks = [f"placeholder{i}x{digest}x" for i in range(len(messages))]
    changed = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
    marked = _try_render(template, changed, prompt=False)
    if marked is None:
        return None
    pieces = re.split("(" + "|".join(marks) + ")", marked)
    between, order = pieces[0::2], [marks.index(mark) for mark in pieces[1::2]]
    if len(set(order)) != len(order) or not text.startswith(between[0]):
        return None
    place = len(between[0])
    found = {}
    for i, after in zip(order, between[1:], strict=True):
        last = i == order[-1]
        content = next(_fitting(messages[i]["content"], after, text, place, last=last), None)
        if content is None:
            return None
        found[i] = (place, place + len(content))
        place += len(content) + len(after)
    return found


def _fitting(content: str, after: str, text: str, place: int, *, last: bool) -> Iterator[str]:
    """The forms of a content that fit at `place`, followed by what the template writes after it."""
    for change in _CHANGES:
        candidate = change(content)
        if text.startswith(candidate + after, place) and (not last or place + len(candidate + after) == len(text)):
            yield candidate


def _try_render(template: Template, messages: Sequence[Message], *, prompt: bool) -> str | None:
    """The text, or None when the template refuses a part of a conversation (it must start with a user, say)."""
    try:
        return template.render(messages, add_generation_prompt=prompt).text
    except TemplateError:
        return None
