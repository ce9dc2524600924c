"""A report of a run with plausible figures, built of the dataclasses that a run builds it of."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from ollama_forge.architectures.model_map import Role
from ollama_forge.directions.separation import Separation
from ollama_forge.edits.layer_changes import LayerChange
from ollama_forge.evaluation.counts import Counts
from ollama_forge.evaluation.intervals import Estimate
from ollama_forge.evaluation.measure import EXACT, Damage, Measurement
from ollama_forge.evaluation.verify import Check
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.models.machine import Machine
from ollama_forge.pipeline import RunSettings
from ollama_forge.pipeline.report import Report
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.prompts.split import PromptSplit
from ollama_forge.search.candidates import DOCUMENTED_DEFAULT, Candidate, least_squares
from ollama_forge.search.ladder import BaseAnswers, Choice
from ollama_forge.search.probes import LayerProbe
from ollama_forge.search.rule import Compared, Trial
from ollama_forge.text.closed_thought import Moment

LAYERS = 30


@cache
def _split() -> PromptSplit:
    return PromptSettings().load(32)


def classes(total: int, refusal: float, *, deflection: float = 0.0, degenerate: float = 0.0, seed: int = 0) -> Counts:
    """``total`` answers with these shares of classes, in an order drawn with ``seed``."""
    shares = zip("rdx", (refusal, deflection, degenerate), strict=True)
    joined = "".join(round(share * total) * letter for letter, share in shares)
    shuffled = list(joined + "a" * (total - len(joined)))
    random.Random(seed).shuffle(shuffled)
    return Counts("".join(shuffled))


def row(refusal: float, damage: Damage, seed: int, *, over: float = 0.2) -> Measurement:
    """A measurement of a model that refuses a share of harmful requests."""
    return Measurement(
        harmful=classes(151, refusal, deflection=0.02, seed=seed),
        harmless=classes(151, 0.013, seed=seed),
        over_refusal=classes(150, over, seed=seed),
        second_turn=classes(15, refusal * 0.8, seed=seed),
        system_prompt=classes(15, refusal * 0.9, seed=seed),
        general=classes(283, 0.004, degenerate=0.007, seed=seed),
        damage=damage,
    )


def damage(kl: float) -> Damage:
    """The damage of an edit with this answer KL."""
    return Damage(
        Estimate(kl, kl * 0.81, kl * 1.27), kl * 4.4, Estimate(kl * 1.6, kl * 1.1, kl * 2.3), 21.0 + 30 * kl,
        Estimate(0.61, 0.55, 0.68),
    )  # fmt: skip


def trial(candidate: Candidate, refusal: float, kl: float, ended: str = "") -> Trial:
    """A trial; one that was ended early has answers to a part of the prompts, or to none if its KL is large."""
    counts = Counts() if ended.startswith("answer KL") else classes(32 if ended else 101, refusal)
    return Trial(candidate.name, candidate.direction, candidate.settings, counts, 101, kl, 1.7 * kl, (kl,), ended)


def choice(found: bool = True) -> Choice:
    """A choice among the trials of two passes."""
    best = least_squares(20, 2.0)
    trials = (
        trial(least_squares(18, 2.0), 0.14, 0.021),
        trial(best, 0.03, 0.017),
        trial(least_squares(22, 2.0), 0.21, 0.019),
        trial(least_squares(20, 2.5), 0.02, 0.031),
        trial(least_squares(20, 1.5), 0.12, 0.011),
        trial(least_squares(21, 2.0), 0.30, 0.020, "worse than " + best.name),
        trial(DOCUMENTED_DEFAULT, 0.4, 0.19, "answer KL above 0.06"),
    )
    probes = tuple(
        LayerProbe(layer, 2.0, 0.9 / (1 + math.exp((layer - 16) / 1.5)) + 0.004, 0.006 + 0.0012 * (layer - 15))
        for layer in range(15, 28)
    )
    reason = "the best of 7 edits: 3 of 101 are refused, at an answer KL of 0.017"
    base = BaseAnswers(classes(101, 0.95), classes(64, 0.0))
    compared = Compared(trials[0].name, 3, 14, 0.0034, Estimate(-0.004, -0.0062, -0.0018))
    return Choice(best.name, best.direction, best.settings, reason, base, trials, probes, found, compared)


def thinking_choice() -> Choice:
    """A choice with probes of both directions that a thinking model has at each layer."""
    found = choice()
    at_thought = [replace(one, moment=Moment.THOUGHT, refusal=0.9 * one.refusal) for one in found.probes]
    return replace(found, probes=(*found.probes, *at_thought))


def separation(*, thinks: bool = False) -> Separation:
    """A separation that rises over the first half of the layers, and is best at the last position."""
    values = tuple(
        tuple(round((2.0 + place) / (1 + math.exp(4 - layer / 2)), 4) for layer in range(LAYERS)) for place in range(5)
    )
    tokens = ("", "<|im_end|>", "\n", "<|im_start|>", "assistant")
    prompts, at_thought = {"harmful": 64, "harmless": 64}, values[2] if thinks else ()
    return Separation((-5, -4, -3, -2, -1), tuple(range(LAYERS)), tokens, prompts, values, at_thought)


def made(**changes: Any) -> Report:
    """The report of a run on a small chat model; ``changes`` replace its fields."""
    rows = {
        "base": row(0.954, Damage(EXACT, 0.0, EXACT, 21.3), 0, over=0.35),
        "random direction": row(0.947, damage(0.0034), 1, over=0.34),
        "edited": row(0.02, damage(0.0185), 2, over=0.04),
        "GGUF (Q4_K_M)": row(0.026, damage(0.061), 3, over=0.05),
    }
    checks = (
        Check("activations and loss are finite", True, 3.1, None, ""),
        Check("edited matrices and biases are the planned edit, rounded once", True, 0.41, 0.5, ""),
    )
    changes_by_layer = tuple(
        LayerChange(layer, role, round(0.02 + 0.002 * layer + 0.01 * (role is Role.DOWN), 6), 1)
        for layer in range(1, LAYERS - 1)
        for role in (Role.O, Role.DOWN)
    )
    report = Report(
        model="demo",
        name="my-model",
        fingerprint="d3" * 16,
        split=_split(),
        choice=choice(),
        rows=rows,
        noise_floor=damage(0.0011),
        checks=checks,
        seconds={"base": 61.3, "choose": 240.8, "measure": 66.2},
        folder=Path(),
        file_problem="--no-requantize",
        ollama_problem="no Ollama answers",
        certificate={
            "tier": "proven",
            "reasons": [],
            "writers_left": 8e-8,
            "readers_left": 1e-6,
            "unproven_matrices": 0,
            "unproven": {},
            "idle": [],
        },
        separation=separation(),
        changes=changes_by_layer,
        settings=RunSettings("demo", "my-model").described(),
        machine=Machine.here(LoadSettings(device="cpu")),
    )
    return replace(report, **changes)


def evaluation() -> Mapping[str, Any]:
    """The content of a report of ``evaluate``, of two models and a server, whose KLs are not available."""
    content = made().to_json()
    rows = content["measurements"]
    server = {**rows["GGUF (Q4_K_M)"], "damage": dict.fromkeys(rows["edited"]["damage"])}
    interval = {"value": 0.0185, "low": 0.015, "high": 0.0235}
    test = {"prompts": 151, "row_alone": 0, "other_alone": 141, "p": 7.1e-43}
    words = ["fewer refusals than base (3 and 144 of 151): p < 0.0001"]
    counts = classes(24, 0.875)
    preserved = {"refusal": counts.refusal, "total": counts.total, "refusal_rate": _json(counts.refusal_rate)}
    agreement = {"share": interval | {"value": 0.97}, "kappa": interval | {"value": 0.93}}
    return {
        **{key: content[key] for key in ("version", "machine", "noise_floor", "seconds")},
        "schema": 1,
        "kind": "evaluation",
        "base": "demo",
        "prompts": content["prompts"]["report"],
        "lists": content["lists"]["report"],
        "notes": ["only 12 of your harmful lines fall into the report part: it uses the curated lines instead"],
        "candidates": {
            "base": {"kind": "base", "identity": {"fingerprint": "d3" * 16}, "note": ""},
            "other": {"kind": "checkpoint", "identity": {"fingerprint": "e4" * 16}, "note": ""},
            "server": {"kind": "server", "identity": {"model": "other:latest"}, "note": ""},
        },
        "measurements": {"base": rows["base"], "other": rows["edited"], "server": server},
        "differences": [
            {"row": "other", "other": "base", "refusals": test, "answer_kl": interval, "words": words},
            {"row": "server", "other": "base", "refusals": test, "answer_kl": None, "words": words},
        ],
        "missing_controls": {"other": "it lacks some of the base's matrices"},
        "preserve": {"file": "keep.txt", "rows": {"base": preserved, "other": preserved}},
        "judge": {"name": "judge", "rows": {"base": {"rules": preserved, "judge": preserved, "agreement": agreement}}},
        "lm_eval": {"base": {"local": {"acc": {"value": 0.41, "standard_error": 0.02}}}, "server": None},
    }


def _json(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}
