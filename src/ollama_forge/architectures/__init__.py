"""Architectures as data: one TOML file a family. The keys are explained in ``llama.toml``."""
