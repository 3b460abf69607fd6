"""Small environments for episodes: a calculator, a store of files, a look-up in two steps. Deterministic and pure.

A tool takes the state and its arguments and returns the state after it and what the agent reads. Whatever an agent asks
gets an answer: a wrong name or argument is a `ToolError`, which is told to the agent and counted.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

State = Mapping[str, Any]
MOST_DIGITS = 30


class ToolError(Exception):
    """What the agent asked cannot be done; the message is its answer."""


@dataclass(frozen=True)
class Tool:
    """A tool: its named arguments, all texts, and what it does."""

    arguments: tuple[str, ...]
    run: Callable[..., tuple[State, str]]


@dataclass(frozen=True)
class Environment:
    """Tools by name, and what a state and a goal must look like.

    Attributes:
        problem: of a state, "" where it is one.
    """

    tools: Mapping[str, Tool]
    problem: Callable[[State], str]

    def call(self, state: State, name: str, arguments: Mapping[str, Any]) -> tuple[State, str]:
        """Use a tool.

        Raises:
            ToolError: no such tool, other arguments than it takes, or what the tool itself refuses.
        """
        tool = self.tools.get(name)
        if tool is None:
            raise ToolError(f"no tool {name!r}; there is: {', '.join(self.tools)}")
        if set(arguments) != set(tool.arguments) or not all(isinstance(one, str) for one in arguments.values()):
            raise ToolError(f"{name} takes the texts: {', '.join(tool.arguments) or 'none'}")
        return tool.run(state, **arguments)


_OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def _calculate(state: State, expression: str) -> tuple[State, str]:
    """Whole numbers with + - * // % and brackets, nothing else."""
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ToolError(f"cannot calculate {expression[:40]!r}: {error}") from error
    return state, str(value)


def _value(node: ast.AST) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _bounded(_OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
    raise ValueError("whole numbers with + - * // % and brackets only")


def _bounded(value: int) -> int:
    if abs(value) >= 10**MOST_DIGITS:
        raise ValueError("too large")
    return value


def _read(state: State, path: str) -> tuple[State, str]:
    if path not in state:
        raise ToolError(f"no file {path!r}")
    return state, state[path]


def _write(state: State, path: str, text: str) -> tuple[State, str]:
    return {**state, path: text}, "written"


def _list(state: State) -> tuple[State, str]:
    return state, "\n".join(sorted(state)) or "no files"


def _find(state: State, name: str) -> tuple[State, str]:
    if name not in state["ids"]:
        raise ToolError(f"nobody is called {name!r}")
    return state, state["ids"][name]


def _get(state: State, id: str, field: str) -> tuple[State, str]:
    record = state["records"].get(id)
    if record is None or field not in record:
        raise ToolError(f"no {field!r} of {id!r}")
    return state, record[field]


def _nothing(state: State) -> str:
    return "" if not state else f"found the state {sorted(state)}, expected none"


def _texts(state: State) -> str:
    return "" if all(isinstance(one, str) for one in state.values()) else "expected a text for each path"


def _records(state: State) -> str:
    ids, records = state.get("ids"), state.get("records")
    if state.keys() != {"ids", "records"} or not isinstance(ids, dict) or not isinstance(records, dict):
        return "expected {'ids': {name: id}, 'records': {id: {field: text}}}"
    whole = all(isinstance(one, dict) and all(isinstance(v, str) for v in one.values()) for one in records.values())
    return "" if whole and set(ids.values()) <= set(records) else "expected texts, and a record for each id"


ENVIRONMENTS: Mapping[str, Environment] = {
    "calculator": Environment({"calculate": Tool(("expression",), _calculate)}, _nothing),
    "files": Environment(
        {
            "read_file": Tool(("path",), _read),
            "write_file": Tool(("path", "text"), _write),
            "list_files": Tool((), _list),
        },
        _texts,
    ),
    "lookup": Environment({"find": Tool(("name",), _find), "get": Tool(("id", "field"), _get)}, _records),
}
