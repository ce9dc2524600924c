"""Reads requests and writes responses of the OpenAI and Anthropic APIs. Their routes are in the parent package."""
