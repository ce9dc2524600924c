"""The vLLM that answers for the edits of a search."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ollama_forge.edits.loaded_model import LoadedModel
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.evaluation.measure import longest_request
from ollama_forge.evaluation.tokens import check_server_tokens
from ollama_forge.export.adapters.served import MAX_RANK, AdapterAnswers
from ollama_forge.models.servers.find import find_token_server
from ollama_forge.models.servers.vllm import VllmServer
from ollama_forge.models.servers.vllm_process import VllmSettings, vllm_server
from ollama_forge.prompts.split import PromptSplit


@contextmanager
def started(loaded: LoadedModel, split: PromptSplit, settings: VllmSettings, folder: Path) -> Iterator[AdapterAnswers]:
    """Run a vLLM of a loaded model inside the block.

    Args:
        split: the prompts that it is asked.
        folder: where adapters are written.

    Raises:
        ForgeError: there is no vLLM, or it does not start.
    """
    parts = (split.select.lists.values(), split.report.lists.values())
    context = longest_request(
        loaded.chat.tokenizer, [prompt for part in parts for prompts in part for prompt in prompts]
    )
    load = loaded.chat.settings
    with vllm_server(loaded.source, settings, load, context=context, adapter_rank=MAX_RANK) as server:
        yield _answers(loaded, server, folder)


def connected(loaded: LoadedModel, address: str, folder: Path) -> AdapterAnswers:
    """The vLLM at ``URL`` or ``URL#MODEL``, which must run the loaded model.

    Raises:
        UsageError: the server is no vLLM, or does not have the model.
        ForgeError: it is not reached, or its tokens are others.
    """
    server = find_token_server(address)
    if not isinstance(server, VllmServer):
        raise UsageError(
            f"{address} is a {server.name}, which takes no edits while it runs",
            "give a vLLM that runs with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
        )
    problem = check_server_tokens(server, loaded.chat.tokenizer)
    if problem is not None:
        raise ForgeError(f"{address} {problem}", "give the model that the server runs as --model")
    return _answers(loaded, server, folder)


def _answers(loaded: LoadedModel, server: VllmServer, folder: Path) -> AdapterAnswers:
    return AdapterAnswers(server, loaded.chat.tokenizer, loaded.source, loaded.model_map, folder)
