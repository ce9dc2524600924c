"""The text of prompts and answers: chat templates, tokenizers, detokenisation, thinking and stop strings."""
