"""Architectures as data: one TOML file per family. ``llama.toml`` explains the keys."""
