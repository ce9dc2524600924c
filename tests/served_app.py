"""The application around a served model."""

from __future__ import annotations

from ollama_forge.serving.http.app import build_app as app_for

__all__ = ["app_for"]
