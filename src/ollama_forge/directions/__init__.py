"""Refusal directions from activation statistics: the methods, the choice of a layer, and the ``.pt`` file."""
