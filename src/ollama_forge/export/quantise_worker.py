"""A worker process of the quantiser: encodes rows of one file into another.

It is a process because the native encoder holds the interpreter's lock. It is started as a script with a source and a
target. Each line on stdin is a job; the answer on stdout is ``ok`` or what went wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import libgguf
import numpy as np

from ollama_forge.files import read_at, write_all

F32, F16, BF16 = 0, 1, 30
_PLAIN: dict[int, Any] = {F32: np.float32, F16: np.float16, BF16: np.uint16}


def decoded(data: bytes | bytearray, kind: int) -> Any:
    """The values of plain bytes, in float32."""
    values = np.frombuffer(data, _PLAIN[kind])
    if kind == BF16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def encode(data: bytes | bytearray, kind: int, to: int, row_length: int) -> bytes:
    """Encode rows of a plain type in another type.

    Raises:
        ValueError: values that are not finite.
    """
    rows = decoded(data, kind).reshape(-1, row_length)
    if not np.isfinite(rows).all():
        raise ValueError("NaN or infinite values")
    return bytes(libgguf.quantize_rows(rows, to).tobytes())


def main() -> None:
    with (
        Path(sys.argv[1]).open("rb", buffering=0) as source,
        Path(sys.argv[2]).open("r+b", buffering=0) as target,
    ):
        for line in sys.stdin:
            job = json.loads(line)
            try:
                data = read_at(source, job["start"], job["size"])
                target.seek(job["target"])
                write_all(target, encode(data, job["kind"], job["to"], job["row_length"]))
                answer = "ok"
            except EOFError:
                answer = "the source is truncated"
            except (OSError, ValueError) as error:
                answer = str(error).replace("\n", " ") or type(error).__name__
            print(answer, flush=True)


if __name__ == "__main__":
    main()
