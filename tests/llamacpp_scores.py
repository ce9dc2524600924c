"""The log-probabilities that llama.cpp computes with a file, to compare with those of transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ollama_forge.models.servers.llama import LlamaServer

_ALL_TOKENS = 1 << 20  # more than any vocabulary has


def first_log_probs(
    server: LlamaServer, prompts: Sequence[list[int]], letter: int, *, adapter_scale: float | None = None
) -> Tensor:
    """Log-probabilities of the token after each prompt, ``[prompts, vocabulary]``.

    llama.cpp omits the probabilities if the sampled token ends the answer or is an incomplete character, so a bias
    forces it to sample ``letter``. The probabilities are those before the bias.

    Args:
        adapter_scale: the scale of the server's adapter; None for a server without one.
    """
    adapters = {} if adapter_scale is None else {"lora": [{"id": 0, "scale": adapter_scale}], "cache_prompt": False}
    rows = []
    for prompt in prompts:
        body = {
            "prompt": prompt,
            "n_predict": 1,
            "temperature": 0,
            "n_probs": _ALL_TOKENS,
            "logit_bias": [[letter, 1e6]],
            **adapters,
        }
        found = server.connection.request("/completion", body)["completion_probabilities"][0]["top_logprobs"]
        row = torch.empty(len(found), dtype=torch.float64)
        row[[entry["id"] for entry in found]] = torch.tensor([entry["logprob"] for entry in found], dtype=torch.float64)
        rows.append(row.log_softmax(-1).float())
    return torch.stack(rows)
