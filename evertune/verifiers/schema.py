"""The verifier `json_schema`: JSON that satisfies a schema, through jsonschema (the one door to it)."""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from evertune.errors import ProbeError
from evertune.verifiers.outcome import Outcome
from evertune.verifiers.plain import REGEX_SECONDS

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

_FENCED = re.compile(r"^```(?:json)?[ \t]*\n(.*?)\n?^```[ \t]*$", re.DOTALL | re.MULTILINE)

_OWN_NAME = "urn:evertune:schema"


def satisfies_schema(schema: dict[str, Any], output: str, answer: Any) -> Outcome:
    """The output is JSON that satisfies the schema, and equals the answer where that is an object or a list.

    The whole output is read, or else its only fenced block. Repeated keys and NaN are not JSON. Numbers are equal by
    value (1 and 1.0), keys in any order. Valid: it is JSON and satisfies the schema.
    """
    try:
        value = _read(output)
    except (ValueError, RecursionError):
        return Outcome(0.0, False)
    parsed = json.dumps(value, ensure_ascii=False, sort_keys=True)
    if not _validator(json.dumps(schema)).is_valid(value):
        return Outcome(0.0, False, parsed=parsed)
    is_right = not isinstance(answer, dict | list) or _is_same(value, answer)
    return Outcome(float(is_right), True, parsed=parsed)


def check_schema(schema: Any, answer: Any, *, place: str) -> None:
    """Refuse what is no schema, references out of it, and an object or list as answer that breaks it.

    Raises:
        ProbeError: with the place.
    """
    if not isinstance(schema, dict):
        raise ProbeError(f"{place}: found {schema!r} for the verifier 'json_schema', expected an object.")
    problem = _schema_problem(json.dumps(schema))
    if problem:
        raise ProbeError(f"{place}: {problem}.", remedy="Correct the recipe's 'json_schema'.")
    if isinstance(answer, dict | list):
        broken = next(_validator(json.dumps(schema)).iter_errors(answer), None)
        if broken is not None:
            raise ProbeError(
                f"{place}: found an 'answer' that breaks the verifier's schema, expected one that satisfies it: "
                f"{broken.message}.",
                remedy="Correct the answer or the schema.",
            )


def _read(output: str) -> Any:
    text = output.strip()
    try:
        return _strict(text)
    except ValueError:
        blocks = _FENCED.findall(text)
        if len(blocks) != 1:
            raise
        return _strict(blocks[0])


def _strict(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_refuse)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key twice in one object")
    return value


def _refuse(literal: str) -> Any:
    raise ValueError(f"{literal} is no JSON")


def _is_same(one: Any, other: Any) -> bool:
    """Equality of JSON values; Python's own takes true for 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


@lru_cache(maxsize=32)
def _validator(schema_json: str) -> "Validator":
    """A validator that opens no connection for a reference and gives up on a pattern that backtracks for ever."""
    import regex
    from jsonschema import Draft202012Validator, ValidationError
    from jsonschema.validators import extend, validator_for
    from referencing import Registry

    def pattern(_: Any, wanted: str, value: Any, __: Any) -> Iterator[ValidationError]:
        if isinstance(value, str) and not regex.search(wanted, value, timeout=REGEX_SECONDS):
            yield ValidationError(f"{value!r} does not match {wanted!r}")

    schema = json.loads(schema_json)
    kind = extend(validator_for(schema, default=Draft202012Validator), {"pattern": pattern})
    validator: Validator = kind(schema, registry=Registry())
    return validator


@lru_cache(maxsize=32)
def _schema_problem(schema_json: str) -> str:
    """What is wrong with a schema, or ""."""
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    schema = json.loads(schema_json)
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        return f"found {error.message} at {error.json_path}, expected a JSON Schema"
    registry = Registry().with_resource(_OWN_NAME, DRAFT202012.create_resource(schema))
    for name, value in _keywords(schema):
        if name == "patternProperties":
            return "found 'patternProperties', expected 'properties': matching names cannot be given a time limit"
        if name in ("$ref", "$dynamicRef") and isinstance(value, str):
            try:
                registry.resolver(_OWN_NAME).lookup(value)
            except Unresolvable:
                return f"found the reference {value!r}, expected a place in this schema (#/...); nothing is fetched"
    return ""


def _keywords(schema: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(schema, dict):
        for name, value in schema.items():
            yield name, value
            yield from _keywords(value)
    elif isinstance(schema, list):
        for one in schema:
            yield from _keywords(one)
