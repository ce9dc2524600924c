"""A script that asks llama.cpp's converter what it would write for a config, without weights.

    python worker.py LLAMA_CPP_DIR

Each line on stdin is a request, a JSON object with ``op``; the answer on stdout is one JSON object, with ``error`` if
the request failed. The script imports nothing from this package, because the converter's libraries come first on the
path. The converter is lazy: it builds what it would write from tensors without values, and a tensor's values are made
up, and passed through its code, where they are asked for.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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


def classes() -> dict[str, list[str]]:
    """For each GGUF architecture, the Hugging Face architectures that the converter writes as it."""
    import conversion
    import gguf

    found: dict[str, list[str]] = {}
    for name in conversion.TEXT_MODEL_MAP:
        with contextlib.suppress(Exception):  # a class may want a package that is not installed
            arch = conversion.get_model_class(name).model_arch
            found.setdefault(gguf.MODEL_ARCH_NAMES[arch], []).append(name)
    return found


def metadata(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """What the converter derives from a config: the metadata, without those about the tokenizer, and made-up tensors."""
    model = converter(config, shapes, no_values)
    extra = dict(model.generate_extra_tensors())  # it may write metadata too
    model.set_gguf_parameters()
    pairs = (pair for part in model.gguf_writer.kv_data for pair in part.items())
    return {"values": {key: plain(value.value) for key, value in pairs}, "extra": computed(extra)}


def computed(tensors: Mapping[str, Any]) -> dict[str, list[float]]:
    """The values of those vectors that the converter has computed from the config."""
    import torch

    return {name: data.tolist() for name, data in tensors.items() if type(data) is torch.Tensor and data.dim() == 1}


def tensors(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Names and shapes, the row length last, of the tensors that the converter writes."""
    model = converter(config, shapes, no_values)
    written: dict[str, list[int]] = {}
    for name, data in itertools.chain(model.generate_extra_tensors(), model.get_tensors()):
        block = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        written.update((new, list(made.shape)) for new, made in model.modify_tensors(data, name, block))
    return {"shapes": written}


def no_values(name: str, shape: tuple[int, ...]) -> Any:
    raise ValueError(f"the converter reads the values of {name}")


def converter(config: Mapping[str, Any], shapes: Shapes, values: MakeValues) -> Any:
    """The converter's model for a config, with lazy tensors of these names and shapes.

    Args:
        values: makes the values of a tensor, given its name and shape, where they are needed.
    """
    import conversion
    import gguf
    import torch
    from conversion.base import LazyTorchTensor, ModelType, get_model_architecture

    def lazy(name: str, shape: tuple[int, ...]) -> Any:
        meta = LazyTorchTensor.meta_with_dtype_and_shape(torch.float32, shape)
        return LazyTorchTensor(meta=meta, args=(name,), func=lambda name: values(name, shape))

    def index_tensors(self: Any, remote_hf_model_id: str | None = None) -> dict[str, Callable[[], Any]]:
        items = (
            self.filter_tensors((name, lambda name=name, shape=shape: lazy(name, tuple(shape))))
            for name, shape in shapes.items()
        )
        return {item[0]: item[1] for item in items if item is not None}

    base = conversion.get_model_class(get_model_architecture(dict(config), ModelType.TEXT))
    model_class = type(base.__name__, (base,), {"index_tensors": index_tensors, "model_arch": base.model_arch})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return model_class(Path(folder), gguf.LlamaFileType.ALL_F32, Path(folder) / "out.gguf")


def plain(value: Any) -> Any:
    """A metadata value as JSON."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, bool | float | str) or value is None else int(value)


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "classes": classes,
    "metadata": metadata,
    "tensors": tensors,
}

if __name__ == "__main__":
    main()
