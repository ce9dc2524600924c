"""Runs llama.cpp's ``convert_hf_to_gguf.py`` in its own process, supplying a pre-tokenizer where it recognises none.

    python run_converter.py LLAMA_CPP_DIR FALLBACK ARGUMENTS...

Imports nothing of this package: the converter's libraries come first on the path.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

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
    for name, loaded in list(sys.modules.items()):  # the class has lived in the script itself and in its package
        if name == spec.name or name.partition(".")[0] == "conversion":
            for kind in list(vars(loaded).values()):
                if isinstance(kind, type) and "get_vocab_base_pre" in vars(kind):
                    recognise = vars(kind)["get_vocab_base_pre"]
                    if not hasattr(recognise, "__wrapped__"):
                        setattr(kind, recognise.__name__, with_fallback(recognise, fallback))
    sys.argv = [str(script), *sys.argv[3:]]
    module.main()


if __name__ == "__main__":
    main()
