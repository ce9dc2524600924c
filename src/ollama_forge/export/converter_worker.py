"""Runs llama.cpp's ``convert_hf_to_gguf.py`` in its own process, supplying a pre-tokenizer where it recognises none.

    python converter_worker.py LLAMA_CPP_DIR FALLBACK ARGUMENTS...

FALLBACK is the pre-tokenizer's name, or ``-`` to leave the vocabulary out.
Imports nothing of this package: the converter's libraries come first on the path.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NO_VOCABULARY = "-"
FELL_BACK = "pre-tokenizer not recognised, falling back to"


def with_fallback(answer: Any, fallback: str) -> Any:
    """The converter's recognition, answering ``fallback`` instead of giving up."""

    @functools.wraps(answer)
    def recognise(self: Any, tokenizer: Any) -> Any:
        try:
            return answer(self, tokenizer)
        except NotImplementedError:
            print(f"{FELL_BACK} {fallback}", file=sys.stderr, flush=True)
            return fallback

    return recognise


def without_vocabulary(write: Any) -> Any:
    """The converter's writing of a model, its vocabulary left to whoever takes the file over."""

    @functools.wraps(write)
    def write_rest(self: Any) -> Any:
        self.set_vocab = self._set_vocab_none
        return write(self)

    return write_rest


def main() -> None:
    folder, fallback = Path(sys.argv[1]), sys.argv[2]
    script = folder / "convert_hf_to_gguf.py"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("convert_hf_to_gguf", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if fallback == NO_VOCABULARY:
        replace(spec.name, "write", without_vocabulary)
    else:
        replace(spec.name, "get_vocab_base_pre", functools.partial(with_fallback, fallback=fallback))
    sys.argv = [str(script), *sys.argv[3:]]
    module.main()


def replace(script: str, method: str, change: Callable[[Any], Any]) -> None:
    """Change a method where it is defined: its class has lived in the script itself and in its package."""
    for name, loaded in list(sys.modules.items()):
        if name == script or name.partition(".")[0] == "conversion":
            for kind in list(vars(loaded).values()):
                if isinstance(kind, type) and method in vars(kind) and kind.__module__ == name:
                    setattr(kind, method, change(vars(kind)[method]))


if __name__ == "__main__":
    main()
