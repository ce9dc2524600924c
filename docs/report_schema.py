"""The JSON schema of ``report.json``, made from the classes that are written into it; a hook of mkdocs shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from ollama_forge.directions.separation import Separation
from ollama_forge.edits.layer_changes import LayerChange
from ollama_forge.evaluation.counts import Counts
from ollama_forge.evaluation.measure import Damage, Measurement
from ollama_forge.evaluation.tokens import TokenCheck
from ollama_forge.evaluation.verify import Check
from ollama_forge.models.machine import Machine
from ollama_forge.ollama.prompt_check import PromptCheck
from ollama_forge.pipeline import RunSettings
from ollama_forge.search.ladder import Choice

_MARK = "<!-- report schema -->"
_FILE = "reference/report.schema.json"


class _Certificate(TypedDict):
    tier: str
    reasons: list[str]
    writers_left: float | None
    readers_left: float | None
    unproven_matrices: int
    unproven: dict[str, str]
    idle: list[str]


class _Verification(TypedDict):
    passed: bool
    checks: list[Check]


class _File(TypedDict):
    file: str
    quant: str
    bytes: int
    quantised_by: str
    pre_tokenizer_fallback: str | None
    tokenizer_of_source: bool
    verified: bool | None


class _Gguf(_File):
    others: list[_File]
    problem: str
    tokens: TokenCheck | None


class _Made(TypedDict):
    name: str
    template_from: str | None
    sent: bool
    quantization: str
    renderer: str
    parser: str
    parameters: dict[str, Any]
    notes: list[str]
    differences: list[str]
    prompts: PromptCheck


class _Ollama(TypedDict):
    made: _Made | None
    problem: str | None


class Report(TypedDict):
    schema: int
    version: str
    model: str
    name: str
    fingerprint: str
    prompts: dict[str, dict[str, int]]
    lists: dict[str, dict[str, str]]
    notes: list[str]
    certificate: _Certificate | None
    choice: Choice
    measurements: dict[str, Measurement]
    noise_floor: Damage | None
    categories: dict[str, dict[str, Counts]]
    separation: Separation | None
    layer_changes: list[LayerChange]
    verification: _Verification | None
    gguf: _Gguf
    ollama: _Ollama
    settings: RunSettings
    machine: Machine | None
    seconds: dict[str, float]


_ABSENT = {"_Gguf": set(_File.__annotations__), "RunSettings": {"model", "name", "output_dir"}}  # where there is none


def schema() -> dict[str, Any]:
    """The schema; an object has the keys that it names and no others."""
    made = TypeAdapter(Report).json_schema(mode="serialization")
    for one in (made, *made["$defs"].values()):
        if "properties" in one:
            absent = _ABSENT.get(one["title"], set())
            one["required"] = [key for key in one["properties"] if key not in absent]
            one.update(additionalProperties=False, title=one["title"].lstrip("_"))
            for key, of in one["properties"].items():
                if of.get("type") == "number":  # such as the rate of an empty list
                    one["properties"][key] = {"anyOf": [{"type": "number"}, {"type": "null"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the schema itself among the files of the site."""
    files.append(File.generated(config, _FILE, content=json.dumps(schema(), indent=1)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark on the page of the schema by a table for each kind of object."""
    return markdown.replace(_MARK, "\n".join(tables())) if _MARK in markdown else markdown


def tables() -> Iterator[str]:
    """The schema as Markdown, in the order in which a reader of the file meets the objects."""
    made = schema()
    waiting, seen = [made], {"Report"}
    while waiting:
        one = waiting.pop(0)
        yield f"\n## {one['title']}\n\n| key | type | |\n|---|---|---|"
        told = _attributes(one.get("description", ""))
        for key, of in one["properties"].items():
            yield f"| `{key}` | {_type(of, made['$defs'])} | {told.get(key, '')} |"
            for other in _named(of):
                if other not in seen and "properties" in made["$defs"][other]:
                    seen.add(other)
                    waiting.append(made["$defs"][other])


def _attributes(description: str) -> dict[str, str]:
    """What a class says of its attributes."""
    entries = re.split(r"\n    (?=\S)", description.partition("Attributes:")[2].partition("\n\n")[0])
    told: dict[str, str] = {}
    for entry in entries:
        names, _, text = " ".join(entry.split()).partition(": ")
        told.update(dict.fromkeys(names.split(", "), text.replace("|", "\\|").replace("``", "`")))
    return told


def _named(of: Mapping[str, Any]) -> Iterator[str]:
    """The objects that a type names."""
    if "$ref" in of:
        yield of["$ref"].rpartition("/")[2]
    for part in (*of.get("anyOf", ()), of.get("items"), of.get("additionalProperties")):
        if isinstance(part, Mapping):
            yield from _named(part)


def _type(of: Mapping[str, Any], kinds: Mapping[str, Any]) -> str:
    if "$ref" in of:
        name = of["$ref"].rpartition("/")[2]
        if "properties" not in kinds[name]:
            return ", ".join(f"`{value}`" for value in kinds[name]["enum"])
        return f"[{name.lstrip('_')}](#{name.lstrip('_').lower()})"
    if "anyOf" in of:
        return " or ".join(_type(part, kinds) for part in of["anyOf"])
    if of.get("type") == "array":
        return f"list of {_type(of.get('items', {}), kinds)}"
    if isinstance(of.get("additionalProperties"), Mapping):
        return f"by name: {_type(of['additionalProperties'], kinds)}"
    return str(of.get("type", "any"))
