"""The names of a model's modules and parameters, to report what an experiment found by its object."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class Paths:
    """Paths of a model's modules and names of its parameters; for shared ones the first."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {module: path for path, module in model.named_modules()}
        self._parameters = {parameter: name for name, parameter in model.named_parameters()}

    def module(self, module: nn.Module) -> str:
        path: str = self._modules[module]
        return path

    def parameter(self, parameter: nn.Parameter) -> str:
        return self._parameters[parameter]

    def named(self, modules: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
        """All parameters of some modules by name."""
        own = (parameter for module in modules for parameter in module.parameters(recurse=False))
        return {self._parameters[parameter]: parameter for parameter in own}
