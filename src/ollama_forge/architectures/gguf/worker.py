"""A script that asks llama.cpp's converter what it would write for a config, without weights.

    python worker.py LLAMA_CPP_DIR

Each line on stdin is a request, a JSON object with ``op``; the answer on stdout is one JSON object, with ``error`` if
the request failed. The script writes to the working directory, which is to be empty. The converter's libraries come
first on the path, so it imports only such modules of this package that import no library but numpy. The converter is
lazy: it builds what it would write from tensors without values, and a tensor's values are made up, and passed through
its code, where they are asked for.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

MakeValues = Callable[[str, tuple[int, ...]], Any]
Shapes = Mapping[str, list[int]]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the converter prints to stdout
    folder = Path(sys.argv[1])
    sys.path[:0] = [str(folder), str(folder / "gguf-py")]
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = OPERATIONS[request.pop("op")](**request)
        except BaseException as error:  # the converter raises anything, SystemExit too
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def classes(arch: str) -> dict[str, Any]:
    """The Hugging Face architectures that the converter writes as a GGUF architecture, and words that it knows."""
    import conversion
    import gguf

    name = next((kind.name for kind, spelled in gguf.MODEL_ARCH_NAMES.items() if spelled == arch), None)
    named = f"MODEL_ARCH.{name}"
    paths = Path(str(conversion.__file__)).parent.glob("*.py")
    sources = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    modules = {module for module, source in sources.items() if named in source}  # to import all takes seconds
    found = []
    for architecture, module in conversion.TEXT_MODEL_MAP.items():
        with contextlib.suppress(Exception):  # a class may want a package that is not installed
            if module in modules and conversion.get_model_class(architecture).model_arch.name == name:
                found.append(architecture)
    words = [word for module in ("base", *modules) for word in re.findall(r' == "(\w+)"', sources[module])]
    return {"classes": found, "words": sorted(set(words))}


def architecture(names: list[str]) -> dict[str, Any]:
    """The GGUF architecture that the converter writes the first known Hugging Face architecture as; None if none is."""
    import conversion
    import gguf

    known = next((name for name in names if name in conversion.TEXT_MODEL_MAP), None)
    return {"architecture": known and gguf.MODEL_ARCH_NAMES[conversion.get_model_class(known).model_arch]}


def metadata(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """What the converter derives from a config: the metadata without the tokenizer's, and the computed vectors.

    ``absent`` are the paths that the converter looks for in the config and does not find.
    """
    model = converter(config, shapes, no_values)
    absent: dict[tuple[str, ...], None] = {}
    model.hparams = Watched(model.hparams, absent)
    model.rope_parameters = Watched(model.rope_parameters, absent, ("rope_parameters",))
    extra = dict(model.generate_extra_tensors())  # it may write metadata too
    model.set_gguf_parameters()
    pairs = (pair for part in model.gguf_writer.kv_data for pair in part.items())
    values = {key: plain(value.value) for key, value in pairs}
    return {"values": values, "extra": computed(extra), "absent": list(absent)}


class Watched(dict[str, Any]):
    """A part of a config that records the absent paths that are looked for."""

    def __init__(
        self, part: Mapping[str, Any], absent: dict[tuple[str, ...], None], path: tuple[str, ...] = ()
    ) -> None:
        super().__init__(
            (key, Watched(value, absent, (*path, key)) if isinstance(value, dict) else value)
            for key, value in part.items()
        )
        self.absent, self.path = absent, path

    def note(self, key: str) -> None:
        if not super().__contains__(key):
            self.absent[*self.path, key] = None

    def __contains__(self, key: object) -> bool:
        self.note(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.note(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.note(key)
        return super().get(key, default)


def computed(tensors: Mapping[str, Any]) -> dict[str, list[float]]:
    """The values of those vectors that the converter has computed from the config."""
    import torch

    return {name: data.tolist() for name, data in tensors.items() if type(data) is torch.Tensor and data.dim() == 1}


def tensors(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Names and shapes, the row length last, of the tensors that the converter writes."""
    model = converter(config, shapes, no_values)
    written: dict[str, list[int]] = {}
    with tokenizer(config):
        for name, data in itertools.chain(model.generate_extra_tensors(), model.get_tensors()):
            block = next((int(part) for part in name.split(".") if part.isdecimal()), None)
            written.update((new, list(made.shape)) for new, made in model.modify_tensors(data, name, block))
    return {"shapes": written}


