"""Write a Modelfile, from which ``ollama create`` makes the model that this program would create."""

from __future__ import annotations

from pathlib import Path

from ollama_forge.files import write_text
from ollama_forge.ollama.made_from import create_request
from ollama_forge.ollama.modelfile import Modelfile, Unwritable
from ollama_forge.ollama.parameters import KNOWN, NO_PARAMETERS, Parameters, lines_of
from ollama_forge.ollama.template import TemplatePlan
from ollama_forge.sources.ollama_store import Blob, StoredModel


def write_modelfile(
    path: Path,
    gguf: Path,
    plan: TemplatePlan,
    *,
    system: str = "",
    parameters: Parameters = NO_PARAMETERS,
    source: StoredModel | None = None,
) -> None:
    """Write a Modelfile for ``ollama create NAME -f path``; a ``gguf`` in the same folder is named relatively.

    A text that a Modelfile cannot hold is left out, and a comment says so.

    Args:
        source: the Ollama model that was edited, all of whose other layers the new model gets; None if it was none.
    """
    request = create_request("", plan, system=system, parameters=parameters, source=source)
    projectors, adapters, drafts = (
        ((), (), ()) if source is None else map(_paths, (source.projectors, source.adapters, source.drafts))
    )
    texts = [
        Modelfile(
            sources=(_from(gguf, path), *projectors),
            adapters=adapters,
            others=tuple(("DRAFT", draft) for draft in drafts),
        ).text()
    ]
    parts = [
        ("TEMPLATE", Modelfile(template=request.template)),
        ("SYSTEM", Modelfile(system=request.system)),
        ("RENDERER", Modelfile(renderer=request.renderer, parser=request.parser)),
        *(("PARAMETER", Modelfile(parameters=(line,))) for line in lines_of(request.parameters) if line[0] in KNOWN),
        *(("LICENSE", Modelfile(licenses=(text,))) for text in request.licenses),
        *(("MESSAGE", Modelfile(messages=(turn,))) for turn in request.messages),
        ("REQUIRES", Modelfile(others=(("REQUIRES", request.requires),) if request.requires else ())),
    ]
    for command, part in parts:
        try:
            texts.append(part.text())
        except Unwritable as error:
            texts.append(f"# {command} left out: {error.message}; ollama-forge sets it where Ollama runs\n")
    unknown = sorted(set(request.parameters) - set(KNOWN))
    texts += [f"# PARAMETER {key} left out: Ollama reads no such line any more\n" for key in unknown]
    write_text(path, "".join(texts))


def write_adapter_modelfile(
    path: Path, adapter: Path, source: StoredModel, parameters: Parameters = NO_PARAMETERS
) -> None:
    """Write a Modelfile that adds an adapter to a model in Ollama, of which the new model inherits everything else."""
    lines = tuple(lines_of(parameters))
    write_text(path, Modelfile(sources=(source.name,), adapters=(_from(adapter, path),), parameters=lines).text())


def _from(file: Path, modelfile: Path) -> str:
    near = file.resolve().parent == modelfile.resolve().parent
    return f"./{file.name}" if near else str(file.resolve())


def _paths(blobs: tuple[Blob, ...]) -> tuple[str, ...]:
    return tuple(str(blob.path) for blob in blobs)
