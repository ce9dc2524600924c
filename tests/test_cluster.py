"""A Ray cluster of two nodes on this machine gives what one process gives, also if a node is lost midway."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ollama_forge
from ollama_forge.api import ComputedDirection, apply, compute_dir
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.companions import PROVENANCE
from ollama_forge.checkpoints.object_store import StoreFolder
from ollama_forge.cli.main import cli
from ollama_forge.cluster import ray_cluster
from ollama_forge.cluster.ray_cluster import RayCluster, connected
from ollama_forge.comparison import EvaluateSettings, evaluate
from ollama_forge.comparison import main as comparison
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import read_json
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.models.copies import ModelSetup
from ollama_forge.pipeline.optimize import Optimized, OptimizeSettings, optimize
from ollama_forge.prompts import general
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.search import study
from ollama_forge.search.study import Study
from ollama_forge.sources.portable import PortableCheckpoint
from tests import pieces, planted
from tests.test_evaluate import write_general

LOAD = LoadSettings(device="cpu", dtype="float32", batch_size=16)
STORE = 100_000_000  # bytes of a node's object store


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    pytest.importorskip("ray", reason="the extra cluster (ray) is not installed")
    from ray.cluster_utils import Cluster

    quick = {  # a node that does not listen is dead; a busy one has seconds to answer
        "health_check_initial_delay_ms": 500,
        "health_check_period_ms": 300,
        "health_check_failure_threshold": 4,
        "health_check_timeout_ms": 10_000,
    }
    lean = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}  # a process each
    head = {"num_cpus": 1, "object_store_memory": STORE, "_system_config": quick}
    made = Cluster(initialize_head=True, head_node_args=head | lean)
    made.add_node(num_cpus=1, object_store_memory=STORE)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def cluster(nodes: Any) -> Iterator[RayCluster]:
    with connected(nodes.address) as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As many threads as each of two workers has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a planted model in several shards, lists, and a short list of general prompts."""
    folder = tmp_path_factory.mktemp("cluster")
    made = planted.build(1)
    made.save_pretrained(folder / "model", max_shard_size="15KB")
    planted.tokenizer().save_pretrained(folder / "model")
    planted.write_lists(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(general, "GENERAL_FILE", write_general(folder))
        general.general_prompts.cache_clear()
        yield folder
    general.general_prompts.cache_clear()


def prompts(model: Path, **others: Any) -> PromptSettings:
    return PromptSettings(str(model / "harmful.txt"), str(model / "harmless.txt"), max_measured=16, **others)


def computed(model: Path, output: Path, cluster: Any = None) -> ComputedDirection:
    return compute_dir(
        str(model / "model"),
        output,
        prompts=prompts(model, num_instructions=40),
        load=LOAD,
        edit=EditSettings(factors="least-squares", targets=("writers",), norm_preserving=False),
        cluster=cluster,
    )


@pytest.fixture(scope="module")
def local(model: Path) -> Path:
    """What one process computes and applies."""
    folder = model / "local"
    folder.mkdir()
    computed(model, folder / "refusal.pt")
    apply(str(model / "model"), folder / "edited", edit_file=folder / "refusal.edit.safetensors")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@dataclass
class LosingCluster:
    """A cluster that loses a node when the third piece is given out."""

    cluster: RayCluster
    kill: Callable[[], None]
    killed: bool = field(default=False)
    given: int = field(default=0)

    def map(self, setup: Callable[[], Any], work: Callable[[Any, Any], Any], pieces: Iterable[Any]) -> Iterator[Any]:
        def losing() -> Iterator[Any]:
            for piece in pieces:
                self.given += 1
                if self.given >= 3 and not self.killed:
                    self.killed = True
                    self.kill()
                yield piece

        return self.cluster.map(setup, work, losing())


@pytest.fixture
def losing(nodes: Any, cluster: RayCluster, capfd: pytest.CaptureFixture[str]) -> Iterator[LosingCluster]:
    if not nodes.worker_nodes:
        nodes.add_node(num_cpus=1, object_store_memory=STORE)
    while len(cluster.nodes) < 2:
        list(cluster.map(pieces.base, pieces.added, range(1, 5)))
    (node,) = nodes.worker_nodes
    made = LosingCluster(cluster, partial(nodes.remove_node, node, allow_graceful=False))
    yield made
    assert made.killed
    assert "a worker of the Ray cluster is lost; another one does its work" in capfd.readouterr().err


def test_pieces_come_back_in_order_from_all_nodes(cluster: RayCluster) -> None:
    numbers, found, seen = iter(range(1000)), [], set[int]()
    while len(seen) < 2:  # the second worker may still start
        some = [next(numbers) for _ in range(20)]
        for value, process in cluster.map(pieces.base, pieces.added, some):
            found.append(value)
            seen.add(process)
    assert found == list(range(10, 10 + len(found)))
    assert os.getpid() not in seen


def test_errors_of_work_arrive_as_they_are(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"piece \d") as raised:
        list(cluster.map(pieces.base, pieces.failing, range(3)))
    assert raised.value.hint == "the hint"
    monkeypatch.setattr(ray_cluster, "MAX_RETRIES", 1)
    with pytest.raises(ForgeError, match="lost with 2 workers"):
        list(cluster.map(pieces.base, pieces.last_words, [0]))


# What is shared equals what one process does


@pytest.fixture(scope="module")
def reported(model: Path, local: Path) -> dict[str, Any]:
    """What one process measures."""
    return report(model, local, "here")


def report(model: Path, local: Path, name: str, cluster: Any = None) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:  # a cache of its own
        patch.setattr(comparison, "cache_root", partial(Path, model / f"cache-{name}"))
        settings = EvaluateSettings(
            str(model / "model"),
            (str(local / "edited"),),
            output_dir=model / f"report-{name}",
            prompts=prompts(model),
            load=replace(LOAD, memory=None, batch_size=4),
        )
        evaluate(settings, cluster=cluster)
    return {**read_json(settings.output_dir / "report.json"), "seconds": None}


@dataclass(frozen=True)
class Search:
    """The result of a search of six trials, and the number of those that it began with."""

    found: Optimized
    begun: int


@pytest.fixture(scope="module")
def searched(model: Path) -> Search:
    """What one process finds."""
    return search(model, "here")


def search(model: Path, name: str, cluster: Any = None) -> Search:
    begun, run_all = [], Study.run_all

    def six_more(self: Study, measure_all: Any, rule: Any, count: int) -> None:
        begun.append(len([trial for trial in self.trials() if self.space.parameters(trial) is not None]))
        run_all(self, measure_all, rule, begun[-1] + 6)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "RANDOM_TRIALS", 100)  # what TPE proposes depends on what is known so far
        patch.setattr(Study, "run_all", six_more)
        load = replace(LOAD, batch_size=64)
        found = optimize(
            OptimizeSettings(str(model / "model"), model / f"study-{name}", prompts=prompts(model), load=load), cluster
        )
    return Search(found, begun[0])


