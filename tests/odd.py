"""A made-up model whose parameters are laid out unlike its checkpoint: split, interleaved, squeezed, never called."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ollama_forge.architectures.model_map import Matrix, ModelMap, Norm, Place, Role
from ollama_forge.models.chat_model import ChatModel, LoadSettings

D, WIDTH, VOCABULARY, LENGTH, BLOCKS = 16, 12, 40, 24, 3


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (D,)) * self.gain


class _Held(nn.Module):
    """Parameters that other code uses: the module is never called."""

    def __init__(self, *shape: int, bias: int = 0) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.empty(shape))
        if bias:
            self.shift = nn.Parameter(torch.empty(bias))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = _Norm()
        self.one, self.two, self.three = (nn.Linear(D, D) for _ in range(3))
        self.low, self.high = (nn.Linear(D, D // 2) for _ in range(2))
        self.ways = nn.ModuleList([_Norm(), _Norm()])
        self.both = nn.Linear(D, 2 * WIDTH)
        self.back = _Held(WIDTH, D, bias=D)
        self.convolution = nn.Conv1d(D, D, 1)
        self.constant = _Held(D)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.before(x)
        steps = torch.arange(1, x.shape[1] + 1).unsqueeze(-1)
        mixed = (self.one(seen) * self.two(seen)).tanh() * self.three(seen).cumsum(1) / steps
        mixed = torch.cat([self.low(mixed), self.high(mixed)], dim=-1)
        x = x + self.ways[0](mixed) + self.ways[1](mixed)
        gate, up = self.both(x).unflatten(-1, (WIDTH, 2)).unbind(-1)
        x = x + (gate.sigmoid() * up.tanh()) @ self.back.values + self.back.shift
        return x + self.convolution(seen.transpose(1, 2)).transpose(1, 2) + self.constant.values


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, D)
        self.words_norm = _Norm()
        self.places = _Held(1, LENGTH, D)
        self.blocks = nn.ModuleList([_Block() for _ in range(BLOCKS)])
        self.head = nn.Linear(D, VOCABULARY, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.words_norm(self.words(input_ids)) + self.places.values[0, : input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=self.head(functional.rms_norm(x, (D,))))


def _block_map(layer: int) -> list[Matrix]:
    path = f"blocks.{layer}"

    def norm(name: str) -> Norm:
        return Norm(f"{path}.{name}.gain", None, 0.0, False, f"{path}.{name}", parameter="gain")

    def held(name: str, bias: str | None = None, *, transposed: bool = False) -> tuple[Place, ...]:
        return (Place(f"{path}.{name}", "values", bias, transposed, linear=False),)

    def split(size: int, *names: str) -> tuple[Place, ...]:
        rows = [range(n * size, (n + 1) * size) for n in range(len(names))]
        return tuple(
            Place(f"{path}.{name}", bias="bias", stored_rows=part) for name, part in zip(names, rows, strict=True)
        )

    rows = [(Place(f"{path}.both", bias="bias", rows=range(n, 2 * WIDTH, 2)),) for n in range(2)]
    kernel = (Place(f"{path}.convolution", bias="bias", linear=False),)
    back = held("back", "shift", transposed=True)

    def matrix(name: str, role: Role, shape: tuple[int, ...], places: tuple[Place, ...], **more: Any) -> Matrix:
        bias = f"{path}.{name}_bias" if places[0].bias else None
        return Matrix(f"{path}.{name}", role, layer, shape, places, role in (Role.O, Role.DOWN), bias, **more)

    return [
        matrix("qkv", Role.QKV, (3 * D, D), split(D, "one", "two", "three"), reads=norm("before")),
        matrix("o", Role.O, (D, D), split(D // 2, "low", "high"), post_norms=(norm("ways.0"), norm("ways.1"))),
        matrix("gate", Role.GATE, (WIDTH, D), rows[0]),
        matrix("up", Role.UP, (WIDTH, D), rows[1]),
        matrix("down", Role.DOWN, (D, WIDTH), back),
        matrix("mix", Role.DOWN, (D, D), kernel),
        matrix("vector", Role.DOWN, (D,), held("constant")),
    ]


def model_map() -> ModelMap:
    norm = Norm("words_norm.gain", None, 0.0, False, "words_norm", parameter="gain")
    embeddings = [
        Matrix("words", Role.EMBEDDING, None, (VOCABULARY, D), (Place("words"),), True, post_norms=(norm,)),
        Matrix("positions", Role.POSITION, None, (LENGTH, D), (Place("places", "values", linear=False),), True),
    ]
    matrices = [*embeddings, *(matrix for layer in range(BLOCKS) for matrix in _block_map(layer))]
    head = Matrix("head", Role.UNEMBEDDING, None, (VOCABULARY, D), (Place("head"),), False)
    return ModelMap("odd", D, (*matrices, head), tuple(f"blocks.{n}" for n in range(BLOCKS)), VOCABULARY, tied=False)


def stored_tensors() -> dict[str, Tensor]:
    """A random checkpoint, in its own layout."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    tensors = {name: drawn(D) + 1.0 for name, _ in Odd().named_parameters() if name.endswith("gain")}
    for matrix in model_map().matrices:
        tensors[matrix.tensor] = drawn(*matrix.shape)
        if matrix.bias:
            tensors[matrix.bias] = drawn(matrix.out_features)
    return tensors


def load(tensors: dict[str, Tensor]) -> ChatModel:
    """The model with these weights."""
    model = Odd().eval()
    state = {name: tensors[name] for name in model.state_dict() if name.endswith("gain")}
    state |= {"words.weight": tensors["words"], "head.weight": tensors["head"]}
    state["places.values"] = tensors["positions"].unsqueeze(0)
    for path in (f"blocks.{n}" for n in range(BLOCKS)):
        stored = {
            name.removeprefix(f"{path}."): value for name, value in tensors.items() if name.startswith(f"{path}.")
        }
        block = {
            "both.weight": torch.stack([stored["gate"], stored["up"]], 1).flatten(0, 1),
            "both.bias": torch.stack([stored["gate_bias"], stored["up_bias"]], 1).flatten(),
            "back.values": stored["down"].T,
            "back.shift": stored["down_bias"],
            "convolution.weight": stored["mix"].unsqueeze(-1),
            "convolution.bias": stored["mix_bias"],
            "constant.values": stored["vector"],
        }
        for fused, size, names in (("qkv", D, ("one", "two", "three")), ("o", D // 2, ("low", "high"))):
            for kind in ("weight", "bias"):
                parts = stored[fused if kind == "weight" else f"{fused}_bias"].split(size)
                block |= {f"{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
        state |= {f"{path}.{name}": value for name, value in block.items()}
    model.load_state_dict(state)
    return ChatModel(model, None, model_map(), LoadSettings(device="cpu"))  # type: ignore[arg-type]
