"""A Ray cluster of two nodes on this machine gives what one process gives, also if a node is lost midway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ollama_forge.api import apply, compute_dir
from ollama_forge.cluster.ray_cluster import RayWorkers, ray_workers
from ollama_forge.comparison import EvaluateSettings, evaluate
from ollama_forge.comparison import main as comparison
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.pipeline.optimize import OptimizeSettings, optimize
from ollama_forge.prompts.settings import PromptSettings
from tests import planted, tiny

LOAD = LoadSettings(device="cpu", dtype="float32", batch_size=4)
needs_ray = pytest.importorskip("ray", reason="the extra cluster (ray) is not installed")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 200_000_000})
    made.add_node(num_cpus=1, object_store_memory=100_000_000)
    yield made
    made.shutdown()


@pytest.fixture
def workers(cluster: Any) -> Iterator[RayWorkers]:
    with ray_workers(cluster.address) as connected:
        yield connected


def number_of(base: int) -> int:
    return base


def node_of(base: int, piece: int) -> tuple[int, int]:
    time.sleep(0.05)
    return base + piece, os.getpid()


def test_pieces_come_back_in_order_from_all_nodes(workers: RayWorkers) -> None:
    found = list(workers.map(partial(number_of, 10), node_of, range(12)))
    assert [value for value, _ in found] == list(range(10, 22))
    assert len({process for _, process in found} - {os.getpid()}) == 2
