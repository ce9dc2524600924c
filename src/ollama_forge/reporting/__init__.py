"""``report.html``: a page made from the JSON object of a report alone, so that it shows nothing that is not in it."""

from ollama_forge.reporting.page import render

__all__ = ["render"]
