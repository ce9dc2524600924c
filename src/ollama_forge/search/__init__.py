"""Choose an edit: candidates are tried with hooks on one loaded model, on the select prompts."""
