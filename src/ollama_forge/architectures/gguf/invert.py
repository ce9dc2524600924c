"""The config from which llama.cpp's converter writes given metadata and tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ollama_forge.architectures.gguf.forward import Forward
from ollama_forge.architectures.gguf.leaves import Path, leaves, value_at
from ollama_forge.architectures.gguf.probe import Effect, probe, same
from ollama_forge.errors import ForgeError

_ROUNDS = 8
_SMALL = range(9)
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_SHARED, _VOCABULARY = ("tie_word_embeddings",), ("vocab_size",)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Wanted:
    """What the converter is to write.

    Attributes:
        metadata: the keys ``ARCH.*`` of the file.
        shapes: names and shapes of the file's tensors, the row length last.
        computed: the values of the vectors that may have been computed from the config, by name.
    """

    metadata: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    computed: Mapping[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """A difference between what the converter writes and what is wanted; None where one of them has nothing."""

    name: str
    written: Any
    wanted: Any

    @property
    def is_extra(self) -> bool:
        """Whether the converter writes a key that the file lacks."""
        return self.wanted is None

    def __str__(self) -> str:
        return f"{self.name} is {_shown(self.written)} instead of {_shown(self.wanted)}"


def _shown(value: Any) -> str:
    return "absent" if value is None else str(value)


class Inversion:
    """Changes the config of one class until the converter writes from it what is wanted.

    Attributes:
        values: the values of the config that are told; the others are the class's own choice.
        config: the complete config.
    """

    def __init__(self, forward: Forward, wanted: Wanted) -> None:
        self.forward, self.wanted = forward, wanted
        self.values: dict[Path, Any] = {}
        self.config = forward.base

    def run(self) -> None:
        """Find the values.

        Raises:
            ForgeError: the class or the converter rejects them.
        """
        self.set_vocabulary()
        self.set_depth()
        self.assign(probe(self.forward, self.config))
        self.correct(self.metadata_differences, self.metadata_moves)

    def set(self, values: Mapping[Path, Any]) -> None:
        self.values.update(values)
        self.config = self.forward.complete(self.values)

    def set_vocabulary(self) -> None:
        """The vocabulary, and whether the head shares the embedding's weights, follow from the tensors."""
        told: dict[Path, Any] = {}
        if _EMBEDDING in self.wanted.shapes:
            told[_VOCABULARY] = self.wanted.shapes[_EMBEDDING][0]
        if _SHARED[0] in self.config:
            told[_SHARED] = _HEAD not in self.wanted.shapes
        self.set(told)

    def set_depth(self) -> None:
        """The number of layers comes first: lists of the config have a value for each."""
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
        """Give each value that a GGUF key equals the file's value of that key."""
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
        """The file's value of what stands for some layers in a list of the metadata, as the config's value does."""
        for key, (before, after) in effect.changed.items():
            wanted = self.wanted.metadata.get(key)
            if not (isinstance(before, list) and isinstance(after, list) and isinstance(wanted, list)):
                continue
            moved = [(old, new) for old, new in zip(before, after, strict=False) if old != new]
            kept = {old for old, new in zip(before, after, strict=False) if old == new}
            if moved and all(same(old, effect.before) and same(new, effect.after) for old, new in moved):
                values = sorted(set(wanted) - kept)
                if len(values) == 1:
                    return as_config(values[0], effect.before)
        return None

    def metadata_differences(self, config: Mapping[str, Any]) -> list[Difference]:
        """Where the metadata differ, those that the file has first."""
        told, wanted = self.forward.metadata(config), self.wanted.metadata
        found = [
            Difference(key, told.get(key), wanted.get(key))
            for key in {**wanted, **told}
            if key not in told or key not in wanted or not same(told[key], wanted[key])
        ]
        return sorted(found, key=lambda difference: difference.is_extra)

    def correct(self, differences: Any, moves: Any) -> None:
        """Change one value after the other, each time the one that leaves the fewest differences."""
        for _ in range(_ROUNDS):
            found = differences(self.config)
            if not found:
                return
            best, best_score = None, _score(found)
            for move in moves(found):
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
                return
            self.set(best)

    def differences(self) -> list[Difference]:
        """What is left."""
        return self.metadata_differences(self.config) + self.tensor_differences(self.config)

    def tensor_differences(self, config: Mapping[str, Any]) -> list[Difference]:
        """Where names and shapes of tensors differ."""
        told, wanted = self.forward.tensors(config), self.wanted.shapes
        names = dict.fromkeys([*wanted, *told])
        return [Difference(n, told.get(n), wanted.get(n)) for n in names if told.get(n) != wanted.get(n)]

    def metadata_moves(self, differences: list[Difference]) -> Iterator[dict[Path, Any]]:
        effects = probe(self.forward, self.config)
        yield from self.layer_types(differences)
        for difference in differences:
            for path, effect in effects.items():
                if difference.name in effect.changed:
                    for value in _candidates(effect, difference):
                        if not difference.is_extra or len(path) == 1:
                            yield {path: value}

    def layer_types(self, differences: list[Difference]) -> Iterator[dict[Path, Any]]:
        """For each list of the kinds of layers: the one from which the lists of the metadata come out."""
        from transformers.configuration_utils import ALLOWED_LAYER_TYPES

        for path, value in leaves(self.config).items():
            if not (isinstance(value, list) and value and all(isinstance(item, str) for item in value)):
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
                yield from (_nice(found), found)
            elif round(found) == found:
                yield int(found)
    if isinstance(value, int):
        yield from _SMALL


def as_config(wanted: Any, like: Any) -> Any:
    """A value of the metadata, as a config writes it: a float by the shortest decimal of its float32."""
    if isinstance(wanted, list):
        return [as_config(item, like[0] if isinstance(like, list) and like else like) for item in wanted]
    if isinstance(wanted, bool) or not isinstance(wanted, int | float):
        return wanted
    if isinstance(wanted, int):
        return float(wanted) if isinstance(like, float) else wanted
    if type(like) is int and wanted == int(wanted):
        return int(wanted)
    return _nice(wanted)


def _nice(number: float) -> float:
    return float(str(np.float32(number)))
