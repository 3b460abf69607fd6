"""json_schema: strict JSON, no connections, bounded patterns."""

import http.server
import threading
import time
from typing import Any

import pytest

from evertune.errors import ProbeError
from evertune.verifiers import check, validate

ORDER = {
    "type": "object",
    "properties": {"item": {"type": "string"}, "count": {"type": "integer", "minimum": 1}, "gift": {"type": "boolean"}},
    "required": ["item", "count"],
    "additionalProperties": False,
}
GOOD = '{"item": "lamp", "count": 2}'


def outcome(output: str, answer: Any = None, schema: Any = ORDER) -> tuple[float, bool]:
    found = check({"json_schema": schema}, output=output, answer=answer)
    assert found.error is None
    return found.score, found.valid


@pytest.mark.parametrize(
    "output, valid",
    [
        (GOOD, True),
        (f"\n {GOOD}\n", True),
        (f"```json\n{GOOD}\n```", True),
        (f"```\n{GOOD}\n```", True),
        (f"Here you are:\n```json\n{GOOD}\n```\nAnything else?", True),
        (f"```json\n{GOOD}\n```\n```json\n{GOOD}\n```", False),
        (f"Here you are: {GOOD}", False),
        (GOOD[:-1], False),
        ('{"item": "lamp"}', False),
        ('{"item": "lamp", "count": 0}', False),
        ('{"item": "lamp", "count": true}', False),
        ('{"item": "lamp", "count": 2, "note": ""}', False),
        ('{"item": "lamp", "count": 2, "count": 3}', False),
        ('{"item": "lamp", "count": NaN}', False),
        ("[" * 50_000, False),
        ("1" * 5000, False),
        ("", False),
    ],
)
def test_without_an_answer_the_form_is_the_score(output: str, valid: bool) -> None:
    assert outcome(output) == (float(valid), valid)


def test_a_fence_inside_a_text_is_part_of_the_text() -> None:
    value = '{"item": "```json\\n{}\\n```", "count": 1}'
    assert outcome(value, {"item": "```json\n{}\n```", "count": 1}) == (1.0, True)


@pytest.mark.parametrize(
    "output, score, valid",
    [
        ('{"count": 2.0, "item": "lamp"}', 1.0, True),
        ('{"item": "lamp", "count": 3}', 0.0, True),
        ('{"item": "lamp", "count": 2, "gift": false}', 0.0, True),
        ('{"item": "lamp"}', 0.0, False),
    ],
)
def test_an_answer_must_be_equalled(output: str, score: float, valid: bool) -> None:
    assert outcome(output, {"item": "lamp", "count": 2}) == (score, valid)


@pytest.mark.parametrize(
    "output, score", [("[1, 0]", 1.0), ("[true, false]", 0.0), ("[0, 1]", 0.0), ("[1, 0, 0]", 0.0)]
)
def test_true_is_not_one_and_order_counts_in_lists(output: str, score: float) -> None:
    assert outcome(output, [1, 0], {"type": "array"}) == (score, True)


def test_a_text_answer_is_not_read() -> None:
    assert outcome(GOOD, "anything") == (1.0, True)


def test_a_pattern_that_backtracks_for_ever_is_the_verifiers_failure() -> None:
    start = time.process_time()
    found = check({"json_schema": {"pattern": "^(a|aa)+$"}}, output='"' + "a" * 200 + '!"', answer=None)
    assert time.process_time() - start < 10
    assert found.error == "TimeoutError: regex timed out"


def test_a_schema_that_refers_to_itself_for_ever_is_the_verifiers_failure() -> None:
    found = check({"json_schema": {"$ref": "#"}}, output="{}", answer=None)
    assert found.error is not None
    assert found.error.startswith("RecursionError")


def test_a_reference_opens_no_connection() -> None:
    asked: list[str] = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

    with http.server.HTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        schema = {"$ref": f"http://127.0.0.1:{server.server_port}/schema.json"}
        with pytest.raises(ProbeError, match="nothing is fetched"):
            validate({"json_schema": schema}, None, place="p:1")
        found = check({"json_schema": schema}, output="{}", answer=None)
        server.shutdown()
    assert asked == []
    assert found.error is not None


@pytest.mark.parametrize(
    "schema, message",
    [
        ({"type": "objekt"}, "at $.type, expected a JSON Schema"),
        ({"properties": {"a": {"minimum": "1"}}}, "at $.properties.a.minimum, expected a JSON Schema"),
        ({"pattern": "("}, "expected a JSON Schema"),
        ({"$ref": "#/$defs/none"}, "found the reference '#/$defs/none', expected a place in this schema"),
        ({"$ref": "other.json"}, "found the reference 'other.json'"),
        ({"patternProperties": {"(a+)+$": {}}}, "found 'patternProperties', expected 'properties'"),
        ("object", "found 'object' for the verifier 'json_schema', expected an object"),
        (True, "found True for the verifier"),
    ],
)
def test_what_is_no_usable_schema_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(ProbeError) as caught:
        validate({"json_schema": schema}, None, place="p:4")
    assert str(caught.value).startswith("p:4: ")
    assert message in str(caught.value)


def test_an_answer_that_breaks_the_schema_is_refused() -> None:
    validate({"json_schema": ORDER}, {"item": "lamp", "count": 2}, place="p:4")
    with pytest.raises(ProbeError, match="found an 'answer' that breaks the verifier's schema"):
        validate({"json_schema": ORDER}, {"item": "lamp", "count": 0}, place="p:4")


def test_references_inside_the_schema_work() -> None:
    schema = {"$defs": {"name": {"type": "string"}}, "type": "array", "items": {"$ref": "#/$defs/name"}}
    validate({"json_schema": schema}, ["a"], place="p:4")
    assert outcome('["a", "b"]', ["a", "b"], schema) == (1.0, True)
    assert outcome('["a", 1]', ["a", "b"], schema) == (0.0, False)


def test_older_drafts_are_read_as_they_say() -> None:
    # In draft 4, exclusiveMinimum is a flag beside minimum.
    schema = {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 1, "exclusiveMinimum": True}
    validate({"json_schema": schema}, None, place="p:1")
    assert [outcome(one, None, schema)[1] for one in ("1", "2")] == [False, True]
