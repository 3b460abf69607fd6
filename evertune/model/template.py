"""Chat templates: rendered exactly as transformers renders them, in a sandbox, with the spans of `{% generation %}`.

Templates are data from elsewhere, so they run in jinja2's immutable sandbox, see plain JSON values only, cannot build
huge strings by multiplication, and are stopped when their output grows past 16 million characters. A template that
loops without writing anything is not stopped.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from evertune.errors import CheckpointError, DataError

Message = Mapping[str, Any]

# A template that prints today's date would give other tokens tomorrow, and a resumed run other bits.
TEMPLATE_DATE = datetime(2026, 1, 1)
MAX_CHARACTERS = 16_000_000
MAX_REPEATED = 1_000_000
# Private-use characters around what a generation block writes; taken out again before anyone sees the text.
_OPEN, _CLOSE = "\U0010fffc", "\U0010fffd"
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Rendered(NamedTuple):
    """A rendered conversation.

    text: what the model reads.
    spans: character ranges [start, end) that `{% generation %}` marks; None when the template has no such tag.
    """

    text: str
    spans: tuple[tuple[int, int], ...] | None


class TemplateError(CheckpointError):
    """The chat template refused the conversation, or is itself wrong."""


class Template:
    """A compiled chat template.

    Args:
        source: jinja2 text.
        variables: special tokens that templates may name, such as `{"bos_token": "<s>"}`.
        place: file named in errors.

    Raises:
        TemplateError: the source does not compile.
    """

    def __init__(self, source: str, variables: Mapping[str, str], *, place: str) -> None:
        self.source = source
        self._variables = dict(variables)
        self._place = place
        self._environment = _environment()
        try:
            tree = self._environment.parse(source)
            self.marks_generation = any(
                isinstance(block.call.node, nodes.ExtensionAttribute) for block in tree.find_all(nodes.CallBlock)
            )
            self._template = self._environment.from_string(tree)
            # A chain of mappings, put together anew for each text; here nothing is added to any of them later.
            self._template.globals = dict(self._template.globals)
        except (jinja2.TemplateError, SyntaxError, RecursionError, OverflowError, MemoryError) as error:
            raise TemplateError(f"{place}: the chat template does not compile: {error}") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> Rendered:
        """The text of a conversation and, where the template marks them, the spans the model is to generate.

        Raises:
            TemplateError: the template raised, or its output is too long.
            DataError: a message holds something that is not a JSON value.
        """
        plain = self._plain_messages(messages)
        text = self._run(plain, add_generation_prompt)
        if not self.marks_generation:
            return Rendered(text, None)
        with _marking(self._environment):
            marked = self._run(plain, add_generation_prompt)
        found, spans = _take_marks(marked)
        if found != text:
            raise TemplateError(
                f"{self._place}: the template changes what its generation block writes.",
                remedy="Move filters such as trim inside {% generation %}.",
            )
        return Rendered(text, spans)

    def _plain_messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        try:
            return [_with_reasoning_names(_plain(message)) for message in messages]
        except (TypeError, ValueError) as error:
            raise DataError(f"the conversation cannot be rendered: {error}") from error

    def _run(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            ):
                length += len(piece)
                if length > MAX_CHARACTERS:
                    raise TemplateError(
                        f"{self._place}: the chat template writes more than {MAX_CHARACTERS:,} characters"
                    )
                pieces.append(piece)
        except TemplateError:
            raise
        except Exception as error:  # a template is code: it can raise anything
            raise TemplateError(f"{self._place}: the chat template refuses the conversation: {error}") from error
        return "".join(pieces)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant is to say."""

    tags = {"generation"}  # noqa: RUF012  declared so by jinja2

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(marks_on=False)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Macro) -> str:
        text = caller()
        return f"{_OPEN}{text}{_CLOSE}" if getattr(self.environment, "marks_on", False) else text


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses products that would fill the memory: `'x' * 10**9`."""

    intercepted_binops = frozenset({"*", "**"})

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # What is asked for each message, `loop.first`: the same answer without a dozen looks at what else it might be.
        if type(obj) is LoopContext:
            return not attr.startswith("_")
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(left) > MAX_REPEATED or abs(right) > 64):
            raise SecurityError("power too large for a chat template")
        if operator == "*":
            for sized, count in ((left, right), (right, left)):
                repeats = isinstance(sized, str | list | tuple) and isinstance(count, int)
                if repeats and len(sized) * count > MAX_REPEATED:
                    raise SecurityError("repetition too long for a chat template")
        return super().call_binop(context, operator, left, right)


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes HTML characters, which models never saw.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@contextmanager
def _marking(environment: Any) -> Iterator[None]:
    environment.marks_on = True
    try:
        yield
    finally:
        environment.marks_on = False


def _take_marks(marked: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text without marks, and the outermost marked ranges in it."""
    spans: list[tuple[int, int]] = []
    pieces: list[str] = []
    length = depth = start = 0
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", marked):
        if piece == _OPEN:
            start = length if depth == 0 else start
            depth += 1
        elif piece == _CLOSE:
            depth -= 1
            if depth == 0:
                spans.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), tuple(spans)


def _plain(value: Any) -> Any:
    """Plain JSON values only: an object's methods would be a way out of the sandbox. Top-level None keys go."""
    if isinstance(value, str):
        if _OPEN in value or _CLOSE in value:
            raise ValueError("a message holds U+10FFFC or U+10FFFD, which mark generated text here")
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    raise TypeError(f"a message holds {type(value).__name__}, not a JSON value")


def _with_reasoning_names(message: dict[str, Any]) -> dict[str, Any]:
    """Templates disagree on what the reasoning field is called; each finds its own name, as in transformers."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
