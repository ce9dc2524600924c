"""Build the wheel and the sdist, check what is in them, install the wheel in a fresh environment, and try it there.

The fresh environment takes the dependencies from the one that runs this script, and the demo model from the cache, so
that nothing is downloaded but a demo model that is not there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ollama_forge"
NOT_IN_SDIST = (".ci/", ".dockerignore", ".github/", ".importlinter", "docker/")  # of the repository alone


def run(*command: str | Path, **options: str | Path | dict[str, str]) -> str:
    """Run a command and return what it prints; end this script with its output if it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return str(done.stdout)


def tracked() -> set[str]:
    """The files of the repository."""
    return set(run("git", "ls-files", cwd=ROOT).splitlines())


def require_equal(what: str, found: Iterable[str], expected: Iterable[str]) -> None:
    """End this script if two sets of files differ."""
    missing, extra = sorted({*expected} - {*found}), sorted({*found} - {*expected})
    if missing or extra:
        sys.exit(f"{what}: missing {missing[:5]} ({len(missing)}), not expected {extra[:5]} ({len(extra)})")


def build(folder: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from the unpacked sdist, as an installer without a wheel would."""
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    sdist = next(folder.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    wheel = next(folder.glob("*.whl"))
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """Every file of the repository is where it belongs, data files among them, and nothing else is."""
    files = tracked()
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    require_equal("the sdist", names - {"PKG-INFO"}, {name for name in files if not name.startswith(NOT_IN_SDIST)})
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        changed = [name for name in names if archive.read(name) != (ROOT / "src" / name).read_bytes()]
    sources = {name.removeprefix("src/") for name in files if name.startswith("src/")}
    require_equal("the wheel", names, sources)
    if changed:
        sys.exit(f"the wheel: other content than the repository: {changed[:5]}")


def fresh_environment(folder: Path, wheel: Path) -> Path:
    """An environment with the wheel, and with the packages of this one; returns its folder of commands."""
    venv.create(folder, with_pip=False)
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    python = commands / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (own / "packages.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")  # a path alone: no .pth in there
    return commands


def try_out(commands: Path) -> None:
    """Run the installed commands, away from the repository."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    options: dict[str, Any] = {"cwd": commands.parent, "env": variables}
    forge = commands / "ollama-forge"
    place = run(commands / "python", "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)", **options).strip()
    if not Path(place).resolve().is_relative_to(commands.parent.resolve()):
        sys.exit(f"the fresh environment takes {PACKAGE} from {place}")
    version = run(forge, "--version", **options).splitlines()[0].split()[-1]
    findings = {finding["name"]: finding for finding in json.loads(run(forge, "doctor", "--json", **options))}
    if not findings["ollama-forge"]["detail"].startswith(version) or not findings["torch"]["ok"]:
        sys.exit(f"doctor says {findings['ollama-forge']} and {findings['torch']}")
    edit_the_demo(forge, options)


def edit_the_demo(forge: Path, options: dict[str, Any]) -> None:
    """Edit the demo model with few prompts, into files of every kind; what they are worth is what the tests tell."""
    few = ("--no-escalate", "--num-instructions", "16", "--max-measured", "4")
    command = ("abliterate", "run", "--model", "demo", "--name", "fresh", "--no-requantize", "--no-ollama", *few)
    report = json.loads(run(forge, *command, "--json", **options))
    folder = options["cwd"] / "abliterate-fresh"
    expected = ("checkpoint/model.safetensors", "refusal.pt", "fresh.gguf", "Modelfile", "report.html", "run.toml")
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing or not report:
        sys.exit(f"run has not made {missing}: {[path.name for path in folder.iterdir()]}")


def main() -> None:
    """Do all checks."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sdist, wheel = build(folder)
        check_contents(sdist, wheel)
        try_out(fresh_environment(folder / "fresh", wheel))
        for path in (sdist, wheel):
            print(f"{path.name}: {path.stat().st_size:,} bytes, complete")
        print("the wheel edits the demo model in a fresh environment")


if __name__ == "__main__":
    main()
