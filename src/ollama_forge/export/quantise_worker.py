"""A worker process of the embedded quantiser: quantises rows of one file into another.

It is a separate process, because the native quantiser holds the interpreter's lock. It is started as a script with the
paths of a source and a target. Each line on stdin is a job; the answer on stdout is ``ok`` or an error message.
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


def float_values(data: bytes | bytearray, source_type: int) -> Any:
    """The values of stored bytes of a plain type, in float32."""
    values = np.frombuffer(data, _PLAIN[source_type])
    if source_type == BF16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def quantise_rows(data: bytes | bytearray, source_type: int, target_type: int, row_length: int) -> bytes:
    """Quantise rows of a plain type to another type.

    Raises:
        ValueError: a value is not finite.
    """
    rows = float_values(data, source_type).reshape(-1, row_length)
    if not np.isfinite(rows).all():
        raise ValueError("NaN or infinite values")
    return bytes(libgguf.quantize_rows(rows, target_type).tobytes())


def main() -> None:
    with (
        Path(sys.argv[1]).open("rb", buffering=0) as source,
        Path(sys.argv[2]).open("r+b", buffering=0) as target,
    ):
        for line in sys.stdin:
            job = json.loads(line)
            try:
                data = read_at(source, job["source_start"], job["source_size"])
                target.seek(job["target_start"])
                write_all(target, quantise_rows(data, job["source_type"], job["target_type"], job["row_length"]))
                answer = "ok"
            except EOFError:
                answer = "the source is truncated"
            except (OSError, ValueError) as error:
                answer = str(error).replace("\n", " ") or type(error).__name__
            print(answer, flush=True)


if __name__ == "__main__":
    main()
