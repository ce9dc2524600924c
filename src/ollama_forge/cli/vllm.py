"""The options of ``--engine vllm``."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.options import combined
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.models.servers.vllm_process import VllmSettings

vllm_options = combined(
    click.option(
        "--vllm-python",
        metavar="PYTHON",
        help="With --engine vllm: the Python of the environment that has vLLM (default: the vllm on PATH).",
    ),
    click.option(
        "--tensor-parallel-size",
        type=click.IntRange(1),
        metavar="N",
        help="With --engine vllm: devices that share each matrix (default 1).",
    ),
    click.option(
        "--vllm-args",
        metavar="TEXT",
        help='With --engine vllm: further arguments of vllm serve, such as "--gpu-memory-utilization 0.5".',
    ),
)
engine_option = click.option(
    "--engine",
    type=click.Choice(("transformers", "vllm")),
    default="transformers",
    show_default=True,
    help="What generates the answers. vllm starts a vLLM; distributions are computed by transformers in any case.",
)


def vllm_settings(options: dict[str, Any]) -> VllmSettings | None:
    """How vLLM is started; None if another engine is chosen.

    Raises:
        UsageError: an option of vLLM is given for another engine.
    """
    names = ("vllm_python", "tensor_parallel_size", "vllm_args")
    if options["engine"] != "vllm":
        given = next((name for name in names if options[name] is not None), None)
        if given is not None:
            raise UsageError(f"--{given.replace('_', '-')} is for --engine vllm", "add that, or leave it out")
        return None
    from ollama_forge.models.servers.vllm_process import VllmSettings

    try:
        arguments = tuple(shlex.split(options["vllm_args"] or ""))
    except ValueError as error:
        raise UsageError(f"--vllm-args cannot be split: {error}", "quote it as for a shell") from None
    return VllmSettings(options["vllm_python"], options["tensor_parallel_size"] or 1, arguments)
