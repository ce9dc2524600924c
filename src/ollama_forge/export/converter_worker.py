"""A script that runs llama.cpp's ``convert_hf_to_gguf.py`` with two changes, so that it takes more checkpoints.

    python converter_worker.py LLAMA_CPP_DIR FALLBACK ARGUMENTS...

FALLBACK is the name of the pre-tokenizer to write if the converter does not recognise the checkpoint's. The converter
reads config.json with transformers, which drops keys that the converter needs; here it gets all keys of config.json.
The script ends when its stdin is closed: whoever started it may be killed, and start another one for the same file. It
imports nothing from this package, because the converter's libraries come first on the path.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

FELL_BACK = "pre-tokenizer not recognised, falling back to"


def with_fallback(recognise: Any, fallback: str) -> Any:
    """Wrap the converter's ``get_vocab_base_pre``: return ``fallback`` for an unknown pre-tokenizer."""

    @functools.wraps(recognise)
    def recognise_or_fall_back(self: Any, tokenizer: Any) -> Any:
        try:
            return recognise(self, tokenizer)
        except NotImplementedError:
            print(f"{FELL_BACK} {fallback}", file=sys.stderr, flush=True)
            return fallback

    return recognise_or_fall_back


def with_all_keys(load: Any) -> Any:
    """Wrap the converter's static ``load_hparams``: add the keys of config.json that the loaded config lacks."""

    @functools.wraps(load)
    def load_all_keys(folder: Path, *options: Any, **named: Any) -> dict[str, Any]:
        loaded: dict[str, Any] = load(folder, *options, **named)
        path = folder / "config.json"
        return {**json.loads(path.read_text(encoding="utf-8")), **loaded} if path.is_file() else loaded

    return staticmethod(load_all_keys)


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
    wrap_method(spec.name, "load_hparams", with_all_keys)
    wrap_method(spec.name, "get_vocab_base_pre", functools.partial(with_fallback, fallback=fallback))
    sys.argv = [str(script), *sys.argv[3:]]
    module.main()


def wrap_method(script: str, method: str, wrap: Callable[[Any], Any]) -> None:
    """Wrap a method in every class that defines it, in the script (older llama.cpp) or the package ``conversion``."""
    for name, loaded in list(sys.modules.items()):
        if name == script or name.partition(".")[0] == "conversion":
            for value in list(vars(loaded).values()):
                if isinstance(value, type) and method in vars(value) and value.__module__ == name:
                    setattr(value, method, wrap(vars(value)[method]))


def end_with_stdin() -> None:
    """End this process as soon as its stdin is closed."""

    def wait() -> None:
        while os.read(0, 1):  # sys.stdin has a lock, which the end of the interpreter would wait for
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    end_with_stdin()
    main()
