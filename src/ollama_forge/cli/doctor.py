"""The command ``ollama-forge doctor``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from ollama_forge.cli.base import Command
from ollama_forge.cli.options import json_option


@click.command("doctor", cls=Command)
@click.option(
    "--report", is_flag=True, help="Print what a bug report needs instead, without paths, names, prompts and tokens."
)
@json_option
@click.pass_context
def doctor(ctx: click.Context, report: bool, as_json: bool) -> None:
    """Show what is installed, what is missing, and what needs the missing parts."""
    if report:
        _report(ctx, as_json)
        return
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


def _report(ctx: click.Context, as_json: bool) -> None:
    from ollama_forge.cli.config import set_options
    from ollama_forge.doctor import system_report

    told = {**system_report(), "options": set_options(ctx)}
    if as_json:
        print(json.dumps(told))
        return
    print("Put these lines into the report, with the command that failed and what it printed with --debug.")
    print("Replace names, paths and prompts in those two; below there are none.\n")
    for line in _lines(told):
        print(line)


def _lines(told: dict[str, Any]) -> Iterator[str]:
    """A Markdown list."""
    for name, value in told.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {part or 'not installed'}" for key, part in value.items())
        elif isinstance(value, list):
            value = ", ".join(value)
        yield f"- {name}: {value or 'none'}"
