"""Until there is an engine that constrains, schemas are checked by jsonschema."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType

NAME = "ollama_forge.serving.engines.constraint"


def check_schema(schema: str) -> str | None:
    import jsonschema

    try:
        jsonschema.Draft202012Validator.check_schema(json.loads(schema))
    except jsonschema.SchemaError as error:
        return str(error.message)
    return None


if importlib.util.find_spec(NAME) is None:
    stub = ModuleType(NAME)
    stub.check_schema = check_schema  # type: ignore[attr-defined]
    sys.modules[NAME] = stub
