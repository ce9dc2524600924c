"""Give a model in Ollama the template of another model; its weights stay."""

from __future__ import annotations

from dataclasses import replace

from ollama_forge.errors import ForgeError
from ollama_forge.names import check_ollama_name
from ollama_forge.ollama.client import Client, CreateRequest, Shown
from ollama_forge.ollama.parameters import Parameters
from ollama_forge.ollama.register import Registered, differences, shown_after


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
    wanted = replace(model, template=source.template, renderer=source.renderer, parser=source.parser)
    if not template_only:
        wanted = replace(
            wanted,
            parameters={**model.parameters, **source.parameters},
            system=source.system or model.system,
        )
    request = _on_top(model, wanted, target) if _grows(model, source) else _anew(model, wanted, target)
    client.make(request)
    shown = shown_after(client, target)
    if not request.source:
        wanted = replace(wanted, weights=(), adapters=())  # Ollama may store files anew, in another order
    kept = tuple(f"{key} stays as it was" for key in _unset(model, source)) if not template_only else ()
    return Registered(
        target,
        shown,
        template_from=base,
        notes=(f"template copied from {base}", *kept),
        differences=(*differences(wanted, shown), *_gone(wanted, shown)),
    )


def _require_model(client: Client, name: str, option: str) -> Shown:
    shown = client.shown(name)
    if shown is None:
        raise ForgeError(f"{option} {name}: Ollama has no such model", "`ollama list` shows what it has")
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
        files=_numbered("model", model.weights),
        adapters=_numbered("adapter", model.adapters),
        template=wanted.template,
        renderer=wanted.renderer,
        parser=wanted.parser,
        system=wanted.system,
        parameters=wanted.parameters,
        licenses=(wanted.license,) if wanted.license else (),
        messages=wanted.messages,
    )


def _numbered(stem: str, digests: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((f"{stem}-{number}.gguf", digest) for number, digest in enumerate(digests))


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
