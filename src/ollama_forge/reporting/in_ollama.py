"""What became of the model in Ollama: its notes, and its prompts beside those of the chat template."""

from __future__ import annotations

from ollama_forge.reporting.blocks import section, table
from ollama_forge.reporting.entry import Entry, count, words
from ollama_forge.reporting.markup import Child, Html, tag


def in_ollama(report: Entry) -> Html | None:
    """The section on the model in Ollama; None where there is none."""
    made = report["ollama"]["made"]
    if not made:
        return None
    notes = [tag("li", words(note)) for key in ("notes", "differences") for note in made[key]]
    return section(
        "In Ollama", tag("p", *_prompts(made["prompts"])), _difference(made), tag("ul", notes) if notes else None
    )


def _prompts(found: Entry) -> tuple[Child, ...]:
    if not found["compared"].value:
        return ("Its prompts were not compared: ", words(found["problem"]), ".")
    tool = ", one of them with a tool" if found["with_tools"].value else ""
    asked = (count(found["equal"]), " of ", count(found["compared"]), f" conversations{tool}.")
    return ("Ollama renders the same prompt as the chat template of ", words(found["owner"]), " in ", *asked)


def _difference(made: Entry) -> Child:
    """The first difference, side by side."""
    found = made["prompts"]["difference"]
    if not found:
        return None
    rows = [
        (words(made["prompts"]["owner"]), tag("code", words(found["expected"]))),
        ("Ollama", tag("code", words(found["found"]))),
    ]
    return table("Where the prompts differ first", ("rendered by", "text around the difference"), rows)
