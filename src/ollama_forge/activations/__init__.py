"""Run prompts through a model, and collect statistics of its residual stream and its writers' inputs."""
