"""Text of prompts and answers: chat templates, tokens and their bytes, where a thought ends, stop strings."""
