"""The writers of a region: what moves the stream when it is nudged, and which axis of which parameter does it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ollama_forge.architectures.calls import STILL, parallel, rows
from ollama_forge.architectures.learned import Gap, NormFound, RoleFound
from ollama_forge.architectures.roles.axes import expert_axis, is_linear, outer
from ollama_forge.architectures.roles.norms import (
    MeasuredNorm,
    find_gain,
    laid_over,
    measured_norms,
    name_norm,
    norm_passed,
)
from ollama_forge.architectures.roles.paths import Paths
from ollama_forge.architectures.roles.region import Change, Held, Region, Replay, nudged

_MIXED = 4e-5  # a part of the stream below this is rounding
_LONGEST_CONVOLUTION = 8  # tokens


class Writers:
    """Finds the writers of one region. ``find`` yields what it finds and what it cannot explain."""

    def __init__(self, region: Region, paths: Paths, d_model: int) -> None:
        self.region, self.paths, self.d = region, paths, d_model
        self.generator = torch.Generator().manual_seed(3)
        self.parameters = paths.named(region.modules)
        self.norms = measured_norms(region, lambda width: width == d_model)

    def find(self) -> Iterator[RoleFound | Gap]:
        found: list[RoleFound | Gap] = []
        for held, calls in self.region.held.items():
            output = calls[0].result
            if output is not None and output.shape[-1] == self.d:
                found += self._site(held, output)
        found += self._strays()
        yield from found
        odd = {item.module for item in found if isinstance(item, Gap)}
        hidden = self._hidden([item for item in found if isinstance(item, RoleFound)])
        yield from (gap for gap in hidden if gap.module not in odd)

    def _nudge(self, size: float) -> Tensor:
        """A vector ``[d]`` without small entries."""
        random = torch.rand(self.d, generator=self.generator) + 0.5
        signs = torch.randint(0, 2, (self.d,), generator=self.generator) * 2 - 1
        return random * signs * max(size, 1e-3)

    def _site(self, held: Held, output: Tensor) -> Iterator[RoleFound | Gap]:
        path = self.paths.module(held.module)
        nudge = self._nudge(float(output.abs().mean()))
        answer = self.region.replay(changes={held: partial(torch.add, nudge)})
        change = moved(self.region.stream, answer.stream, nudge)
        if change is None:
            return
        ways = self._ways(change, answer, nudge, output + nudge if len(self.region.held[held]) == 1 else None)
        if ways is None:
            ways = self._gains(held, output)
        if ways is None:
            yield Gap(path, "writers", "its output moves the stream, but not by a norm or a gain that can be measured")
            return
        if isinstance(ways, Gap):
            yield ways
            return
        found = list(self._parameters(held, ways))
        if not found:
            yield Gap(path, "writers", "it writes to the stream, but along no axis of its parameters")
        yield from found

    def _ways(
        self, change: Tensor, answer: Replay, nudge: Tensor, alone: Tensor | None
    ) -> tuple[NormFound, ...] | Gap | None:
        """The way from a nudged output to the stream: direct (no norm), through one norm, or None.

        Args:
            alone: the nudged output, if a stream of nothing else (up to a factor a row) counts as direct.
        """
        if parallel(change, nudge) is not None:
            return ()
        if alone is not None:
            far = change.norm(dim=1) > 1e-3 * change.norm(dim=1).max()
            laid = laid_over(rows(alone), len(change))
            if len(laid) == len(far) and parallel(rows(answer.stream)[far], laid[far]) is not None:
                return ()
        module = norm_passed(self.region, self.norms, answer, change, nudge)
        return None if module is None else self._named(module, self.norms[module])

    def _named(self, module: nn.Module, norm: MeasuredNorm) -> tuple[NormFound, ...] | Gap:
        path = self.paths.module(module)
        found = name_norm(norm, module, path, self.parameters)
        if found is None:
            return Gap(path, "writers", "the gain or bias of this norm behind a writer is no parameter's")
        return () if found.gain is None and not found.centred and found.bias is None else (found,)

    def _gains(self, held: Held, output: Tensor) -> tuple[NormFound, ...] | Gap | None:
        """Gains per channel between a module and the stream: one, or one for each token of a short convolution.

        Nudges at two tokens, with two vectors, must find the same gains.
        """
        if len(rows(output)) != len(rows(self.region.stream)) or len(self.region.held[held]) != 1:
            return None
        by_token: list[dict[int, Tensor]] = []
        for token in (3, 5):
            if token >= len(rows(output)):
                return None
            answers = []
            for _ in range(2):
                vector = self._nudge(float(output.abs().mean()))
                nudge = torch.zeros(len(rows(output)), self.d)
                nudge[token] = vector
                answer = self.region.replay(changes={held: partial(torch.add, nudge.view(output.shape))})
                answers.append((rows(answer.stream - self.region.stream), vector.double()))
            (first, one), (second, two) = answers
            lengths = first.norm(dim=1)
            where = torch.nonzero(lengths > 1e-4 * lengths.max())[:, 0].tolist()
            gains = {row - token: first[row] / one for row in where}
            errors = [(second[row] - gains[row - token] * two).abs().max() for row in where]
            if len(where) > _LONGEST_CONVOLUTION or max(errors) > 1e-3 * second.abs().max():
                return None
            by_token.append(gains)
        early, late = by_token
        shared = early.keys() & late.keys()
        if not shared or any(parallel(early[lag][None], late[lag]) is None for lag in shared):
            return None
        return self._named_gains(held, list((early | late).values()))

    def _named_gains(self, held: Held, gains: list[Tensor]) -> tuple[NormFound, ...] | Gap:
        named = [find_gain(gain, self.parameters) for gain in gains]
        found = [NormFound("", name, offset, False, None, column) for name, offset, column in filter(None, named)]
        if len(found) < len(gains):
            path = self.paths.module(held.module)
            return Gap(path, "writers", "the gain of each channel between it and the stream is no parameter's")
        return tuple(found)

    def _parameters(self, held: Held, ways: tuple[NormFound, ...]) -> Iterator[RoleFound]:
        """The parameters of a writing module whose axis is the stream, with their biases."""
        axes: dict[nn.Parameter, int] = {}
        norms: dict[nn.Parameter, tuple[NormFound, ...]] = {}
        for parameter in held.parameters:
            for axis in (a for a in range(parameter.dim()) if parameter.shape[a] == self.d):
                through = self._through(held, parameter, axis)
                if through is not None and not (through and ways):
                    axes[parameter], norms[parameter] = axis, through or ways
        experts = {weight: expert_axis(self.region, held, weight, axis) for weight, axis in axes.items()}
        biases: dict[nn.Parameter, nn.Parameter] = {}
        for weight, axis in axes.items():
            shape = torch.Size(weight.shape[a] for a in range(weight.dim()) if a in (axis, experts[weight]))
            bias = next((p for p in axes if p is not weight and p.shape == shape), None)
            if bias is not None:
                biases[weight] = bias
        for weight, axis in axes.items():
            if weight in set(biases.values()):  # by identity
                continue
            bias = biases.get(weight)
            yield RoleFound(
                self.paths.parameter(weight),
                self.paths.module(held.module),
                writes=True,
                axis=axis,
                expert_axis=experts[weight],
                block=self.region.block,
                norms=norms[weight],
                linear=is_linear(held, self.region.held[held], weight, bias),
                bias=self.paths.parameter(bias) if bias is not None else None,
            )

    def _through(self, held: Held, parameter: nn.Parameter, axis: int) -> tuple[NormFound, ...] | None:
        """Whether a rank-one nudge of a parameter moves its module's output along the axis: directly (no norm), through
        a norm inside the module, or not (None).
        """
        vector = self._nudge(float(parameter.detach().abs().mean()))
        change_of = outer(vector, parameter.shape, axis, self.generator)
        was = self.region.outputs(held)
        with nudged(parameter, change_of):
            change = self.region.outputs(held) - was
        if not _moves(change, vector):
            return None
        if parallel(change, vector) is not None:
            return ()
        inner = self.norms.keys() & set(held.module.modules())
        if not inner:
            return None
        before = self.region.replay(watch=[held])
        with nudged(parameter, change_of):
            after = self.region.replay(watch=[held])
        for norm_module in inner:
            (was_in, was_out), (now_in, now_out) = before.passed[norm_module][0], after.passed[norm_module][0]
            if parallel(now_in - was_in, vector) is not None and parallel(change, now_out - was_out) is not None:
                named = self._named(norm_module, self.norms[norm_module])
                return None if isinstance(named, Gap) else named
        return None

    def _strays(self) -> Iterator[RoleFound]:
        """Parameters outside the held modules that add to the stream, such as vectors and a post-norm's bias."""
        for module, parameter in self._loose():
            for axis in (a for a in range(parameter.dim()) if parameter.shape[a] == self.d):
                vector = self._nudge(float(parameter.detach().abs().mean()))
                with nudged(parameter, outer(vector, parameter.shape, axis, None)):
                    answer = self.region.replay()
                change = moved(self.region.stream, answer.stream, vector)
                ways = None if change is None else self._ways(change, answer, vector, None)
                if isinstance(ways, tuple):
                    name, path = self.paths.parameter(parameter), self.paths.module(module)
                    yield RoleFound(name, path, writes=True, axis=axis, block=self.region.block, norms=ways)
                    break

    def _loose(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        """The parameters of the region that no held module owns."""
        seen = {p for held in self.region.held for p in held.parameters}
        for module in self.region.modules:
            for parameter in module.parameters(recurse=False):
                if parameter not in seen and parameter.is_floating_point():
                    seen.add(parameter)
                    yield module, parameter

    def _hidden(self, found: list[RoleFound]) -> Iterator[Gap]:
        """What still moves the stream when every writer that was found gives zeros."""
        names = {role.parameter for role in found}
        writing = [h for h in self.region.held if any(self.paths.parameter(p) in names for p in h.parameters)]
        silence: dict[Held, Change] = dict.fromkeys(writing, torch.zeros_like)
        before = self.region.replay(changes=silence).stream
        for held, calls in self.region.held.items():
            output = calls[0].result
            if held in silence or output is None:
                continue
            nudge = torch.randn(output.shape[-1], generator=self.generator) * float(output.abs().mean())
            after = self.region.replay(changes={**silence, held: partial(torch.add, nudge)}).stream
            if moved(before, after, nudge) is not None:
                yield Gap(
                    self.paths.module(held.module), "writers", "its output moves the stream in a way that is not known"
                )
        for module, parameter in self._loose():
            if (
                self.paths.parameter(parameter) in names or module in self.norms
            ):  # a norm only passes on what it takes in
                continue
            nudge = torch.randn(parameter.shape, generator=self.generator) * float(parameter.detach().abs().mean())
            with nudged(parameter, nudge):
                after = self.region.replay(changes=silence).stream
            if moved(before, after, nudge) is not None:
                name = self.paths.parameter(parameter).rpartition(".")[2]
                yield Gap(
                    self.paths.module(module), "writers", f"its {name} moves the stream in a way that is not known"
                )


def moved(before: Tensor, after: Tensor, nudge: Tensor) -> Tensor | None:
    """How a stream ``[tokens, copies, d]`` moved, as ``[rows, d]``; None if it did not.

    A token whose copies are only scaled and mixed carries nothing new: it counts as still.
    """
    was, now = before.double(), after.double()
    basis = torch.linalg.qr(was.transpose(1, 2)).Q  # [tokens, d, copies]
    new = (now - now @ basis @ basis.transpose(1, 2)).norm(dim=(1, 2)) > _MIXED * now.norm(dim=(1, 2))
    change = torch.where(new[:, None, None], now - was, 0.0)
    return rows(change) if _moves(change, nudge) else None


def _moves(change: Tensor, nudge: Tensor) -> bool:
    return float(change.abs().max()) > STILL * float(nudge.abs().max())
