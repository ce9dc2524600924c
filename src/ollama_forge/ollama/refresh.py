"""Give a model in Ollama the template of another model; its weights stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ollama_forge.checkpoints.gguf.file import read_part, value_of
from ollama_forge.checkpoints.gguf.metadata import with_metadata
from ollama_forge.errors import ForgeError
from ollama_forge.names import check_ollama_name
from ollama_forge.ollama.chat_template import CHAT_TEMPLATE_KEY, FileTemplate
from ollama_forge.ollama.client import Client, digest_of
from ollama_forge.ollama.made_from import numbered
from ollama_forge.ollama.parameters import Parameters
from ollama_forge.ollama.prompt_check import ModelPrompts, PromptCheck
from ollama_forge.ollama.register import IGNORED_TEMPLATE, Registered, differences, examine
from ollama_forge.ollama.repair import commented, silent
from ollama_forge.ollama.shown import NO_TEMPLATE, CreateRequest, Shown
from ollama_forge.sources.ollama_store import find_model


def refresh(
    client: Client,
    name: str,
    base: str,
    *,
    template_only: bool,
    output_name: str | None = None,
) -> Registered:
    """Give ``name`` the template, renderer and parser of ``base``; everything else of ``name`` stays.

    Args:
        template_only: False to copy the parameters and the system prompt that ``base`` sets, too.
        output_name: the new model; default ``name`` itself.

    Raises:
        UsageError: a name Ollama refuses.
        ForgeError: one of them isn't there, ``base`` has no template, or Ollama fails.
    """
    target = output_name or name
    for each, option in ((name, "--name"), (base, "--base"), (target, "--output-name")):
        check_ollama_name(each, option)
    model, source = _require_model(client, name, "--name"), _require_model(client, base, "--base")
    if not source.has_template:
        raise ForgeError(f"{base} has no template of its own", "give a --base that Ollama's library has one for")
    template = "" if source.goes_by_file else source.template or NO_TEMPLATE
    wanted = replace(model, template=template, jinja="", renderer=source.renderer, parser=source.parser)
    if not template_only:
        wanted = replace(
            wanted,
            parameters={**model.parameters, **source.parameters},
            system=source.system or model.system,
        )
    prompts = ModelPrompts(client, source)
    if source.goes_by_file:
        note, request, silence, shown, checked = _by_file(client, model, source, wanted, prompts, target)
    else:
        note = f"template copied from {base}"
        request = _on_top(model, wanted, target) if _grows(model, source) else _anew(model, wanted, target)
        client.make(request)
        silence, shown, checked = examine(client, target, prompts)
    if silence:
        raise silent(target, silence)
    if not request.source:
        wanted = replace(wanted, weights=(), adapters=())  # Ollama may store files anew, in another order
    kept = tuple(f"{key} stays as it was" for key in _unset(model, source)) if not template_only else ()
    ignored = (IGNORED_TEMPLATE,) if request.template not in ("", NO_TEMPLATE) and shown.jinja else ()
    return Registered(
        target,
        shown,
        template_from=base,
        notes=(note, *ignored, *kept),
        differences=(*differences(wanted, shown), *_gone(wanted, shown)),
        prompts=checked,
    )


def _by_file(
    client: Client, model: Shown, source: Shown, wanted: Shown, prompts: ModelPrompts, target: str
) -> tuple[str, CreateRequest, str, Shown, PromptCheck]:
    """Give ``model`` the chat template in the file of ``source``: by none of its own in front, or in a changed file.

    Returns:
        What was done, the request, and what ``examine`` says of the result.

    Raises:
        ForgeError: the file of ``model`` would have to change, and cannot be read here.
    """
    if model.jinja == source.jinja and not model.renderer and not model.parser:
        request = _on_top(model, wanted, target)
        client.make(request)
        note = f"the file of {model.name} has the chat template of {source.name} already"
        return note, request, *examine(client, target, prompts)
    file = _file_of(model)
    own = FileTemplate.of(read_part(file)).text
    for text in (source.jinja, commented(source.jinja)):
        digest = model.weights[0]
        if text != own:
            content = with_metadata(file, {CHAT_TEMPLATE_KEY: value_of(text)})
            digest = digest_of(content)
            client.send(content, digest)
        request = _anew(replace(model, weights=(digest, *model.projectors)), wanted, target)
        recognised = client.make(request)
        silence, shown, checked = examine(client, target, prompts)
        if (not silence and not checked.differs) or not recognised:
            break
    return f"its file got the chat template of {source.name}", request, silence, shown, checked


def _file_of(model: Shown) -> Path:
    """The GGUF file of a model in the store of this machine's Ollama."""
    try:
        stored = find_model(model.name)
    except ForgeError as error:
        raise ForgeError(
            f"the file of {model.name} would have to get another chat template, and it cannot be read: {error.message}",
            f"{error.hint}; or give a --base that has a TEMPLATE",
        ) from error
    if stored.weights.digest not in model.weights:
        raise ForgeError(
            f"the file of {model.name} would have to get another chat template, and the store here has another file",
            "set OLLAMA_MODELS to the store of the Ollama that OLLAMA_HOST names",
        )
    return stored.weights.path