@contextlib.contextmanager
def tokenizer(config: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block, there is a tokenizer.json with as many tokens as the model has; the converter counts them."""
    tokens = {str(number): number for number in range({**config, **config.get("text_config", {})}["vocab_size"])}
    path = Path("tokenizer.json")
    path.write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": []}), encoding="utf-8")
    try:
        yield
    finally:
        path.unlink()


def no_values(name: str, shape: tuple[int, ...]) -> Any:
    raise ValueError(f"the converter reads the values of {name}")


def converter(config: Mapping[str, Any], shapes: Shapes, values: MakeValues) -> Any:
    """The converter's model for a config, with lazy tensors of these names and shapes.

    Layers that predict further tokens (MTP) are left out, as transformers leaves them out.

    Args:
        values: makes the values of a tensor, given its name and shape, where they are needed.
    """
    import conversion
    import gguf
    import torch
    from conversion.base import LazyTorchTensor, ModelBase, ModelType, get_model_architecture

    def lazy(name: str, shape: tuple[int, ...]) -> Any:
        meta = LazyTorchTensor.meta_with_dtype_and_shape(torch.float32, shape)
        return LazyTorchTensor(meta=meta, args=(name, shape), func=values)

    def index_tensors(self: Any, *_: Any, **_options: Any) -> dict[str, Callable[[], Any]]:
        items = (
            self.filter_tensors((name, lambda name=name, shape=shape: lazy(name, tuple(shape))))
            for name, shape in shapes.items()
        )
        return {item[0]: item[1] for item in items if item is not None}

    ModelBase.index_tensors = index_tensors
    base = conversion.get_model_class(get_model_architecture(dict(config), ModelType.TEXT))
    model_class = type(base.__name__, (base,), {"model_arch": base.model_arch, "no_mtp": True})
    Path("config.json").write_text(json.dumps(config), encoding="utf-8")
    hparams = {**config, **ModelBase.load_hparams(Path.cwd(), False)}  # transformers drops old keys that it looks for
    return model_class(Path.cwd(), gguf.LlamaFileType.ALL_F32, Path("out.gguf"), hparams=hparams)


def places(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """For each tensor that the converter writes: its shape, and the parts that fill it, or why it has none.

    The parts are those of ``ollama_forge.checkpoints.gguf.layout``. A tensor that is made from the config has none.
    """
    import gguf

    from ollama_forge.architectures.gguf.places import NotMovedError, Program, parts_of

    program = Program()
    model = converter(config, shapes, program.values)
    outputs: dict[str, Any] = {}
    writer, quants = cast("Any", gguf.GGUFWriter), cast("Any", gguf.quants)
    writer.add_tensor = lambda _, name, tensor, **options: outputs.update({name: tensor})
    quants.quantize = lambda data, kind: data  # the values as they are before they are rounded
    with tokenizer(config):
        model.prepare_tensors()
    known: dict[str, tuple[list[str], list[Any], str]] = {}
    answer: dict[str, Any] = {}
    for name in list(outputs):
        output = outputs.pop(name)
        shape = list(output.shape) or [1]
        if not isinstance(output, gguf.LazyBase):
            answer[name] = {"shape": shape, "parts": []}
            continue
        key, inputs = program.inputs(output)
        if key not in known:
            try:
                parts, why = [asdict(part) for part in parts_of(program, output, inputs)], ""
            except NotMovedError as error:
                parts, why = [], str(error)
            known[key] = list(inputs), parts, why
        names, parts, why = known[key]
        named = dict(zip(names, inputs, strict=True))
        answer[name] = {"shape": shape, "parts": [{**part, "tensor": named[part["tensor"]]} for part in parts]}
        if why:
            answer[name]["computed"] = why
    return {"tensors": answer}


def plain(value: Any) -> Any:
    """A metadata value as JSON."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, bool | float | str) or value is None else int(value)


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "classes": classes,
    "architecture": architecture,
    "metadata": metadata,
    "tensors": tensors,
    "places": places,
}

if __name__ == "__main__":
    main()
