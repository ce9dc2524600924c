"""The application around a served model."""

from __future__ import annotations

from fastapi import FastAPI

from ollama_forge.serving.http import anthropic, openai, responses
from ollama_forge.serving.served import ServedModel


def app_for(model: ServedModel) -> FastAPI:
    app = FastAPI()
    for module in (openai, responses, anthropic):
        app.include_router(module.routes(model))
    return app
