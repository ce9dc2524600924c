"""Fixtures of several test modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.gguf_models import Model


@pytest.fixture(scope="session")
def gguf_models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Model]:
    """Small random models by family, as checkpoint folders and as GGUF files; converted once a session."""
    from tests.gguf_models import convert_families  # imports transformers, which few test modules need

    return convert_families(tmp_path_factory.mktemp("gguf"))
