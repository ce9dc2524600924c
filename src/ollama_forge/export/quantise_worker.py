"""A worker process of the quantiser (the native encoder holds the interpreter's lock): rows of one file into another.

Started as a script with a source and a target; each line on stdin is a job, answered with ``ok`` or what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import libgguf
import numpy as np

F32, F16, BF16 = 0, 1, 30
_PLAIN: dict[int, Any] = {F32: np.float32, F16: np.float16, BF16: np.uint16}


def decoded(data: bytes, kind: int) -> Any:
    """Values in float32."""
    values = np.frombuffer(data, _PLAIN[kind])
    if kind == BF16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def encode(data: bytes, kind: int, to: int, row_length: int) -> bytes:
    """Rows of a plain type in another type.

    Raises:
        ValueError: values that are not finite.
    """
    rows = decoded(data, kind).reshape(-1, row_length)
    if not np.isfinite(rows).all():
        raise ValueError("NaN or infinite values")
    return bytes(libgguf.quantize_rows(rows, to).tobytes())


def read_exactly(handle: int, size: int, place: int) -> bytes:
    parts = []
    while size:
        part = os.pread(handle, size, place)
        if not part:
            raise ValueError("the source is cut short")
        parts.append(part)
        size, place = size - len(part), place + len(part)
    return b"".join(parts)


def write_exactly(handle: int, data: bytes, place: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view, place)
        view, place = view[done:], place + done


def main() -> None:
    source, target = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_WRONLY)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            data = read_exactly(source, job["size"], job["start"])
            write_exactly(target, encode(data, job["kind"], job["to"], job["row_length"]), job["target"])
            answer = "ok"
        except (OSError, ValueError) as error:
            answer = str(error).replace("\n", " ") or type(error).__name__
        print(answer, flush=True)


if __name__ == "__main__":
    main()