def require_equal(there: Search, here: Search) -> None:
    found, expected = there.found, here.found
    assert there.begun == here.begun
    assert [t.name for t in found.choice.trials] == [t.name for t in expected.choice.trials]
    assert (found.choice, found.number) == (replace(expected.choice, trials=found.choice.trials), expected.number)
    assert found.front == expected.front
    for number, path in expected.edits.items():
        assert found.edits[number].read_bytes() == path.read_bytes()


def require_computed(folder: Path, local: Path) -> None:
    for name in ("refusal.pt", "refusal.json", "refusal.edit.safetensors"):
        assert (folder / name).read_bytes() == (local / name).read_bytes(), name


def applied(model: Path, local: Path, name: str, cluster: Any) -> Path:
    apply(str(model / "model"), model / name, edit_file=local / "refusal.edit.safetensors", cluster=cluster)
    return model / name


def test_statistics_and_factors(cluster: RayCluster, model: Path, local: Path) -> None:
    folder = model / "ray"
    folder.mkdir()
    computed(model, folder / "refusal.pt", cluster)
    require_computed(folder, local)


def test_shards(cluster: RayCluster, model: Path, local: Path) -> None:
    output = applied(model, local, "applied", cluster)
    assert len(list(output.glob("*.safetensors"))) > 3
    assert contents(output) == contents(local / "edited")
    assert output.with_name("applied.edit.safetensors").read_bytes() == (local / "edited.edit.safetensors").read_bytes()


def test_shards_through_an_object_store(cluster: RayCluster, model: Path, local: Path) -> None:
    store = (model / "store").as_uri()
    shutil.copytree(model / "model", model / "store" / "model")
    _, edit = apply(
        f"{store}/model",
        StoreFolder(f"{store}/edited"),
        edit_file=local / "refusal.edit.safetensors",
        cluster=cluster,
    )
    written, expected = contents(model / "store" / "edited"), contents(local / "edited")
    origin = {PROVENANCE, "README.md"}  # they say that the source lies in a store
    assert {name: data for name, data in written.items() if name not in origin} == {
        name: data for name, data in expected.items() if name not in origin
    }
    assert edit.changed


def test_measurements(cluster: RayCluster, model: Path, local: Path, reported: dict[str, Any]) -> None:
    measured = reported["measurements"]
    assert measured["base"]["harmful"] != measured[str(local / "edited")]["harmful"]
    assert report(model, local, "there", cluster) == reported


def test_a_search(cluster: RayCluster, model: Path, searched: Search) -> None:
    require_equal(search(model, "there", cluster), searched)


# Also if a node is lost midway


def test_statistics_after_a_loss(losing: LosingCluster, model: Path, local: Path) -> None:
    folder = model / "lost"
    folder.mkdir()
    computed(model, folder / "refusal.pt", losing)
    require_computed(folder, local)


