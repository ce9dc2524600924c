"""Forced decoding: the model's distributions at every token of given answers, one pass for each prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ollama_forge.models.batch_support import BatchSupport
from ollama_forge.models.batching import by_length, pad_left
from ollama_forge.models.protocol import Forced, ForwardModel, ModelCopies
from ollama_forge.text.tokenizer import Ids


def predictions_of(answer: Ids, max_new_tokens: int) -> int:
    """Number of predictions of an answer: one for each token, and one for its end if it ended before the limit."""
    return min(len(answer) + 1, max_new_tokens)


@torch.inference_mode()
def forced(
    model: ForwardModel,
    prompts: Sequence[Ids],
    answers: Sequence[Ids],
    max_new_tokens: int,
    *,
    support: BatchSupport,
    progress: Callable[[int], None] | None = None,
    copies: ModelCopies | None = None,
) -> Iterator[Forced]:
    """Yield the model's predictions of the answers' tokens, batch by batch; the batches depend on the lengths alone.

    Args:
        answers: token ids without the end token, at most ``max_new_tokens`` each.
        max_new_tokens: the limit with which the answers were made; at least 1.
        copies: copies of the model that run the batches in its place.

    Raises:
        ForgeError: the memory does not suffice for one prompt.
    """
    counts = [predictions_of(answer, max_new_tokens) for answer in answers]
    inputs = [[*prompt, *answer[: count - 1]] for prompt, answer, count in zip(prompts, answers, counts, strict=True)]
    vocabulary = model.tokenizer.vocabulary or len(model.tokenizer.backend)
    done: list[Forced] = []

    def predict(rows: list[int], batch: _Batch) -> None:
        done.append(Forced(rows, _predict(model, batch), [counts[row] for row in rows]))

    chunks: list[tuple[list[int], int]] = []
    for group in by_length(inputs, model.batch_size, most_tokens=model.batch_tokens, pads=support.pads):
        keep = max(counts[row] for row in group)
        chunks += [(rows, keep) for rows in _chunks(group, max(1, model.logits_bytes // (4 * keep * vocabulary)))]
    batches = [_Batch([inputs[row] for row in rows], keep) for rows, keep in chunks]
    if copies is not None:
        for (rows, _), logits in zip(chunks, copies.map(_predict_to_cpu, batches), strict=True):
            yield Forced(rows, logits.to(model.device), [counts[row] for row in rows])
            if progress:
                progress(len(rows))
        return
    works = [partial(predict, rows, batch) for (rows, _), batch in zip(chunks, batches, strict=True)]
    for _ in model.in_step(works, [len(rows) * max(len(inputs[row]) for row in rows) for rows, _ in chunks]):
        for batch in done:
            yield batch
            if progress:
                progress(len(batch.rows))
        done.clear()


@dataclass(frozen=True)
class _Batch:
    """Prompts with their answers, and the number of last positions to predict at."""

    inputs: list[Ids]
    keep: int


@torch.inference_mode()
def _predict(model: ForwardModel, batch: _Batch) -> Tensor:
    logits: Tensor = model.retry_smaller(partial(_logits, model, batch.inputs, batch.keep))
    return logits


def _predict_to_cpu(model: ForwardModel, batch: _Batch) -> Tensor:
    return _predict(model, batch).cpu()


def _chunks(rows: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _logits(model: ForwardModel, inputs: Sequence[Ids], keep: int) -> Tensor:
    """The float32 logits of the last ``keep`` positions ``[rows, keep, vocabulary]``."""
    parts = []
    for start in range(0, len(inputs), model.batch_size):  # smaller batches after memory ran out
        rows = inputs[start : start + model.batch_size]
        ids, mask = pad_left(rows, model.tokenizer.pad_id, model.device)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        result = model.forward(keep=keep, input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        logits = result.logits[:, -keep:].float()
        parts.append(torch.nn.functional.pad(logits, (0, 0, keep - logits.shape[1], 0)))
    return torch.cat(parts)
