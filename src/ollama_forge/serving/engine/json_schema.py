"""Translates JSON schemas to llguidance grammars, and finds schemas that cannot be enforced. Imports no torch.

What llguidance cannot express is loosened here and nowhere else: the grammar then allows more than the schema, so that
a complete answer is checked against the schema itself, patterns and formats aside (``violation``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher

from ollama_forge.serving.engine.base import ToolCallGrammar

# whitespace as in llama.cpp's grammars: one space or an indented line, so that a model cannot write blanks forever
_OPTIONS: Any = {"whitespace_pattern": r"[ ]|\n{1,2}[ \t]{0,20}", "coerce_one_of": True}
_OPEN = ("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_VALUES = ("enum", "const", "default", "examples", "example", "required", "type")  # these hold no schemas
_UNKNOWN_KEYWORDS = frozenset({
    "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies",
    "propertyNames", "unevaluatedProperties", "unevaluatedItems",
    "uniqueItems", "contains", "minContains", "maxContains",
    "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor",
})  # fmt: skip
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LARGEST_BOUND = 9e17
_CACHED = 64  # clients send the same schemas again and again


@dataclass(frozen=True)
class Translation:
    """A schema as llguidance takes it.

    Attributes:
        grammar: the grammar; "" if there is a problem.
        loosened: the keywords that the grammar does not enforce, sorted.
        problem: why the schema cannot be enforced, in one line; None if it can.
    """

    grammar: str
    loosened: tuple[str, ...] = ()
    problem: str | None = None


@lru_cache(_CACHED)
def translate(schema: str) -> Translation:
    """Translate a JSON schema. This takes milliseconds to seconds: call it outside the event loop."""
    try:
        expressible, loosened = _expressible(schema)
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(expressible), overrides=_OPTIONS)
        is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    except ValueError as error:
        return Translation("", problem=one_line(str(error)))
    if is_error:
        return Translation("", problem=one_line(messages[0]))
    return Translation(grammar, tuple(sorted({*loosened, *(["oneOf"] if messages else [])})))


def check_schema(schema: str) -> str | None:
    """Why a JSON schema cannot be enforced, in one line; None if it can."""
    return translate(schema).problem


def grammar_of(schema: str) -> str:
    """Translate a JSON schema to an llguidance grammar.

    Raises:
        ValueError: the schema cannot be enforced.
    """
    found = translate(schema)
    if found.problem is not None:
        raise ValueError(found.problem)
    return found.grammar


def one_line(text: str) -> str:
    """A message of llguidance as one line of at most 300 characters, without the answer that its state quotes."""
    return " ".join(text.partition("<state>")[0].split())[:300]


def _expressible(schema: str) -> tuple[dict[str, Any], set[str]]:
    """The schema without what llguidance cannot express, and the keywords that it lost.

    Raises:
        ValueError: the schema is not JSON, not an object, or nested too deeply.
    """
    loosened: set[str] = set()
    try:
        parsed = json.loads(schema)
        rewritten = _rewritten(parsed, closes=not _spreads_properties(parsed), loosened=loosened)
    except json.JSONDecodeError as error:
        raise ValueError(f"the schema is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError("the schema's JSON is nested too deeply") from None
    if not isinstance(rewritten, dict):
        raise ValueError("a schema is a JSON object")
    return rewritten, loosened


def _rewritten(schema: Any, *, closes: bool, loosened: set[str]) -> Any:
    """A schema or a list of schemas, loosened, and with its objects closed if ``closes`` is set.

    Objects that list their properties get ``additionalProperties: false``, as llama.cpp reads them; JSON that satisfies
    the closed schema also satisfies the open one.
    """
    if isinstance(schema, list):
        return [_rewritten(part, closes=closes, loosened=loosened) for part in schema]
    if not isinstance(schema, dict):
        return schema
    lost = {key for key in schema if key in _UNKNOWN_KEYWORDS} | _inexpressible_values(schema)
    loosened |= lost
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key in lost:
            continue
        if key in _VALUES:
            out[key] = value
        elif key in _NAMED and isinstance(value, dict):
            out[key] = {name: _rewritten(part, closes=closes, loosened=loosened) for name, part in value.items()}
        else:
            out[key] = _rewritten(value, closes=closes, loosened=loosened)
    if "patternProperties" in lost:  # other names than those of ``properties`` were allowed, too
        out.pop("additionalProperties", None)
    elif closes and _may_close(schema):
        out["additionalProperties"] = False
    return out


def _spreads_properties(schema: Any) -> bool:
    """Whether the properties of an object are spread over several subschemas, so that none of them may be closed."""
    if isinstance(schema, list):
        return any(map(_spreads_properties, schema))
    if not isinstance(schema, dict):
        return False
    if "allOf" in schema or ("properties" in schema and any(key in schema for key in ("$ref", "anyOf", "oneOf"))):
        return True
    return any(map(_spreads_properties, schema.values()))


def _may_close(schema: dict[str, Any]) -> bool:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or any(key in schema for key in _OPEN):
        return False
    return not isinstance(required, list) or all(name in properties for name in required if isinstance(name, str))


def _inexpressible_values(schema: dict[str, Any]) -> set[str]:
    """The keywords that llguidance knows, but whose values here it cannot express."""
    found: set[str] = {
        key
        for key in ("pattern", "format", "multipleOf")
        if key in schema and not _is_expressible(key, json.dumps(schema[key]))
    }
    for key in _BOUNDS:
        value = schema.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > _LARGEST_BOUND:
            found.add(key)
    patterns, properties = schema.get("patternProperties"), schema.get("properties")
    if isinstance(patterns, dict):
        anything = json.dumps(dict.fromkeys(patterns, True))
        if not _is_expressible("patternProperties", anything):
            found.add("patternProperties")
    if isinstance(properties, dict) and set(properties) - set(_texts(schema.get("required"))):
        found |= {key for key in ("minProperties", "maxProperties") if key in schema}
    return found


def _texts(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


@lru_cache(1024)
def _is_expressible(key: str, value: str) -> bool:
    """Whether llguidance takes a keyword's value (JSON text), or refuses it because it is malformed."""
    parsed = json.loads(value)
    kind = {"patternProperties": "object", "multipleOf": "number"}.get(key, "string")
    grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": kind, key: parsed}))
    is_error, _ = LLMatcher.validate_grammar_with_warnings(grammar)
    if not is_error:
        return True
    if key == "multipleOf":
        return not (isinstance(parsed, int | float) and parsed > 0)
    patterns = {"pattern": [parsed], "patternProperties": parsed}.get(key)
    if patterns is None:
        return not isinstance(parsed, str)  # an unknown format
    return not all(map(_is_regex, patterns))


