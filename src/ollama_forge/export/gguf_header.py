"""A look at a GGUF file's header before it is uploaded: is it one, is it whole, of what type."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ollama_forge.errors import ForgeError

_MAGIC = b"GGUF"
_TEXT, _LIST = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEMPLATE = "tokenizer.chat_template"
_KEPT = ("general.alignment", "general.file_type", "general.type", "split.count", _TEMPLATE)
_MOST = 1 << 32  # no count or length of a whole file is larger
_UNQUANTISED = {0: "F32", 1: "F16", 32: "BF16"}


@dataclass(frozen=True)
class GgufHeader:
    """Of a file that is whole.

    Attributes:
        file_type: llama.cpp's number of the type most tensors have; None where the file doesn't say.
        has_chat_template: whether it brings one.
    """

    file_type: int | None
    has_chat_template: bool

    @property
    def unquantised(self) -> bool:
        """Whether Ollama quantises it."""
        return self.file_type in _UNQUANTISED

    @property
    def type_name(self) -> str:
        from gguf import LlamaFileType

        if self.file_type is None:
            return "of an unnamed type"
        try:
            return LlamaFileType(self.file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        except ValueError:
            return "of an unknown type"


def read_header(path: Path) -> GgufHeader:
    """Check that ``path`` is a model that Ollama can be given, without reading its tensors.

    Raises:
        ForgeError: no file, not GGUF, cut short, one of several parts, or an adapter.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(4) != _MAGIC:
                raise ForgeError(f"{path} is not a GGUF file", "give the .gguf that run or llama.cpp wrote")
            kept, end = _read(file)
    except OSError as error:
        raise ForgeError(f"{path} cannot be read: {error.strerror or error}", "check the path") from None
    except (struct.error, EOFError, ValueError, OverflowError):
        raise _cut_short(path) from None
    if end > size:
        raise _cut_short(path)
    if kept.get("split.count", 0) not in (0, 1):
        raise ForgeError(f"{path} is one of {kept['split.count']} parts", "join them: llama-gguf-split --merge")
    if kept.get("general.type") == "adapter":
        raise ForgeError(f"{path} is a LoRA adapter, not a model", "give the model's own .gguf")
    kind = kept.get("general.file_type")
    return GgufHeader(kind if isinstance(kind, int) else None, bool(kept.get(_TEMPLATE)))


def _cut_short(path: Path) -> ForgeError:
    return ForgeError(f"{path} is cut short or damaged", "fetch or write it again; nothing was sent to Ollama")


def _read(file: BinaryIO) -> tuple[dict[str, int | float | str], int]:
    """The values of ``_KEPT``, and the size that the tensors need."""
    version, tensors, pairs = _unpack(file, "IQQ")
    if version not in (2, 3) or tensors > _MOST or pairs > _MOST:
        raise ValueError
    kept: dict[str, int | float | str] = {}
    for _ in range(pairs):
        key = _text(file)
        (kind,) = _unpack(file, "I")
        if key in _KEPT and kind != _LIST:
            kept[key] = _text(file) if kind == _TEXT else _unpack(file, _SCALARS.get(kind, ""))[0]
        else:
            _skip(file, kind)
    ends = [_tensor_end(file) for _ in range(tensors)]
    alignment = int(kept.get("general.alignment", 32)) or 32
    start = -(-file.tell() // alignment) * alignment
    return kept, start + max(ends, default=0)


def _tensor_end(file: BinaryIO) -> int:
    """Where a tensor ends, from where the data begins; of a type unknown here, where it begins."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    _text(file)
    (dimensions,) = _unpack(file, "I")
    if dimensions > 8:
        raise ValueError
    count = 1
    for length in _unpack(file, "Q" * dimensions):
        count *= length
    kind, offset = _unpack(file, "IQ")
    try:
        per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        return int(offset)
    return int(offset) + count // per_block * block_bytes


def _skip(file: BinaryIO, kind: int) -> None:
    if kind == _TEXT:
        _text(file)
    elif kind == _LIST:
        element, count = _unpack(file, "IQ")
        if count > _MOST:
            raise ValueError
        if element in _SCALARS:
            file.seek(count * struct.calcsize(_SCALARS[element]), 1)
        else:
            for _ in range(count):
                _skip(file, element)
    elif kind in _SCALARS:
        _unpack(file, _SCALARS[kind])
    else:
        raise ValueError


def _text(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    if length > _MOST:
        raise ValueError
    data = file.read(length)
    if len(data) < length:
        raise EOFError
    return data.decode("utf-8", "replace")


def _unpack(file: BinaryIO, form: str) -> tuple[int, ...]:
    layout = struct.Struct("<" + form)
    return layout.unpack(file.read(layout.size))
