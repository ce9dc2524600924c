"""How a model is built and what an edit would change in it, without loading its weights."""

from ollama_forge.inspection.inspection import Inspection
from ollama_forge.inspection.main import inspect

__all__ = ["Inspection", "inspect"]