def _require_model(client: Client, name: str, option: str) -> Shown:
    shown = client.shown(name)
    if shown is None:
        hint = client.alike(name) or "`ollama list` shows what it has"
        raise ForgeError(f"{option} {name}: Ollama has no such model", hint)
    return shown


def _grows(model: Shown, source: Shown) -> bool:
    """Whether FROM suffices: Ollama inherits a renderer and a parser, and cannot remove them."""
    return not (model.renderer and not source.renderer) and not (model.parser and not source.parser)


def _on_top(model: Shown, wanted: Shown, target: str) -> CreateRequest:
    """Create FROM the model itself: everything that is not stated is inherited, blobs and licences included."""
    changed = {key: value for key, value in wanted.parameters.items() if model.parameters.get(key) != value}
    return CreateRequest(
        model=target,
        source=model.name,
        template=wanted.template,
        renderer=wanted.renderer,
        parser=wanted.parser,
        system=wanted.system if wanted.system != model.system else "",
        parameters=changed,
    )


def _anew(model: Shown, wanted: Shown, target: str) -> CreateRequest:
    """Create from the blobs that Ollama holds, with everything else stated anew."""
    if not model.weights or model.draft:
        raise ForgeError(
            f"{model.name} has a renderer or parser that the base lacks, and Ollama can't take it away",
            "give a --base that has one too",
        )
    return CreateRequest(
        model=target,
        files=numbered("model", model.weights),
        adapters=numbered("adapter", model.adapters),
        template=wanted.template,
        renderer=wanted.renderer,
        parser=wanted.parser,
        system=wanted.system,
        parameters=wanted.parameters,
        licenses=(wanted.license,) if wanted.license else (),
        messages=wanted.messages,
    )


def _unset(model: Shown, source: Shown) -> tuple[str, ...]:
    """Names of what ``model`` sets and ``source`` does not."""
    parameters = (f"parameter {key}" for key in _only(model.parameters, source.parameters))
    return (*parameters, *(("the system prompt",) if model.system and not source.system else ()))


def _only(here: Parameters, there: Parameters) -> list[str]:
    return sorted(set(here) - set(there))


def _gone(wanted: Shown, shown: Shown) -> tuple[str, ...]:
    """Differences: renderers, parsers and parameters that the new model should not have."""
    left = [part for part in ("renderer", "parser") if getattr(shown, part) and not getattr(wanted, part)]
    extra = _only(shown.parameters, wanted.parameters)
    return (
        *(f"it still has the {part} {getattr(shown, part)}" for part in left),
        *(f"it got a parameter {key}" for key in extra),
    )
