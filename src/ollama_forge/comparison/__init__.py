"""``evaluate``: measure a base model and others made of it side by side, and test their differences."""

from ollama_forge.comparison.main import evaluate
from ollama_forge.comparison.settings import EvaluateSettings

__all__ = ["EvaluateSettings", "evaluate"]
