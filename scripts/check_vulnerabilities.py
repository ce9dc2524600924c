"""Look up the installed packages in a database of known vulnerabilities, with pip-audit.

    python scripts/check_vulnerabilities.py

Exits with 1 if a package has one. A machine that reaches no such database, or one that lacks packages, gets a line that
says what was not looked up: that is no failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

SECONDS = 240


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--progress-spinner", "off"]
    try:
        done = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        print(f"vulnerabilities: not looked up (no answer in {SECONDS} seconds)")
        return 0
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"vulnerabilities: not looked up ({reason[:200]})")
        return 0
    return report(packages)


def report(packages: list[dict[str, Any]]) -> int:
    """Print what was found in pip-audit's list of packages. Returns the exit status."""
    known = [package for package in packages if "skip_reason" not in package]
    vulnerable = [package for package in known if package["vulns"]]
    for package in vulnerable:
        for found in package["vulns"]:
            fixed = ", ".join(found["fix_versions"]) or "no version"
            print(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}")
    unknown = len(packages) - len(known)
    print(
        f"vulnerabilities: {len(vulnerable)} of {len(known)} packages have known ones"
        + (f"; {unknown} not looked up, as the database does not have them" if unknown else "")
    )
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())
