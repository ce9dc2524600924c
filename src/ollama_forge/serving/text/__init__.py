"""Turns the tokens of an answer into text, thinking and tool calls; the same for every engine."""
