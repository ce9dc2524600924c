"""The command ``ollama-forge doctor``."""

from __future__ import annotations

import json

import click

from ollama_forge.cli.base import Command
from ollama_forge.cli.options import json_option


@click.command("doctor", cls=Command)
@json_option
def doctor(as_json: bool) -> None:
    """Show what is installed, what is missing, and what needs the missing parts."""
    from ollama_forge.doctor import examine
    from ollama_forge.records import to_json

    findings = examine()
    if as_json:
        print(json.dumps([to_json(finding) for finding in findings]))
        return
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = "ok" if finding.ok else "--"
        print(f"{mark}  {finding.name:<{width}}  {finding.detail}")
        if not finding.ok and finding.cost:
            print(f"    {'':<{width}}  {finding.cost}")
    for remedy in dict.fromkeys(finding.remedy for finding in findings if not finding.ok and finding.remedy):
        names = ", ".join(finding.name for finding in findings if not finding.ok and finding.remedy == remedy)
        print(f"to install {names}: {remedy}")
