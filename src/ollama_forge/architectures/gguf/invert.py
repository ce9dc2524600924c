"""The config from which llama.cpp's converter writes given metadata and tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ollama_forge.architectures.gguf.forward import Forward
from ollama_forge.architectures.gguf.leaves import Path, leaves, with_value
from ollama_forge.architectures.gguf.probe import Effect, probe, same
from ollama_forge.architectures.gguf.rope_moves import scaled_rope
from ollama_forge.architectures.gguf.wanted import Difference, Shape, Wanted, as_config, nice
from ollama_forge.errors import ForgeError

_ROUNDS = 8
_TOLERANCE = 2e-5  # relative, of vectors that the converter computes in float32
_SMALL = range(9)
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_SHARED, _VOCABULARY = ("tie_word_embeddings",), ("vocab_size",)


Move = dict[Path, Any]
Differences = Callable[[Mapping[str, Any]], list[Difference]]
Moves = Callable[[list[Difference]], Iterator[Move]]


class Inversion:
    """Changes the config of one class until the converter writes from it what is wanted.

    Attributes:
        values: the values of the config that are told; the others are the class's own choice.
        config: the complete config.
    """

    def __init__(self, forward: Forward, wanted: Wanted, values: Mapping[Path, Any], words: Sequence[str] = ()) -> None:
        """Start from some values, which may be changed.

        Args:
            words: those that the converter knows as values of a config.
        """
        self.forward, self.wanted, self.words = forward, wanted, words
        self.values: dict[Path, Any] = dict(values)
        self.config = forward.base

    def start(self) -> list[Difference]:
        """Give the values that the metadata tell directly, and return what differs.

        Raises:
            ForgeError: the class or the converter rejects them.
        """
        self.set_vocabulary()
        self.set_depth()
        self.assign(probe(self.forward, self.config))
        return self.metadata_differences(self.config)

    def finish(self) -> list[Difference]:
        """Find the other values, and return what still differs.

        Raises:
            ForgeError: the class or the converter rejects them.
        """
        left = self.correct(self.metadata_differences, self.metadata_moves)
        if any(not difference.is_extra for difference in left):
            return left
        self.drop_zeros()
        self.follow()
        return left + self.correct(self.tensor_differences, self.tensor_moves)

    def set(self, values: Mapping[Path, Any]) -> None:
        self.values.update(values)
        self.config = self.forward.complete(self.values)

    def set_vocabulary(self) -> None:
        """Read the vocabulary's size from the tensors, and whether the head shares the embedding's weights."""
        told: dict[Path, Any] = {}
        if _EMBEDDING in self.wanted.shapes:
            told[_VOCABULARY] = self.wanted.shapes[_EMBEDDING][0]
        if _SHARED[0] in self.config:
            told[_SHARED] = _HEAD not in self.wanted.shapes
        self.set(told)

    def set_depth(self) -> None:
        """Set the number of layers. It comes first, because lists of the config have a value for each layer."""
        key = f"{self.forward.arch}.block_count"
        told, wanted = self.forward.metadata(self.config).get(key), self.wanted.metadata.get(key)
        if told is None or wanted is None:
            return
        for path, value in leaves(self.config).items():
            if type(value) is int and 0 < value <= told:
                try:
                    deeper = self.forward.metadata(self.forward.complete({**self.values, path: value + 1}))
                except ForgeError:
                    continue
                if deeper.get(key) == told + 1:
                    self.set({path: value + wanted - told})
                    return

    def assign(self, effects: Mapping[Path, Effect]) -> None:
        """Set each value that a GGUF key repeats to the file's value of that key."""
        told: dict[Path, Any] = {}
        for path, effect in effects.items():
            keys = [key for key in effect.changed if effect.equals(key) and key in self.wanted.metadata]
            keys.sort(key=lambda key: sum(key in other.changed for other in effects.values()))
            if keys:
                told[path] = as_config(self.wanted.metadata[keys[0]], effect.before)
            elif (value := self.in_lists(effect)) is not None:
                told[path] = value
        try:
            self.set(told)
        except ForgeError:
            self.values = {path: value for path, value in self.values.items() if path not in told}
            for path, value in told.items():
                self.try_set({path: value})

    def try_set(self, values: Mapping[Path, Any]) -> bool:
        before = dict(self.values)
        try:
            self.set(values)
            self.forward.metadata(self.config)
        except ForgeError:
            self.values = before
            self.config = self.forward.complete(before)
            return False
        return True

    def in_lists(self, effect: Effect) -> Any:
        """The file's value at the layers of a metadata list that repeat the config's value; None if no list does."""
        for key, (before, after) in effect.changed.items():
            wanted = self.wanted.metadata.get(key)
            if not (isinstance(before, list) and isinstance(after, list) and isinstance(wanted, list)):
                continue
            moved = [(old, new) for old, new in zip(before, after, strict=False) if old != new]
            kept = {old for old, new in zip(before, after, strict=False) if old == new}
            if moved and all(same(old, effect.before) and same(new, effect.after) for old, new in moved):
                values = set(wanted) - kept - {0}  # layers without it have 0
                if len(values) == 1:
                    return as_config(values.pop(), effect.before)
        return None

    def metadata_differences(self, config: Mapping[str, Any]) -> list[Difference]:
        """The differences of the metadata; those of keys that the file has come first."""
        told, wanted = self.forward.metadata(config), self.wanted.metadata
        found = [
            Difference(key, told.get(key), wanted.get(key))
            for key in {**wanted, **told}
            if key not in told or key not in wanted or not same(told[key], wanted[key])
        ]
        computed = self.forward.computed(config)
        for name in {**self.wanted.computed, **computed}:
            left, right = computed.get(name), self.wanted.computed.get(name)
            if left is None or right is None or not _close(left, right):
                found.append(Difference(name, left, right))
        return sorted(found, key=lambda difference: difference.is_extra)

    def correct(self, differences: Differences, moves: Moves) -> list[Difference]:
        """Make one change at a time, the one that leaves the fewest differences; return the differences left."""
        found = differences(self.config)
        for _ in range(_ROUNDS):
            best, best_score = None, _score(found)
            for move in moves(found) if found else ():
                try:
                    config = self.forward.complete({**self.values, **move})
                    score = _score(differences(config))
                except ForgeError:
                    continue
                if score < best_score:
                    best, best_score = move, score
                    if score == (0, 0):
                        break
            if best is None:
                break
            self.set(best)
            found = differences(self.config)
        return found

    def follow(self) -> None:
        """If the converter rejects the tensors, change one value that the metadata do not tell.

        So ``num_key_value_heads`` of a model with latent attention is ``num_attention_heads``, which alone is told.
        """
        if self.takes(self.config):
            return
        for move in self.untold_moves():
            try:
                config = self.forward.complete({**self.values, **move})
            except ForgeError:
                continue
            if self.takes(config):
                self.set(move)
                return

    def untold_moves(self) -> Iterator[Move]:
        """Changes of untold values: one with the same default as a told value follows it; a switch is flipped."""
        defaults = leaves(self.forward.base)
        untold = {path: default for path, default in defaults.items() if path not in self.values}
        for path, default in untold.items():
            for other, value in self.values.items():
                if type(default) is int and defaults.get(other) == default != value:
                    yield {path: value}
        yield from ({path: not default} for path, default in untold.items() if isinstance(default, bool))

    def takes(self, config: Mapping[str, Any]) -> bool:
        """Whether the converter accepts the tensors of a config."""
        try:
            self.forward.tensors(config)
        except ForgeError:
            return False
        return True

    def drop_zeros(self) -> None:
        """Take None for 0 where the converter writes the same: a window of 0 tokens means that there is none."""
        zeros = [path for path, value in self.values.items() if value == 0 and type(value) is int]
        for path in [path for path in zeros if not path[-1].endswith("token_id")]:
            try:
                config = self.forward.complete({**self.values, path: None})
                if self.metadata_differences(config) == self.metadata_differences(self.config):
                    self.set({path: None})
            except ForgeError:
                continue

    def tensor_differences(self, config: Mapping[str, Any]) -> list[Difference]:
        """Where names and shapes of tensors differ."""
        told, wanted = self.forward.tensors(config), self.wanted.shapes
        names = dict.fromkeys([*wanted, *told])
        return [Difference(n, told.get(n), wanted.get(n)) for n in names if told.get(n) != wanted.get(n)]

    def metadata_moves(self, differences: list[Difference]) -> Iterator[Move]:
        effects = probe(self.forward, self.config)
        if any("rope" in difference.name for difference in differences):
            yield from scaled_rope(self.forward, self.wanted, self.config)
        yield from self.layer_types(differences)
        absent = self.forward.absent(self.config)
        for difference in differences:
            if difference.written is None:
                yield from ({path: as_config(difference.wanted, None)} for path in absent)
                yield from ({path: word} for path in absent if self.is_word(path) for word in self.words)
        for difference in differences:
            for path, effect in effects.items():
                if difference.name in effect.changed:
                    for value in _candidates(effect, difference):
                        if not difference.is_extra or len(path) == 1:
                            yield {path: value}
            if not difference.is_extra:
                yield from self.pairs(difference, effects)

    def is_word(self, path: Path) -> bool:
        """Whether the converter rejects words that it does not know as a value."""
        try:
            self.forward.metadata(with_value(self.config, path, "?"))
        except ForgeError as error:
            return "?" in error.message
        return False

    def pairs(self, difference: Difference, effects: Mapping[Path, Effect]) -> Iterator[Move]:
        """Changes of two values: a switch is flipped, so that the converter writes the other value unchanged."""
        own = {path: effect.before for path, effect in effects.items() if difference.name in effect.changed}
        switches = {path: value for path, value in own.items() if isinstance(value, bool)}
        for switch, on in switches.items():
            for path, value in own.items():
                if path not in switches:
                    yield {switch: not on, path: as_config(difference.wanted, value)}

    def tensor_moves(self, differences: list[Difference]) -> Iterator[Move]:
        """Changes of untold values: a switch is flipped, or a size follows the size of a tensor."""
        yield from self.layer_types_of_tensors()
        sizes = {
            (written, wanted)
            for difference in differences
            if difference.written is not None and difference.wanted is not None
            for written, wanted in zip(difference.written, difference.wanted, strict=False)
            if written != wanted
        }
        for path, value in leaves(self.config).items():
            if path in self.values:
                continue
            if isinstance(value, bool):
                yield {path: not value}
            elif value is None:
                yield from ({path: True}, *({path: wanted} for _, wanted in sizes))
            elif isinstance(value, int):
                yield from (
                    {path: value * wanted // written}
                    for written, wanted in sizes
                    if value * wanted % written == 0 and (value == written or value > 1)
                )

    def layer_types(self, differences: list[Difference]) -> Iterator[Move]:
        """Changes of each list of layer kinds to the list from which the converter writes the file's metadata."""
        from transformers.configuration_utils import ALLOWED_LAYER_TYPES

        for path, value in leaves(self.config).items():
            if not _is_of_kinds(value):
                continue
            kinds = list(dict.fromkeys([*value, *ALLOWED_LAYER_TYPES]))
            told = {}
            for kind in kinds:
                try:
                    config = self.forward.complete({**self.values, path: [kind] * len(value)})
                    told[kind] = self.forward.metadata(config)
                except ForgeError:
                    continue
            chosen = [self.kind_of(layer, len(value), current, told) for layer, current in enumerate(value)]
            if all(kind is not None for kind in chosen) and chosen != value:
                yield {path: chosen}

    def kind_of(self, layer: int, depth: int, current: str, told: Mapping[str, Mapping[str, Any]]) -> str | None:
        """The kind of a layer that gives it the values that the lists of the file have for it."""
        lists = {key: value for key, value in self.wanted.metadata.items() if _is_of_layers(value, depth)}

        def fits(kind: str) -> bool:
            values = {key: told[kind].get(key) for key in lists}
            return all(
                value is None or same(value[layer] if _is_of_layers(value, depth) else value, lists[key][layer])
                for key, value in values.items()
            )

        return next((kind for kind in [current, *told] if kind in told and fits(kind)), None)

    def layer_types_of_tensors(self) -> Iterator[Move]:
        """Changes of each list of layer kinds to the list with which each layer has the file's tensors."""
        from transformers.configuration_utils import ALLOWED_LAYER_TYPES

        for path, value in leaves(self.config).items():
            if not _is_of_kinds(value):
                continue
            told = {}
            for kind in dict.fromkeys([*value, *ALLOWED_LAYER_TYPES]):
                try:
                    told[kind] = self.forward.tensors(self.forward.complete({**self.values, path: [kind] * len(value)}))
                except ForgeError:
                    continue
            chosen = []
            for layer, current in enumerate(value):
                wanted = _of_layer(self.wanted.shapes, layer)
                kinds = [kind for kind in [current, *told] if kind in told and _of_layer(told[kind], layer) == wanted]
                chosen.append(kinds[0] if kinds else current)
            if chosen != value:
                yield {path: chosen}


def _of_layer(shapes: Mapping[str, Shape], layer: int) -> set[str]:
    return {name for name in shapes if name.startswith(f"blk.{layer}.")}


def _is_of_kinds(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _close(left: list[float], right: list[float]) -> bool:
    return len(left) == len(right) and bool(np.allclose(left, right, rtol=_TOLERANCE, atol=0))


def _is_of_layers(value: Any, depth: int) -> bool:
    return isinstance(value, list) and len(value) == depth


def _score(differences: list[Difference]) -> tuple[int, int]:
    extra = sum(difference.is_extra for difference in differences)
    return len(differences) - extra, extra


def _candidates(effect: Effect, difference: Difference) -> Iterator[Any]:
    """Values that may make a difference vanish."""
    value, written, wanted = effect.before, difference.written, difference.wanted
    if isinstance(value, bool):
        yield not value
        return
    if wanted is None:
        yield from (None, False)
        return
    if not isinstance(wanted, int | float) or isinstance(wanted, bool):
        yield wanted
        if value is None:
            yield from (True, False)
        return
    yield as_config(wanted, value)
    numbers = isinstance(value, int | float) and isinstance(written, int | float)
    if numbers and value and written:
        for found in (value * wanted / written, value * written / wanted if wanted else 0.0, value + wanted - written):
            if isinstance(value, float):
                yield from (nice(found), found)
            elif round(found) == found:
                yield int(found)
    if isinstance(value, int):
        yield from _SMALL
