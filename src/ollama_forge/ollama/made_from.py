"""What a new model in Ollama gets from the Ollama model that was edited: everything but the edited weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ollama_forge.errors import ForgeError
from ollama_forge.ollama.client import Client
from ollama_forge.ollama.parameters import NO_PARAMETERS, STOP, Parameters
from ollama_forge.ollama.shown import CreateRequest, Shown
from ollama_forge.ollama.template import TemplatePlan, template_of
from ollama_forge.sources.ollama_store import StoredModel


def create_request(
    name: str,
    plan: TemplatePlan,
    *,
    system: str = "",
    parameters: Parameters = NO_PARAMETERS,
    source: StoredModel | None = None,
) -> CreateRequest:
    """The request that creates a model, without the files of its weights and projectors.

    Args:
        plan: template, renderer, parser and stop parameters, also in place of those of ``source``.
        system, parameters: the user's; they take precedence over those of ``plan`` and ``source``.
        source: the Ollama model that was edited, whose layers the new model gets; None if it was none.
    """
    stops = {STOP: plan.stop} if plan.stop else {}
    request = CreateRequest(
        model=name,
        template=plan.template,
        system=system,
        renderer=plan.renderer,
        parser=plan.parser,
        parameters={**stops, **parameters},
    )
    if source is None:
        return request
    kept = {key: value for key, value in source.parameters.items() if key != STOP}
    return replace(
        request,
        adapters=numbered("adapter", (blob.digest for blob in source.adapters)),
        drafts=numbered("draft", (blob.digest for blob in source.drafts)),
        system=system or source.system,
        parameters={**kept, **request.parameters},
        licenses=source.licenses,
        messages=source.messages,
        requires=source.requires,
    )


def send_blobs(client: Client, source: StoredModel) -> None:
    """Upload those projectors, adapters and drafts of ``source`` that this Ollama lacks."""
    for blob in (*source.projectors, *source.adapters, *source.drafts):
        client.send(blob.path, blob.digest)


def require_one_adapter(source: StoredModel) -> None:
    """Raise ForgeError if ``source`` has more adapters than Ollama takes in creating a model."""
    if len(source.adapters) > 1:
        raise ForgeError(
            f"{source.name} has {len(source.adapters)} adapters, and Ollama takes one with new weights",
            "add --as-adapter, which keeps them all, or edit the model that they were added to",
        )


def require_source(client: Client, source: StoredModel) -> None:
    """Raise ForgeError unless this Ollama has ``source`` with the weights that were edited; it pulls what it lacks."""
    shown = client.shown(source.name)
    if shown is None or source.weights.digest not in shown.weights:
        having = "has no" if shown is None else "has another"
        raise ForgeError(
            f"the Ollama at {client.url} {having} {source.name}; an adapter is added to the model that was edited",
            "set OLLAMA_HOST to the Ollama whose store it is in, or leave out --as-adapter",
        )


def expected(request: CreateRequest) -> Shown:
    """What Ollama should show of a model made from files; the digest under which it stores weights is its own."""
    return Shown(
        request.model,
        template=request.template,
        renderer=request.renderer,
        parser=request.parser,
        parameters=request.parameters,
        system=request.system,
        license="\n".join(request.licenses),
        messages=request.messages,
        adapters=tuple(digest for _, digest in request.adapters),
        requires=request.requires,
    )


def expected_with_adapter(
    name: str, source: StoredModel, adapter: str, parameters: Parameters = NO_PARAMETERS
) -> Shown:
    """What Ollama should show of a model that is ``source`` with one more adapter, which has this digest."""
    kept = expected(create_request(name, template_of(source), parameters=parameters, source=source))
    weights = tuple(blob.digest for blob in (source.weights, *source.projectors))
    return replace(kept, weights=weights, adapters=(*kept.adapters, adapter))


def numbered(stem: str, digests: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Names and digests of blobs, for a request."""
    return tuple((f"{stem}-{number}.gguf", digest) for number, digest in enumerate(digests))
