"""``run``: preflight, then the stages in order, each of them resumable, and the report."""

from ollama_forge.pipeline.main import run
from ollama_forge.pipeline.settings import RunSettings

__all__ = ["RunSettings", "run"]
