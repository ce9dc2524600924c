"""Publish what a run made in a repository on the Hugging Face Hub."""
