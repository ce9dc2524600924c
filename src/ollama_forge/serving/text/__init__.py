"""From the ids of an answer to its text, thought and tool calls; the same above every engine."""