# JavaScript's notations that Python's regular expressions write in another way
_JAVASCRIPT = (
    (re.compile(r"\(\?<(?=[A-Za-z_])"), "(?P<"),
    (re.compile(r"\\k<(\w+)>"), r"(?P=\1)"),
    (re.compile(r"\\[pP]\{[^}]*\}|\\c[A-Za-z]|\\u\{[^}]*\}"), "x"),
)


def _is_regex(pattern: Any) -> bool:
    """Whether a pattern is a regular expression of Python or JavaScript."""
    if not isinstance(pattern, str):
        return False
    for notation, replacement in _JAVASCRIPT:
        pattern = notation.sub(replacement, pattern)
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


# -- tool calls -------------------------------------------------------------------------------------------------------


def calls_grammar(calls: ToolCallGrammar, special: Callable[[str], Sequence[str | int]]) -> str:
    """Translate the grammar of tool calls to an llguidance grammar.

    Args:
        special: splits a text into texts without special tokens and ids of special tokens.

    Raises:
        ValueError: the schema of a tool cannot be enforced.
    """

    def literal(text: str) -> str:
        parts = [
            f"<[{part}]>" if isinstance(part, int) else json.dumps(part, ensure_ascii=False) for part in special(text)
        ]
        return " ".join(part for part in parts if part != '""')

    named = [f"tool{index}" for index in range(len(calls.tools))]
    more = f"({literal(calls.separator)} call)*" if calls.several else ""
    thought = ""
    rules = [f"call: {' | '.join(named)}"]
    if calls.thought is not None:
        thought = "thought?"
        rules += [f"thought: {literal(calls.thought[0])} TEXT {literal(calls.thought[1])}", r"TEXT: /(.|\n)*/"]
    for name, tool in zip(named, calls.tools, strict=True):
        rules.append(f"{name}: {literal(tool.opening)} @{name} {literal(tool.closing)}")
    start = rf"start: BLANKS? {thought} {literal(calls.begin)} call {more} {literal(calls.end)}"
    lark = "\n".join(["%llguidance {}", start, r"BLANKS: /\s{1,2}/", *rules, ""])
    schemas = [
        {"name": name, "json_schema": {**_arguments(tool.schema), "x-guidance": _OPTIONS}}
        for name, tool in zip(named, calls.tools, strict=True)
    ]
    return json.dumps({"grammars": [{"name": "calls", "lark_grammar": lark}, *schemas]})


def _arguments(schema: str) -> dict[str, Any]:
    if (problem := check_schema(schema)) is not None:
        raise ValueError(problem)
    return _expressible(schema)[0]


# -- checking answers -------------------------------------------------------------------------------------------------


def violation(schema: str, answer: str) -> str | None:
    """What in an answer does not satisfy a JSON schema, without quoting the answer; None if it satisfies it.

    Patterns and formats are not checked: a search with a client's regular expression may never end. References to other
    documents are not followed.
    """
    from jsonschema import validators
    from jsonschema.exceptions import ValidationError
    from referencing import Registry

    parsed = json.loads(schema)
    own: Any = validators.validator_for(parsed, default=validators.Draft202012Validator)
    checker: Any = validators.extend(own, dict.fromkeys(("pattern", "patternProperties"), _unchecked))
    try:
        value = json.loads(answer)
        error: ValidationError | None = next(checker(parsed, registry=Registry()).iter_errors(value), None)
    except Exception as failure:  # a schema that the library cannot follow, or an answer that is no JSON
        return f"it could not be checked ({type(failure).__name__})"
    return None if error is None else f"{error.validator} at {error.json_path}"


def _unchecked(*_: Any) -> None:
    """A keyword that is not checked."""
