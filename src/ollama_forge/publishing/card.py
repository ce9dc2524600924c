"""The model card of a repository: that of the edited model, with a list of the files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WHAT = {
    "checkpoint": "the edited checkpoint, for transformers, vLLM and other programs that load a repository of the Hub",
    "gguf": "the edited model for llama.cpp and Ollama: `ollama run hf.co/{repo}`",
    "adapter": "the edit as a GGUF adapter: `ollama create NAME -f Modelfile` adds it to the model in Ollama",
    "edit": "the factors of the edit and its direction; "
    "`ollama-forge abliterate apply --model {base} --edit FILE` makes the checkpoint again",
    "report": "what the edit changed, measured on prompts that took no part in it",
}


def repository_card(text: str, repo: str, report: Mapping[str, Any], parts: Mapping[str, str]) -> str:
    """The card.

    Args:
        text: the card of the edited model; "" if it has none, as an adapter has.
        report: the content of the run's ``report.json``.
        parts: the part that each file of the repository belongs to, by path.
    """
    from huggingface_hub import ModelCard, ModelCardData

    card = ModelCard(text) if text else ModelCard(f"---\n{ModelCardData(tags=['ollama-forge']).to_yaml()}\n---\n")
    data: Any = card.data  # its fields are those of the YAML
    found = dict.fromkeys(parts.values())
    if "checkpoint" not in found:
        data.library_name = None
    if found.keys() & {"gguf", "adapter"}:
        data.tags = list(dict.fromkeys([*(data.get("tags") or []), "gguf"]))
    body = card.text.strip() or _adapter_body(report)
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n\n{_files(repo, parts, data.get('base_model'))}"


def _files(repo: str, parts: Mapping[str, str], base: Any) -> str:
    lines = ["## Files", ""]
    for part, what in _WHAT.items():
        paths = [path for path, of in parts.items() if of == part]
        if paths:
            shown = "all other files" if part == "checkpoint" else ", ".join(f"`{path}`" for path in paths)
            lines.append(f"- {shown}: {what.format(repo=repo, base=base if isinstance(base, str) else 'SOURCE')}.")
    return "\n".join([*lines, ""])


def _adapter_body(report: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            f"# {report['name']}",
            "",
            f"An edit of `{report['model']}` along its refusal direction, made as an adapter with ollama-forge "
            f"{report['version']}. The weights of the model are not part of this repository.",
            "",
            "This is a research artefact. The licence of the base model applies to it. Its users are responsible for "
            "how they use it.",
        ]
    )
