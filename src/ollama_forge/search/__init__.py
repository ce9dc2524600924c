"""Choosing an edit: candidates tried as hooks on one loaded model, on prompts that nothing else is measured on."""