def test_shards_after_a_loss(losing: LosingCluster, model: Path, local: Path) -> None:
    assert contents(applied(model, local, "applied-lost", losing)) == contents(local / "edited")


def test_measurements_after_a_loss(losing: LosingCluster, model: Path, local: Path, reported: dict[str, Any]) -> None:
    assert report(model, local, "lost", losing) == reported


def test_a_search_after_a_loss(losing: LosingCluster, model: Path, searched: Search) -> None:
    require_equal(search(model, "lost", losing), searched)


# What does not fit


def test_what_excludes_a_cluster_is_said(cluster: RayCluster, model: Path, local: Path) -> None:
    limited = replace(LOAD, memory=1 << 30)
    with pytest.raises(UsageError, match="every machine loads the whole model"):
        compute_dir(str(model / "model"), model / "no.pt", prompts=prompts(model), load=limited, cluster=cluster)
    settings = OptimizeSettings(str(model / "model"), model / "no", prompts=prompts(model), workers=2)
    with pytest.raises(UsageError, match="--workers and --ray"):
        optimize(settings, cluster)


def test_a_node_without_the_model_is_told(tmp_path: Path) -> None:
    missing = ModelSetup(PortableCheckpoint(Checkpoint(tmp_path / "nowhere", "nowhere", "folder"), ""), LOAD, None)
    with pytest.raises(ForgeError, match=r"has no .*nowhere") as raised:
        missing()
    assert "storage that all nodes see" in raised.value.hint


def test_without_ray_the_option_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["abliterate", "compute-dir", "--model", "demo", "--output", str(tmp_path / "r.pt"), "--ray", "auto"]
    with pytest.raises(ForgeError, match="--ray needs Ray, which is not installed") as raised:
        cli.main(command, standalone_mode=False)
    assert "[abliterate,cluster]" in raised.value.hint


class NothingStarts:
    """In place of Ray: a cluster of one node whose new workers all fail in one way."""

    def __init__(self, failure: Callable[[Any], Exception]) -> None:
        self.exceptions = pytest.importorskip("ray", reason="the extra cluster (ray) is not installed").exceptions
        self.failure, self.started = failure(self.exceptions), 0

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "ab" * 28, "Alive": True, "Resources": {"CPU": 2.0}, "NodeManagerHostname": "here"}]

    def put(self, value: Any) -> str:
        return "functions"

    def remote(self, actor: type) -> Any:
        def start(_: int) -> Any:
            self.started += 1
            return SimpleNamespace(version=SimpleNamespace(remote=lambda: f"answer {self.started}"))

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def wait(self, references: list[str], timeout: float) -> tuple[list[str], list[str]]:
        return references, []

    def get(self, reference: str) -> Any:
        raise self.failure

    def error(self) -> ForgeError:
        with pytest.raises(ForgeError) as raised:
            list(RayCluster(self).map(pieces.base, pieces.added, [1]))
        return raised.value


def class_not_loaded(errors: Any) -> Exception:
    cause = ModuleNotFoundError("No module named 'ollama_forge'")
    trace = f"RuntimeError: failed to import\n\nTraceback (most recent call last):\nModuleNotFoundError: {cause}"
    failed: Exception = errors.ActorDiedError(errors.RayTaskError("__init__", trace, cause, actor_id="ab"))
    return failed


def test_a_worker_whose_class_cannot_be_loaded_is_told_at_once() -> None:
    fake = NothingStarts(class_not_loaded)
    error = fake.error()
    assert error.message == (
        "a worker cannot start on a node of the Ray cluster: ModuleNotFoundError: No module named 'ollama_forge'"
    )
    assert "on every node" in error.hint
    assert fake.started == 1


def test_workers_that_always_end_at_their_start_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster.time, "sleep", lambda _: None)
    fake = NothingStarts(lambda errors: errors.RaySystemError(RuntimeError("the process ended")))
    assert "the process ended" in fake.error().message
    assert fake.started == 1 + ray_cluster.MAX_RETRIES


def test_one_module_alone_imports_ray() -> None:
    package = Path(ollama_forge.__file__).parent
    sources = {path.relative_to(package).as_posix(): path.read_text("utf-8") for path in package.rglob("*.py")}
    pattern = re.compile(r"^\s*(import|from) ray\b", re.MULTILINE)
    assert [name for name, text in sources.items() if pattern.search(text)] == ["cluster/ray_cluster.py"]
    assert not pattern.search(sources["cluster/ray_cluster.py"].partition("\n@contextmanager")[0])


@pytest.mark.parametrize("address", ["no-such-scheme://x", "127.0.0.1:9", "[::1]:9", "127.0.0.1:99999"])
def test_an_address_without_a_cluster_is_told(address: str) -> None:
    pytest.importorskip("ray", reason="the extra cluster (ray) is not installed")
    with pytest.raises(ForgeError, match="there is no Ray cluster at") as raised, connected(address):
        pass
    assert "ray start --head" in raised.value.hint
