"""Check that the lower bounds of ``pyproject.toml`` are the versions that are installed, in ``make test-lowest``.

A bound below the installed version was not tried: other packages rule it out.
"""

from __future__ import annotations

import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def main() -> None:
    """Name each package whose bound is not the installed version, and exit with 1 if there is one."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    wrong = []
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        bound = next(Version(part.version) for part in requirement.specifier if part.operator == ">=")
        installed = Version(metadata.version(requirement.name))
        if installed != bound:
            wrong.append(f"{line}: {installed} is installed")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
