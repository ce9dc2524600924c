"""Continuous batching: sequences of different lengths decode together, and join and leave between decode steps."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import Tensor

from ollama_forge.models.device import is_out_of_memory, upload
from ollama_forge.serving.engine.cuda_graphs import StepGraphs
from ollama_forge.serving.engine.grouped_attention import AttentionSwitch, GroupedKVCache
from ollama_forge.serving.engine.kv_cache import KVCache, Layout
from ollama_forge.serving.engine.model_runner import Forward, Media, chunk_of, differ_by_rounding, on_device
from ollama_forge.serving.engine.prefix_cache import PrefixCache, common_prefix
from ollama_forge.serving.engine.recorded_step import RecordedStep
from ollama_forge.serving.engine.row_group import CachedPrefix, Row, RowGroup

_MOST_GROUPS = 4
_WASTE_TOGETHER = 512  # padding columns that cost less than another call of the attention function
_WASTE_APART = 4096  # padding columns that cost less than another forward pass
_WASTE_BY_GRAPH = 32768  # the same on a GPU: reading some GiB of weights again takes as long
_SPARE_COLUMNS = 256
_LONG = 512  # columns from which on the attention of equally long rows is slow on a CPU, see ``grouped_attention``


class BatchedPrefill:
    """Prefills prompts in a cache of their own, right-aligned.

    A single prompt runs in chunks after its cached prefix. Several prompts run in one pass, which computes the last
    ``new_tokens`` tokens of each; ``new_tokens`` is the largest number of uncached tokens among them.

    Args:
        switch: of an attention function that is to be used; None: the model's own.

    Attributes:
        offset: what is added to the positions behind the images of a prompt.
    """

    def __init__(
        self,
        forward: Forward,
        cache: KVCache,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        chunk: int,
        media: Media,
        switch: AttentionSwitch | None = None,
    ) -> None:
        self.forward, self.cache, self.prompts, self.chunk = forward, cache, prompts, chunk
        self._switch = switch
        self.media = on_device(media, forward.model)
        self.offset = 0
        self.width = max(map(len, prompts))
        self.starts = [self.width - len(prompt) for prompt in prompts]
        self.cached = [max(len(prompt) - new_tokens, 0) for prompt in prompts]
        cache.span.end = self.width - new_tokens
        pad, device = forward.model.tokenizer.pad_id, forward.device
        self._ids = upload(
            [[pad] * start + list(prompt) for start, prompt in zip(self.starts, prompts, strict=True)], device
        )
        columns = torch.arange(self.width, device=device)
        starts = upload(self.starts, device).unsqueeze(1)
        self._positions = (columns - starts).clamp_min(0)
        self._mask = (columns >= starts).long() if any(self.starts) else None

    def advance(self) -> Tensor | None:
        span = self.cache.span
        end = self.width if len(self.starts) > 1 or self.media else min(self.width, span.end + self.chunk)
        inputs = dict(self.media)
        if self._mask is not None:
            inputs["attention_mask"] = self._mask
        finds_positions = bool(self.media) and self.forward.finds_positions
        if not finds_positions:
            inputs["position_ids"] = self._positions[:, span.end : end]
        with self._switch.grouped() if self._switch is not None else nullcontext():
            logits, _ = self.forward(self._ids[:, span.end : end], self.cache, **inputs)
        if finds_positions:
            self.offset = self.forward.take_offset()
        span.end = end
        return logits if end == self.width else None

    def row(self, index: int) -> CachedPrefix:
        """Where the keys and values of a prompt are."""
        return CachedPrefix(self.cache, index, self.starts[index], self.width - self.starts[index])


class BatchedRunner:
    """Decodes up to ``slots`` sequences at once.

    Rows of similar length form a group with a cache of its own. If the model's attention allows, one forward pass
    steps all groups (``grouped_attention``); else there is a pass for each. The first step of several groups is done
    in both ways, and the single pass is given up if the logits differ.

    With CUDA graphs, there is a step for each group.

    Args:
        has_kv: for each layer, whether it stores keys and values (``kv_cache.layers_with_kv``).
        nbytes: maximum size of the prefix cache.
        splits: whether prompts may be prefilled in chunks.
        reuses: whether the keys and values of other sequences may be continued.
        graphs: the CUDA graphs of decode steps; None: without.
        recorded: recordings of the decode steps; None: without.
        joins_queries: whether prompts, and steps of a single group, are computed with the attention function of
            ``grouped_attention``.

    Attributes:
        runs_ahead: see ``ModelRunner``; true on CUDA.
        rows: the running sequences.
        groups: their groups, the widest last; none is empty.
    """

    def __init__(
        self,
        forward: Forward,
        has_kv: Sequence[bool],
        slots: int,
        nbytes: int,
        *,
        splits: bool = True,
        reuses: bool = True,
        graphs: StepGraphs | None = None,
        recorded: RecordedStep | None = None,
        joins_queries: bool = False,
    ) -> None:
        self.forward, self.has_kv, self.slots, self.graphs = forward, has_kv, slots, graphs
        self.recorded, self.joins_queries = recorded, joins_queries
        self.runs_ahead = forward.device.type == "cuda"
        self.prefixes: PrefixCache[KVCache] = PrefixCache(2 * slots, nbytes)
        self.chunk = chunk_of(forward.device) if splits else sys.maxsize
        self.reuses = reuses
        self.rows: list[Row] = []
        self.groups: list[RowGroup] = []
        self._layout: Layout | None = None
        self._shares_layers = forward.device.type == "cuda" or recorded is not None
        self._switch = AttentionSwitch(forward.model.module)
        self.one_pass = self._switch.available
        self._checked = False
        self._order: list[int] = []  # for each row of a pass over all groups, its number in ``rows``
        self._in_order = True
        self._by_row: tuple[Tensor, Tensor] | None = None  # ``_order`` and its inverse on the device, once needed
        self._grouped: GroupedKVCache | None = None
        self._mask: Tensor | None = None  # of all rows in one pass, with spare columns

    # -- prefill --------------------------------------------------------------------------------------------------

    def uncached(self, prompt: Sequence[int]) -> int:
        found = self._running_prefix(prompt)
        known = max(self.prefixes.shared(prompt), found.length if found is not None else 0)
        return len(prompt) - known

    def _running_prefix(self, prompt: Sequence[int]) -> CachedPrefix | None:
        """The longest prefix of a prompt that the prompt of a running sequence begins with."""
        usable = tuple(prompt[:-1])
        best, length = None, 0
        for row in self.rows if self.reuses else ():
            shared = common_prefix(row.prompt, usable)
            if shared > length:
                best, length = row, shared
        return best.group.prefix(best, length) if best is not None else None

    def _cached_prefix(self, prompt: Sequence[int]) -> CachedPrefix | None:
        running = self._running_prefix(prompt)
        if running is not None and running.length >= self.prefixes.shared(prompt):
            return running
        kept = self.prefixes.match(prompt)
        return None if kept is None else CachedPrefix(kept[0], 0, 0, kept[1])

    def prefill(self, prompts: Sequence[Sequence[int]], media: Media) -> BatchedPrefill:
        cache = KVCache(self.has_kv, len(prompts), max(map(len, prompts)), self._layout)
        found = [self._cached_prefix(prompt) if media is None else None for prompt in prompts]
        new_tokens = max(
            len(prompt) - (prefix.length if prefix is not None else 0)
            for prompt, prefix in zip(prompts, found, strict=True)
        )
        switch = self._switch if self.joins_queries and media is None else None
        prefill = BatchedPrefill(self.forward, cache, prompts, new_tokens, self.chunk, media, switch)
        for row, prefix in enumerate(found):
            length = cache.span.end - prefill.starts[row]
            if prefix is not None and length > 0:
                cache.copy_row(prefix.cache, prefix.row, prefix.start, row, prefill.starts[row], length)
        return prefill

    def join(self, prefill: BatchedPrefill, index: int) -> None:
        if self._layout is None and self._shares_layers:
            self._layout = Layout.of(prefill.cache)
            self._shares_layers = self._layout is not None
        source = prefill.row(index)
        group = self._group_for(source.length)
        prompt = () if prefill.media else tuple(prefill.prompts[index])
        row = Row(prompt, group, prefill.offset)
        following = (prefill.row(later).length for later in range(index + 1, len(prefill.prompts)))
        group.join(row, source, sum(abs(length - source.length) <= self._waste for length in following))
        if group not in self.groups:
            self.groups.append(group)
        self.rows.append(row)
        self._regroup()

    # -- groups ---------------------------------------------------------------------------------------------------

    def _group_for(self, length: int) -> RowGroup:
        """The group whose rows are most similar, or a new one if a row of ``length`` would cost its rows too much."""
        nearest = min(self.groups, key=lambda group: abs(group.width - length), default=None)
        if nearest is not None:
            rows = 1 if length < nearest.width else len(nearest.rows)
            if abs(nearest.width - length) * rows <= self._waste:
                return nearest
        return RowGroup(self._new_cache, length, self.slots, self.forward.device)

    def _new_cache(self, rows: int, columns: int) -> KVCache:
        if self.graphs is not None:
            return self.graphs.new_cache(rows, columns, self._layout)
        return KVCache(self.has_kv, rows, columns, self._layout)

    @property
    def _waste(self) -> int:
        """Number of padding columns that cost less than another group."""
        if self.graphs is not None:
            return _WASTE_BY_GRAPH
        return _WASTE_TOGETHER if self.one_pass else _WASTE_APART

    def _regroup(self) -> None:
        """Merge groups that have become alike, or are too many; call this after rows joined or left."""
        for group in self.groups:
            if not group.rows:
                group.release()
        self.groups = sorted((group for group in self.groups if group.rows), key=lambda group: group.width)
        while len(self.groups) > 1:
            padding = [(large.width - small.width) * len(small.rows) for small, large in pairwise(self.groups)]
            index = padding.index(min(padding))
            if padding[index] > self._waste and len(self.groups) <= _MOST_GROUPS:
                break
            small, large = self.groups[index], self.groups[index + 1]
            try:
                for row in list(small.rows):
                    large.join(row, small.prefix(row))
                    small.remove(row)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                break  # the groups stay as they are
            small.release()
            del self.groups[index]
        order = [self.rows.index(row) for group in self.groups for row in group.rows]
        self._order = order
        self._in_order = order == list(range(len(order)))
        self._by_row = None
        self._grouped = self._mask = None

    # -- decoding -------------------------------------------------------------------------------------------------

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        if isinstance(tokens, Tensor):
            ids = (tokens if self._in_order else tokens[self._orders[0]]).unsqueeze(1)
        else:
            ids = upload([tokens[number] for number in self._order], self.forward.device).unsqueeze(1)
        logits = self._with_graphs(ids, self.graphs) if self.graphs is not None else self._without_graphs(ids)
        return logits if self._in_order else logits.index_select(0, self._orders[1])  # on a CPU faster than []

    @property
    def _orders(self) -> tuple[Tensor, Tensor]:
        """For each row of a pass over all groups, its number in ``rows``; and for each of ``rows``, its row."""
        if self._by_row is None:
            places = sorted(range(len(self._order)), key=self._order.__getitem__)
            first, second = upload([self._order, places], self.forward.device).unbind()
            self._by_row = first, second
        return self._by_row

    def _with_graphs(self, ids: Tensor, graphs: StepGraphs) -> Tensor:
        if len(self.groups) == 1:
            return graphs.step(self.groups[0], ids)
        parts = torch.split(ids, [len(group.rows) for group in self.groups])
        steps = zip(self.groups, parts, strict=True)
        return torch.cat([graphs.step(group, part).clone() for group, part in steps])

    def _without_graphs(self, ids: Tensor) -> Tensor:
        logits = self._pass(ids, [group.inputs() for group in self.groups])
        for group in self.groups:
            group.advance()
        return logits

    def _pass(self, ids: Tensor, inputs: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        count = len(self.groups)
        alone = count == 1
        if self.recorded is None or self.recorded.fails(count) or not (alone or (self.one_pass and self._checked)):
            return self._by_model(ids, inputs)
        positions, mask = inputs[0] if alone else self._joined(inputs)
        caches = [group.cache for group in self.groups]
        return self.recorded(ids, caches, positions, mask, lambda: self._by_model(ids, inputs))

    def _by_model(self, ids: Tensor, inputs: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        slow_kernel = inputs[0][1] is None and self.groups[0].width >= _LONG and ids.device.type == "cpu"
        if not self.one_pass or (len(self.groups) == 1 and not slow_kernel):
            return self._apart(ids, inputs)
        if self._checked:
            return self._in_one_pass(ids, inputs)
        expected = self._apart(ids, inputs)
        try:
            found = self._in_one_pass(ids, inputs)  # it writes the same column again
            self.one_pass = differ_by_rounding(found, expected)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.one_pass = False  # the model does more with keys and values than attend to them
        self._checked = True
        return expected if self.one_pass else self._apart(ids, inputs)  # the other pass has written other keys

    def _apart(self, ids: Tensor, inputs: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Logits by a forward pass for each group."""
        logits = []
        parts = torch.split(ids, [len(group.rows) for group in self.groups])
        for group, part, (positions, mask) in zip(self.groups, parts, inputs, strict=True):
            more = {} if mask is None else {"attention_mask": mask}
            with self._switch.grouped() if self.joins_queries else nullcontext():
                logits.append(self.forward(part, group.cache, position_ids=positions, **more)[0])
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _in_one_pass(self, ids: Tensor, inputs: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Logits by one forward pass for all groups."""
        if self._grouped is None:
            self._grouped = GroupedKVCache([group.cache for group in self.groups])
        positions, mask = self._joined(inputs)
        with self._switch.grouped():
            return self.forward(ids, self._grouped, position_ids=positions, attention_mask=mask)[0]

    def _joined(self, inputs: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
        """The positions and the mask of all rows in one pass."""
        width = self.groups[-1].width + 1
        if self._mask is None or width > self._mask.shape[1]:
            self._mask = self._common_mask()
        return torch.cat([positions for positions, _ in inputs]), self._mask[:, :width]

    def _common_mask(self) -> Tensor:
        """The mask of all rows in one pass, with spare columns; as all rows grow alike, their padding stays."""
        widest = max(group.width for group in self.groups)
        lengths = [group.cache.span.end - start for group in self.groups for start in group.starts]
        padding = upload([widest - length for length in lengths], self.forward.device).unsqueeze(1)
        columns = torch.arange(widest + _SPARE_COLUMNS, device=self.forward.device)
        return (columns >= padding).long()

    # -- leaving --------------------------------------------------------------------------------------------------

    def leave(self, row: int, ids: Sequence[int] | None) -> None:
        leaving = self.rows[row]
        if ids is not None and self.reuses:
            self._keep(leaving, ids)
        leaving.group.remove(leaving)
        self.rows[row] = self.rows[-1]
        self.rows.pop()
        self._regroup()  # frees the memory of an empty group

    def _keep(self, row: Row, ids: Sequence[int]) -> None:
        """Keep a row's keys and values for later prompts, if there is memory for a copy."""
        source = row.group.prefix(row)
        try:
            kept = KVCache(self.has_kv, 1, source.length, self._layout)
            kept.copy_row(source.cache, source.row, source.start, 0, 0, source.length)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return
        kept.span.end = source.length
        self.prefixes.add(ids[: source.length], kept, kept.nbytes)

    def reset(self) -> None:
        for group in self.groups:
            group.release()
        self.rows, self.groups = [], []
        self.prefixes.clear()
        if self.graphs is not None:
            self.graphs.clear()
        self._regroup()
