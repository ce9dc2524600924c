"""The server's OpenAPI description, tested by schemathesis; and decoding JSON without recursion."""

from __future__ import annotations

import json
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from ollama_forge import __version__
from ollama_forge.serving.api import body as json_body
from ollama_forge.serving.api.app import build_app
from ollama_forge.serving.api.security import ServeSettings
from ollama_forge.serving.registry import ModelRegistry
from ollama_forge.serving.requests import BadRequest
from tests.loopback import scripted

app = build_app(ModelRegistry(scripted(lambda *_: "hello", slots=4)), ServeSettings(host="0.0.0.0"))
schema = schemathesis.openapi.from_asgi("/openapi.json", app)
RECORDED = ("option ", "invalid format: ", "there was an error signing out")  # what Ollama answers with status 500


@schema.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_failure_that_is_not_recorded(case: Any) -> None:
    if isinstance(case.body, dict) and case.body.get("model"):
        case.body["model"] = "wire"  # another name is refused before anything else is looked at
    response = case.call()
    if response.status_code == 500:
        assert response.json()["error"].startswith(RECORDED)
        return
    case.validate_response(response, checks=[not_a_server_error])
    assert response.headers["server"] == [f"ollama-forge/{__version__}"]


def test_all_routes_are_described() -> None:
    paths = app.openapi()["paths"]
    told = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    for route in [("POST", "/api/chat"), ("POST", "/api/generate"), ("GET", "/api/ps"), ("POST", "/v1/messages"),
                  ("DELETE", "/api/delete"), ("POST", "/v1/responses"), ("POST", "/api/blobs/{digest}")]:  # fmt: skip
        assert route in told
    names = [one["operationId"] for methods in paths.values() for one in methods.values()]
    assert len(names) == len(set(names))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(VALUES, st.sampled_from([None, 1]), st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_deep_json_is_read_as_the_standard_library_reads_it(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    deep = b"[" * 300 + text + b"]" * 300
    found = json_body.decode(deep)
    for _ in range(300):
        (found,) = found
    assert found == json_body.decode(text)


@given(st.binary(max_size=30) | st.text(alphabet='[]{}":,1e-.tnfaul\\ ', max_size=30).map(str.encode))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_broken_json_is_refused_alike_at_any_depth(body: bytes) -> None:
    def read(text: bytes) -> Any:
        try:
            return json_body.decode(text)
        except BadRequest:
            return BadRequest

    shallow, found = read(b"[" + body + b"]"), read(b"[" * 300 + body + b"]" * 300)
    for _ in range(299):
        if found is BadRequest or not isinstance(found, list) or len(found) != 1:
            break
        (found,) = found
    if shallow is not BadRequest and body.count(b"]") == 0:
        assert found == shallow
    if shallow is BadRequest and body.count(b"]") == 0:
        assert found is BadRequest


@pytest.mark.parametrize("depth", [199, 201, 9_999])
def test_depth(depth: int) -> None:
    found = json_body.decode(b'{"a":' * depth + b"[]" + b"}" * depth)
    for _ in range(depth):
        found = found["a"]
    assert found == []
