"""A worker process that renders chat templates, so that what they take of time and memory can be bounded.

    python template_worker.py MEMORY CHARACTERS

Each line on stdin is a request, a JSON object with ``op``; the answer on stdout is one JSON object, with ``error`` if
the request failed and ``too_large`` if it took more than MEMORY bytes or made a text of more than CHARACTERS. It ends
when its stdin is closed. It imports nothing from this package.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print
    memory, characters = map(int, sys.argv[1:3])
    for line in sys.stdin:
        _limit_memory(memory)
        try:
            request = json.loads(line)
            answer = _OPERATIONS[request.pop("op")](**request)
            too_large = len(answer.get("text", "")) > characters
            written = json.dumps({"too_large": True} if too_large else answer)
        except MemoryError:
            written = '{"too_large": true}'
        except Exception as error:  # a template raises anything
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            written = json.dumps({"error": first, "raised": type(error).__name__})
        answers.write(written + "\n")
        answers.flush()


def prepare() -> dict[str, Any]:
    """Import what rendering needs."""
    from transformers.utils import chat_template_utils

    assert chat_template_utils
    return {}


def render(
    template: str, turns: Sequence[Mapping[str, Any]], options: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> dict[str, Any]:
    """Render as transformers' tokenizers do."""
    from transformers.utils import chat_template_utils

    renderer: Any = chat_template_utils.render_jinja_template
    rendered, _ = renderer([turns], chat_template=template, **{**special_tokens, **options})
    return {"text": str(rendered[0])}


def variables(template: str) -> dict[str, Any]:
    """Names of the arguments that a template reads; of one that is not Jinja, all its words."""
    import jinja2
    from jinja2 import meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    source = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)
    try:
        found = meta.find_undeclared_variables(environment.parse(source))
    except (jinja2.TemplateError, RecursionError):
        found = set(re.findall(r"\w+", template))
    return {"names": sorted(found)}


_OPERATIONS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "prepare": prepare,
    "render": render,
    "variables": variables,
}


def _limit_memory(more: int) -> None:
    """Let this process have ``more`` bytes than it has now, where the system has such a limit."""
    try:
        import resource

        with open("/proc/self/statm") as file:  # noqa: PTH123 (pathlib takes a fifth of a rendering's time)
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, OSError, ValueError):
        return


if __name__ == "__main__":
    main()
