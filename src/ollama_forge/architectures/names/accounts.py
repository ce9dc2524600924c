"""Account for every tensor of a checkpoint and every parameter of its model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from ollama_forge.architectures.names.counterparts import numbers_of
from ollama_forge.architectures.names.layout import INCOMPLETE_HINT, Layout
from ollama_forge.errors import ForgeError


def check_complete(layout: Layout, model_type: str) -> None:
    """Check that the checkpoint holds each parameter of the model.

    Raises:
        ForgeError: names of another model, whole layers that are missing, or a missing tensor.
    """
    blocks = layout.counterparts.blocks
    absent = [block for block in blocks if all(name in layout.lacking for name in _inside(layout.parameters, block))]
    if blocks and len(absent) == len(blocks):
        raise _misnamed_error(layout, model_type)
    if absent:
        raise ForgeError(f"the checkpoint lacks whole layers, such as {absent[0]}", INCOMPLETE_HINT)
    parameters = dict(layout.model.named_parameters())
    for parameter, tensor in layout.lacking.items():
        if parameter not in parameters or _may_be_absent(layout, parameter):
            continue
        if parameter == layout.head:
            raise ForgeError(
                f"the checkpoint lacks {tensor}, and its config does not tie it to the embedding",
                'download or save it again; if the model ties its head, set "tie_word_embeddings": true in config.json',
            )
        raise ForgeError(f"the checkpoint lacks {tensor}", INCOMPLETE_HINT)


def check_known(layout: Layout, model_type: str) -> None:
    """Check that each tensor fills something of the model, or that the model's class skips it.

    Raises:
        ForgeError: some tensors are unknown.
    """
    unknown = {name for name in layout.spelled if not _is_known(layout, name)}
    further = _further_layers(layout, unknown)
    unknown -= {name for names in further.values() for name in names}
    plain = [block for block, names in further.items() if _is_like_a_block(layout, block, names)]
    if plain:
        depth = len(layout.counterparts.blocks)
        raise ForgeError(
            f"the checkpoint has {len(plain)} more layers than its config says ({depth}), such as {plain[0]}",
            "config.json and the weights are of different models: download or save the model again",
        )
    if unknown:
        names = ", ".join(sorted(unknown)[:6])
        raise ForgeError(
            f"{len(unknown)} tensors are unknown to the architecture {model_type!r}: {names}",
            "use the unmodified bf16 release of the model",
        )


def _is_known(layout: Layout, name: str) -> bool:
    targets = layout.spelled[name].targets
    return any(target in layout.spelling.names or layout.spelling.ignores(target) for target in targets)


def _may_be_absent(layout: Layout, parameter: str) -> bool:
    patterns = getattr(layout.model, "_keys_to_ignore_on_load_missing", None) or ()
    return any(re.search(pattern, parameter) for pattern in patterns)


def _inside(names: Iterable[str], path: str) -> Iterator[str]:
    return (name for name in names if name.startswith(f"{path}."))


def _further_layers(layout: Layout, unknown: Iterable[str]) -> dict[str, list[str]]:
    """The tensors of layers behind the last one, which predict more tokens at once and which loading leaves out."""
    depths: dict[str, int] = {}
    for block in layout.counterparts.blocks:
        parent, _, number = block.rpartition(".")
        if number.isdecimal():
            depths[parent] = max(depths.get(parent, 0), int(number) + 1)
    out: dict[str, list[str]] = {}
    for name in unknown:
        target = layout.spelled[name].targets[0]
        for parent, depth in depths.items():
            number = target.removeprefix(f"{parent}.").partition(".")[0]
            if target.startswith(f"{parent}.") and number.isdecimal() and int(number) >= depth:
                out.setdefault(f"{parent}.{number}", []).append(name)
    return out


def _is_like_a_block(layout: Layout, block: str, names: Iterable[str]) -> bool:
    """Whether a further layer has no other tensors than a layer of the model: then the config's depth is wrong."""
    kinds = {numbers_of(target)[0] for targets in _targets(layout, names) for target in targets}
    return any(
        kinds <= {numbers_of(name)[0] for name in _inside(layout.spelling.names, other)}
        for other in layout.counterparts.blocks
        if other.rpartition(".")[0] == block.rpartition(".")[0]
    )


def _targets(layout: Layout, names: Iterable[str]) -> list[tuple[str, ...]]:
    return [layout.spelled[name].targets for name in names]


def _misnamed_error(layout: Layout, model_type: str) -> ForgeError:
    """The error for a checkpoint that holds no tensor of any layer."""
    names = layout.spelling.names
    prefixes: set[str] = set()
    for name in layout.tensors:
        parts = name.split(".")
        tails = [".".join(parts[at:]) for at in range(1, len(parts))]
        inner = layout.spelling.read(tails)
        known = [tail for tail in tails if inner[tail].targets[0] in names]
        prefixes |= {name.removesuffix(max(known, key=len))} if known else set()
        if prefixes:
            break
    if not prefixes:
        return ForgeError(
            f"the tensors do not have the names of a {model_type!r} model; its matrices: {matrix_summary(layout)}",
            "use the model's Hugging Face release, or save it with save_pretrained",
        )
    prefix = min(prefixes, key=len)
    return ForgeError(
        f"the tensor names start with {prefix!r}, which the architecture {model_type!r} does not use",
        f"save the inner model with save_pretrained, or rename the tensors: name.removeprefix({prefix!r})",
    )


def matrix_summary(layout: Layout) -> str:
    """The names of all matrices with ``N`` for numbers, each with its count."""
    counts: dict[str, int] = {}
    for name, shape in layout.tensors.items():
        if len(shape) >= 2:
            pattern = numbers_of(name)[0]
            counts[pattern] = counts.get(pattern, 0) + 1
    return ", ".join(f"{name} (x{count})" if count > 1 else name for name, count in sorted(counts.items()))
