"""Blocks of one kind are measured once, and modules run alone: what is found is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ollama_forge.architectures.certificate.held_norms import norms_sharing
from ollama_forge.architectures.learned import LearnedArchitecture, RoleFound, StoredParameter
from ollama_forge.architectures.model_map import Role
from ollama_forge.architectures.names.counterparts import Counterparts
from ollama_forge.architectures.roles import find
from ollama_forge.architectures.roles.find import find_roles
from tests.made_up import Blurb, D, F, MadeUp, Zed, twin_of


def test_blocks_of_one_kind_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = twin_of(MadeUp(order=(0, 1, 2)))
    measured: list[int] = []
    region_of = find.block_region

    def counted(*args: Any, block: int, **kwargs: Any) -> Any:
        measured.append(block)
        return region_of(*args, block=block, **kwargs)

    monkeypatch.setattr(find, "block_region", counted)
    once = find_roles(twin)
    assert measured == [0]
    monkeypatch.setattr(find, "block_kind", lambda call: call)  # no two are alike
    each = find_roles(twin)
    assert measured == [0, 0, 1, 2]
    assert once == each
    assert {role.block for role in once.roles} == {None, 0, 1, 2}


def test_blocks_that_share_parameters_are_alike_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MadeUp(order=(0, 1))
    model.stones[1].snee = model.stones[0].snee
    twin = twin_of(model)
    once = find_roles(twin)
    monkeypatch.setattr(find, "block_kind", lambda call: call)
    assert once == find_roles(twin)


def test_norms_that_share_a_gain_are_known_in_every_block() -> None:
    first, second, other = Zed(), Zed(), Zed()
    second.ploy = first.ploy
    block = nn.ModuleList([second, other, nn.Linear(D, D)])
    assert norms_sharing([first], block) == [second]


class _Deaf(Blurb):
    """A block of which a setting decides whether it uses its linears."""

    def __init__(self) -> None:
        super().__init__()
        self.deaf = False

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x @ self.alpha) @ self.omega if self.deaf else super().forward(x)


def test_another_setting_makes_another_kind() -> None:
    model = MadeUp(_Deaf)
    model.stones[1].deaf = True
    found = {role.parameter for role in find_roles(twin_of(model)).roles}
    assert {"stones.0.snee.weight", "stones.0.grob.weight", "stones.1.omega"} <= found
    assert not found & {"stones.1.snee.weight", "stones.1.grob.weight"}


class _Vise(nn.Module):
    """A module that is handed its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.kelp, self.rind = nn.Parameter(torch.ones(F, D)), nn.Parameter(torch.ones(F, D))

    def forward(self, x: Tensor, kelp: Tensor, rind: Tensor) -> Tensor:
        return torch.tanh(x @ kelp.T) @ rind


class _Lender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pre, self.vise = Zed(), _Vise()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.vise(self.pre(x), self.vise.kelp.view(F, D), self.vise.rind.view(F, D))


def test_weights_given_as_arguments() -> None:
    found = find_roles(twin_of(MadeUp(_Lender)))
    inside = [(role.parameter, role.writes, role.axis) for role in found.roles if role.block == 0]
    assert inside == [("stones.0.vise.rind", True, 1), ("stones.0.vise.kelp", False, 1)]
    assert found.gaps == ()


class _Towered(MadeUp):
    """Blocks of another width run before those of the stream that the logits are read from."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleList([nn.Sequential(nn.Linear(24, 24), nn.Tanh()) for _ in range(2)])

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        x = self.bloop(input_ids)[..., :24]
        for block in self.tower:
            x = block(x)
        return super().forward(input_ids, **kwargs)


def test_the_stream_is_that_of_the_last_block() -> None:
    found = find_roles(twin_of(_Towered()))
    assert (found.d_model, found.blocks) == (D, ("stones.0", "stones.1"))
    assert [gap.module for gap in found.gaps if gap.about == "stream"] == ["tower.0", "tower.1"]


def test_blocks_are_like_blocks_of_their_own_stack() -> None:
    names = ("left.0.w", "right.0.w")
    roles = tuple(RoleFound(name, name[:-2], True, 0, block=n, role=Role.O) for n, name in enumerate(names))
    stored = tuple(StoredParameter(name, (D, D), ()) for name in names)
    learned = LearnedArchitecture(D, ("left.0", "right.0"), roles, stored, ())
    model = nn.ModuleDict({side: nn.ModuleList([nn.Identity(), nn.Identity()]) for side in ("left", "right")})
    real = [f"{side}.{n}.w" for side in ("left", "right") for n in range(2)]
    found = Counterparts(learned, model, real).found
    assert {name: found[name].twin for name in real} == {name: f"{name.split('.')[0]}.0.w" for name in real}
